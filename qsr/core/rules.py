"""Synchronization rules: how many local steps a round takes, given its learning rate.

A rule answers for one round at a time. It does not know where the run ends: `Plan` holds H during
the warm-up and cuts the last round (see plan.py).
"""

import math
from dataclasses import dataclass
from typing import Literal

Averages = Literal["gradients", "parameters"]
"""What the workers average: their gradients before every update (data parallel training), or
their parameters after the last update of a round (local methods)."""

UNTIL_THE_END = None
"""The round length that means: no further average before the last step of the run."""


class Rule:
    """What a plan needs of a synchronization rule. Rules are immutable: one that depends on earlier
    rounds returns another rule from `after`."""

    def length(self, start: int, lr: float) -> int | None:
        """Steps of the round that starts at `start`, or UNTIL_THE_END.

        `lr` is the learning rate that decides: that of the round's first step, or, inside the
        warm-up, that of the first step after it.
        """
        raise NotImplementedError

    def averages(self, start: int) -> Averages:
        """What is averaged in the round that starts at `start`."""
        return "parameters"

    def after(self, lr: float) -> "Rule":
        """The rule of the next round, after one whose length `lr` decided."""
        return self

    @property
    def needs_loss(self) -> bool:
        """Whether `observe` must be called after every round, so that no round is known before the
        one before it has ended (see open_plan.py)."""
        return False

    def observe(self, loss: float) -> "Rule":
        """The rule of the next round, given the mean training loss of the one that has ended."""
        return self


def check_h(name: str, h: int) -> None:
    """Raise ValueError unless h is at least 1."""
    if h < 1:
        raise ValueError(f"{name} must be at least 1 step, got {h}")


@dataclass(frozen=True)
class EveryStepRule(Rule):
    """Average in every step.

    With gradients this is data parallel training. With parameters it is the local method at H=1,
    which is the same algorithm for SGD and another one for AdamW, whose moments stay local.
    """

    average: Averages = "gradients"

    def length(self, start: int, lr: float) -> int:
        return 1

    def averages(self, start: int) -> Averages:
        return self.average


@dataclass(frozen=True)
class ConstantRule(Rule):
    """H local steps in every round."""

    h: int

    def __post_init__(self) -> None:
        check_h("h", self.h)

    def length(self, start: int, lr: float) -> int:
        return self.h


@dataclass(frozen=True)
class PowerRule(Rule):
    """H = max(h_base, floor((coefficient / lr)^exponent)), the paper's general form.

    Exponent 1 is the scaling H ~ 1/lr, 2 the quadratic rule, 3 the cubic rule. The floor is
    int() of a double, bit for bit what the authors' code computes: (0.3 / 0.1)^2 gives 8, because
    0.3 / 0.1 is a little less than 3 in binary. lr = 0 means: until the end.
    """

    h_base: int
    coefficient: float
    exponent: float

    def __post_init__(self) -> None:
        check_h("h_base", self.h_base)
        for name, value in (("coefficient", self.coefficient), ("exponent", self.exponent)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value}")

    def length(self, start: int, lr: float) -> int | None:
        return _power_length(self.h_base, self.coefficient, self.exponent, lr)


@dataclass(frozen=True)
class QuadraticRule(Rule):
    """QSR: H = max(h_base, floor((alpha / lr)^2)). Gu et al. 2024, equation 2.

    `alpha` has the unit of the learning rate: alpha / peak_lr squared is H at the peak.
    """

    h_base: int
    alpha: float

    def __post_init__(self) -> None:
        check_h("h_base", self.h_base)
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha must be a positive number, got {self.alpha}")

    def length(self, start: int, lr: float) -> int | None:
        return _power_length(self.h_base, self.alpha, 2, lr)


def _power_length(h_base: int, coefficient: float, exponent: float, lr: float) -> int | None:
    if lr <= 0.0:
        return UNTIL_THE_END
    try:
        return max(h_base, int((coefficient / lr) ** exponent))
    except OverflowError:  # a rate so small that H exceeds every double
        return UNTIL_THE_END


@dataclass(frozen=True)
class CappedRule(Rule):
    """Another rule, with rounds of at most h_max steps."""

    rule: Rule
    h_max: int

    def __post_init__(self) -> None:
        check_h("h_max", self.h_max)

    def length(self, start: int, lr: float) -> int:
        length = self.rule.length(start, lr)
        return self.h_max if length is UNTIL_THE_END else min(length, self.h_max)

    def averages(self, start: int) -> Averages:
        return self.rule.averages(start)

    def after(self, lr: float) -> "CappedRule":
        return CappedRule(self.rule.after(lr), self.h_max)

    @property
    def needs_loss(self) -> bool:
        return self.rule.needs_loss

    def observe(self, loss: float) -> "CappedRule":
        return CappedRule(self.rule.observe(loss), self.h_max)


@dataclass(frozen=True)
class StagewiseRule(Rule):
    """H doubles whenever the learning rate has halved since the last change (STL-SGD, Shen et al.
    2021). A rate that falls to an eighth at once doubles it three times; one that rises changes
    nothing. lr = 0 means: until the end."""

    h: int
    halved_from: float | None = None
    """The rate at the last change; None: that of the first round."""

    def __post_init__(self) -> None:
        check_h("h", self.h)

    def length(self, start: int, lr: float) -> int | None:
        return self.after(lr).h if lr > 0.0 else UNTIL_THE_END

    def after(self, lr: float) -> "StagewiseRule":
        h, halved_from = self.h, lr if self.halved_from is None else self.halved_from
        while 0.0 < lr <= halved_from / 2.0:
            h, halved_from = 2 * h, halved_from / 2.0
        return StagewiseRule(h, halved_from)


@dataclass(frozen=True)
class GrowingRule(Rule):
    """H grows linearly with the round's number, whatever the learning rate (Spiridonoff et al.
    2021): H = h_base + floor(growth * round), counted from round 0."""

    h_base: int
    growth: float
    round: int = 0

    def __post_init__(self) -> None:
        check_h("h_base", self.h_base)
        if not (math.isfinite(self.growth) and self.growth > 0):
            raise ValueError(f"growth must be a positive number, got {self.growth}")

    def length(self, start: int, lr: float) -> int:
        return self.h_base + math.floor(self.growth * self.round)

    def after(self, lr: float) -> "GrowingRule":
        return GrowingRule(self.h_base, self.growth, self.round + 1)


@dataclass(frozen=True)
class PostLocalRule(Rule):
    """Data parallel until switch_step, H local steps a round after it (Lin et al. 2020)."""

    switch_step: int
    h: int

    def __post_init__(self) -> None:
        check_h("h", self.h)
        _check_switch(self.switch_step)

    def length(self, start: int, lr: float) -> int:
        return 1 if start < self.switch_step else self.h

    def averages(self, start: int) -> Averages:
        return "gradients" if start < self.switch_step else "parameters"


@dataclass(frozen=True)
class SwapRule(Rule):
    """Data parallel until switch_step, then alone; one average at the end (Gupta et al. 2020)."""

    switch_step: int

    def __post_init__(self) -> None:
        _check_switch(self.switch_step)

    def length(self, start: int, lr: float) -> int | None:
        return 1 if start < self.switch_step else UNTIL_THE_END

    def averages(self, start: int) -> Averages:
        return "gradients" if start < self.switch_step else "parameters"


def _check_switch(switch_step: int) -> None:
    if switch_step < 0:
        raise ValueError(f"switch_step must be at least 0, got {switch_step}")
