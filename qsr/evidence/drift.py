"""Drift along a valley of minima: measured by simulation, and predicted with core/drift.py."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsr.core.drift import drift_multiplier, psi, psi_discrete
from qsr.core.plan import Plan
from qsr.core.seeds import seed_for


@dataclass(frozen=True)
class Valley:
    """A model with outputs f_i = c_i u v_i of parameters (u, v_1, ..., v_m); every target is 1, the
    loss is half the squared error. The minima form a curve, v_i = 1 / (c_i u). With one output and
    c = 1 the only non-zero eigenvalue is u^2 + v^2."""

    scales: tuple[float, ...]
    """c_i, one for each output; there are as many non-zero eigenvalues."""
    u: float
    """Position on the curve."""

    def eigenvalues(self, u: float | None = None) -> NDArray[np.floating[Any]]:
        """Non-zero eigenvalues of the Hessian at `u`, rising: those of J J^T, J the Jacobian."""
        u = self.u if u is None else u
        scales = np.array(self.scales)
        return np.linalg.eigvalsh(1 / u**2 + np.diag(scales**2 * u**2))

    def predicted(self, workers: int, psi_of: Callable[[float], float]) -> float:
        """Drift relative to that of data parallel training; `psi_of` maps an eigenvalue to psi."""
        step = 1e-5 * self.u
        slopes = self.eigenvalues(self.u + step) - self.eigenvalues(self.u - step)
        psis = [psi_of(float(each)) for each in self.eigenvalues()]
        return drift_multiplier(workers, float(slopes @ psis / slopes.sum()))

    def predicted_continuous(self, workers: int, h: int, lr: float) -> float:
        """Prediction of the slow SDE."""
        return self.predicted(workers, lambda eigenvalue: psi(2 * h * lr * eigenvalue))

    def predicted_discrete(self, workers: int, h: int, lr: float) -> float:
        """Prediction for steps of finite size."""
        return self.predicted(workers, lambda eigenvalue: psi_discrete(h, lr, eigenvalue))


@dataclass(frozen=True)
class Drift:
    """Drift of u^2 - v^2, which gradient flow conserves, per step; over many simulated runs."""

    per_step: float
    standard_error: float


def measure_drift(
    valley: Valley, plan: Plan, *, workers: int, noise: float, runs: int, settle_steps: int
) -> Drift:
    """Simulate `runs` runs of local SGD from the valley's point through the rounds of a plan, with
    label noise of standard deviation `noise`, and measure how far they move. Rounds that begin in
    the first `settle_steps`, while fluctuations become stationary, are not counted."""
    generator = torch.Generator().manual_seed(seed_for(1, "drift", workers=workers))
    scales = torch.tensor(valley.scales, dtype=torch.float64)
    u = torch.full((runs, workers, 1), valley.u, dtype=torch.float64)
    v = 1 / (scales * u)
    shape = (runs, workers, len(valley.scales))
    start, first_step = _invariant(u, v), 0
    for round_ in plan.rounds():
        for step in range(round_.start, round_.end):
            lr = plan.schedule(step)
            target = torch.randn(shape, generator=generator, dtype=torch.float64) * noise + 1
            residuals = (scales * u * v - target) * scales
            u, v = u - lr * (residuals * v).sum(-1, keepdim=True), v - lr * residuals * u
        u = u.mean(1, keepdim=True).expand(-1, workers, -1)
        v = v.mean(1, keepdim=True).expand(-1, workers, -1)
        if first_step == 0 and round_.end >= settle_steps:
            start, first_step = _invariant(u, v), round_.end
    moved = (_invariant(u, v) - start) / (plan.total_steps - first_step)
    return Drift(moved.mean().item(), moved.std().item() / math.sqrt(runs))


def _invariant(u: Tensor, v: Tensor) -> Tensor:
    return u[:, 0].square().sum(-1) - v[:, 0].square().sum(-1)
