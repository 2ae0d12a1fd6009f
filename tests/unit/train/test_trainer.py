"""The algorithm against independent references, on virtual workers in one process."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qsr import (
    ConstantRule,
    ConstantSchedule,
    CosineSchedule,
    EveryStepRule,
    LinearSchedule,
    Plan,
    PostLocalRule,
    QuadraticRule,
    SwapRule,
)
from qsr.core.outer import OuterOptions
from qsr.core.sampling import Sampler
from qsr.core.seeds import seed_for
from tests.support import (
    Setup,
    adamw,
    batchnorm_net,
    build,
    digits_like,
    sgd,
    train,
)

COSINE = CosineSchedule(peak_lr=0.1, final_lr=1e-4, warmup_steps=4, total_steps=24)
GRADIENTS = Plan(COSINE, EveryStepRule("gradients"))
PARAMETERS = Plan(COSINE, EveryStepRule("parameters"))
QSR = Plan(COSINE, QuadraticRule(h_base=2, alpha=0.15))
FIVES = Plan(replace(COSINE, total_steps=22), ConstantRule(5))
"""Its last round has two steps."""


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("workers", [2, 4])
def test_averaging_every_step_is_data_parallel_sgd(workers: int, momentum: float) -> None:
    optimizer = sgd(momentum=momentum, weight_decay=0.01)
    setup = Setup(GRADIENTS, workers, optimizer=optimizer, net=batchnorm_net)
    local = train(replace(setup, plan=PARAMETERS))
    parallel = train(setup)
    torch.testing.assert_close(local.parameters(), parallel.parameters(), rtol=1e-5, atol=1e-6)


def test_data_parallel_is_the_large_batch() -> None:
    """K workers of b images are one worker of K b images (no BatchNorm, equal noise)."""
    four = train(Setup(GRADIENTS, workers=4, noise=0.0))
    one = train(Setup(GRADIENTS, workers=1, noise=0.0))
    torch.testing.assert_close(four.parameters(), one.parameters(), rtol=1e-5, atol=1e-6)


def numpy_local_sgd(
    plan: Plan, workers: int, batch: int, rate_decay: float, delay_steps: int, outer: OuterOptions
) -> Any:
    """Softmax regression by local SGD, in numpy."""
    torch.manual_seed(1)
    layer = nn.Linear(108, 4)
    images, labels = digits_like()
    x, onehot = images.flatten(1).double().numpy(), np.eye(4)[labels.numpy()]
    sampler = Sampler(96, batch, workers, seed=1)
    w = np.stack([layer.weight.detach().double().numpy().T] * workers)
    b = np.stack([layer.bias.detach().double().numpy()] * workers)
    on_the_way = None
    velocity = 0.0
    for round_ in plan.rounds():
        begin = np.concatenate([w[0].ravel(), b[0]])
        for step in range(round_.start, round_.end):
            for k in range(workers):
                rows = sampler.indices(step, k)
                logits = x[rows] @ w[k] + b[k]
                p = np.exp(logits - logits.max(axis=1, keepdims=True))
                error = (p / p.sum(axis=1, keepdims=True) - onehot[rows]) / len(rows)
                w[k] -= plan.schedule(step) * (x[rows].T @ error + rate_decay * w[k])
                b[k] -= plan.schedule(step) * (error.sum(axis=0) + rate_decay * b[k])
            late = delay_steps and step + 1 in (round_.start + delay_steps, round_.end)
            if late and on_the_way is not None:
                w, b = w + on_the_way[0], b + on_the_way[1]
                on_the_way = None
        if delay_steps and round_.end < plan.total_steps:
            on_the_way = w.mean(axis=0) - w, b.mean(axis=0) - b
        else:
            end = np.concatenate([w.mean(axis=0).ravel(), b.mean(axis=0)])
            rates = sum(plan.schedule(step) for step in range(round_.start, round_.end))
            unit = rates if outer.rate_correction else 1.0
            moved = (end - begin) / unit
            velocity = outer.momentum * velocity + moved
            direction = moved + outer.momentum * velocity if outer.nesterov else velocity
            now = begin + outer.lr * unit * direction
            w[:], b[:] = now[: 108 * 4].reshape(108, 4), now[108 * 4 :]
    return np.concatenate([w[0].T.ravel(), b[0]])


@pytest.mark.parametrize(
    ("plan", "delay_steps", "outer"),
    [
        *((plan, delay, OuterOptions()) for plan, delay in ((QSR, 0), (QSR, 1))),
        *((FIVES, delay, OuterOptions()) for delay in (0, 1, 4)),
        (FIVES, 0, OuterOptions(lr=0.7)),
        (FIVES, 0, OuterOptions(lr=0.5, momentum=0.8)),
        (QSR, 0, OuterOptions(lr=0.7, momentum=0.9, nesterov=True)),
        (QSR, 0, OuterOptions(lr=0.7, momentum=0.9, nesterov=True, rate_correction=True)),
    ],
)
@pytest.mark.parametrize("workers", [1, 3, 4])
def test_rounds_against_numpy(
    workers: int, plan: Plan, delay_steps: int, outer: OuterOptions
) -> None:
    setup = Setup(plan, workers, global_batch=12, noise=0.0, optimizer=sgd(weight_decay=0.01))
    setup = replace(setup, delay_steps=delay_steps, outer=outer)
    expected = numpy_local_sgd(plan, workers, 12, 0.01, delay_steps, outer)
    np.testing.assert_allclose(train(setup).parameters().numpy(), expected, rtol=2e-4, atol=2e-5)


def test_workers_agree_after_every_round_and_differ_within() -> None:
    plan = Plan(ConstantSchedule(0.1, 10), ConstantRule(4))
    at_border = train(Setup(plan, stop_after=8))
    assert torch.equal(at_border.parameters(0), at_border.parameters(1))


def test_a_delayed_average_leaves_the_workers_apart_until_the_run_ends() -> None:
    plan = Plan(ConstantSchedule(0.1, 10), ConstantRule(4))
    for steps, agree in ((4, False), (6, False), (8, False), (10, True)):
        delayed = train(Setup(plan, delay_steps=2, stop_after=steps))
        assert torch.equal(delayed.parameters(0), delayed.parameters(1)) == agree, steps


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(
        QSR,
        net=batchnorm_net,
        optimizer=sgd(momentum=0.9),
        mixup_alpha=0.2,
        checkpoint_every=5,
        folder=tmp_path,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"plan": GRADIENTS},
        {"plan": Plan(COSINE, PostLocalRule(9, 4))},
        {"plan": Plan(COSINE, SwapRule(9))},
        {"optimizer": adamw(clip_norm=1.0), "micro_batch": 2, "average_momentum": True},
        {"optimizer": adamw(), "average_momentum": True, "average_second_moment": True},
        {"plan": FIVES, "delay_steps": 4},
        {"optimizer": adamw(), "delay_steps": 1},
        {"outer": OuterOptions(lr=0.7, momentum=0.9, nesterov=True, rate_correction=True)},
        {"plan": Plan(COSINE, PostLocalRule(9, 4)), "outer": OuterOptions(momentum=0.5)},
        {"precision": "bf16"},
        {"precision": "fp16"},
    ],
    ids=str,
)
@pytest.mark.parametrize("stop", [10, 11, 15])
def test_a_resumed_run_is_the_uninterrupted_one(
    setup: Setup, changes: dict[str, Any], stop: int
) -> None:
    """Stopped at a checkpoint, in the middle of a round or at its end: the same bits after it."""
    setup = replace(setup, **changes)
    whole = train(replace(setup, folder=None))
    train(replace(setup, stop_after=stop))
    resumed = train(setup)
    assert resumed.loader.requested[0].seed == seed_for(1, "augment", worker=0, step=stop)
    for ours, theirs in zip(resumed.workers, whole.workers, strict=True):
        assert ours.tensors().keys() == theirs.tensors().keys()
        for name, tensor in theirs.tensors().items():
            assert torch.equal(ours.tensors()[name], tensor), name
        assert ours.values() == theirs.values()
    assert resumed.trainer.evaluation == whole.trainer.evaluation
    assert resumed.trainer.progress.averages == whole.trainer.progress.averages
    last, expected = resumed.tracker.rows[-1], whole.tracker.rows[-1]
    assert (last["step"], last["top1"]) == (expected["step"], expected["top1"])
    losses = [r["loss"] for r in whole.tracker.rows if r["kind"] == "train" and r["step"] > stop]
    resumed_losses = [r["loss"] for r in resumed.tracker.rows if r["kind"] == "train"]
    assert resumed_losses[-len(losses) :] == pytest.approx(losses, rel=1e-12)


def test_a_run_killed_before_its_first_checkpoint_starts_its_log_anew(setup: Setup) -> None:
    rig = build(setup)
    rig.tracker.log({"kind": "train", "step": 3})
    assert not rig.trainer.restore()
    assert rig.tracker.rows == []


@pytest.mark.parametrize("plan", [QSR, GRADIENTS])
def test_evaluations_leave_training_untouched(setup: Setup, plan: Plan) -> None:
    often = train(replace(setup, plan=plan, evaluate_every=1, folder=None))
    never = train(replace(setup, plan=plan, evaluate_every=1000))
    assert len(often.tracker.rows) > len(never.tracker.rows) + 20
    for ours, theirs in zip(often.workers, never.workers, strict=True):
        for name, tensor in theirs.tensors().items():
            assert torch.equal(ours.tensors()[name], tensor), name


def test_evaluation_in_a_round_is_of_the_mean_and_marked() -> None:
    plan = Plan(ConstantSchedule(0.1, 8), ConstantRule(8))
    rig = train(Setup(plan, evaluate_every=3, noise=0.0))
    evaluations = [row for row in rig.tracker.rows if row["kind"] == "eval"]
    assert [(r["step"], r["shadow"]) for r in evaluations] == [(3, True), (6, True), (8, False)]
    images, labels = digits_like()
    # by hand: two workers alone for 6 steps, then the mean of their weights
    mean = train_alone_and_average(plan, steps=6)
    logits = functional.linear(images.flatten(1), mean[:432].view(4, 108), mean[432:])
    shadow = evaluations[1]
    assert shadow["top1"] == pytest.approx(
        100 * (logits.argmax(1) == labels).double().mean().item()
    )
    assert shadow["loss"] == pytest.approx(functional.cross_entropy(logits, labels).item(), 1e-5)


def train_alone_and_average(plan: Plan, steps: int) -> Tensor:
    shorter = Plan(ConstantSchedule(plan.schedule(0), steps), ConstantRule(steps))
    return train(Setup(shorter, noise=0.0)).parameters()


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batches_add_up_to_the_batch(micro_batch: int) -> None:
    whole = train(Setup(QSR))
    parts = train(Setup(QSR, micro_batch=micro_batch))
    torch.testing.assert_close(parts.parameters(), whole.parameters(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("plan", [QSR, GRADIENTS])
def test_clipping_bounds_every_update(plan: Plan) -> None:
    rig = build(Setup(plan, optimizer=sgd(clip_norm=0.01)))
    before = rig.parameters()
    rig.trainer.train()
    moved = (rig.parameters() - before).norm()
    rates = sum(COSINE(step) for step in range(24))
    assert 0.5 * 0.01 * rates < moved <= 0.01 * rates * 1.001


def test_requests_follow_the_sampler_with_a_seed_for_each_worker_and_step() -> None:
    rig = train(Setup(QSR, workers=3, global_batch=6))
    sampler = Sampler(96, 6, 3, seed=1)
    assert rig.loader.requested == [
        (sampler.indices(step, worker), seed_for(1, "augment", worker=worker, step=step))
        for step in range(24)
        for worker in range(3)
    ]


def test_learning_rates_and_rounds_in_the_log() -> None:
    schedule = LinearSchedule(1e-2, 0.0, 0, 10)
    plan = Plan(schedule, QuadraticRule(1, 1e-2))
    rows = [r for r in train(Setup(plan, log_every=1)).tracker.rows if r["kind"] == "train"]
    assert [row["lr"] for row in rows] == [schedule(step) for step in range(10)]
    assert [(row["round"], row["h"]) for row in rows] == [
        (plan.round_at(step).index, plan.round_at(step).length) for step in range(10)
    ]
    assert rows[-1]["averages"] == plan.num_rounds == 6
