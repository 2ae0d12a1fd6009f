"""How this process becomes a rank: its place, its device and the process group."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from qsr.cluster.memory import keep_freed_memory
from qsr.cluster.place import find_place
from qsr.cluster.rendezvous import meet
from qsr.cluster.rollcall import RollCall
from qsr.config.schema import ClusterConfig, Config
from qsr.errors import ClusterError
from qsr.sync.communicator import Communicator
from qsr.sync.topology import Topology, WorkerGroups

_roll_call: RollCall | None = None
"""The roll call of the current process group."""

_parts: WorkerGroups | None = None
"""The groups within the current process group, if several ranks make one worker."""

_store: Store | None = None
"""The rendezvous store, kept for the life of the process because it may hold the port."""


def topology(cluster: ClusterConfig, num_workers: int, ranks_per_worker: int = 1) -> Topology:
    """The ranks and workers as given by the launcher; without one, a single rank with all workers.

    Raises ClusterError if the launched ranks do not suit the workers.
    """
    place = find_place()
    ranks = place.ranks
    if cluster.ranks not in (None, ranks):
        raise ClusterError(
            f"cluster.ranks={cluster.ranks}, but {ranks} ranks were launched: launch "
            f"{cluster.ranks} ranks, or leave cluster.ranks unset"
        )
    if ranks_per_worker > 1 and ranks != num_workers * ranks_per_worker:
        wanted = num_workers * ranks_per_worker
        raise ClusterError(
            f"{ranks} ranks were launched, but workers={num_workers} x ranks_per_worker="
            f"{ranks_per_worker} needs {wanted}: launch {wanted} ranks"
        )
    if ranks_per_worker == 1 and num_workers % ranks:
        raise ClusterError(
            f"{ranks} ranks were launched, which do not divide workers={num_workers} evenly: "
            f"launch a divisor of {num_workers}"
        )
    return Topology(place.rank, ranks, place.local_rank, num_workers, ranks_per_worker)


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device of this rank. Raises ClusterError if the GPU does not exist.

    Works if each rank sees all GPUs, and if CUDA_VISIBLE_DEVICES shows each rank only one.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 0:
        raise ClusterError("cluster.device=cuda, but torch sees no GPU; use cluster.device=cpu")
    if visible > 1 and local_rank >= visible:
        raise ClusterError(
            f"local rank {local_rank} has no GPU: this machine shows only {visible}; start at most "
            f"{visible} ranks on it"
        )
    return torch.device("cuda", local_rank if visible > 1 else 0)


def join(config: Config, name: str = "group") -> Communicator:
    """Collective: choose this rank's place, device and number of threads, and join the process
    group `name`. Errors of the launch raise ClusterError before a process group exists."""
    place = topology(config.cluster, config.workers, config.ranks_per_worker)
    device = choose_device(config.cluster.device, place.local_rank)
    if device.type == "cpu":
        if config.cuda_graphs:
            raise ClusterError("cuda_graphs=true, but torch sees no GPU; use cuda_graphs=false")
        keep_freed_memory()
    else:  # what names no device means this one, as the seeding of generators
        torch.cuda.set_device(device)
    torch.set_num_threads(config.cluster.threads_per_rank or find_place().cores)
    return join_process_group(place, device, config.cluster.timeout_seconds, name)


def join_process_group(
    topology: Topology, device: torch.device, timeout_seconds: float, name: str = "group"
) -> Communicator:
    """Collective: join the process group, if there are several ranks and this process is not in one
    yet. Leave it with `leave_process_group`; the next group of the same processes needs another
    `name`.

    Raises ClusterError if the ranks do not find each other within `timeout_seconds`.
    """
    if topology.ranks > 1 and not dist.is_initialized():
        _join(topology, device, timeout_seconds, name)
    return Communicator(topology, device, timeout_seconds, _roll_call, parts=_parts)


def leave_process_group() -> None:
    """Leave the process group, if there is one. Not collective: safe while other ranks fail."""
    global _parts, _roll_call
    _parts = None
    if _roll_call is not None:
        _roll_call.close()
        _roll_call = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(topology: Topology, device: torch.device, timeout_seconds: float, name: str) -> None:
    global _parts, _roll_call, _store
    # gloo in addition to NCCL, so that barriers and flags on the host never wait for the GPU queue
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout, task = timedelta(seconds=timeout_seconds), find_place().slurm
    try:
        if _store is None and task is not None:
            _store = meet(task, timeout_seconds)
        elif _store is None:  # torchrun passes the rendezvous address in environment variables
            found, _, _ = next(iter(rendezvous("env://", timeout=timeout)))
            # torchrun's store survives restarts of the ranks, so each attempt gets its own prefix
            _store = PrefixStore(find_place().attempt, found)
        # the store still has an earlier group's addresses and roll calls: use a prefix per group
        store = PrefixStore(name, _store)
        dist.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=topology.rank,
            world_size=topology.ranks,
            timeout=timeout,
        )
        _parts = WorkerGroups.make(topology, timeout)
    except (OSError, dist.DistError) as error:
        text = str(error).partition("\n")[0]
        if isinstance(error, dist.DistError):  # in torch's words
            text = (
                f"see whether all have started, and name the network between their machines: "
                f"cluster.network_interface, or NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME ({text})"
            )
        raise ClusterError(
            f"the {topology.ranks} ranks could not connect to each other: {text}"
        ) from None
    _roll_call = RollCall(store, topology.rank, topology.ranks)
