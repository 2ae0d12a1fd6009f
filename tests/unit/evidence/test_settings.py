"""Settings of scripts/simulate.py: every experiment composes, and what is wrong is named."""

import pytest

from qsr.core.plan import Plan
from qsr.errors import ConfigError
from qsr.evidence.settings import (
    SimulationConfig,
    load_simulation,
    make_simulated_plan,
    simulation_names,
    time_in_steps,
)

DIGITS = "experiment=digits_mlp"


def known_plans(config: SimulationConfig) -> dict[str, Plan]:
    """Those that are known before the run."""
    plans = {name: make_simulated_plan(config, arm) for name, arm in config.rules.items()}
    return {name: plan for name, plan in plans.items() if isinstance(plan, Plan)}


@pytest.mark.parametrize("name", simulation_names())
def test_every_experiment_composes(name: str) -> None:
    config = load_simulation([f"experiment={name}"])
    plans = {rule: make_simulated_plan(config, of) for rule, of in config.rules.items()}
    assert next(iter(plans)) == "QSR"
    for arm, plan in zip(config.rules.values(), plans.values(), strict=True):
        peak = config.peak_lr if arm.peak_lr is None else arm.peak_lr
        fraction = config.final_fraction if arm.final_fraction is None else arm.final_fraction
        assert (plan.total_steps == config.total_steps) == (arm.same_time is None)
        assert plan.schedule(0) == pytest.approx(peak)
        assert plan.schedule(plan.total_steps) == pytest.approx(peak * fraction)


def test_volumes_are_those_of_the_design() -> None:
    """One and a half decades of an exponential decay from H = 4, 8,000 steps."""
    config = load_simulation([DIGITS])
    assert {name: round(plan.volume, 3) for name, plan in known_plans(config).items()} == {
        "QSR": 0.039, "data parallel": 1.0, "constant H": 0.25, "beta/eta": 0.075, "cubic": 0.026,
    }  # fmt: skip


def test_equal_time_is_as_many_steps_as_fit() -> None:
    """QSR averages 311 times in 8,000 steps; an all-reduce takes one step, or four."""
    config = load_simulation(["experiment=digits_mlp_same_time"])
    plans = known_plans(config)
    steps = {name: plan.total_steps for name, plan in plans.items()}
    assert plans["QSR"].num_rounds == 311
    assert steps["data parallel, r = 1"] == (8000 + 311) // 2
    assert steps["data parallel, r = 4"] == (8000 + 4 * 311) // 5
    for name, allreduce, budget in (("QSR, r = 1", 1, 16_000), ("QSR, r = 4", 4, 40_000)):
        taken = time_in_steps(plans[name], allreduce)
        assert budget - 1 - allreduce < taken <= budget


def test_growth_gives_qsrs_volume_from_its_first_round() -> None:
    config = load_simulation(["experiment=digits_mlp_other_rules"])
    plans = known_plans(config)
    assert plans["linear in the round"].volume == pytest.approx(plans["QSR"].volume, rel=0.02)
    for arm in config.rules.values():
        assert make_simulated_plan(config, arm).round_at(0).length == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["experiment=digits"], "did you mean digits_mlp"),
        ([DIGITS, "worker=3"], "did you mean workers"),
        ([DIGITS, "problem.train_siz=3"], "train_siz is not a setting of problem"),
        ([DIGITS, "rules.QSR.exponnet=3"], "did you mean rules.QSR.exponent?"),
        ([DIGITS, "workers=0"], "workers=0: input should be greater than or equal to 1"),
        ([DIGITS, "problem.train_size=5"], "greater than or equal to 20"),
        ([DIGITS, "final_fraction=0"], "final_lr must lie in"),
        ([DIGITS, "rules.QSR.average={ema:0.9,last:0.5}"], "average: set one of ema and last"),
        ([DIGITS, "rules.QSR.rule=stagewise"], "exponent belongs to rule: power"),
        ([DIGITS, "rules.QSR.growth=1.0"], "growth belongs to rule: growing"),
        (
            [DIGITS, "rules.QSR.same_time={arm:DDP,allreduce_steps:1.0}"],
            "same_time.arm=DDP is not one of the rules",
        ),
        ([], "experiment"),
    ],
)
def test_wrong_settings_are_refused_in_a_line(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as found:
        load_simulation(settings)
    assert message in str(found.value)
    assert "\n" not in str(found.value)
