"""H against tables that can be checked by hand."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsr import ConstantRule, EveryStepRule, PostLocalRule, PowerRule, QuadraticRule, SwapRule


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConstantRule(0), "h must be at least 1"),
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
