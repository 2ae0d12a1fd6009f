"""Processes, devices, and every collective of the project.

All collectives stand here, so that it is plain where ranks wait for each other. A method marked
"collective" must be called by every rank, in the same order. With one rank nothing is sent.
"""

import contextlib
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


class RollCall(Protocol):
    """Knows which ranks are missing when the network between them has failed."""

    def not_waiting(self) -> list[int]:
        """The ranks that are not waiting for the others, as this one is."""

    def gone(self) -> list[int]:
        """The ranks whose process is gone."""


class Communicator:
    """The collectives of a run, and the time that training's own averages took."""

    def __init__(
        self,
        topology: Topology,
        device: torch.device,
        timeout_seconds: float,
        roll_call: RollCall | None = None,
    ) -> None:
        """`timeout_seconds`: how long the process group waits in a collective. With several ranks
        the default process group must exist (see qsr.cluster.group)."""
        self.topology = topology
        self.device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._timeout_seconds = timeout_seconds
        self._roll_call = roll_call

    def sum_(self, tensor: Tensor) -> None:
        """Collective: replace `tensor`, in place, by its sum over the ranks; timed."""
        if self.topology.ranks > 1:
            with self._timed():
                dist.all_reduce(tensor)

    def begin_sum_(self, tensor: Tensor) -> "PendingSum":
        """Collective: as `sum_`, without waiting for it; what is waited later is timed. Until then
        `tensor` must not be touched."""
        work = None
        if self.topology.ranks > 1:
            with self.missing("an average"):
                work = dist.all_reduce(tensor, async_op=True)
        return PendingSum(tensor, work, self._timed)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Around what training waits for: counts its time, and names who is missing."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            with self.missing("an average"):
                yield
            end.record()
            self._events.append((start, end))
        else:
            started = time.perf_counter()
            with self.missing("an average"):
                yield
            self._seconds += time.perf_counter() - started

    def seconds(self) -> float:
        """Time that training waited for sums so far. Waits for the GPU; call it where the host
        waits anyway."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000.0
        self._events.clear()
        return self._seconds

    def total(self, tensor: Tensor) -> Tensor:
        """Collective: the sum of `tensor` over the ranks, as a new tensor; not timed."""
        result = tensor.clone()
        if self.topology.ranks > 1:
            with self.missing("a sum"):
                dist.all_reduce(result)
        return result

    def gather_floats(self, values: Sequence[float]) -> list[list[float]]:
        """Collective: every rank's `values` (equally many), in the order of the ranks."""
        own = torch.tensor(values, dtype=torch.float64)
        if self.topology.ranks == 1:
            return [own.tolist()]
        everyone = [torch.empty_like(own) for _ in range(self.topology.ranks)]
        with self.missing("a comparison"):
            dist.all_gather(everyone, own)
        return [row.tolist() for row in everyone]

    def gather_texts(self, text: str) -> list[str]:
        """Collective: every rank's `text`, in the order of the ranks."""
        own = torch.tensor(list(text.encode(errors="surrogateescape")), dtype=torch.uint8)
        sizes = [int(row[0]) for row in self.gather_floats([len(own)])]
        if self.topology.ranks == 1 or max(sizes) == 0:
            return [text] * len(sizes)
        padded = nn.functional.pad(own, (0, max(sizes) - len(own)))
        everyone = [torch.empty_like(padded) for _ in sizes]
        with self.missing("a comparison"):
            dist.all_gather(everyone, padded)
        return [
            bytes(row[:size].tolist()).decode(errors="surrogateescape")  # paths may be any bytes
            for row, size in zip(everyone, sizes, strict=True)
        ]

    def first_difference(self, record: Mapping[str, Any]) -> "Difference | None":
        """Collective: the first rank whose `record`, of what JSON holds, is not rank 0's; None if
        all are the same."""
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
        """Collective: do `action`. Where it raises OSError on any rank, every rank raises one: that
        of the first of them, with its number."""
        problem = ""
        try:
            action()
        except OSError as error:
            problem = f"rank {self.topology.rank}: {error}"
        reason = first_text(self.gather_texts(problem))
        if reason:
            raise OSError(reason)

    def say(self, line: str) -> None:
        """Tell the user something beside the metrics, on stderr; rank 0 alone speaks."""
        if self.topology.is_main:
            warn(line)

    def any(self, flag: bool) -> bool:
        """Collective: whether `flag` holds on any rank."""
        return any(row[0] for row in self.gather_floats([float(flag)]))

    def begin_sum(self, values: Sequence[float]) -> "PendingSum":
        """Collective: add up `values` (equally many) over the ranks, without waiting for it."""
        own, work = torch.tensor(values, dtype=torch.float64), None
        if self.topology.ranks > 1:
            with self.missing("a question"):
                work = dist.all_reduce(own, async_op=True)
        return PendingSum(own, work, partial(self.missing, "a question"))

    def barrier(self) -> None:
        """Collective: wait until every rank is here."""
        self.any(False)

    @contextlib.contextmanager
    def missing(self, collective: str) -> Iterator[None]:
        """Around `collective`: if it fails because of other ranks, raises LostRankError, which
        names those that do not answer."""
        started = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if not _is_of_the_network(error):
                raise
            waited = time.monotonic() - started
            raise LostRankError(self._describe(collective, waited, error)) from error

    def _describe(self, collective: str, waited: float, error: RuntimeError) -> str:
        during = f"rank {self.topology.rank} was in {collective}"
        if waited < 0.9 * self._timeout_seconds:
            gone = self._roll_call.gone() if self._roll_call is not None else []
            if gone:
                return f"{_ranks(gone)} gone: {during} when the connection was closed"
            return f"{during} when the network failed, and all ranks are there ({error})"
        absent = self._roll_call.not_waiting() if self._roll_call is not None else []
        if absent:
            return (
                f"{_ranks(absent)} not there: {during} for {waited:.0f} s "
                f"(cluster.timeout_seconds); it hangs, or is slower than that"
            )
        return f"{during} for {waited:.0f} s, and so were all ranks: is the network that slow?"


class Difference(NamedTuple):
    """Of a rank from rank 0."""

    rank: int
    what: str
    """What differs, as "name: of rank 0 -> of this rank"."""


@dataclass(frozen=True)
class PendingSum:
    """A sum over the ranks that is on its way."""

    _sum: Tensor
    _work: dist.Work | None
    _waiting: Callable[[], contextlib.AbstractContextManager[None]]

    def wait(self) -> Tensor:
        """Collective: the sum. With NCCL the device waits for it, not the host."""
        if self._work is not None:
            with self._waiting():
                self._work.wait()
        return self._sum


def first_text(texts: Iterable[str]) -> str | None:
    """The first that is not empty."""
    return next(filter(None, texts), None)


def _is_of_the_network(error: RuntimeError) -> bool:
    """Whether a collective failed for want of other ranks. gloo has no type of its own for it."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "pair closure" in text


def _ranks(numbers: Sequence[int]) -> str:
    """As the subject of a sentence, with its verb."""
    listed = ", ".join(map(str, numbers))
    return f"rank {listed} is" if len(numbers) == 1 else f"ranks {listed} are"
