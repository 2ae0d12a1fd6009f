"""The laptop studies behind docs/evidence.md: what is simulated, and the records of it."""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, assert_never

import torch

from qsr.core.plan import Plan
from qsr.core.rules import ConstantRule
from qsr.core.schedules import ConstantSchedule
from qsr.evidence.drift import Drift, Valley, measure_drift
from qsr.evidence.problems import DiagonalNetwork, DigitsMlp, Problem
from qsr.evidence.settings import (
    DiagonalConfig,
    DigitsMlpConfig,
    SimulationConfig,
    make_simulated_plan,
)
from qsr.evidence.simulation import Outcome, simulate
from qsr.run.environment import environment
from qsr.sync.communicator import Topology

VALLEYS = {
    "one eigenvalue": Valley((1.0,), u=2.0),
    "nine eigenvalues": Valley((2.0, *[0.5] * 8), u=3.0),
}
SMALL_NOISE = 0.05
"""Of the labels: so little that the model hardly moves along the valley within a round, as the
expansion assumes."""
RUNS = 1000
STEPS = 1024
"""Of a drift, at least; and several rounds."""


@dataclass(frozen=True)
class DriftCase:
    """One measurement of the drift."""

    valley: str
    workers: int
    h: int
    lr: float
    noise: float


def drift_cases() -> list[DriftCase]:
    """One eigenvalue (4.25): H * lr over four decades. Nine, of 2.25 to 36. Then more noise, until
    a round's own movement along the valley is no longer small: it grows with noise^2 lr^2 H."""
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
    """The drift of one case."""
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
    """Every case beside the predictions: the drift relative to that of H = 1, which is data
    parallel training, of the same valley, workers, learning rate and noise."""
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
    """results/theory/drift.json"""
    valleys = {
        name: {
            "scales": list(valley.scales),
            "u": valley.u,
            "eigenvalues": valley.eigenvalues().tolist(),
        }
        for name, valley in VALLEYS.items()
    }
    return {"environment": study_environment(), "valleys": valleys, "rows": drift_rows(measured)}


def make_problem(config: SimulationConfig) -> Problem:
    """What the simulation learns, for all of its seeds."""
    return _make_problem(config.problem, config.seeds)


@functools.lru_cache(maxsize=1)  # the rules of a simulation begin alike
def _make_problem(settings: DigitsMlpConfig | DiagonalConfig, seeds: int) -> Problem:
    numbers = range(1, seeds + 1)
    match settings:
        case DigitsMlpConfig():
            return DigitsMlp(numbers, settings.train_size, settings.split_seed, settings.activation)
        case DiagonalConfig():
            return DiagonalNetwork(numbers, settings.train_size, settings.weights, settings.truth)
    assert_never(settings)


def simulate_rule(config: SimulationConfig, rule: str) -> Outcome:
    """One of the simulation's rules, on all of its seeds."""
    torch.set_num_threads(1)  # tensors are small; other rules run beside
    return simulate(
        make_problem(config),
        make_simulated_plan(config, config.rules[rule]),
        range(1, config.seeds + 1),
        workers=config.workers,
        local_batch=config.local_batch,
        label_noise=config.label_noise,
    )


def simulation_record(
    name: str, config: SimulationConfig, outcomes: Mapping[str, Outcome]
) -> dict[str, Any]:
    """results/theory/NAME.json. What a diverged seed measures is null."""
    rows = {}
    for rule in config.rules:
        outcome = outcomes[rule]
        measured = {
            quantity: [
                None if diverged else value
                for value, diverged in zip(values, outcome.diverged, strict=True)
            ]
            for quantity, values in outcome.measured.items()
        }
        rows[rule] = {"volume": outcome.volume, "diverged": sum(outcome.diverged), **measured}
    settings = dataclasses.asdict(config)
    return {
        "experiment": name,
        "environment": study_environment(),
        "config": settings,
        "rules": rows,
    }


def run_studies(
    simulations: Mapping[str, SimulationConfig], cases: Sequence[DriftCase]
) -> Iterator[tuple[tuple[str, str] | DriftCase, Outcome | Drift]]:
    """All rules of the simulations and all cases, side by side on the processors of this machine:
    (simulation, rule) or case, and what came of it, as they finish."""
    processes = os.cpu_count() or 1
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        jobs: dict[Any, tuple[str, str] | DriftCase] = {}
        for name, config in simulations.items():
            for rule in config.rules:
                jobs[pool.submit(simulate_rule, config, rule)] = (name, rule)
        for case in cases:
            jobs[pool.submit(measure_case, case)] = case
        for done in as_completed(jobs):
            yield jobs[done], done.result()


def study_environment() -> dict[str, Any]:
    """Versions, revision and hardware, for a record of a study on this machine's processors."""
    about = environment(Topology(0, 1, 0, 1), "cpu")
    del about["host"]  # nobody else's concern
    return about
