"""Processes, devices, and every collective of the project.

All collectives stand here, so that it is plain where ranks wait for each other. A method marked
"collective" must be called by every rank, in the same order. With one rank nothing is sent.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from qsr.config.schema import ClusterConfig


class ClusterError(Exception):
    """One line: what of the machines does not fit the run, and the mend."""


@dataclass(frozen=True)
class Topology:
    """Where this process stands: `rank` of `ranks`, holding `workers` of the run's K."""

    rank: int
    ranks: int
    local_rank: int
    """Number of this rank on its machine."""
    num_workers: int
    """K."""

    @property
    def workers(self) -> range:
        """The workers of this rank: consecutive, equally many on each."""
        each = self.num_workers // self.ranks
        return range(self.rank * each, (self.rank + 1) * each)

    @property
    def is_main(self) -> bool:
        """True on the rank that writes logs."""
        return self.rank == 0


def launched() -> bool:
    """Whether a launcher (torchrun, or ours) started this process as one rank of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def topology(cluster: ClusterConfig, num_workers: int) -> Topology:
    """From the launcher's environment variables; without them, one rank holding every worker.

    Raises ClusterError if the launched ranks cannot share the workers.
    """
    ranks = int(os.environ["WORLD_SIZE"]) if launched() else 1
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
    return Topology(
        rank=int(os.environ["RANK"]) if launched() else 0,
        ranks=ranks,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        num_workers=num_workers,
    )


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


class Communicator:
    """The collectives of a run, and the time that training's own averages took."""

    def __init__(self, topology: Topology, device: torch.device, timeout_seconds: float) -> None:
        """Collective: joins the process group, if there are several ranks and no run before this
        one in the same process has done so. `leave_process_group` ends it."""
        self.topology = topology
        self.device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        if topology.ranks > 1 and not dist.is_initialized():
            # gloo beside NCCL: barriers and flags of the host never wait for the GPU's queue
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))

    def sum_(self, tensor: Tensor) -> None:
        """Collective: replace `tensor`, in place, by its sum over the ranks; timed."""
        if self.topology.ranks == 1:
            return
        if tensor.is_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            dist.all_reduce(tensor)
            end.record()
            self._events.append((start, end))
        else:
            started = time.perf_counter()
            dist.all_reduce(tensor)
            self._seconds += time.perf_counter() - started

    def seconds(self) -> float:
        """Time spent in `sum_` so far. Waits for the GPU; call it where the host waits anyway."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000.0
        self._events.clear()
        return self._seconds

    def total(self, tensor: Tensor) -> Tensor:
        """Collective: the sum of `tensor` over the ranks, as a new tensor; not timed."""
        result = tensor.clone()
        if self.topology.ranks > 1:
            dist.all_reduce(result)
        return result

    def gather_floats(self, values: Sequence[float]) -> list[list[float]]:
        """Collective: every rank's `values` (equally many), in the order of the ranks."""
        own = torch.tensor(values, dtype=torch.float64)
        if self.topology.ranks == 1:
            return [own.tolist()]
        everyone = [torch.empty_like(own) for _ in range(self.topology.ranks)]
        dist.all_gather(everyone, own)
        return [row.tolist() for row in everyone]

    def any(self, flag: bool) -> bool:
        """Collective: whether `flag` holds on any rank."""
        return any(row[0] for row in self.gather_floats([float(flag)]))

    def begin_any(self, flag: bool) -> "PendingAny":
        """Collective: ask whether `flag` holds on any rank, without waiting for the answer."""
        own = torch.tensor([float(flag)])
        if self.topology.ranks == 1:
            return PendingAny(own, None)
        return PendingAny(own, dist.all_reduce(own, async_op=True))

    def barrier(self) -> None:
        """Collective: wait until every rank is here."""
        self.any(False)


@dataclass(frozen=True)
class PendingAny:
    """A question to all ranks whose answer is on its way."""

    _sum: Tensor
    _work: dist.Work | None

    def wait(self) -> bool:
        """Collective: whether the flag held on any rank."""
        if self._work is not None:
            self._work.wait()
        return bool(self._sum.item() > 0.0)


def leave_process_group() -> None:
    """Leave the process group, if there is one. Not collective: safe while other ranks fail."""
    if dist.is_initialized():
        dist.destroy_process_group()
