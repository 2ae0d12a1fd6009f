"""Rules and schedules that the user wrote. All that they return is checked: a plan trusts rules."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qsr.config.own import call_own
from qsr.core.rules import Averages, Rule
from qsr.core.schedules import Schedule
from qsr.errors import ConfigError


def own_rule(target: str, make: Callable[..., Any], options: Mapping[str, Any]) -> Rule:
    """The rule that `make(**options)` returns. Raises ConfigError, then and in a plan."""
    return _OwnRule(target, call_own("sync", target, make, **options))


def own_schedule(
    target: str,
    make: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    peak_lr: float,
    final_lr: float,
    warmup_steps: int,
    total_steps: int,
) -> Schedule:
    """The schedule that `make` returns, tried in every step. Raises ConfigError."""
    given = {
        "peak_lr": peak_lr,
        "final_lr": final_lr,
        "warmup_steps": warmup_steps,
        "total_steps": total_steps,
    }
    schedule = call_own("schedule", target, make, **given, **options)
    if not isinstance(schedule, Schedule):
        raise ConfigError(
            f"schedule.target={target}: it returns a {type(schedule).__name__}, not a function of "
            f"the step with total_steps and warmup_steps as attributes"
        )
    for name in ("total_steps", "warmup_steps"):
        if getattr(schedule, name) != given[name]:
            raise ConfigError(
                f"schedule.target={target}: its {name} is {getattr(schedule, name)}, not the "
                f"{given[name]} that it was given"
            )
    rates = call_own("schedule", target, lambda: list(map(schedule, range(total_steps + 1))))
    for step, lr in enumerate(rates):
        if not (isinstance(lr, float | int) and math.isfinite(lr) and lr >= 0):
            raise ConfigError(
                f"schedule.target={target}: the learning rate of step {step} is {lr!r}: it must be "
                f"a number of at least 0"
            )
    return schedule


@dataclass(frozen=True)
class _OwnRule(Rule):
    target: str
    rule: Rule

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):
            raise ConfigError(
                f"sync.target={self.target}: it returns a {type(self.rule).__name__}, not a "
                f"qsr.Rule"
            )

    def length(self, start: int, lr: float) -> int | None:
        h = call_own("sync", self.target, self.rule.length, start, lr)
        whole = isinstance(h, int) and not isinstance(h, bool)
        if h is not None and not (whole and h >= 1):
            raise ConfigError(
                f"sync.target={self.target}: H of the round at step {start} (learning rate {lr:g}) "
                f"is {h!r}: it must be a whole number of at least 1, or None for all steps left"
            )
        if h != 1 and self.averages(start) == "gradients":
            raise ConfigError(
                f"sync.target={self.target}: H of the round at step {start} is {h}, but a round "
                f"that averages gradients has one step"
            )
        return h  # type: ignore[no-any-return]

    def averages(self, start: int) -> Averages:
        what = call_own("sync", self.target, self.rule.averages, start)
        if what not in ("gradients", "parameters"):
            raise ConfigError(
                f"sync.target={self.target}: the round at step {start} averages {what!r}: it must "
                f"be 'gradients' or 'parameters'"
            )
        return what  # type: ignore[no-any-return]

    def after(self, lr: float) -> Rule:
        return _OwnRule(self.target, call_own("sync", self.target, self.rule.after, lr))

    @property
    def needs_loss(self) -> bool:
        return bool(call_own("sync", self.target, lambda: self.rule.needs_loss))

    def observe(self, loss: float) -> Rule:
        return _OwnRule(self.target, call_own("sync", self.target, self.rule.observe, loss))
