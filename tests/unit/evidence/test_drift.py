"""The drift along a valley of minima: its geometry, and simulation against prediction."""

import numpy as np
import pytest
import torch

from qsr.core.plan import Plan
from qsr.core.rules import ConstantRule
from qsr.core.schedules import ConstantSchedule
from qsr.evidence.drift import Valley, measure_drift
from qsr.evidence.studies import DriftCase, drift_rows

ONE = Valley((1.0,), u=2.0)
THREE = Valley((2.0, 0.5, 1.0), u=1.5)


@pytest.mark.parametrize("valley", [ONE, THREE])
def test_eigenvalues_are_those_of_the_hessian(valley: Valley) -> None:
    scales = torch.tensor(valley.scales, dtype=torch.float64)

    def loss(parameters: torch.Tensor) -> torch.Tensor:
        return (scales * parameters[0] * parameters[1:] - 1).square().sum() / 2

    point = torch.cat([torch.tensor([valley.u], dtype=torch.float64), 1 / (scales * valley.u)])
    hessian = torch.autograd.functional.hessian(loss, point)
    values = np.linalg.eigvalsh(np.asarray(hessian))
    # along the valley it is flat
    assert values[0] == pytest.approx(0.0, abs=1e-9)
    assert valley.eigenvalues() == pytest.approx(values[1:])


def test_one_eigenvalue_is_the_models() -> None:
    assert ONE.eigenvalues() == pytest.approx([2.0**2 + 0.5**2])
    # whatever the slopes, one eigenvalue's psi is all there is
    assert ONE.predicted(8, lambda _: 0.25) == pytest.approx(1 + 7 * 0.25)


def test_several_eigenvalues_count_by_how_they_change_along_the_valley() -> None:
    step = 1e-6
    slopes = (THREE.eigenvalues(1.5 + step) - THREE.eigenvalues(1.5 - step)) / (2 * step)
    psis = [0.1, 0.2, 0.3]
    values = iter(psis)
    expected = 1 + 3 * float(slopes @ psis) / slopes.sum()
    assert THREE.predicted(4, lambda _: next(values)) == pytest.approx(expected, rel=1e-6)


def test_measured_and_predicted_agree() -> None:
    """Eight workers, rounds of 8 steps: 3.92 times the drift of data parallel training."""
    drifts = {}
    for h in (1, 8):
        plan = Plan(ConstantSchedule(0.02, 120 + 512), ConstantRule(h))
        drift = measure_drift(ONE, plan, workers=8, noise=0.05, runs=400, settle_steps=120)
        drifts[DriftCase("one eigenvalue", 8, h, 0.02, 0.05)] = drift
    alone, local = drift_rows(drifts)
    assert (alone["multiplier"], alone["standard_error"]) == (1.0, 0.0)
    assert local["predicted_discrete"] == pytest.approx(3.922, abs=1e-3)
    assert local["standard_error"] < 0.04
    assert local["multiplier"] == pytest.approx(local["predicted_discrete"], rel=0.05)
