"""Averages over time against sums in double precision, from the models of shorter runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from qsr import (
    ConstantRule,
    CosineSchedule,
    EveryStepRule,
    Plan,
    PostLocalRule,
    QuadraticRule,
    SwapRule,
)
from qsr.config.schema import EmaConfig
from qsr.core.outer import OuterOptions
from qsr.errors import TrainingError
from tests.support import NO_EMA, Rig, Setup, batchnorm_net, build, digits_like, sgd, train

COSINE = CosineSchedule(peak_lr=0.1, final_lr=1e-4, warmup_steps=4, total_steps=24)
GRADIENTS = Plan(COSINE, EveryStepRule("gradients"))
QSR = Plan(COSINE, QuadraticRule(h_base=2, alpha=0.1))
"""Rounds of 2 steps until 14, then of 3 and 7."""
FIVES = Plan(COSINE, ConstantRule(5))
BOTH = EmaConfig(decay=0.8, uniform_fraction=0.6)
"""Uniform from step 10, which begins a round of QSR and of FIVES."""
Array = np.ndarray[Any, np.dtype[np.float64]]


def averages(rig: Rig) -> dict[str, Array]:
    """The averages of a run, each as one vector."""
    found: dict[str, list[Array]] = {}
    for name, tensor in rig.trainer.state.averages.tensors().items():
        found.setdefault(name.split("/")[1], []).append(tensor.double().flatten().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def expected(setup: Setup, steps: int) -> dict[str, Array]:
    """The averages after so many steps, from the model of a run that stops after each round."""
    decay, fraction = setup.ema.decay, setup.ema.uniform_fraction
    found: dict[str, Array] = {}
    begin = 24 - max(1, round(24 * (fraction or 0)))
    total = 0
    for round_ in setup.plan.rounds():
        if round_.end > steps:
            break
        shorter = replace(setup, ema=NO_EMA, stop_after=round_.end, folder=None)
        model: Array = train(shorter).parameters().double().numpy()
        if decay is not None:
            kept = decay**round_.length
            ema = found.get("ema", model)
            found["ema"] = kept * ema + (1 - kept) * model
        weight = sum(step >= begin for step in range(round_.start, round_.end))
        if fraction is not None and weight:
            found["uniform"] = found.get("uniform", 0.0 * model) + weight * model
            total += weight
    if total:
        found["uniform"] /= total
    return found


@pytest.mark.parametrize(
    ("changes", "ema"),
    [
        ({"plan": GRADIENTS}, BOTH),
        ({"plan": QSR, "net": batchnorm_net}, BOTH),
        ({"plan": QSR}, EmaConfig(None, 0.33)),  # from step 16, within a round
        ({"plan": QSR}, EmaConfig(0.99, None)),
        ({"plan": FIVES}, EmaConfig(0.5, 1.0)),
        ({"plan": FIVES}, EmaConfig(None, 1e-9)),  # the last step's model
        ({"plan": Plan(COSINE, PostLocalRule(9, 4))}, BOTH),
        ({"plan": Plan(COSINE, SwapRule(9))}, BOTH),
        ({"plan": FIVES, "outer": OuterOptions(lr=0.7, momentum=0.9, nesterov=True)}, BOTH),
        ({"plan": QSR, "workers": 1}, BOTH),
    ],
    ids=[
        *("data_parallel", "batchnorm", "late", "ema", "fives", "last_step"),
        *("post_local", "swap", "outer", "one_worker"),
    ],
)
def test_averages_in_double_precision(changes: dict[str, Any], ema: EmaConfig) -> None:
    setup = replace(Setup(QSR, optimizer=sgd(momentum=0.9), ema=ema), **changes)
    found, wanted = averages(train(setup)), expected(setup, 24)
    assert found.keys() == wanted.keys() == set(ema.names)
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6)
    # and training is the same without them
    assert torch.equal(train(setup).parameters(), train(replace(setup, ema=NO_EMA)).parameters())


def test_the_rounds_differ_in_length() -> None:
    assert [r.length for r in QSR.rounds()] == [2, 2, 2, 2, 2, 2, 2, 3, 7]


def test_each_evaluation_is_of_the_averages_so_far() -> None:
    setup = Setup(QSR, ema=BOTH, evaluate_every=1, noise=0.0)
    rig = train(setup)
    rows = {row["step"]: row for row in rig.tracker.rows if row["kind"] == "eval"}
    images, labels = digits_like()
    assert len(rows) == 24
    assert not any(name.startswith(("ema", "uniform")) for name in rows[1])
    assert "ema_top1" in rows[2]
    assert "uniform_top1" not in rows[10]  # before its part of the run
    assert rows[14]["ema_loss"] == rows[16]["ema_loss"] != rows[17]["ema_loss"]
    for step in (3, 12, 20, 24):
        for name, weights in expected(setup, step).items():
            values = torch.from_numpy(weights).float()
            logits = functional.linear(images.flatten(1), values[:432].view(4, 108), values[432:])
            top1 = 100 * (logits.argmax(1) == labels).double().mean().item()
            assert rows[step][f"{name}_top1"] == pytest.approx(top1)
            loss = functional.cross_entropy(logits, labels).item()
            assert rows[step][f"{name}_loss"] == pytest.approx(loss, 1e-4)
    plain = train(replace(setup, ema=NO_EMA)).tracker.rows
    shown = [(row["step"], row["top1"], row["loss"]) for row in plain if row["kind"] == "eval"]
    assert shown == [(step, row["top1"], row["loss"]) for step, row in rows.items()]


class KilledError(Exception):
    pass


class LossThatKills:
    """Cross entropy until so many micro-batches were computed."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, model: Any, images: Any, labels: Any, seed: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise KilledError
        return functional.cross_entropy(model(images), labels)


@pytest.mark.parametrize(
    "changes",
    [{}, {"plan": GRADIENTS}, {"plan": FIVES}, {"plan": Plan(COSINE, SwapRule(9))}],
    ids=["qsr", "data_parallel", "fives", "swap"],
)
@pytest.mark.parametrize("saved", [5, 11, 17, 23])
def test_a_killed_run_goes_on_with_the_same_bits(
    changes: dict[str, Any], saved: int, tmp_path: Path
) -> None:
    """Killed after the checkpoint of a step, which mostly lies in a round."""
    setup = Setup(QSR, net=batchnorm_net, ema=BOTH, optimizer=sgd(momentum=0.9), evaluate_every=7)
    setup = replace(setup, loss=LossThatKills(10**6), **changes)
    whole = train(setup)
    kept = replace(setup, folder=tmp_path, checkpoint_every=saved)
    with pytest.raises(KilledError):
        train(replace(kept, loss=LossThatKills(2 * saved + 1)))
    resumed = train(kept)
    assert resumed.loader.requested[0] == whole.loader.requested[2 * saved]
    ours, theirs = averages(resumed), averages(whole)
    assert ours.keys() == theirs.keys() == {"ema", "uniform"}
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert resumed.trainer.evaluation == whole.trainer.evaluation
    assert resumed.trainer.state.averages.evaluations == whole.trainer.state.averages.evaluations


def test_a_run_killed_after_its_last_checkpoint_has_them_to_write(tmp_path: Path) -> None:
    setup = Setup(QSR, net=batchnorm_net, ema=BOTH, folder=tmp_path, checkpoint_every=5)
    first = train(setup).trainer.state.averages
    rig = build(setup)
    rig.trainer.restore()
    assert rig.trainer.finished
    again = rig.trainer.state.averages
    assert again.evaluations == first.evaluations
    assert again.models.keys() == {"ema", "uniform"}
    for name, state in first.models.items():
        assert state.keys() == rig.evaluator.model.state_dict().keys()
        assert all(torch.equal(again.models[name][key], t) for key, t in state.items())
    # with statistics of their own; and what the evaluator holds is the workers' mean
    statistics = [
        m["1.running_mean"] for m in (*first.models.values(), rig.evaluator.model.state_dict())
    ]
    assert not torch.equal(statistics[0], statistics[1])
    assert not torch.equal(statistics[0], statistics[2])
    mean = torch.cat([p.flatten() for p in rig.evaluator.model.parameters()])
    assert torch.equal(mean, rig.parameters())


def test_without_them_a_checkpoint_holds_nothing_of_them(tmp_path: Path) -> None:
    for ema, there in ((NO_EMA, False), (BOTH, True)):
        folder = tmp_path / str(there)
        rig = train(Setup(QSR, ema=ema, folder=folder, stop_after=16))
        (checkpoint,) = (folder / "checkpoints").iterdir()
        names = [n for f in checkpoint.glob("*.safetensors") for n in load_file(f)]
        assert any(name.startswith("weight_average/") for name in names) == there
        assert ("weight_average" in (checkpoint / "state.json").read_text()) == there
        assert bool(rig.trainer.state.averages.tensors()) == there


def test_an_average_that_is_not_finite_is_neither_reported_nor_saved() -> None:
    setup = Setup(QSR, ema=BOTH, evaluate_every=8)
    for changes, message in (
        ({}, "the validation loss is nan at step 8"),
        ({"evaluate_every": 1000, "checkpoint_every": 8}, "states are not finite at step 8"),
    ):
        rig = build(replace(setup, **changes))  # type: ignore[arg-type]
        names = [f"weight_average/ema/{name}" for name in ("1.weight", "1.bias")]
        tensors = {name: torch.full((), torch.nan) for name in names}
        rig.trainer.state.averages.load(tensors, {"weight_average_steps": {"ema": 1}})
        with pytest.raises(TrainingError, match=message):
            rig.trainer.train()
        assert not any(row["kind"] == "eval" for row in rig.tracker.rows)
