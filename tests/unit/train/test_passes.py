"""The passes of micro-batches on the CPU; CUDA graphs of them are in tests/gpu."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from qsr import ConstantRule, ConstantSchedule, Plan
from qsr.config.schema import LossConfig
from qsr.sync.flat import FlatModule
from qsr.train.losses import TrainingLoss, draw_mixup
from qsr.train.passes import make_passes
from qsr.train.precision import Precision
from qsr.train.vit import SimpleViT
from qsr.train.worker import Worker
from tests.support import CPU, Setup, build, digits_like, linear_net


def new_worker(module: nn.Module, precision: Precision) -> Worker:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return Worker(0, FlatModule(module), optimizer, precision.scaler())


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return SimpleViT(image_size=8, patch_size=4, num_classes=4, width=16, depth=2, heads=2)


class CastsOf(TorchDispatchMode):
    """Counts casts of a module's parameters to half precision."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self._parameters = {p.data_ptr() for p in module.parameters()}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        cast = function is torch.ops.aten._to_copy.default
        self.count += cast and args[0].data_ptr() in self._parameters
        return function(*args, **(kwargs or {}))


def step(precision: Precision, *, keep: bool) -> tuple[int, list[Tensor]]:
    """Casts and gradients of a step of four micro-batches of two images."""
    module = small_vit()
    worker = new_worker(module, precision)
    passes = make_passes(
        TrainingLoss(LossConfig(0.1, 0.2)), precision, lambda _: None, graphs=False
    )
    images, labels = digits_like(8, size=8)
    with CastsOf(module) as casts, passes.step() if keep else nullcontext():
        for number, (x, y) in enumerate(zip(images.split(2), labels.split(2), strict=True)):
            passes(worker, module, x, y, seed=number, of=4)
    return casts.count, [p.grad for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_step_casts_each_weight_once(name: Any) -> None:
    """And not once per micro-batch, with the same gradients bit for bit."""
    precision = Precision(name, CPU)
    casts, gradients = step(precision, keep=True)
    each_time, expected = step(precision, keep=False)
    matrices = sum(p.dim() == 2 for p in small_vit().parameters())
    assert matrices <= casts <= len(gradients)  # and some biases
    assert each_time == 4 * casts
    assert len(gradients) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_fp32_casts_nothing() -> None:
    assert step(Precision("fp32", CPU), keep=True)[0] == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_no_cast_outlives_the_weights(workers: int) -> None:
    """Each step's loss is that of the weights after the last update, of the worker's own."""
    setup = Setup(
        Plan(ConstantSchedule(0.5, 6), ConstantRule(3)),
        workers=workers,
        micro_batch=2,
        precision="bf16",
        noise=0.0,
        log_every=1,
    )
    rig = build(setup)
    seen: list[tuple[float, float]] = []

    def loss(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        found = functional.cross_entropy(model(images).float(), labels)
        # the same linear layer, cast anew by hand
        weight, bias = (p.detach().bfloat16() for p in model.parameters())
        by_hand = functional.linear(images.flatten(1).bfloat16(), weight, bias)
        seen.append((found.item(), functional.cross_entropy(by_hand.float(), labels).item()))
        return found

    stepper: Any = rig.trainer._stepper
    stepper._passes._loss = loss
    rig.trainer.train()
    assert len(seen) == 6 * 8 // 2
    assert all(found == by_hand for found, by_hand in seen)
    assert len({found for found, _ in seen}) > 6


def test_a_pass_by_value() -> None:
    """The gradient of the mean over micro-batches, with mixup and label smoothing by hand."""
    torch.manual_seed(1)
    module = linear_net()
    worker = new_worker(module, Precision("fp32", CPU))
    passes = make_passes(
        TrainingLoss(LossConfig(0.1, 0.2)), Precision("fp32", CPU), lambda _: None, graphs=False
    )
    images, labels = digits_like(6)
    losses = [
        passes(worker, module, x, y, seed, of=3)
        for seed, (x, y) in enumerate(zip(images.split(2), labels.split(2), strict=True))
    ]
    found = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    expected = []
    for seed, (x, y) in enumerate(zip(images.split(2), labels.split(2), strict=True)):
        keep, order = draw_mixup(2, 0.2, seed)
        logits = module(keep * x + (1 - keep) * x[order])
        target = keep * functional.one_hot(y, 4) + (1 - keep) * functional.one_hot(y[order], 4)
        target = 0.9 * target + 0.1 / 4
        expected.append(-(target * logits.log_softmax(1)).sum(1).mean())
    torch.stack(expected).mean().backward()
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected))
    assert not any(loss.requires_grad for loss in losses)
    for gradient, parameter in zip(found, module.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
