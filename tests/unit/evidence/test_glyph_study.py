"""The study on glyphs: its runs, their order, and the time it may take."""

import itertools
import math
from collections.abc import Sequence

import pytest

from qsr.config.planning import make_plan
from qsr.evidence.glyph_study import GlyphStudy, Record, Trial, config_of, missing, trials, within

STUDY = GlyphStudy()
IMAGES = 26_965


@pytest.mark.parametrize("model", STUDY.models)
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_rules_begin_with_the_same_rounds(model: str, factor: float) -> None:
    volumes = {}
    for rule in STUDY.rules:
        plan = make_plan(config_of(Trial(model, rule, 0.0, factor, 1), ()), IMAGES)
        at_peak = plan.round_at(plan.schedule.warmup_steps).length
        assert at_peak == {"parallel": 1, "matched": 9}.get(rule, 4)
        volumes[rule] = 100 * plan.volume
    assert volumes["parallel"] == 100
    assert volumes["constant"] == pytest.approx(25, abs=0.1)
    assert volumes["matched"] == pytest.approx(volumes["quadratic"], abs=0.5)
    assert volumes["constant"] > volumes["linear"] > volumes["quadratic"] > volumes["cubic"]


def test_complete_sets_come_first() -> None:
    order = trials(STUDY)
    assert len(order) == len(set(order)) == 2 * 6 * 2 * 3 * 5
    assert [trial.rule for trial in order[:6]] == list(STUDY.rules)
    assert {(trial.model, trial.noise, trial.rate_factor) for trial in order[:30]} == {
        ("resnet", 0.2, 1.0)
    }
    assert [trial.seed for trial in order[:30:6]] == [1, 2, 3, 4, 5]
    assert {trial.rate_factor for trial in order[:120]} == {1.0}


def test_settings_reach_the_run() -> None:
    config = config_of(Trial("vit", "quadratic", 0.2, 0.5, 3), ("epochs=7",))
    assert (config.seed, config.epochs, config.data.label_noise) == (3, 7, 0.2)
    assert config.schedule.peak_lr == 0.0005
    assert config.experiment.startswith("evidence/glyphs_vit_quadratic")


def test_finished_runs_are_not_repeated() -> None:
    words = ("workers=4", "epochs=2", "cluster.threads_per_rank=1", "data.root=elsewhere")
    study = GlyphStudy(models=("vit",), rules=("quadratic",), seeds=(1, 2), settings=words)
    done = trials(study)[1]
    records = [{**done._asdict(), "settings": ["epochs=2", "workers=4"], "top1": 50.0}]
    assert missing(study, records) == [trial for trial in trials(study) if trial != done]
    records[0]["settings"] = ["epochs=3"]
    assert missing(study, records) == trials(study)


def echo(trial: Trial, settings: Sequence[str]) -> Record:
    return {"seed": trial.seed, "settings": list(settings)}


def test_every_run_is_done_if_there_is_time() -> None:
    waiting = [Trial("vit", "quadratic", 0.0, 1.0, seed) for seed in range(12)]
    done = list(within(waiting, ("x=1",), processes=2, seconds=math.inf, measure=echo))
    assert {record["seed"] for record in done} == set(range(12))
    assert all(record["settings"] == ["x=1"] for record in done)


def test_no_run_begins_that_would_end_too_late() -> None:
    ticks = itertools.count()  # a second passes whenever the clock is read, so a run takes one
    waiting = [Trial("vit", "quadratic", 0.0, 1.0, seed) for seed in range(12)]
    done = within(
        waiting, (), processes=1, seconds=10.5, measure=echo, clock=lambda: float(next(ticks))
    )
    # asked after 1, 4, 7 and 10 seconds; the last one would end after 11
    assert [record["seed"] for record in done] == [0, 1, 2]
