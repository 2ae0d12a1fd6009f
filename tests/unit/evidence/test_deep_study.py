"""Which runs the study of deep networks is made of, and how a rate is chosen."""

from dataclasses import replace

import pytest

from qsr.config.load import load_config, run_folder
from qsr.config.planning import make_plan
from qsr.config.schema import AdamWConfig, PowerSync, QuadraticSync
from qsr.data.prepare.digits import FEW_DIGITS
from qsr.evidence.deep_study import (
    DeepStudy,
    Measured,
    Trial,
    at_rate,
    choose_rates,
    reported_runs,
    tuning_runs,
    with_recipes,
)

SMALL = DeepStudy(rules=("linear", "quadratic"), tuning_seeds=(101,), seeds=(1, 2))


@pytest.mark.parametrize("model", DeepStudy.models)
def test_the_experiments_differ_in_their_rule_only(model: str) -> None:
    first, *others = (at_rate(model, rule, *_peak(model)) for rule in DeepStudy.rules)
    for other in others:
        assert replace(other, sync=first.sync, experiment=first.experiment) == first


def test_the_recipe_of_data_parallel_runs_is_the_papers() -> None:
    """It is that of the paper's rows, and all else is as for the other rules."""
    plain, recipe, paper = (
        load_config([f"experiment={name}"])
        for name in (
            "evidence/vit_parallel",
            "evidence/vit_parallel_recipe",
            "vit_b16_b4096/parallel",
        )
    )
    assert isinstance(paper.optimizer, AdamWConfig)
    assert (paper.optimizer.weight_decay, paper.optimizer.clip_norm) == (0.1, 1.0)
    changed = replace(plain.optimizer, weight_decay=0.1, clip_norm=1.0)
    assert replace(plain, optimizer=changed, experiment=recipe.experiment) == recipe
    rates = {("vit", "parallel"): 0.5, ("resnet", "parallel"): 0.25}
    assert with_recipes(rates) == rates | {("vit", "parallel_recipe"): 0.5}


@pytest.mark.parametrize("model", DeepStudy.models)
@pytest.mark.parametrize("rule", ["constant", "linear", "quadratic"])
@pytest.mark.parametrize("factor", DeepStudy.rate_factors)
def test_h_at_the_peak_is_4_at_any_rate(model: str, rule: str, factor: float) -> None:
    rate, settings = _peak(model)
    config = at_rate(model, rule, factor * rate, settings)
    assert config.schedule.peak_lr == factor * rate
    plan = make_plan(config, FEW_DIGITS["test"].train)
    assert plan.round_at(plan.schedule.warmup_steps).length == 4
    base = make_plan(at_rate(model, rule, rate, settings), FEW_DIGITS["test"].train)
    assert plan.num_rounds == pytest.approx(base.num_rounds, rel=0.01)


def test_coefficients_follow_the_rate() -> None:
    rate, settings = _peak("resnet")
    linear, qsr = (at_rate("resnet", rule, 2 * rate, settings).sync for rule in SMALL.rules)
    assert isinstance(linear, PowerSync)
    assert isinstance(qsr, QuadraticSync)
    assert linear.coefficient == pytest.approx(4 * 2 * rate)
    assert qsr.alpha == pytest.approx(2.1875 * 2 * rate)  # as 0.0175 / 0.008 in the paper


def test_rates_are_tuned_on_other_images_and_seeds() -> None:
    tuning = tuning_runs(SMALL)
    rates = dict.fromkeys(((t.model, t.rule) for t in tuning), 0.3)
    reported = reported_runs(SMALL, rates)
    assert len(tuning) == 2 * 2 * 3
    assert len(reported) == 2 * 2 * 2
    assert {config.data.root for config in tuning.values()} == {"data/few_digits_tuning"}
    assert {config.data.root for config in reported.values()} == {"data/few_digits"}
    assert not {config.seed for config in tuning.values()} & {c.seed for c in reported.values()}
    folders = [run_folder(config) for config in (*tuning.values(), *reported.values())]
    assert len(set(folders)) == len(folders)


def test_the_rate_with_the_lowest_mean_error_is_chosen() -> None:
    def tried(rates: dict[float, list[tuple[float, float]]]) -> dict[Trial, Measured]:
        return {
            Trial("vit", "constant", rate, seed): Measured(error, loss, 0.25, 0.0, 0.0, 1.0, 0.1)
            for rate, of_seeds in rates.items()
            for seed, (error, loss) in enumerate(of_seeds)
        }

    better = {1.0: [(10.0, 0.1), (8.0, 0.1)], 2.0: [(1.0, 0.5), (11.0, 0.5)]}
    assert choose_rates(tried(better)) == {("vit", "constant"): 2.0}
    equal = {1.0: [(10.0, 0.1), (8.0, 0.1)], 2.0: [(9.0, 0.5), (9.0, 0.5)]}
    assert choose_rates(tried(equal)) == {("vit", "constant"): 1.0}


def _peak(model: str) -> tuple[float, list[str]]:
    """The experiments' peak rate, and no further settings."""
    return next(t.rate for t in tuning_runs(replace(SMALL, models=(model,), rate_factors=(1,)))), []
