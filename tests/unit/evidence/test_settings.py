"""Settings of scripts/simulate.py: every experiment composes, and what is wrong is named."""

import pytest

from qsr.errors import ConfigError
from qsr.evidence.settings import load_simulation, make_simulated_plan, simulation_names

DIGITS = "experiment=digits_mlp"


@pytest.mark.parametrize("name", simulation_names())
def test_every_experiment_composes(name: str) -> None:
    config = load_simulation([f"experiment={name}"])
    plans = {rule: make_simulated_plan(config, of) for rule, of in config.rules.items()}
    assert next(iter(plans)) == "QSR"
    assert {plan.total_steps for plan in plans.values()} == {config.total_steps}
    final = config.peak_lr * config.final_fraction
    for plan in plans.values():
        assert plan.schedule(0) == pytest.approx(config.peak_lr)
        assert plan.schedule(config.total_steps) == pytest.approx(final)


def test_volumes_are_those_of_the_design() -> None:
    """One and a half decades of an exponential decay from H = 4, 8,000 steps."""
    config = load_simulation([DIGITS])
    volumes = {name: make_simulated_plan(config, of).volume for name, of in config.rules.items()}
    assert {name: round(volume, 3) for name, volume in volumes.items()} == {
        "QSR": 0.039, "data parallel": 1.0, "constant H": 0.25, "beta/eta": 0.075, "cubic": 0.026,
    }  # fmt: skip


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
        ([], "experiment"),
    ],
)
def test_wrong_settings_are_refused_in_a_line(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as found:
        load_simulation(settings)
    assert message in str(found.value)
    assert "\n" not in str(found.value)
