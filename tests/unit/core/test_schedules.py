"""Learning rates against tables that can be checked by hand."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsr import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    PowerOfTwoSchedule,
    StepSchedule,
)


def test_cosine_by_hand() -> None:
    schedule = CosineSchedule(peak_lr=1.0, final_lr=0.0, warmup_steps=4, total_steps=12)
    expected = {0: 0.0, 1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0, 6: 0.5 + math.sqrt(0.125), 8: 0.5}
    assert {step: schedule(step) for step in expected} == pytest.approx(expected)
    assert schedule(12) == 0.0


def test_warmup_starts_at_the_final_rate() -> None:
    schedule = CosineSchedule(peak_lr=0.8, final_lr=1e-6, warmup_steps=1560, total_steps=62_400)
    assert schedule(0) == 1e-6
    assert schedule(1560) == 0.8
    assert schedule(62_400) == 1e-6


def test_modified_cosine_stops_decaying() -> None:
    whole = CosineSchedule(1.0, 0.0, 0, 100)
    stopped = CosineSchedule(1.0, 0.0, 0, 100, stop_step=60)
    assert [stopped(s) for s in (0, 30, 60)] == [whole(s) for s in (0, 30, 60)]
    assert stopped(61) == stopped(99) == whole(60)


def test_linear_by_hand() -> None:
    schedule = LinearSchedule(peak_lr=1.0, final_lr=0.0, warmup_steps=2, total_steps=10)
    assert [schedule(s) for s in (0, 1, 2, 4, 6, 8, 10)] == [0, 0.5, 1, 0.75, 0.5, 0.25, 0]


def test_step_by_hand() -> None:
    schedule = StepSchedule(1.0, milestones=(4, 8), factor=0.5, total_steps=10, warmup_steps=2)
    assert [schedule(s) for s in range(10)] == [0, 0.5, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_power_of_two_rounds_the_exponent_and_leaves_the_warmup_alone() -> None:
    cosine = CosineSchedule(peak_lr=0.8, final_lr=1e-6, warmup_steps=10, total_steps=100)
    schedule = PowerOfTwoSchedule(cosine)
    assert [schedule(s) for s in range(10)] == [cosine(s) for s in range(10)]
    assert schedule(10) == 1.0  # 0.8 is 2^-0.32
    assert schedule(55) == 0.5  # 0.4 is 2^-1.32
    assert all(math.log2(schedule(s)).is_integer() for s in range(10, 100))
    assert PowerOfTwoSchedule(CosineSchedule(0.008, 1e-6, 10, 100))(10) == 0.0078125


def test_constant() -> None:
    assert {ConstantSchedule(0.1, 10)(s) for s in range(11)} == {0.1}
    assert ConstantSchedule(1.0, 10, warmup_steps=2)(1) == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CosineSchedule(0.1, 0.0, 10, 10), "warmup_steps"),
        (lambda: CosineSchedule(0.1, 0.2, 0, 10), "final_lr"),
        (lambda: CosineSchedule(0.0, 0.0, 0, 10), "peak_lr"),
        (lambda: CosineSchedule(math.nan, 0.0, 0, 10), "peak_lr"),
        (lambda: CosineSchedule(0.1, 0.0, 0, 0), "total_steps"),
        (lambda: CosineSchedule(0.1, 0.0, 5, 10, stop_step=4), "stop_step"),
        (lambda: StepSchedule(0.1, (8, 4), 0.1, 10), "milestones"),
        (lambda: StepSchedule(0.1, (4, 10), 0.1, 10), "milestones"),
        (lambda: StepSchedule(0.1, (4,), 1.5, 10), "factor"),
        (lambda: CosineSchedule(0.1, 0.0, 0, 10)(11), "step 11"),
        (lambda: CosineSchedule(0.1, 0.0, 0, 10)(-1), "step -1"),
    ],
)
def test_refuses(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@given(
    total=st.integers(2, 500),
    warmup=st.floats(0, 0.99),
    peak=st.floats(1e-4, 10),
    final=st.floats(0, 1),
)
def test_rises_in_the_warmup_and_never_after_it(
    total: int, warmup: float, peak: float, final: float
) -> None:
    steps = int(warmup * total)
    for kind in (CosineSchedule, LinearSchedule):
        schedule = kind(peak, final * peak, steps, total)
        rates = [schedule(s) for s in range(total + 1)]
        assert rates[:steps] == sorted(rates[:steps])
        assert rates[steps:] == sorted(rates[steps:], reverse=True)
        assert max(rates) == pytest.approx(peak)
