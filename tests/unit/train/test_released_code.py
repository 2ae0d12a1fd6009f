"""The trainer against the paper's released code: the same batches, and after 120 steps the same
workers.

Both sides compute in float64. What remains of the order of sums is then below 1e-14 after 120
steps, while a change of the algorithm leaves 0.01 and more: an average one step late, a rate one
step late, a gradient that is clipped before the mean, a moment that is averaged unasked.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from qsr import CosineSchedule, EveryStepRule, Plan, QuadraticRule
from qsr.config.schema import LossConfig
from qsr.core.sampling import Sampler
from qsr.core.seeds import seed_for
from qsr.data import Request
from qsr.train.losses import TrainingLoss, draw_mixup
from qsr.train.vit import SimpleViT
from tests import released_code
from tests.released_code import Recipe, Record, tensors_of
from tests.support import MemoryLoader, Setup, adamw, build, digits_like, sgd

TOLERANCE = 1e-12
"""Of every number: parameters, statistics, moments and losses."""

SEED = 1
SAMPLES = 96
LOCAL_BATCH = 4
NOISE = 0.1
MIXUP_ALPHA = 0.2


@pytest.fixture(autouse=True)
def _doubles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New tensors are float64, and so are the logits that the loss takes to float32 otherwise."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small_resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        BasicBlock(8, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def small_vit() -> nn.Module:
    return SimpleViT(image_size=6, patch_size=3, num_classes=4, width=16, depth=2, heads=2)


@dataclass(frozen=True)
class Case:
    """Settings of a run of either side."""

    recipe: Recipe
    net: Callable[[], nn.Module]

    def changed(self, **changes: Any) -> "Case":
        return replace(self, recipe=replace(self.recipe, **changes))


def case(
    net: Callable[[], nn.Module], optimizer: str, workers: int, *, qsr: bool, **changes: Any
) -> Case:
    """The warm-up ends within a round, and H grows from 2 to the steps that are left."""
    peak = {"sgd": 0.1, "adamw": 0.004}[optimizer]
    recipe = Recipe(
        workers=workers,
        local=qsr,
        optimizer=optimizer,
        max_lr=peak,
        final_lr=peak / 100,
        warmup_steps=13,
        total_steps=120,
        acc_times=1,
        wd={"sgd": 0.001, "adamw": 0.1}[optimizer],
        alpha=1.5 * peak,
        min_h=2,
        init_h=2,
    )
    return Case(recipe, net).changed(**changes)


CASES = {
    "parallel SGD, ResNet, 2 workers": case(
        small_resnet, "sgd", 2, qsr=False, label_smoothing=0.1, acc_times=2
    ),
    "parallel SGD, ViT, 2 workers, clipping": case(
        small_vit, "sgd", 2, qsr=False, gradient_clipping=0.5
    ),
    "QSR SGD, ResNet, 4 workers": case(small_resnet, "sgd", 4, qsr=True, label_smoothing=0.1),
    "QSR SGD, ViT, 2 workers, clipping": case(
        small_vit, "sgd", 2, qsr=True, gradient_clipping=0.5, label_smoothing=0.1
    ),
    "parallel AdamW, ResNet, 4 workers": case(small_resnet, "adamw", 4, qsr=False, strong_aug=True),
    "parallel AdamW, ViT, 2 workers, clipping": case(
        small_vit, "adamw", 2, qsr=False, gradient_clipping=0.5, strong_aug=True
    ),
    "QSR AdamW, ResNet, 2 workers, averaged first moments": case(
        small_resnet,
        "adamw",
        2,
        qsr=True,
        avg_m=True,
        label_smoothing=0.1,
        strong_aug=True,
        acc_times=2,
    ),
    "QSR AdamW, ViT, 2 workers": case(small_vit, "adamw", 2, qsr=True, strong_aug=True),
    "QSR AdamW, ViT, 2 workers, clipping, averaged moments": case(
        small_vit,
        "adamw",
        2,
        qsr=True,
        gradient_clipping=0.5,
        avg_m=True,
        avg_v=True,
        label_smoothing=0.1,
    ),
}


class WatchedLoss:
    """The trainer's loss. Keeps what every call saw: the loss, and the sum of the parameters, by
    which equal replicas are told from others."""

    def __init__(self, loss: TrainingLoss) -> None:
        self._loss = loss
        self.losses: list[float] = []
        self.sums: list[float] = []

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        loss = self._loss(model, images, labels, seed)
        self.losses.append(loss.item())
        self.sums.append(sum_of(model))
        return loss


def sum_of(model: nn.Module) -> float:
    return torch.stack([parameter.sum() for parameter in model.parameters()]).sum().item()


@cache  # for the tests that compare with the same run
def train_here(case: Case) -> Record:
    """What our trainer does. Rates and averages are read off the optimizers and the replicas, not
    off the trainer's own account of them."""
    recipe = case.recipe
    schedule = CosineSchedule(
        recipe.max_lr,
        final_lr=recipe.final_lr,
        warmup_steps=recipe.warmup_steps,
        total_steps=recipe.total_steps,
    )
    rule = QuadraticRule(recipe.min_h, recipe.alpha) if recipe.local else EveryStepRule()
    clip = None if math.isinf(recipe.gradient_clipping) else recipe.gradient_clipping
    optimizer = (
        sgd(momentum=recipe.momentum, weight_decay=recipe.wd, clip_norm=clip)
        if recipe.optimizer == "sgd"
        else adamw(weight_decay=recipe.wd, clip_norm=clip)
    )
    mixup_alpha = MIXUP_ALPHA if recipe.strong_aug else 0.0
    loss = WatchedLoss(TrainingLoss(LossConfig(recipe.label_smoothing, mixup_alpha)))
    rig = build(
        Setup(
            Plan(schedule, rule),
            recipe.workers,
            net=case.net,
            global_batch=LOCAL_BATCH * recipe.workers,
            micro_batch=LOCAL_BATCH // recipe.acc_times,
            optimizer=optimizer,
            average_momentum=recipe.avg_m,
            average_second_moment=recipe.avg_v,
            noise=NOISE,
            samples=SAMPLES,
            seed=SEED,
            loss=loss,
        )
    )
    record = Record(losses=loss.losses)
    for worker in rig.workers:
        worker.optimizer.register_step_pre_hook(
            lambda optimizer, *_: record.rates.append(optimizer.param_groups[0]["lr"])
        )
    rig.trainer.train()
    sums = loss.sums[:: recipe.acc_times] + [sum_of(w.model.module) for w in rig.workers]
    record.averaged_after = [
        step
        for step in range(1, recipe.total_steps + 1)
        if len(set(sums[step * recipe.workers : (step + 1) * recipe.workers])) == 1
    ]
    record.tensors = [tensors_of(w.model.module, w.optimizer) for w in rig.workers]
    return record


def train_there(case: Case) -> Record:
    """What the released code does with the images that the seeds of our run stand for."""
    sampler = Sampler(SAMPLES, LOCAL_BATCH * case.recipe.workers, case.recipe.workers, SEED)
    loader = MemoryLoader(*digits_like(SAMPLES), NOISE)

    def batches(step: int, worker: int) -> tuple[Tensor, Tensor]:
        seed = seed_for(SEED, "augment", worker=worker, step=step)
        (batch,) = loader.batches([Request(sampler.indices(step, worker), seed)])
        return batch.images, batch.labels

    def mixing(step: int, worker: int, part: int) -> tuple[float, Tensor]:
        seed = seed_for(SEED, "mixup", worker=worker, step=step, micro_batch=part)
        keep, order = draw_mixup(LOCAL_BATCH // case.recipe.acc_times, MIXUP_ALPHA, seed)
        return 1.0 - keep, order

    def make_network() -> nn.Module:
        torch.manual_seed(SEED)
        return case.net()

    return released_code.train(case.recipe, make_network, batches, mixing)


def difference(ours: Record, theirs: Record) -> float:
    """The largest difference of any number of any worker at the end."""
    assert len(ours.tensors) == len(theirs.tensors)
    largest = []
    for one, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert one.keys() == other.keys()
        largest += [(tensor - other[name]).abs().max().double() for name, tensor in one.items()]
    return torch.stack(largest).max().item()  # NaN if one is


@pytest.mark.parametrize("name", CASES)
def test_the_trainer_is_the_released_code(name: str) -> None:
    ours, theirs = train_here(CASES[name]), train_there(CASES[name])
    assert ours.averaged_after == theirs.averaged_after
    assert ours.rates == pytest.approx(theirs.rates, rel=1e-15, abs=0.0)
    assert ours.losses == pytest.approx(theirs.losses, rel=0.0, abs=TOLERANCE)
    assert difference(ours, theirs) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("QSR SGD, ResNet, 4 workers", {"init_h": 3}),
        ("QSR AdamW, ResNet, 2 workers, averaged first moments", {"avg_v": True}),
    ],
    ids=str,
)
def test_another_algorithm_is_told_from_it(name: str, changes: dict[str, int]) -> None:
    """One local step more in the rounds of the warm-up, or one moment more in the averages."""
    other = CASES[name].changed(**changes)
    assert difference(train_here(CASES[name]), train_there(other)) > 1e9 * TOLERANCE
