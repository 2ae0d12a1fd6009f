"""The multiplier of the drift along the minima: its limits, and against sums by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsr.core.drift import drift_multiplier, psi, psi_discrete


@pytest.mark.parametrize(
    ("x", "value"),
    [
        (0.0, 0.0),
        (1.0, math.exp(-1)),  # (1/e - 1 + 1) / 1
        (2.0, (math.exp(-2) + 1) / 2),
        (1e6, 1 - 1e-6),
    ],
)
def test_psi(x: float, value: float) -> None:
    assert psi(x) == pytest.approx(value, rel=1e-12)


@given(x=st.floats(1e-8, 1e-3))
def test_psi_of_small_numbers_is_its_series(x: float) -> None:
    assert psi(x) == pytest.approx(x / 2 - x * x / 6 + x**3 / 24, rel=1e-8)


@given(h=st.integers(1, 50), lr=st.floats(0.001, 0.5), eigenvalue=st.floats(0.1, 3.0))
def test_discrete_psi_is_the_mean_over_a_round(h: int, lr: float, eigenvalue: float) -> None:
    """Of 1 - a^2s over the steps s = 0 .. H - 1: what a worker's own noise has built up."""
    rest = (1 - lr * eigenvalue) ** 2
    mean = sum(1 - rest**s for s in range(h)) / h
    assert psi_discrete(h, lr, eigenvalue) == pytest.approx(mean, abs=1e-9)


def test_data_parallel_training_is_the_discrete_form_at_h_1() -> None:
    assert psi_discrete(1, 0.3, 2.0) == 0.0
    assert drift_multiplier(8, psi_discrete(1, 0.3, 2.0)) == 1.0


@given(x=st.floats(0.01, 100.0))
def test_small_steps_give_the_slow_sde(x: float) -> None:
    h = 10_000
    assert psi_discrete(h, x / (2 * h), 1.0) == pytest.approx(psi(x), rel=0.02, abs=2e-4)


def test_the_multiplier_lies_between_1_and_k() -> None:
    assert drift_multiplier(16, psi(1e-9)) == pytest.approx(1.0)
    assert drift_multiplier(16, psi(1e9)) == pytest.approx(16.0)
    assert drift_multiplier(1, psi(1.0)) == 1.0
