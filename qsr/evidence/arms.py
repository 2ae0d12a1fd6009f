"""One arm of a simulation, for all of its seeds, at its own peak rate or at the best of several."""

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

import torch

from qsr.evidence.problems import DiagonalNetwork, DigitsMlp, Problem
from qsr.evidence.settings import (
    ArmConfig,
    DiagonalConfig,
    DigitsMlpConfig,
    SimulationConfig,
    TimeAverageConfig,
    make_simulated_plan,
)
from qsr.evidence.simulation import (
    LastAverage,
    MovingAverage,
    Outcome,
    TimeAverage,
    join,
    simulate,
)

TUNING_SEED = 101
"""First seed of the runs that choose a rate."""


@functools.lru_cache(maxsize=2)  # the arms of a simulation share their start
def make_problem(settings: DigitsMlpConfig | DiagonalConfig, seeds: range) -> Problem:
    """The problem of a simulation, for these seeds."""
    match settings:
        case DigitsMlpConfig():
            return DigitsMlp(
                seeds,
                settings.train_size,
                settings.split_seed,
                settings.activation,
                settings.tuning_images,
            )
        case DiagonalConfig():
            return DiagonalNetwork(seeds, settings.train_size, settings.weights, settings.truth)
    assert_never(settings)


@dataclass(frozen=True)
class ArmFound:
    """The outcome of an arm for the reported seeds, at a peak rate that was chosen on others if
    the simulation has a tuning."""

    outcome: Outcome
    tried: Mapping[float, Outcome]
    """By peak rate; empty without tuning."""


def simulate_arm(config: SimulationConfig, name: str) -> ArmFound:
    """Simulate one arm for all seeds, after the choice of its peak rate."""
    torch.set_num_threads(1)  # tensors are small, and other arms run at the same time
    arm, seeds = config.rules[name], range(1, config.seeds + 1)
    if config.tuning is None:
        return ArmFound(_simulate(config, arm, seeds), {})
    first_rate = config.peak_lr if arm.peak_lr is None else arm.peak_lr
    others = range(TUNING_SEED, TUNING_SEED + config.tuning.seeds)
    tried = {}
    for factor in sorted(config.tuning.factors):
        rate = factor * first_rate
        tried[rate] = _simulate(config, dataclasses.replace(arm, peak_lr=rate), others)
        if all(tried[rate].diverged):
            break  # as it would at higher rates
    chosen = dataclasses.replace(arm, peak_lr=choose_rate(tried))
    return ArmFound(_simulate(config, chosen, seeds), tried)


def choose_rate(tried: Mapping[float, Outcome]) -> float:
    """The peak rate with the lowest mean error on what is for tuning, of those with which fewest
    seeds diverged."""

    def score(rate: float) -> tuple[int, float]:
        outcome = tried[rate]
        errors = tuning_errors(outcome)
        whole = [e for e, gone in zip(errors, outcome.diverged, strict=True) if not gone]
        return sum(outcome.diverged), statistics.fmean(whole) if whole else math.inf

    return min(tried, key=score)


def tuning_errors(outcome: Outcome) -> list[float]:
    """Per seed: on the images for tuning, or, where every seed is another problem, the test
    error."""
    return outcome.measured.get("tuning_error", outcome.measured["test_error"])


def _simulate(config: SimulationConfig, arm: ArmConfig, seeds: range) -> Outcome:
    # every seed has its own losses, and so its own rounds
    parts = [range(seed, seed + 1) for seed in seeds] if arm.rule == "adaptive" else [seeds]
    return join(
        [
            simulate(
                make_problem(config.problem, part),
                make_simulated_plan(config, arm),
                part,
                workers=config.workers,
                local_batch=config.local_batch,
                label_noise=config.label_noise,
                average=_time_average(arm.average),
                outer=arm.outer,
            )
            for part in parts
        ]
    )


def _time_average(settings: TimeAverageConfig | None) -> TimeAverage | None:
    if settings is None:
        return None
    if settings.ema is not None:
        return MovingAverage(settings.ema)
    assert settings.last is not None
    return LastAverage(settings.last)
