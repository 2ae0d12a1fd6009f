"""Processes, devices, and all collectives of the project.

All collectives are in this module, so that it is clear where ranks wait for each other. A method
marked "Collective:" must be called by every rank, in the same order. With one rank nothing is sent.
"""

import contextlib
import copy
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsr.errors import LostRankError
from qsr.output import warn
from qsr.sync.stopwatch import Stopwatch
from qsr.sync.topology import Topology, WorkerGroups


class RollCall(Protocol):
    """Finds out which ranks are missing after a collective failed."""

    def not_waiting(self) -> list[int]:
        """The ranks that do not wait for the others, as this one does."""

    def gone(self) -> list[int]:
        """The ranks whose process has ended."""


class Communicator:
    """The collectives of a run; measures the time that training waits for averages."""

    def __init__(
        self,
        topology: Topology,
        device: torch.device,
        timeout_seconds: float,
        roll_call: RollCall | None = None,
        *,
        group: dist.ProcessGroup | None = None,
        control: torch.device = torch.device("cpu"),  # noqa: B008  (immutable)
        patience: str = "raise cluster.timeout_seconds",
        parts: WorkerGroups | None = None,
    ) -> None:
        """`timeout_seconds`: timeout of the process group's collectives. With several ranks the
        `group` must exist (None: the default one; see qsr.cluster.group). `control`: the device of
        small messages. `patience`: how a user makes collectives wait longer. `parts`: the groups
        within, if several ranks make one worker."""
        self.topology = topology
        self.device = device
        self.group = group
        self._rank = topology.rank  # in messages, also of `within_worker`
        self._parts = parts
        self._control = control
        self._patience = patience
        self._stopwatch = Stopwatch(device)
        self._timeout_seconds = timeout_seconds
        self._roll_call = roll_call

    def within_worker(self) -> "Communicator":
        """The collectives among the ranks of this rank's worker, where each rank counts as a
        worker; its time is not part of `seconds`."""
        assert self._parts is not None  # several ranks make one worker
        place, other = self.topology, copy.copy(self)
        each = place.ranks_per_worker
        other.topology = Topology(place.part, each, place.local_rank, each)
        other.group, other._parts = self._parts.inside, None
        other._stopwatch = Stopwatch(self.device)
        return other

    def among_shards(self) -> "Communicator":
        """The collectives among all ranks, where each shard counts as a worker."""
        place, other = self.topology, copy.copy(self)
        other.topology = Topology(place.rank, place.ranks, place.local_rank, place.num_shards)
        other._parts = None
        return other

    def sum_(self, tensor: Tensor) -> None:
        """Collective: replace the flat `tensor`, in place, by its sum over the ranks or, if several
        ranks make one worker, by that over the workers; timed."""
        if self.topology.ranks > 1:
            with self._timed():
                if self._parts is None:
                    dist.all_reduce(tensor, group=self.group)
                else:
                    self._parts.begin_sum_(tensor)()

    def begin_sum_(self, tensor: Tensor) -> "PendingSum":
        """Collective: like `sum_`, but do not wait; the later wait is timed. `tensor` must not be
        touched before."""
        wait: Callable[[], object] | None = None
        if self.topology.ranks > 1:
            with self.missing("an average"):
                if self._parts is None:
                    wait = dist.all_reduce(tensor, group=self.group, async_op=True).wait
                else:
                    wait = self._parts.begin_sum_(tensor)
        return PendingSum(tensor, wait, self._timed)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Context for what training waits for: adds to its time; see `missing` for errors."""
        with self._stopwatch.running(), self.missing("an average"):
            yield

    def seconds(self) -> float:
        """Seconds that training has waited for sums so far; see `Stopwatch.seconds`."""
        return self._stopwatch.seconds()

    def total(self, tensor: Tensor) -> Tensor:
        """Collective: the sum of `tensor` over the ranks, as a new tensor; not timed."""
        result = tensor.clone()
        if self.topology.ranks > 1:
            with self.missing("a sum"):
                dist.all_reduce(result, group=self.group)
        return result

    def broadcast_(self, tensor: Tensor) -> None:
        """Collective: replace `tensor`, in place, by that of the first rank."""
        if self.topology.ranks > 1:
            with self.missing("a broadcast"):
                dist.broadcast(tensor, group=self.group, group_src=0)

    def gather_floats(self, values: Sequence[float]) -> list[list[float]]:
        """Collective: the `values` of every rank, in rank order; each has the same number."""
        own = torch.tensor(values, dtype=torch.float64, device=self._control)
        if self.topology.ranks == 1:
            return [own.tolist()]
        everyone = [torch.empty_like(own) for _ in range(self.topology.ranks)]
        with self.missing("a comparison"):
            dist.all_gather(everyone, own, group=self.group)
        return [row.tolist() for row in everyone]

    def gather_texts(self, text: str) -> list[str]:
        """Collective: the `text` of every rank, in rank order."""
        data = list(text.encode(errors="surrogateescape"))
        own = torch.tensor(data, dtype=torch.uint8, device=self._control)
        sizes = [int(row[0]) for row in self.gather_floats([len(own)])]
        if self.topology.ranks == 1 or max(sizes) == 0:
            return [text] * len(sizes)
        padded = nn.functional.pad(own, (0, max(sizes) - len(own)))
        everyone = [torch.empty_like(padded) for _ in sizes]
        with self.missing("a comparison"):
            dist.all_gather(everyone, padded, group=self.group)
        return [
            bytes(row[:size].tolist()).decode(errors="surrogateescape")  # paths may be any bytes
            for row, size in zip(everyone, sizes, strict=True)
        ]

    def first_difference(self, record: Mapping[str, Any]) -> "Difference | None":
        """Collective: the first rank whose `record` (JSON values) differs from rank 0's; None if
        all are equal."""
        main, *others = map(json.loads, self.gather_texts(json.dumps(record)))
        for rank, other in enumerate(others, start=1):
            changed = [
                f"{name}: {main.get(name)} -> {other.get(name)}"
                for name in {**main, **other}
                if main.get(name) != other.get(name)
            ]
            if changed:
                return Difference(rank, "; ".join(changed))
        return None

    def try_on_all(self, action: Callable[[], object]) -> None:
        """Collective: call `action`. If it raises OSError on any rank, every rank raises the error
        of the first such rank, with its number."""
        problem = ""
        try:
            action()
        except OSError as error:
            problem = f"rank {self.topology.rank}: {error}"
        reason = first_text(self.gather_texts(problem))
        if reason:
            raise OSError(reason)

    def warn(self, line: str) -> None:
        """Write a line for the user to stderr, on rank 0 only."""
        if self.topology.is_main:
            warn(line)

    def any(self, flag: bool) -> bool:
        """Collective: whether `flag` holds on any rank."""
        return any(row[0] for row in self.gather_floats([float(flag)]))

    def begin_sum(self, values: Sequence[float]) -> "PendingSum":
        """Collective: sum `values` (the same number on each rank) over the ranks; do not wait."""
        own, wait = torch.tensor(values, dtype=torch.float64, device=self._control), None
        if self.topology.ranks > 1:
            with self.missing("an agreement"):
                wait = dist.all_reduce(own, group=self.group, async_op=True).wait
        return PendingSum(own, wait, partial(self.missing, "an agreement"))

    def barrier(self) -> None:
        """Collective: wait for all ranks."""
        self.any(False)

    @contextlib.contextmanager
    def missing(self, collective: str) -> Iterator[None]:
        """Context for `collective`: if it fails because of other ranks, raise LostRankError, which
        names the ranks that do not respond."""
        started = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if not _is_of_the_network(error):
                raise
            waited = time.monotonic() - started
            raise LostRankError(self._describe(collective, waited, error)) from error

    def _describe(self, collective: str, waited: float, error: RuntimeError) -> str:
        during = f"rank {self._rank} was waiting for {collective}"
        if waited < 0.9 * self._timeout_seconds:
            gone = self._roll_call.gone() if self._roll_call is not None else []
            if gone:
                return f"{_ranks(gone)} gone: {during} when the connection closed"
            return f"{during} when the network failed; all ranks are running ({error})"
        absent = self._roll_call.not_waiting() if self._roll_call is not None else []
        if absent:
            return (
                f"{_ranks(absent)} not responding: {during} for {waited:.0f} s; if it is only "
                f"slow, {self._patience}"
            )
        return (
            f"{during} for {waited:.0f} s, and so were all other ranks: check the network; if it "
            f"is only slow, {self._patience}"
        )


class Difference(NamedTuple):
    """How a rank differs from rank 0."""

    rank: int
    what: str
    """What differs, as "name: value on rank 0 -> value on this rank"."""


@dataclass(frozen=True)
class PendingSum:
    """A sum over the ranks in progress."""

    _sum: Tensor
    _wait: Callable[[], object] | None
    _waiting: Callable[[], contextlib.AbstractContextManager[None]]

    def wait(self) -> Tensor:
        """Collective: wait for the sum and return it. With NCCL the device waits, not the host."""
        if self._wait is not None:
            with self._waiting():
                self._wait()
        return self._sum


def first_text(texts: Iterable[str]) -> str | None:
    """The first text that is not empty, if any."""
    return next(filter(None, texts), None)


def _is_of_the_network(error: RuntimeError) -> bool:
    """Whether a collective failed because of other ranks. gloo has no error type for it."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "pair closure" in text


def _ranks(numbers: Sequence[int]) -> str:
    """ "rank 1 is" or "ranks 1, 2 are"."""
    listed = ", ".join(map(str, numbers))
    return f"rank {listed} is" if len(numbers) == 1 else f"ranks {listed} are"
