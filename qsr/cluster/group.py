"""How this process becomes a rank: its place, its device, and the process group of all ranks."""

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
from qsr.sync.communicator import Communicator, Topology

_roll_call: RollCall | None = None
"""Of the process group."""

_store: Store | None = None
"""Where the ranks meet: one for the life of the process, because its port may be held by it."""


def topology(cluster: ClusterConfig, num_workers: int) -> Topology:
    """From what the launcher told; without one, one rank holding every worker.

    Raises ClusterError if the launched ranks cannot share the workers.
    """
    place = find_place()
    ranks = place.ranks
    if cluster.ranks not in (None, ranks):
        raise ClusterError(
            f"cluster.ranks={cluster.ranks}, but {ranks} were launched: launch as many, or leave "
            f"cluster.ranks out"
        )
    if num_workers % ranks:
        raise ClusterError(
            f"{ranks} ranks were launched; they must divide workers={num_workers}, because each "
            f"holds workers / ranks of them"
        )
    return Topology(place.rank, ranks, place.local_rank, num_workers)


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device of this rank. Raises ClusterError if there is no such GPU.

    Works whether the launcher shows each rank all GPUs or, through CUDA_VISIBLE_DEVICES, one.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 0:
        raise ClusterError("cluster.device=cuda, but torch sees no GPU; use cluster.device=cpu")
    if visible > 1 and local_rank >= visible:
        raise ClusterError(
            f"local rank {local_rank} has no GPU: the machine shows {visible}; start at most "
            f"{visible} ranks on it"
        )
    return torch.device("cuda", local_rank if visible > 1 else 0)


def join(config: Config, name: str = "group") -> Communicator:
    """Collective: find this rank's place, device and threads, and join the others, in the process
    group of this name. Raises ClusterError before a process group exists."""
    place = topology(config.cluster, config.workers)
    device = choose_device(config.cluster.device, place.local_rank)
    if device.type == "cpu":
        keep_freed_memory()
    torch.set_num_threads(config.cluster.threads_per_rank or find_place().cores)
    return join_process_group(place, device, config.cluster.timeout_seconds, name)


def join_process_group(
    topology: Topology, device: torch.device, timeout_seconds: float, name: str = "group"
) -> Communicator:
    """Collective: join the process group, if there are several ranks and this process is in none.
    `leave_process_group` ends it; the next one of the same processes needs another `name`.

    Raises ClusterError if the ranks do not find each other within `timeout_seconds`.
    """
    if topology.ranks > 1 and not dist.is_initialized():
        _join(topology, device, timeout_seconds, name)
    return Communicator(topology, device, timeout_seconds, _roll_call)


def leave_process_group() -> None:
    """Leave the process group, if there is one. Not collective: safe while other ranks fail."""
    global _roll_call
    if _roll_call is not None:
        _roll_call.close()
        _roll_call = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(topology: Topology, device: torch.device, timeout_seconds: float, name: str) -> None:
    global _roll_call, _store
    # gloo beside NCCL: barriers and flags of the host never wait for the GPU's queue
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout, task = timedelta(seconds=timeout_seconds), find_place().slurm
    try:
        if _store is None and task is not None:
            _store = meet(task, timeout_seconds)
        elif _store is None:  # torchrun tells by environment variables where to meet
            found, _, _ = next(iter(rendezvous("env://", timeout=timeout)))
            # torchrun's own store outlives the ranks that it starts again
            _store = PrefixStore(find_place().attempt, found)
        # an earlier group's addresses, and who was missed there, are still in the store
        store = PrefixStore(name, _store)
        dist.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=topology.rank,
            world_size=topology.ranks,
            timeout=timeout,
        )
    except (OSError, dist.DistError) as error:
        first_line = str(error).partition("\n")[0]
        text = f"the {topology.ranks} ranks did not come together: {first_line}"
        raise ClusterError(text) from None
    _roll_call = RollCall(store, topology.rank, topology.ranks)
