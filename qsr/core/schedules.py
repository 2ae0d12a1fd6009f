"""The learning rate as a function of the step.

A schedule is a frozen dataclass that is called with a 0-based step and returns the rate that the
optimizer uses in that step. `schedule(total_steps)`, the end of the curve, is defined too, because
schedulers that look one step ahead ask for it after the last update.
"""

import itertools
import math
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable


@runtime_checkable
class Schedule(Protocol):
    """What a plan needs of a learning-rate schedule."""

    @property
    def total_steps(self) -> int:
        """Steps in the run."""

    @property
    def warmup_steps(self) -> int:
        """Steps of the linear warm-up at the start."""

    def __call__(self, step: int) -> float:
        """Learning rate of the 0-based `step`, 0 <= step <= total_steps."""


def _check_run(peak_lr: float, warmup_steps: int, total_steps: int) -> None:
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps must be at least 0 and less than total_steps ({total_steps}), "
            f"got {warmup_steps}"
        )
    if not (math.isfinite(peak_lr) and peak_lr > 0):
        raise ValueError(f"peak_lr must be a positive number, got {peak_lr}")


def _check_start(start_lr: float, peak_lr: float) -> None:
    if not 0 <= start_lr <= peak_lr:
        raise ValueError(f"start_lr must lie in [0, peak_lr = {peak_lr}], got {start_lr}")


def _check_step(step: int, total_steps: int) -> None:
    if not 0 <= step <= total_steps:
        raise ValueError(f"step {step} lies outside the schedule's 0..{total_steps}")


def _warmup(step: int, warmup_steps: int, start_lr: float, peak_lr: float) -> float:
    """Linear from start_lr (step 0) towards peak_lr (step warmup_steps)."""
    return start_lr + (peak_lr - start_lr) * step / warmup_steps


@dataclass(frozen=True)
class ConstantSchedule:
    """Linear warm-up from start_lr, then peak_lr in every step."""

    peak_lr: float
    total_steps: int
    warmup_steps: int = 0
    start_lr: float = 0.0

    def __post_init__(self) -> None:
        _check_run(self.peak_lr, self.warmup_steps, self.total_steps)
        _check_start(self.start_lr, self.peak_lr)

    def __call__(self, step: int) -> float:
        _check_step(step, self.total_steps)
        if step < self.warmup_steps:
            return _warmup(step, self.warmup_steps, self.start_lr, self.peak_lr)
        return self.peak_lr


@dataclass(frozen=True)
class _DecayingSchedule:
    """Linear warm-up from final_lr to peak_lr, then a decay from peak_lr to final_lr."""

    peak_lr: float
    final_lr: float
    warmup_steps: int
    total_steps: int

    def __post_init__(self) -> None:
        _check_run(self.peak_lr, self.warmup_steps, self.total_steps)
        if not 0 <= self.final_lr <= self.peak_lr:
            raise ValueError(
                f"final_lr must lie in [0, peak_lr = {self.peak_lr}], got {self.final_lr}"
            )

    def __call__(self, step: int) -> float:
        _check_step(step, self.total_steps)
        if step < self.warmup_steps:
            return _warmup(step, self.warmup_steps, self.final_lr, self.peak_lr)
        return self.final_lr + (self.peak_lr - self.final_lr) * self._share(step)

    def _share(self, step: int) -> float:
        """Share of the decay that is left at a step: 1 after the warm-up, 0 at the end."""
        raise NotImplementedError


@dataclass(frozen=True)
class CosineSchedule(_DecayingSchedule):
    """Linear warm-up from final_lr to peak_lr, then a half cosine down to final_lr.

    With `stop_step` the decay stops there and the rate stays at the value of that step: the
    "modified cosine" of the paper's comparison.
    """

    stop_step: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop_step is not None and not (
            self.warmup_steps <= self.stop_step <= self.total_steps
        ):
            raise ValueError(
                f"stop_step must lie between the end of the warm-up ({self.warmup_steps}) and "
                f"total_steps ({self.total_steps}), got {self.stop_step}"
            )

    def _share(self, step: int) -> float:
        if self.stop_step is not None:
            step = min(step, self.stop_step)
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class LinearSchedule(_DecayingSchedule):
    """Linear warm-up from final_lr to peak_lr, then linear down to final_lr."""

    def _share(self, step: int) -> float:
        return (self.total_steps - step) / (self.total_steps - self.warmup_steps)


@dataclass(frozen=True)
class ExponentialSchedule:
    """Exponential decay from peak_lr in step 0 to final_lr at the end."""

    peak_lr: float
    final_lr: float
    total_steps: int
    warmup_steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        _check_run(self.peak_lr, self.warmup_steps, self.total_steps)
        if not 0 < self.final_lr <= self.peak_lr:
            raise ValueError(
                f"final_lr must lie in (0, peak_lr = {self.peak_lr}], got {self.final_lr}"
            )

    def __call__(self, step: int) -> float:
        _check_step(step, self.total_steps)
        share: float = (self.final_lr / self.peak_lr) ** (step / self.total_steps)
        return self.peak_lr * share


@dataclass(frozen=True)
class StepSchedule:
    """Linear warm-up from start_lr, then peak_lr times `factor` once per milestone passed.

    `milestones` are steps, rising, all after the warm-up; the step at a milestone already uses
    the reduced rate.
    """

    peak_lr: float
    milestones: tuple[int, ...]
    factor: float
    total_steps: int
    warmup_steps: int = 0
    start_lr: float = 0.0

    def __post_init__(self) -> None:
        _check_run(self.peak_lr, self.warmup_steps, self.total_steps)
        _check_start(self.start_lr, self.peak_lr)
        if not 0 < self.factor <= 1:
            raise ValueError(f"factor must lie in (0, 1], got {self.factor}")
        object.__setattr__(self, "milestones", tuple(self.milestones))
        bounds = (self.warmup_steps - 1, *self.milestones, self.total_steps)
        if any(later <= earlier for earlier, later in itertools.pairwise(bounds)):
            raise ValueError(
                f"milestones must rise from the end of the warm-up ({self.warmup_steps}) to "
                f"below total_steps ({self.total_steps}), got {self.milestones}"
            )

    def __call__(self, step: int) -> float:
        _check_step(step, self.total_steps)
        if step < self.warmup_steps:
            return _warmup(step, self.warmup_steps, self.start_lr, self.peak_lr)
        passed = sum(step >= milestone for milestone in self.milestones)
        return self.peak_lr * math.pow(self.factor, passed)


@dataclass(frozen=True)
class PowerOfTwoSchedule:
    """Another schedule, its values after the warm-up rounded to the nearest power of two.

    "Nearest" refers to the exponent, 2^round(log2 lr). The paper makes its step schedule from a
    cosine this way. If the peak is not a power of two, the rate jumps at the end of the warm-up
    (0.8 -> 1.0), as in the authors' code.
    """

    schedule: Schedule

    @property
    def total_steps(self) -> int:
        return self.schedule.total_steps

    @property
    def warmup_steps(self) -> int:
        return self.schedule.warmup_steps

    def __call__(self, step: int) -> float:
        lr = self.schedule(step)
        if step < self.warmup_steps or lr == 0.0:
            return lr
        return math.pow(2.0, round(math.log2(lr)))
