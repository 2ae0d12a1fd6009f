"""Which process is which part of the run, and the process groups within it."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Topology:
    """Place of this process: `rank` of `ranks`, with `workers` of the run's K workers."""

    rank: int
    ranks: int
    local_rank: int
    """Index of this rank on its machine."""
    num_workers: int
    """Number of workers of the run, K."""
    ranks_per_worker: int = 1
    """Consecutive ranks that make one worker. With 1, a rank holds one worker or several."""

    @property
    def workers(self) -> range:
        """The workers of this rank: consecutive, the same number on each rank; or the one that it
        is a part of."""
        if self.ranks_per_worker > 1:
            own = self.rank // self.ranks_per_worker
            return range(own, own + 1)
        each = self.num_workers // self.ranks
        return range(self.rank * each, (self.rank + 1) * each)

    @property
    def part(self) -> int:
        """Index of this rank within its worker; 0 unless several ranks make one worker."""
        return self.rank % self.ranks_per_worker

    @property
    def num_shards(self) -> int:
        """Parts that the samples of a step are divided in."""
        return self.num_workers * self.ranks_per_worker

    @property
    def shards(self) -> range:
        """The shards of this rank: one for each of its workers, or for its part of one."""
        each = self.num_shards // self.ranks
        return range(self.rank * each, (self.rank + 1) * each)

    @property
    def is_main(self) -> bool:
        """True on the rank that writes logs."""
        return self.rank == 0


@dataclass(frozen=True)
class WorkerGroups:
    """The process groups of a run whose workers are made of several ranks each."""

    inside: dist.ProcessGroup
    """The ranks of this rank's worker."""
    across: dist.ProcessGroup
    """The ranks that are the same part of the other workers, and this one."""
    part: int
    """Index of this rank in `inside`."""

    @classmethod
    def make(cls, topology: Topology, timeout: timedelta) -> "WorkerGroups | None":
        """Collective: make the groups; None if each worker is on one rank. The default process
        group must exist."""
        each = topology.ranks_per_worker
        if each == 1:
            return None
        workers = [list(range(i, i + each)) for i in range(0, topology.ranks, each)]
        parts = [list(range(i, topology.ranks, each)) for i in range(each)]
        inside, _ = dist.new_subgroups_by_enumeration(workers, timeout)
        across, _ = dist.new_subgroups_by_enumeration(parts, timeout)
        assert isinstance(inside, dist.ProcessGroup)  # this rank is a member
        assert isinstance(across, dist.ProcessGroup)
        return cls(inside, across, topology.part)

    def begin_sum_(self, tensor: Tensor) -> Callable[[], None]:
        """Collective: sum a flat tensor, which is the same on all ranks of a worker, in place over
        the workers; the function that is returned, also collective, waits for it.

        Each rank sums its part of the tensor with the ranks of the same part of the other workers;
        then the ranks of a worker exchange their parts. So the tensor crosses the links between
        workers only once, however many ranks a worker has, and all of them carry a part of it.
        """
        parts = self.inside.size()
        size = len(tensor) // parts
        whole, rest = tensor[: parts * size], tensor[parts * size :]
        own = whole[self.part * size : (self.part + 1) * size]
        # fewer elements than parts are left over: too few to divide
        works = [
            dist.all_reduce(piece, group=self.across, async_op=True)
            for piece in (own, rest)
            if len(piece)
        ]

        def wait() -> None:
            for work in works:
                work.wait()
            if size:
                dist.all_gather_into_tensor(whole, own.clone(), group=self.inside)

        return wait
