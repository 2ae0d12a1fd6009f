"""Alpha for a budget: the published rows recovered, and what holds for every schedule."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsr.core.inverse import cost_of, cost_range, never_rises, one_each, solve_alpha, stretches
from qsr.core.plan import Plan
from qsr.core.rules import CappedRule, ConstantRule, QuadraticRule, Rule
from qsr.core.schedules import (
    ConstantSchedule,
    CosineSchedule,
    ExponentialSchedule,
    LinearSchedule,
    PowerOfTwoSchedule,
    Schedule,
    StepSchedule,
)

VIT = CosineSchedule(0.008, 1e-6, 10_000, 93_600)
LINEAR = LinearSchedule(0.008, 1e-6, 10_000, 93_600)
RESNET = CosineSchedule(0.8, 1e-6, 1_560, 62_400)
RESNET_64 = CosineSchedule(1.6, 1e-6, 390, 15_600)
VIT_64 = CosineSchedule(0.016, 1e-6, 2_500, 23_400)


@pytest.mark.parametrize(
    ("schedule", "h_base", "alpha"),
    [
        (VIT, 4, 0.0175),
        (VIT, 8, 0.0175),
        (LINEAR, 4, 0.0175),
        (RESNET, 2, 0.2),
        (RESNET, 4, 0.25),
        (RESNET_64, 2, 0.2),
        (RESNET_64, 4, 0.2),
        (VIT_64, 4, 0.0175),
        (PowerOfTwoSchedule(VIT), 4, 0.0175),
    ],
)
def test_the_papers_alphas_come_from_their_rounds(
    schedule: Schedule, h_base: int, alpha: float
) -> None:
    rounds = Plan(schedule, QuadraticRule(h_base, alpha)).num_rounds
    found = solve_alpha(schedule, h_base, rounds)
    assert found is not None
    # with steps in the rate, H changes at few values of alpha, of which this is the smallest
    relative = 0.05 if isinstance(schedule, PowerOfTwoSchedule) else 0.002
    assert found.alpha == pytest.approx(alpha, rel=relative)
    assert found.alpha <= alpha
    assert sum(each.rounds for each in found.rounds) == rounds


def test_four_digits() -> None:
    found = solve_alpha(VIT, 2, 0.352 * 93_600)
    assert found is not None
    assert found.alpha == 0.004656
    rounds = [Plan(VIT, QuadraticRule(2, alpha)).num_rounds for alpha in (0.004656, 0.004655)]
    assert rounds[0] <= 0.352 * 93_600 < rounds[1]


@dataclass(frozen=True)
class Restarts:
    """A cosine that starts again in the middle: its rate rises after the warm-up."""

    total_steps: int
    warmup_steps: int = 0

    def __call__(self, step: int) -> float:
        half = self.total_steps / 2
        return 0.01 + 0.5 * (1 + math.cos(math.pi * (step % half) / half))


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    total = draw(st.integers(2, 3_000))
    warmup = draw(st.integers(0, total - 1))
    peak = draw(st.floats(1e-4, 10.0))
    final = peak * draw(st.sampled_from([0.0, 1e-6, 0.01, 0.5, 1.0]))
    cosine = CosineSchedule(peak, final, warmup, total)
    milestones = draw(st.sets(st.integers(warmup, total - 1), max_size=4))
    kinds: list[Schedule] = [
        cosine,
        CosineSchedule(peak, final, warmup, total, draw(st.integers(warmup, total))),
        LinearSchedule(peak, final, warmup, total),
        PowerOfTwoSchedule(cosine),
        StepSchedule(peak, tuple(sorted(milestones)), 0.1, total, warmup),
        ConstantSchedule(peak, total, warmup),
        ExponentialSchedule(peak, peak * draw(st.floats(1e-6, 1.0)), total),
        Restarts(total),
    ]
    return draw(st.sampled_from(kinds))


def quadratic(h_base: int, alpha: float, h_max: int | None) -> Rule:
    rule = QuadraticRule(h_base, alpha)
    return rule if h_max is None else CappedRule(rule, h_max)


def one_less(alpha: float) -> float:
    """In the fourth digit."""
    digits, _, exponent = f"{alpha:.3e}".partition("e")
    number = int(digits.replace(".", "")) - 1
    return float(f"{number if number > 999 else 999.9}e{int(exponent) - 3}")


LIMITS = st.none() | st.integers(20, 200)


@given(schedules(), st.integers(1, 20), st.floats(1e-3, 100.0), LIMITS)
@settings(max_examples=200, deadline=None)
def test_stretches_are_the_rounds_of_the_plan(
    schedule: Schedule, h_base: int, alpha: float, h_max: int | None
) -> None:
    rule = quadratic(h_base, alpha, h_max)
    rounds = [
        (each.start + number * each.length, each.length)
        for each in stretches(schedule, rule)
        for number in range(each.rounds)
    ]
    assert rounds == [(round_.start, round_.length) for round_ in Plan(schedule, rule).rounds()]


@given(schedules(), st.integers(1, 8), st.floats(0.0, 1.0), LIMITS, st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_solution_keeps_to_its_budget_and_uses_it(
    schedule: Schedule, h_base: int, share: float, h_max: int | None, rooted: bool
) -> None:
    """The budget is kept, and with an alpha less by one in the fourth digit it is not."""

    def cost(h: int, last: bool) -> float:
        return (math.sqrt(h) if rooted else 1.0) + last

    def spent(alpha: float) -> float:
        rounds = list(Plan(schedule, quadratic(h_base, alpha, h_max)).rounds())
        return sum(cost(each.length, False) for each in rounds) + 1.0

    least, most = cost_range(schedule, h_base, cost, h_max)
    budget = least + share * (most - least)
    found = solve_alpha(schedule, h_base, budget, cost, h_max)
    if not budget < most:
        assert found is None
        return
    assert found is not None
    assert float(f"{found.alpha:.4g}") == found.alpha
    assert spent(found.alpha) == pytest.approx(cost_of(found.rounds, cost))
    assert spent(found.alpha) <= budget * (1 + 1e-9)
    assert spent(one_less(found.alpha)) > budget * (1 - 1e-9)


def test_what_no_alpha_can_do() -> None:
    most = Plan(VIT, ConstantRule(4)).num_rounds
    assert cost_range(VIT, 4) == (1, most)
    assert cost_range(VIT, 4, one_each, 100) == (936, most)
    assert solve_alpha(VIT, 4, most) is None  # with every one
    assert solve_alpha(VIT, 4, most - 1) is not None
    assert solve_alpha(VIT, 4, 0.9) is None
    assert solve_alpha(VIT, 4, 935, one_each, 100) is None


def test_which_rates_never_rise() -> None:
    assert never_rises(PowerOfTwoSchedule(VIT))
    assert not never_rises(PowerOfTwoSchedule(Restarts(100)))
