"""What a run costs: seconds of computing and of all-reduces, bytes, GPU hours.

The model: every step takes the same computing time. Every average is one all-reduce of the same
size, before which ranks may wait for the slowest one. Data parallel training may overlap part of
its all-reduces with the backward pass. Evaluations, checkpoints and data loading are left out.
docs/planning.md discusses the model.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from qsr.core.plan import Plan

BACKWARD_SHARE = 2 / 3
"""Share of the backward pass in a step's computing: it has two matrix products for each one of the
forward pass."""


class AllReduce(Protocol):
    """How long an all-reduce takes among the ranks of a run."""

    @property
    def ranks(self) -> int:
        """Number of processes."""

    @property
    def machines(self) -> int:
        """Number of machines that the processes run on."""

    def seconds(self, num_bytes: float) -> float:
        """Time of one all-reduce of `num_bytes`; 0 for one rank."""


@dataclass(frozen=True)
class Link:
    """All-reduce times from bandwidth and latency.

    2 ceil(log2 ranks) latency + 2 (ranks - 1) / ranks bytes / bandwidth. The bandwidth term is that
    of a ring, which crosses the link of each machine once per direction, however many ranks the
    machine has. The latency term is that of a tree (reduce, then broadcast), which NCCL uses where
    latency dominates.
    """

    ranks: int
    machines: int
    bytes_per_second: float
    """Bandwidth of a machine's link, per direction; for one machine, that between its ranks."""
    latency_seconds: float
    """Latency of one message."""

    def seconds(self, num_bytes: float) -> float:
        latency = _latencies(self.ranks) * self.latency_seconds
        return latency + ring_bytes(self.ranks, num_bytes) / self.bytes_per_second


@dataclass(frozen=True)
class MeasuredAllReduce:
    """All-reduce times from measurements at some sizes, in rising order: linear interpolation
    between them, the time of the smallest below them, the bandwidth of the largest above them."""

    ranks: int
    machines: int
    measured_bytes: tuple[int, ...]
    measured_seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        sizes = self.measured_bytes
        if len(sizes) != len(self.measured_seconds) or list(sizes) != sorted(set(sizes)):
            raise ValueError("measured all-reduces need rising sizes, and a time for each")

    def seconds(self, num_bytes: float) -> float:
        sizes, times = self.measured_bytes, self.measured_seconds
        if self.ranks == 1:
            return 0.0
        if num_bytes <= sizes[0]:
            return times[0]
        if num_bytes >= sizes[-1]:
            return times[-1] * num_bytes / sizes[-1]
        right = bisect_left(sizes, num_bytes)
        share = (num_bytes - sizes[right - 1]) / (sizes[right] - sizes[right - 1])
        return times[right - 1] + share * (times[right] - times[right - 1])


@dataclass(frozen=True)
class AverageOfParts:
    """Averages of workers that are made of several ranks each: every rank averages its part with
    the ranks of the same part of the other workers; then the ranks of a worker gather the parts,
    which takes half as long as an all-reduce among them."""

    between: AllReduce
    """Among the workers, each of them counted as one rank."""
    inside: AllReduce
    """Among the ranks of a worker."""
    share: float
    """Share of the bytes that one link between workers carries: 1 if a machine holds whole workers,
    less if the ranks of a worker have several links."""

    def seconds(self, num_bytes: float) -> float:
        """Time of one average of `num_bytes`."""
        return self.between.seconds(self.share * num_bytes) + self.inside.seconds(num_bytes) / 2

    def bytes_per_link(self, num_bytes: float) -> float:
        """Bytes over the link of each machine, per direction."""
        return ring_bytes(self.between.ranks, self.share * num_bytes)


def ring_bytes(ranks: int, num_bytes: float) -> float:
    """Bytes that each of `ranks` sends in a ring all-reduce of `num_bytes`: 2 (ranks - 1) / ranks
    times `num_bytes`. With several machines as much crosses each machine's link, per direction."""
    return 2 * (ranks - 1) / ranks * num_bytes


def averaged_bytes(plan: Plan, parameter_bytes: int, moment_bytes: int = 0) -> int:
    """Bytes that one worker contributes to all averages of a plan. Gradients are as large as
    parameters; moments are averaged only at the end of rounds of local steps."""
    moments = (plan.num_rounds - plan.gradient_rounds) * moment_bytes
    return plan.num_rounds * parameter_bytes + moments


def _latencies(ranks: int) -> int:
    return 2 * math.ceil(math.log2(ranks))


def fit_link(
    ranks: int, machines: int, sizes: Sequence[int], seconds: Sequence[float]
) -> tuple[Link, float]:
    """The link that fits measured all-reduces of `sizes` bytes best, by least squares on the
    relative error, and the root mean square of the remaining relative error.

    A negative latency is set to zero. Raises ValueError if times do not grow with the bytes.
    """
    # seconds ~ a + b * ring bytes, every row divided by its seconds
    rows = [(1 / t, ring_bytes(ranks, size) / t) for size, t in zip(sizes, seconds, strict=True)]
    uu, vv = sum(u * u for u, _ in rows), sum(v * v for _, v in rows)
    uv, u1, v1 = sum(u * v for u, v in rows), sum(u for u, _ in rows), sum(v for _, v in rows)
    determinant = uu * vv - uv * uv
    a = (u1 * vv - v1 * uv) / determinant
    b = (v1 * uu - u1 * uv) / determinant
    if a < 0:
        a, b = 0.0, v1 / vv
    if b <= 0:
        raise ValueError("measured all-reduces do not take longer for more bytes")
    link = Link(ranks, machines, 1 / b, a / _latencies(ranks))
    errors = [link.seconds(size) / t - 1 for size, t in zip(sizes, seconds, strict=True)]
    return link, math.sqrt(sum(error * error for error in errors) / len(errors))


def exposed_seconds(allreduce: float, window: float, last_bucket: float) -> float:
    """The part of an all-reduce that DDP cannot hide: what exceeds the `window` of computing that
    it overlaps with, and at least the last bucket, whose gradients are ready only at the end."""
    return min(allreduce, max(last_bucket, allreduce - window))


@dataclass(frozen=True)
class RunCost:
    """Time of a run, without evaluations and checkpoints."""

    compute_seconds: float
    """With the averages of gradients within workers of several ranks, as far as they are not
    hidden."""
    communication_seconds: float
    """All-reduces that are not hidden, and waiting for the slowest rank before them."""
    ranks: int

    @property
    def total_seconds(self) -> float:
        """From the first step to the last."""
        return self.compute_seconds + self.communication_seconds

    @property
    def gpu_hours(self) -> float:
        """Total time, summed over the ranks."""
        return self.ranks * self.total_seconds / 3600


@dataclass(frozen=True)
class CostModel:
    """Times of the steps and the averages of a run."""

    allreduce: AllReduce
    compute_seconds: float
    """Computing of a rank per step: forward and backward passes, and updates, of its workers."""
    micro_batches: int
    """Backward passes of a rank in one step."""
    parameter_bytes: int
    moment_bytes: int = 0
    """Optimizer states that are averaged with the parameters."""
    delay_steps: int = 0
    """Steps that the average of a local round overlaps with, except for the run's last."""
    bucket_bytes: float = 25 * 2**20
    """Size of DDP's gradient buckets; the default is DDP's."""
    waiting_seconds: float = 0.0
    """How long ranks wait for the slowest one, on average, if all must end a step together."""
    overlapped_step_seconds: float | None = None
    """Measured time of an overlapped data parallel step; None: use the formula."""
    parts: AverageOfParts | None = None
    """How averages of parameters travel if several ranks make one worker; None: as `allreduce`."""
    overlap_within_workers: bool = False
    """Whether the averages of gradients within such workers overlap with the backward pass."""

    @property
    def gradient_seconds(self) -> float:
        """All-reduce of one data parallel step, after the backward pass."""
        return self.allreduce.seconds(self.parameter_bytes)

    @property
    def exposed_gradient_seconds(self) -> float:
        """How much longer than its computing a step takes when DDP overlaps the all-reduce with the
        backward pass. It overlaps only with that of the last micro-batch, because gradients are
        accumulated over the earlier ones."""
        if self.overlapped_step_seconds is not None:
            return max(0.0, self.overlapped_step_seconds - self.compute_seconds)
        return self._exposed(self.allreduce) + self.waiting_seconds

    def _exposed(self, allreduce: AllReduce) -> float:
        window = BACKWARD_SHARE * self.compute_seconds / self.micro_batches
        last_bucket = allreduce.seconds(min(self.bucket_bytes, self.parameter_bytes))
        return exposed_seconds(allreduce.seconds(self.parameter_bytes), window, last_bucket)

    def seconds_within_workers(self, *, overlapped: bool) -> float:
        """What the average of gradients among the ranks of a worker adds to a local step."""
        if self.parts is None:
            return 0.0
        inside = self.parts.inside
        return self._exposed(inside) if overlapped else inside.seconds(self.parameter_bytes)

    def round_waiting_seconds(self, h: int) -> float:
        """Waiting at the end of a round of `h` local steps. Slow and fast steps partly cancel, so
        waiting grows with the square root of the steps."""
        return math.sqrt(h) * self.waiting_seconds

    @property
    def average_seconds(self) -> float:
        """All-reduces at the end of a round of local steps; moments have a separate one."""
        allreduce = self.parts or self.allreduce
        moments = allreduce.seconds(self.moment_bytes) if self.moment_bytes else 0.0
        return allreduce.seconds(self.parameter_bytes) + moments

    def bytes_per_link(self, plan: Plan) -> float:
        """Bytes of a plan's averages over the link of each machine, per direction; those within
        workers stay inside a machine, and are left out."""
        if self.allreduce.machines == 1:
            return 0.0
        gradients = plan.gradient_rounds * self.parameter_bytes
        rest = averaged_bytes(plan, self.parameter_bytes, self.moment_bytes) - gradients
        ranks = self.allreduce.ranks
        of_rest = ring_bytes(ranks, rest) if self.parts is None else self.parts.bytes_per_link(rest)
        return ring_bytes(ranks, gradients) + of_rest

    def data_parallel(self, steps: int, *, overlapped: bool) -> RunCost:
        """Data parallel training, its all-reduces after the backward pass or overlapped with it."""
        seconds = steps * self._gradient_step_seconds(overlapped)
        return RunCost(steps * self.compute_seconds, seconds, self.allreduce.ranks)

    def run(self, plan: Plan, *, overlapped: bool) -> RunCost:
        """The rounds of a plan; `overlapped` applies to those that average gradients."""
        seconds = plan.gradient_rounds * self._gradient_step_seconds(overlapped)
        # the trainer does not overlap in plans with both kinds of averages
        overlap_within = self.overlap_within_workers and not plan.gradient_rounds
        step_seconds = self.local_step_seconds(overlapped=overlap_within)
        if plan.gradient_rounds < plan.num_rounds:
            for round_ in plan.rounds():
                if round_.averages == "parameters":
                    last = round_.end == plan.total_steps
                    seconds += self.round_seconds(round_.length, step_seconds, last=last)
        local_steps = plan.total_steps - plan.gradient_rounds
        compute = plan.gradient_rounds * self.compute_seconds + local_steps * step_seconds
        return RunCost(compute, seconds, self.allreduce.ranks)

    def local_step_seconds(self, *, overlapped: bool) -> float:
        """Computing of a local step, with the average of gradients among the ranks of a worker."""
        return self.compute_seconds + self.seconds_within_workers(overlapped=overlapped)

    def round_seconds(self, h: int, step_seconds: float, *, last: bool) -> float:
        """What the average after `h` local steps adds to their computing: all of it at the end of
        the run (`last`), before it what the steps of the delay do not hide."""
        each = self.average_seconds + self.round_waiting_seconds(h)
        return each if last else max(0.0, each - self.delay_steps * step_seconds)

    def _gradient_step_seconds(self, overlapped: bool) -> float:
        """Time of a data parallel step in addition to its computing."""
        if overlapped:
            return self.exposed_gradient_seconds
        return self.gradient_seconds + self.waiting_seconds
