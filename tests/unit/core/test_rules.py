"""H against tables that can be checked by hand."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsr import (
    CappedRule,
    ConstantRule,
    CosineSchedule,
    EveryStepRule,
    GrowingRule,
    Plan,
    PostLocalRule,
    PowerRule,
    QuadraticRule,
    Rule,
    StagewiseRule,
    SwapRule,
)
from qsr.core.schedules import Schedule


@pytest.mark.parametrize(
    ("lr", "h"),
    [(0.8, 4), (0.1, 4), (0.05, 4), (0.04, 6), (0.02, 25), (0.01, 100), (0.001, 10_000)],
)
def test_quadratic(lr: float, h: int) -> None:
    assert QuadraticRule(h_base=4, alpha=0.1).length(0, lr) == h


def test_powers() -> None:
    linear, cubic = PowerRule(2, 0.1, 1), PowerRule(2, 0.1, 3)
    assert [linear.length(0, lr) for lr in (0.1, 0.02, 0.01)] == [2, 5, 10]
    assert [cubic.length(0, lr) for lr in (0.1, 0.05, 0.02)] == [2, 8, 125]


def test_floor_is_bit_compatible_with_the_released_code() -> None:
    # 0.3 / 0.1 is 2.9999999999999996 in binary: the authors' int() gives 8, not 9
    assert QuadraticRule(1, 0.3).length(0, 0.1) == int((0.3 / 0.1) ** 2) == 8


@given(alpha=st.floats(1e-6, 10), lr=st.floats(1e-6, 10), power=st.sampled_from([1, 2, 3, 0.5]))
def test_power_rule_is_int_of_a_double(alpha: float, lr: float, power: float) -> None:
    assert PowerRule(3, alpha, power).length(0, lr) == max(3, int((alpha / lr) ** power))


def test_a_rate_of_zero_asks_for_no_average_before_the_end() -> None:
    assert QuadraticRule(4, 0.1).length(0, 0.0) is None
    assert PowerRule(4, 1.0, 500).length(0, 1e-300) is None  # more than a double can hold


def test_rules_by_step() -> None:
    post, swap = PostLocalRule(switch_step=10, h=8), SwapRule(switch_step=10)
    assert [post.length(s, 0.1) for s in (0, 9, 10, 50)] == [1, 1, 8, 8]
    assert [swap.length(s, 0.1) for s in (0, 9, 10)] == [1, 1, None]
    for rule in (post, swap):
        assert [rule.averages(s) for s in (9, 10)] == ["gradients", "parameters"]
    assert EveryStepRule().averages(0) == "gradients"
    assert EveryStepRule("parameters").averages(0) == "parameters"
    assert ConstantRule(5).length(3, 0.0) == 5


def rounds(rule: Rule, rates: Sequence[float]) -> list[tuple[float, int]]:
    """(rate, H) of each round of a run that has one rate for each step."""
    plan = Plan(StepByStep(tuple(rates)), rule)
    return [(round_.lr, round_.length) for round_ in plan.rounds()]


@dataclass(frozen=True)
class StepByStep(Schedule):
    """A rate for each step."""

    rates: tuple[float, ...]
    warmup_steps: int = 0

    @property
    def total_steps(self) -> int:
        return len(self.rates)

    def __call__(self, step: int) -> float:
        return self.rates[step]


def test_stagewise_doubling() -> None:
    rates = [0.8, 0.7, 0.5, 0.41, 0.4, 0.39, 0.3, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.0]
    assert rounds(StagewiseRule(2), rates) == [
        (0.8, 2),
        (0.5, 2),
        (0.4, 4),  # half of the first rate
        (0.2, 8),  # half of that one
        (0.0, 1),  # until the end
    ]


def test_a_rate_that_falls_to_an_eighth_doubles_thrice_and_one_that_rises_changes_nothing() -> None:
    assert rounds(StagewiseRule(1), [0.8, 0.1, *[0.8] * 8, *[0.05] * 16]) == [
        (0.8, 1),
        (0.1, 8),
        (0.8, 8),
        (0.05, 9),  # 16, cut at the end
    ]


def test_stagewise_doubling_in_the_warmup_has_the_rate_after_it() -> None:
    plan = Plan(CosineSchedule(0.8, 1e-6, warmup_steps=10, total_steps=1000), StagewiseRule(4))
    lengths = [round_.length for round_ in plan.rounds()]
    assert lengths[:4] == [4, 4, 4, 4]
    changes = [b / a for a, b in itertools.pairwise(lengths[:-1]) if a != b]
    assert set(changes) == {2.0}
    for round_ in list(plan.rounds())[3:-1]:
        assert round_.length == 4 * 2 ** math.floor(math.log2(0.8 / round_.lr))


def test_growing_with_the_rounds_number() -> None:
    assert [h for _, h in rounds(GrowingRule(2, 1.0), [0.1] * 20)] == [2, 3, 4, 5, 6]
    assert [h for _, h in rounds(GrowingRule(3, 0.5), [0.0] * 20)] == [3, 3, 4, 4, 5, 1]


def test_a_cap_limits_every_rule_and_changes_nothing_below_it() -> None:
    rates = [0.4] * 4 + [0.1] * 30 + [0.0] * 20
    free = [h for _, h in rounds(QuadraticRule(2, 0.4), rates)]
    assert free == [2, 2, 16, 16, 18]  # a rate of 0 means: until the end
    capped = [h for _, h in rounds(CappedRule(QuadraticRule(2, 0.4), 12), rates)]
    assert capped == [2, 2, 12, 12, 12, 12, 2]  # the last one is cut at the end
    growing = CappedRule(GrowingRule(2, 1.0), 4)
    assert [h for _, h in rounds(growing, [0.1] * 20)] == [2, 3, 4, 4, 4, 3]
    assert [h for _, h in rounds(CappedRule(SwapRule(2), 5), [0.1] * 9)] == [1, 1, 5, 2]
    assert CappedRule(SwapRule(2), 5).averages(1) == "gradients"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CappedRule(ConstantRule(2), 0), "h_max must be at least 1"),
        (lambda: ConstantRule(0), "h must be at least 1"),
        (lambda: StagewiseRule(0), "h must be at least 1"),
        (lambda: GrowingRule(0, 1.0), "h_base"),
        (lambda: GrowingRule(1, 0.0), "growth"),
        (lambda: QuadraticRule(0, 0.1), "h_base"),
        (lambda: QuadraticRule(1, 0.0), "alpha"),
        (lambda: QuadraticRule(1, math.inf), "alpha"),
        (lambda: PowerRule(1, -1.0, 2), "coefficient"),
        (lambda: PowerRule(1, 1.0, 0), "exponent"),
        (lambda: SwapRule(-1), "switch_step"),
        (lambda: PostLocalRule(5, 0), "h must be at least 1"),
    ],
)
def test_refuses(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
