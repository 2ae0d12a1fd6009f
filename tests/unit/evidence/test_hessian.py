"""The estimate of tr(Hessian), against exact ones."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qsr.config.schema import ModelConfig
from qsr.evidence.hessian import hessian_trace
from qsr.train.models import build_model


class WeightPerImage(nn.Module):
    """Two classes; image i has the logits w_i and 0."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([self.weights, torch.zeros(len(images))], dim=1)


def exact_trace(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    """From the whole matrix."""
    names, parameters = zip(*module.named_parameters(), strict=True)

    def loss(*values: Tensor) -> Tensor:
        logits = torch.func.functional_call(
            module, dict(zip(names, values, strict=True)), (images,)
        )
        return functional.cross_entropy(logits, labels)

    blocks = torch.autograd.functional.hessian(loss, parameters)
    return sum(
        float(blocks[i][i].reshape(p.numel(), p.numel()).trace()) for i, p in enumerate(parameters)
    )


def test_it_is_exact_for_a_diagonal_hessian() -> None:
    """Cross entropy of the logits w and 0 has the second derivative s(w) (1 - s(w)) in w, with the
    logistic function s: 1/4 at 0, 3/16 at log 3; the loss is the mean over the images."""
    found = hessian_trace(
        WeightPerImage([0.0, math.log(3)]),
        torch.zeros(2, 1),
        torch.tensor([0, 1]),
        probes=3,
        seed=1,
    )
    assert found.mean == pytest.approx((1 / 4 + 3 / 16) / 2)
    assert found.standard_error == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_is_within_its_error_of_the_exact_trace(seed: int) -> None:
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    )
    images, labels = torch.randn(12, 3, 4, 4), torch.arange(12) % 3
    module(images)  # running statistics that are not those of these images
    found = hessian_trace(module, images, labels, probes=400, seed=seed)
    assert not module.training
    exact = exact_trace(module, images, labels)
    assert found.mean == pytest.approx(exact, abs=4 * found.standard_error)
    assert 0 < found.standard_error < 0.1 * exact


def test_probes_are_drawn_from_the_seed() -> None:
    """And the error falls with their number."""
    torch.manual_seed(1)
    module = nn.Linear(5, 3)
    data = torch.randn(8, 5), torch.arange(8) % 3
    assert hessian_trace(module, *data, probes=8, seed=1) == hessian_trace(
        module, *data, probes=8, seed=1
    )
    few, many = (hessian_trace(module, *data, probes=n, seed=2) for n in (16, 1600))
    assert many.standard_error == pytest.approx(few.standard_error / 10, rel=0.5)
    assert few.mean != many.mean


@pytest.mark.parametrize("name", ["small_resnet", "small_vit"])
def test_the_networks_can_be_differentiated_twice(name: str) -> None:
    torch.manual_seed(1)
    module = build_model(ModelConfig(name, None, channels_last=False), 10, 8)  # type: ignore[arg-type]
    found = hessian_trace(module, torch.randn(4, 3, 8, 8), torch.arange(4), probes=2, seed=1)
    assert math.isfinite(found.mean)


def test_one_probe_has_no_error() -> None:
    with pytest.raises(ValueError, match="at least two probes"):
        hessian_trace(nn.Linear(2, 2), torch.zeros(1, 2), torch.zeros(1).long(), probes=1, seed=1)
