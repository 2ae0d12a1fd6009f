"""The choice of every arm's peak rate, apart from what is reported."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from qsr.evidence.arms import choose_rate, simulate_arm
from qsr.evidence.settings import SimulationConfig, load_simulation
from qsr.evidence.simulation import Outcome


def outcome(tuning: Sequence[float], test: float = 0.0) -> Outcome:
    """NaN: the seed diverged."""
    return Outcome(
        volume=1.0,
        diverged=[math.isnan(value) for value in tuning],
        measured={"tuning_error": [*tuning], "test_error": [test] * len(tuning)},
        steps=1,
        peak_lr=1.0,
    )


def test_the_lowest_error_on_what_is_for_tuning_is_chosen() -> None:
    assert choose_rate({0.1: outcome([4.0, 6.0]), 0.2: outcome([3.0, 5.0])}) == 0.2
    # whatever is seen on the images that are reported
    assert choose_rate({0.1: outcome([4.0], test=1.0), 0.2: outcome([3.0], test=9.0)}) == 0.2


def test_a_rate_at_which_seeds_diverge_is_not_chosen() -> None:
    tried = {0.1: outcome([8.0, 8.0]), 0.2: outcome([1.0, math.nan]), 0.4: outcome([math.nan] * 2)}
    assert choose_rate(tried) == 0.1


def small(**changes: int) -> SimulationConfig:
    settings = [f"{name}={value}" for name, value in changes.items()]
    return load_simulation(
        [
            "experiment=diagonal",
            "total_steps=400",
            "workers=2",
            "tuning={factors:[1.0,0.5],seeds:2}",
            *settings,
        ]
    )


def test_the_choice_does_not_see_the_reported_seeds() -> None:
    few, more = (simulate_arm(small(seeds=seeds), "constant H") for seeds in (1, 3))
    assert few.tried == more.tried
    assert list(few.tried) == [0.01, 0.02]
    assert few.outcome.peak_lr == more.outcome.peak_lr == choose_rate(few.tried)
    seen = {value for tried in few.tried.values() for value in tried.measured["test_error"]}
    assert len(seen) == 4
    assert not seen & set(more.outcome.measured["test_error"])
    assert len(more.outcome.measured["test_error"]) == 3


def test_rates_are_tried_until_all_seeds_diverge() -> None:
    config = small(seeds=1)
    assert config.tuning is not None
    config = replace(config, tuning=replace(config.tuning, factors=(1.0, 200.0, 100.0, 0.5)))
    tried = simulate_arm(config, "constant H").tried
    assert {rate: found.diverged for rate, found in tried.items()} == {
        0.01: [False, False], 0.02: [False, False], 2.0: [True, True],
    }  # fmt: skip


def test_h_at_the_peak_stays() -> None:
    """At half the rate QSR's rounds begin with as many steps, and so are as many."""
    tried = simulate_arm(small(seeds=1), "QSR").tried
    assert tried[0.02].volume == tried[0.01].volume < 1 / 8


def test_images_are_for_tuning_or_reported() -> None:
    pytest.importorskip("sklearn")
    settings = ["experiment=digits_mlp", "seeds=2", "total_steps=4", "workers=2"]
    every = simulate_arm(load_simulation(settings), "QSR").outcome.measured
    parts = simulate_arm(
        load_simulation([*settings, "problem.tuning_images=600"]), "QSR"
    ).outcome.measured
    for whole, tuning, test in zip(
        every["test_error"], parts["tuning_error"], parts["test_error"], strict=True
    ):
        assert 600 * tuning + 1117 * test == pytest.approx(1717 * whole, rel=1e-4)
