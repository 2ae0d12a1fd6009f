"""Rounds that follow the training loss, on virtual workers in one process."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qsr import AdaptiveRule, CosineSchedule
from qsr.core.open_plan import OpenPlan
from qsr.errors import TrainingError
from tests.support import LossWithAccident, Setup, adamw, batchnorm_net, sgd, train

COSINE = CosineSchedule(peak_lr=0.1, final_lr=1e-4, warmup_steps=4, total_steps=40)


def adaptive(**changes: Any) -> Setup:
    """A new setup: an open plan is used up by a run."""
    setup = Setup(OpenPlan(COSINE, AdaptiveRule(6)), net=batchnorm_net, optimizer=sgd(momentum=0.9))
    return replace(setup, **changes)


def rounds_in(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == "round"]


def test_every_round_has_the_h_that_the_logged_losses_give() -> None:
    rows = rounds_in(train(adaptive()).tracker.rows)
    assert [row["round"] for row in rows] == list(range(len(rows)))
    start, lengths = 0, []
    for number, row in enumerate(rows):
        rate = COSINE(max(start, 4))  # in the warm-up that of the first step after it
        h = 6.0
        if number:
            fall = rows[number - 1]["loss"] / rows[0]["loss"]
            h = max(1, math.ceil(6 * math.sqrt(0.1 / rate * fall)))
        assert row["h"] == min(h, 40 - start)
        assert row["lr"] == COSINE(start)
        start += row["h"]
        lengths.append(row["h"])
        assert row["step"] == start
    assert start == 40
    assert len(set(lengths[:-1])) > 2


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_loss_of_a_round_is_the_mean_over_its_steps_and_workers(
    micro_batch: int | None,
) -> None:
    rig = train(adaptive(workers=4, log_every=6, micro_batch=micro_batch, stop_after=6))
    (first,) = rounds_in(rig.tracker.rows)
    (trained,) = (row for row in rig.tracker.rows if row["kind"] == "train")
    assert (first["step"], first["h"]) == (6, 6)
    assert first["loss"] == pytest.approx(trained["loss"], rel=1e-9)


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer": adamw(), "average_momentum": True}, {"precision": "fp16"}],
    ids=str,
)
@pytest.mark.parametrize("stop", [5, 6, 19, 20, 21])
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, changes: dict[str, Any], stop: int
) -> None:
    """In the middle of a round or at its end: the same losses, rounds and bits."""
    whole = train(adaptive(**changes))
    stopped = train(adaptive(**changes, folder=tmp_path, stop_after=stop, checkpoint_every=5))
    resumed = train(adaptive(**changes, folder=tmp_path, checkpoint_every=5))
    rows = [*rounds_in(stopped.tracker.rows), *rounds_in(resumed.tracker.rows)]
    assert rows == rounds_in(whole.tracker.rows)
    for ours, theirs in zip(resumed.workers, whole.workers, strict=True):
        for name, tensor in theirs.tensors().items():
            assert torch.equal(ours.tensors()[name], tensor), name


def test_a_loss_that_is_not_finite_does_not_count() -> None:
    accident = LossWithAccident(at=6, value=math.inf)  # the last of the first round
    plan = OpenPlan(COSINE, AdaptiveRule(6))
    with pytest.raises(TrainingError, match="the loss is not finite at or before step 12"):
        train(adaptive(plan=plan, workers=1, loss=accident, stop_after=12, log_every=12))
    five = OpenPlan(COSINE, AdaptiveRule(5))
    train(adaptive(plan=five, workers=1, stop_after=5))
    assert plan.losses[0] == five.losses[0]


def test_a_round_without_a_finite_loss_ends_the_run() -> None:
    plan, accident = OpenPlan(COSINE, AdaptiveRule(1)), LossWithAccident(at=1, value=math.nan)
    with pytest.raises(TrainingError, match="no loss of round 0 is finite"):
        train(adaptive(plan=plan, workers=1, loss=accident))
