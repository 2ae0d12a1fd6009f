"""Label smoothing and mixup against formulas written out by hand."""

import math
import random
from collections.abc import Sequence
from statistics import fmean

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from qsr.config.schema import LossConfig
from qsr.train.losses import TrainingLoss, draw_mixup

LOGITS = [[2.0, -1.0, 0.5], [0.0, 3.0, -2.0], [1.0, 1.0, 1.0]]
LABELS = [0, 2, 1]


class Given(nn.Module):
    """A network whose logits are those of the first pixel's channels; it keeps its input."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.empty(0)

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        return images[:, :, 0, 0]


def as_images(logits: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(logits)[:, :, None, None].expand(-1, -1, 2, 2).clone()


def soft_cross_entropy(logits: Sequence[float], target: Sequence[float]) -> float:
    """- sum_c target_c log softmax(logits)_c."""
    log_total = math.log(sum(math.exp(value) for value in logits))
    return -sum(p * (value - log_total) for p, value in zip(target, logits, strict=True))


def smoothed(label: int, mass: float) -> list[float]:
    return [(1.0 - mass) * (c == label) + mass / 3 for c in range(3)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_by_hand(smoothing: float) -> None:
    loss = TrainingLoss(LossConfig(smoothing, 0.0))
    expected = fmean(
        soft_cross_entropy(logits, smoothed(label, smoothing))
        for logits, label in zip(LOGITS, LABELS, strict=True)
    )
    found = loss(Given(), as_images(LOGITS), torch.tensor(LABELS), seed=1)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_a_known_value() -> None:
    """Equal logits over n classes cost log n, however the labels are smoothed."""
    loss = TrainingLoss(LossConfig(0.3, 0.0))
    found = loss(Given(), as_images([[5.0, 5.0, 5.0]]), torch.tensor([2]), seed=1)
    assert found.item() == pytest.approx(math.log(3), rel=1e-6)


def test_without_mixup_the_images_are_untouched_and_the_seed_says_nothing() -> None:
    model, images = Given(), as_images(LOGITS)
    loss = TrainingLoss(LossConfig(0.1, 0.0))
    values = {loss(model, images, torch.tensor(LABELS), seed).item() for seed in range(5)}
    assert model.seen is images
    assert len(values) == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(4))
def test_mixup_by_hand(smoothing: float, seed: int) -> None:
    """One blend of images, one cross entropy to the blend of the smoothed labels."""
    keep, order = draw_mixup(3, 0.7, seed)
    blended = [
        [keep * a + (1.0 - keep) * b for a, b in zip(LOGITS[i], LOGITS[j], strict=True)]
        for i, j in enumerate(order.tolist())
    ]
    expected = 0.0
    for i, j in enumerate(order.tolist()):
        own, other = smoothed(LABELS[i], smoothing), smoothed(LABELS[j], smoothing)
        target = [keep * a + (1.0 - keep) * b for a, b in zip(own, other, strict=True)]
        expected += soft_cross_entropy(blended[i], target) / 3
    model, images = Given(), as_images(LOGITS)
    found = TrainingLoss(LossConfig(smoothing, 0.7))(model, images, torch.tensor(LABELS), seed)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(model.seen, as_images(blended))
    assert torch.equal(images, as_images(LOGITS))  # the loader's batch is left alone


def test_mixup_is_a_function_of_the_seed_alone() -> None:
    keep, order = draw_mixup(16, 0.2, 12345)
    torch.rand(7)
    random.random()
    again, same_order = draw_mixup(16, 0.2, 12345)
    assert again == keep
    assert torch.equal(order, same_order)
    assert sorted(order.tolist()) == list(range(16))
    others = [draw_mixup(16, 0.2, seed) for seed in range(20)]
    assert len({value for value, _ in others}) == 20
    assert len({tuple(partner.tolist()) for _, partner in others}) == 20


def test_drawing_mixup_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(3)
    random.seed(3)
    undisturbed = (torch.rand(1).item(), random.random())
    torch.manual_seed(3)
    random.seed(3)
    draw_mixup(16, 0.2, 99)
    assert (torch.rand(1).item(), random.random()) == undisturbed


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
def test_an_image_keeps_the_larger_part_of_a_beta_draw(alpha: float) -> None:
    """P(max(z, 1 - z) <= x) = 1 - 2 P(z <= 1 - x) for x >= 1/2, by Kolmogorov-Smirnov."""
    values = [draw_mixup(2, alpha, seed)[0] for seed in range(4000)]
    beta = stats.beta(alpha, alpha)
    assert min(values) >= 0.5
    result = stats.kstest(values, lambda x: np.where(x < 0.5, 0.0, 1 - 2 * beta.cdf(1 - x)))
    assert result.pvalue > 0.001


def test_partners_are_uniform() -> None:
    """Each of 4 images meets each other one, itself included, in a quarter of 4,000 draws."""
    counts = torch.zeros(4, 4)
    for seed in range(4000):
        counts[torch.arange(4), draw_mixup(4, 1.0, seed)[1]] += 1
    assert (counts / 4000 - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 4000)


def test_large_half_precision_logits_do_not_overflow() -> None:
    images = as_images([[30_000.0, -30_000.0, 0.0]]).half()
    found = TrainingLoss(LossConfig(0.1, 0.0))(Given(), images, torch.tensor([1]), seed=1)
    assert found.dtype == torch.float32
    # distances to the largest logit: 0, 60,000 and 30,000 (in fp16 their sum is infinite)
    expected = 0.1 / 3 * 30_000 + (0.9 + 0.1 / 3) * 60_000
    assert found.item() == pytest.approx(expected, rel=1e-3)


def test_the_loss_trains_the_model() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    loss = TrainingLoss(LossConfig(0.1, 0.2))
    images, labels = as_images(LOGITS), torch.tensor(LABELS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    plain = TrainingLoss(LossConfig(0.1, 0.0))
    before = plain(model, images, labels, 0).item()
    for seed in range(30):
        optimizer.zero_grad()
        loss(model, images, labels, seed).backward()
        optimizer.step()
    assert plain(model, images, labels, 0).item() < 0.8 * before
