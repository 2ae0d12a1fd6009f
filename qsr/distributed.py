"""Processes, devices, and every collective of the project.

All collectives stand here, so that it is plain where ranks wait for each other. A method marked
"collective" must be called by every rank, in the same order. With one rank nothing is sent.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from qsr.config.schema import ClusterConfig
from qsr.output import warn
from qsr.place import find_place
from qsr.rendezvous import meet
from qsr.rollcall import RollCall
from qsr.slurm import ClusterError as ClusterError


class LostRankError(RuntimeError):
    """One line: which ranks do not answer, and what the others waited for."""


_roll_call: RollCall | None = None
"""Of the process group."""

_store: Store | None = None
"""Where the ranks meet: one for the life of the process, because its port may be held by it."""


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


class Communicator:
    """The collectives of a run, and the time that training's own averages took."""

    def __init__(
        self,
        topology: Topology,
        device: torch.device,
        timeout_seconds: float,
        name: str = "group",
    ) -> None:
        """Collective: joins the process group, if there are several ranks and this process is in
        none. `leave_process_group` ends it; the next one of the same processes needs another
        `name`."""
        self.topology = topology
        self.device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._timeout_seconds = timeout_seconds
        if topology.ranks > 1 and not dist.is_initialized():
            _join_group(topology, device, timeout_seconds, name)

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
            gone = _roll_call.gone() if _roll_call is not None else []
            if gone:
                return f"{_ranks(gone)} gone: {during} when the connection was closed"
            return f"{during} when the network failed, and all ranks are there ({error})"
        absent = _roll_call.not_waiting() if _roll_call is not None else []
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


def leave_process_group() -> None:
    """Leave the process group, if there is one. Not collective: safe while other ranks fail."""
    global _roll_call
    if _roll_call is not None:
        _roll_call.close()
        _roll_call = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _join_group(
    topology: Topology, device: torch.device, timeout_seconds: float, name: str
) -> None:
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


def _is_of_the_network(error: RuntimeError) -> bool:
    """Whether a collective failed for want of other ranks. gloo has no type of its own for it."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "pair closure" in text


def _ranks(numbers: Sequence[int]) -> str:
    """As the subject of a sentence, with its verb."""
    listed = ", ".join(map(str, numbers))
    return f"rank {listed} is" if len(numbers) == 1 else f"ranks {listed} are"
