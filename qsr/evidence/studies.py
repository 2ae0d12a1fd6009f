"""The laptop studies behind docs/evidence-simulations.md: the simulations and their records."""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from typing import Any

import torch

from qsr.core.plan import Plan
from qsr.core.rules import ConstantRule
from qsr.core.schedules import ConstantSchedule
from qsr.evidence.arms import ArmFound, simulate_arm, tuning_errors
from qsr.evidence.drift import Drift, Valley, measure_drift
from qsr.evidence.pool import process_pool
from qsr.evidence.settings import SimulationConfig
from qsr.evidence.simulation import Outcome
from qsr.run.environment import environment
from qsr.sync.topology import Topology

VALLEYS = {
    "one eigenvalue": Valley((1.0,), u=2.0),
    "nine eigenvalues": Valley((2.0, *[0.5] * 8), u=3.0),
}
SMALL_NOISE = 0.05
"""Label noise so small that the model hardly moves along the valley within a round, as the
expansion assumes."""
RUNS = 1000
STEPS = 1024
"""Least number of steps to measure a drift; rounded up to whole rounds."""


@dataclass(frozen=True)
class DriftCase:
    """One measurement of the drift."""

    valley: str
    workers: int
    h: int
    lr: float
    noise: float


def drift_cases() -> list[DriftCase]:
    """Cases with one eigenvalue (4.25) and H * lr over four decades, with nine eigenvalues (2.25 to
    36), and with more noise, until the movement along the valley within a round, which grows with
    noise^2 lr^2 H, is no longer small."""
    one, nine = VALLEYS
    every = [2**power for power in range(11)]
    grid = [(h, 0.001) for h in every[:7]] + [(h, 0.02) for h in every[:10]]
    cases = [DriftCase(one, k, h, lr, SMALL_NOISE) for k in (2, 4, 8, 16) for h, lr in grid]
    cases += [DriftCase(nine, k, h, 0.002, SMALL_NOISE) for k in (4, 16) for h in every[::2]]
    cases += [
        DriftCase(one, 8, h, 0.02, noise) for noise in (0.5, 1.0, 2.0) for h in (1, *every[3:])
    ]
    return cases


def measure_case(case: DriftCase) -> Drift:
    """Measure the drift of one case."""
    torch.set_num_threads(1)
    valley = VALLEYS[case.valley]
    # in whole rounds
    settle = math.ceil(10 / (case.lr * valley.eigenvalues()[0] * case.h)) * case.h
    steps = settle + math.ceil(STEPS / case.h) * case.h
    return measure_drift(
        valley,
        Plan(ConstantSchedule(case.lr, steps), ConstantRule(case.h)),
        workers=case.workers,
        noise=case.noise,
        runs=RUNS if case.valley == "one eigenvalue" else RUNS // 4,
        settle_steps=settle,
    )


def drift_rows(measured: Mapping[DriftCase, Drift]) -> list[dict[str, Any]]:
    """Every case with its predictions. The drift is relative to that with H = 1, which is data
    parallel training, for the same valley, workers, learning rate and noise."""
    rows = []
    for case, drift in measured.items():
        valley = VALLEYS[case.valley]
        parallel = measured[dataclasses.replace(case, h=1)]
        multiplier = drift.per_step / parallel.per_step
        errors = [each.standard_error / each.per_step for each in (drift, parallel)]
        rows.append(
            {
                **dataclasses.asdict(case),
                "multiplier": multiplier,
                "standard_error": multiplier * math.hypot(*errors) if case.h > 1 else 0.0,
                "predicted_continuous": valley.predicted_continuous(case.workers, case.h, case.lr),
                "predicted_discrete": valley.predicted_discrete(case.workers, case.h, case.lr),
            }
        )
    return rows


def drift_record(measured: Mapping[DriftCase, Drift]) -> dict[str, Any]:
    """The record for results/evidence/simulations/drift.json."""
    valleys = {
        name: {
            "scales": list(valley.scales),
            "u": valley.u,
            "eigenvalues": valley.eigenvalues().tolist(),
        }
        for name, valley in VALLEYS.items()
    }
    return {"environment": study_environment(), "valleys": valleys, "rows": drift_rows(measured)}


def simulation_record(
    name: str, config: SimulationConfig, found: Mapping[str, ArmFound]
) -> dict[str, Any]:
    """The record of a simulation; measurements of diverged seeds are null."""
    rows = {}
    for arm in config.rules:
        outcome, tried = found[arm].outcome, found[arm].tried
        rows[arm] = {
            "volume": outcome.volume,
            "steps": outcome.steps,
            "peak_lr": outcome.peak_lr,
            "diverged": sum(outcome.diverged),
            **{name: _whole(values, outcome) for name, values in outcome.measured.items()},
        }
        if tried:
            rows[arm]["tried"] = [
                {"peak_lr": rate, "tuning_error": _whole(tuning_errors(trial), trial)}
                for rate, trial in tried.items()
            ]
    settings = dataclasses.asdict(config)
    return {
        "experiment": name,
        "environment": study_environment(),
        "config": settings,
        "rules": rows,
    }


def _whole(values: Sequence[float], outcome: Outcome) -> list[float | None]:
    return [
        None if diverged else value
        for value, diverged in zip(values, outcome.diverged, strict=True)
    ]


def run_studies(
    simulations: Mapping[str, SimulationConfig], cases: Sequence[DriftCase]
) -> Iterator[tuple[tuple[str, str] | DriftCase, ArmFound | Drift]]:
    """Run all rules of the simulations and all cases in parallel on this machine's processors.
    Yields ((simulation, rule) or case, result) as they finish."""
    processes = os.cpu_count() or 1
    with process_pool(processes, __name__) as pool:
        jobs: dict[Any, tuple[str, str] | DriftCase] = {}
        for name, config in simulations.items():
            for rule in config.rules:
                jobs[pool.submit(simulate_arm, config, rule)] = (name, rule)
        for case in cases:
            jobs[pool.submit(measure_case, case)] = case
        for done in as_completed(jobs):
            yield jobs[done], done.result()


def study_environment() -> dict[str, Any]:
    """Versions, revision and hardware of this machine, for the record of a study."""
    about = environment(Topology(0, 1, 0, 1), "cpu")
    del about["host"]  # not for publication
    return about
