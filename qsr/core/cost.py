"""What a run costs: seconds of computing and of all-reduces, bytes, GPU hours.

The model: every step computes for the same time, every average is one all-reduce of the same
bytes, before which ranks may wait for the slowest, and data parallel training may hide part of its
all-reduces behind the backward pass. Evaluations, checkpoints and input are left out.
docs/planning.md discusses it.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from qsr.core.plan import Plan

BACKWARD_SHARE = 2 / 3
"""Part of a step's computing that is the backward pass: two matrix products for every one of the
forward pass."""


class AllReduce(Protocol):
    """How long an all-reduce takes among the ranks of a run."""

    @property
    def ranks(self) -> int:
        """Processes that take part."""

    @property
    def machines(self) -> int:
        """Machines that they live on."""

    def seconds(self, num_bytes: float) -> float:
        """Of one all-reduce of `num_bytes`; 0 for one rank."""


@dataclass(frozen=True)
class Link:
    """All-reduces by bandwidth and latency.

    2 ceil(log2 ranks) latency + 2 (ranks - 1) / ranks bytes / bandwidth: the bandwidth term of a
    ring, which crosses the link of each machine once per direction however many ranks the machine
    has, and the latency term of a tree (reduce, then broadcast), which NCCL takes where latency
    decides.
    """

    ranks: int
    machines: int
    bytes_per_second: float
    """Of a machine's link, per direction; within one machine, of the way from rank to rank."""
    latency_seconds: float
    """Of one message."""

    def seconds(self, num_bytes: float) -> float:
        latency = _latencies(self.ranks) * self.latency_seconds
        return latency + ring_bytes(self.ranks, num_bytes) / self.bytes_per_second


@dataclass(frozen=True)
class MeasuredAllReduce:
    """All-reduces as measured at some sizes, in rising order: straight lines between them, the
    smallest one's time below them, the largest one's bytes per second above them."""

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


def ring_bytes(ranks: int, num_bytes: float) -> float:
    """What one of `ranks` sends in a ring all-reduce of `num_bytes`: 2 (ranks - 1) / ranks of
    them. As much crosses the link of a machine, per direction, if there are several machines."""
    return 2 * (ranks - 1) / ranks * num_bytes


def averaged_bytes(plan: Plan, parameter_bytes: int, moment_bytes: int = 0) -> int:
    """What one worker gives to all averages of a plan. Gradients are as large as parameters;
    moments are averaged at the end of rounds of local steps only."""
    moments = (plan.num_rounds - plan.gradient_rounds) * moment_bytes
    return plan.num_rounds * parameter_bytes + moments


def _latencies(ranks: int) -> int:
    return 2 * math.ceil(math.log2(ranks))


def fit_link(
    ranks: int, machines: int, sizes: Sequence[int], seconds: Sequence[float]
) -> tuple[Link, float]:
    """The link that explains measured all-reduces of `sizes` bytes best, by least squares on the
    relative error, and the root mean square of what relative error is left.

    A latency below zero becomes zero. Raises ValueError if times do not grow with the bytes.
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
    """What DDP cannot hide of an all-reduce: what exceeds the `window` of computing that it
    overlaps with, and at least the last bucket, whose gradients exist when the pass is over."""
    return min(allreduce, max(last_bucket, allreduce - window))


@dataclass(frozen=True)
class RunCost:
    """What a run takes."""

    compute_seconds: float
    communication_seconds: float
    """Of all-reduces that nothing hides, and of waiting for the slowest rank before them."""
    ranks: int

    @property
    def total_seconds(self) -> float:
        """From the first step to the last."""
        return self.compute_seconds + self.communication_seconds

    @property
    def gpu_hours(self) -> float:
        """Total time, on every rank."""
        return self.ranks * self.total_seconds / 3600


@dataclass(frozen=True)
class CostModel:
    """What the steps and the averages of a run take."""

    allreduce: AllReduce
    compute_seconds: float
    """Of a rank in one step: forward and backward passes and updates of all its workers."""
    micro_batches: int
    """Backward passes of a rank in one step."""
    parameter_bytes: int
    moment_bytes: int = 0
    """Optimizer states that are averaged with the parameters."""
    delay_steps: int = 0
    """Steps behind which the average of a round of local steps hides, but for the run's last."""
    bucket_bytes: float = 25 * 2**20
    """Of gradients, in which DDP reduces them. Its default."""
    waiting_seconds: float = 0.0
    """What one step takes longer if all ranks end it together, beside the all-reduce: on average
    they wait that long for the slowest."""
    overlapped_step_seconds: float | None = None
    """Of a data parallel step that overlaps, as measured; None: by the formula."""

    @property
    def gradient_seconds(self) -> float:
        """All-reduce of one data parallel step, after the backward pass."""
        return self.allreduce.seconds(self.parameter_bytes)

    @property
    def exposed_gradient_seconds(self) -> float:
        """What a step takes longer than its computing when DDP overlaps the all-reduce with the
        backward pass: of the last micro-batch only, because gradients are accumulated over those
        before."""
        if self.overlapped_step_seconds is not None:
            return max(0.0, self.overlapped_step_seconds - self.compute_seconds)
        window = BACKWARD_SHARE * self.compute_seconds / self.micro_batches
        last_bucket = self.allreduce.seconds(min(self.bucket_bytes, self.parameter_bytes))
        return exposed_seconds(self.gradient_seconds, window, last_bucket) + self.waiting_seconds

    def round_waiting_seconds(self, h: int) -> float:
        """At the end of a round of `h` local steps: what a step takes longer here and shorter there
        evens out, so that waiting grows as the square root of the steps."""
        return math.sqrt(h) * self.waiting_seconds

    @property
    def average_seconds(self) -> float:
        """All-reduces at the end of a round of local steps: moments take one of their own."""
        moments = self.allreduce.seconds(self.moment_bytes) if self.moment_bytes else 0.0
        return self.allreduce.seconds(self.parameter_bytes) + moments

    def data_parallel(self, steps: int, *, overlapped: bool) -> RunCost:
        """Data parallel training, its all-reduces after the backward pass or overlapped with it."""
        return self._run(steps, steps * self._gradient_step_seconds(overlapped))

    def run(self, plan: Plan, *, overlapped: bool) -> RunCost:
        """The rounds of a plan; `overlapped` concerns those that average gradients."""
        seconds = plan.gradient_rounds * self._gradient_step_seconds(overlapped)
        hidden = self.delay_steps * self.compute_seconds
        if plan.gradient_rounds < plan.num_rounds:
            for round_ in plan.rounds():
                if round_.averages == "parameters":
                    each = self.average_seconds + self.round_waiting_seconds(round_.length)
                    last = round_.end == plan.total_steps
                    seconds += each if last else max(0.0, each - hidden)
        return self._run(plan.total_steps, seconds)

    def _gradient_step_seconds(self, overlapped: bool) -> float:
        """What a data parallel step takes beside its computing."""
        if overlapped:
            return self.exposed_gradient_seconds
        return self.gradient_seconds + self.waiting_seconds

    def _run(self, steps: int, communication_seconds: float) -> RunCost:
        return RunCost(steps * self.compute_seconds, communication_seconds, self.allreduce.ranks)
