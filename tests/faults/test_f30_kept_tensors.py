"""F30: some networks keep a tensor from their first pass in evaluation mode, as LeViT, TinyViT and
EfficientViT do in some versions of timm. A reported number always belongs to the saved weights, not
to those of an earlier evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qsr import ConstantRule, ConstantSchedule, Plan, load_model
from qsr.evidence.hessian import hessian_trace
from qsr.sync.batchnorm import reestimate
from qsr.train import model_file
from qsr.train.evaluation import Evaluation, validate
from qsr.train.networks import build_network
from qsr.train.precision import Precision
from tests.support import CPU, MemoryLoader, Rig, Setup, build, digits_like, linear_net, train
from tests.unit.train.test_model_file import ABOUT, write


class Keeping(nn.Module):
    """In evaluation mode a bias is computed once. train() alone lets go of it."""

    def __init__(self, *, batchnorm: bool = False) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5) if batchnorm else nn.Identity()
        self.head = nn.Linear(5, 4)
        self.bias = nn.Parameter(torch.randn(4))
        self.kept: Tensor | None = None

    def train(self, mode: bool = True) -> "Keeping":
        super().train(mode)
        if mode:
            self.kept = None
        return self

    def forward(self, images: Tensor) -> Any:
        logits = self.head(self.norm(self.body(images)).mean(dim=(2, 3)))
        if self.training:
            return logits + self.made()
        if self.kept is None:
            self.kept = self.made()
        return logits + self.kept

    def made(self) -> Tensor:
        return 2 * self.bias.tanh()


class KeepingStatistics(Keeping):
    """What is kept comes from the statistics, which change within an evaluation."""

    def made(self) -> Tensor:
        assert isinstance(self.norm, nn.BatchNorm2d)
        assert self.norm.running_mean is not None
        return super().made() + self.norm.running_mean[:4]


NETS: dict[str, Callable[[], nn.Module]] = {
    "weights": Keeping,
    "weights beside BatchNorm": lambda: Keeping(batchnorm=True),
    "statistics": lambda: KeepingStatistics(batchnorm=True),
    "nothing": linear_net,
}


def numbers_of(
    make: Callable[[], nn.Module], state: dict[str, Tensor], loader: MemoryLoader
) -> tuple[float, float]:
    """Loss and top-1 of saved weights in a network that nobody has used."""
    fresh = make()
    fresh.load_state_dict(state)
    with torch.no_grad():
        logits = fresh.eval()(loader.images)
    hits = logits.argmax(dim=1) == loader.labels
    return float(functional.cross_entropy(logits, loader.labels)), 100 * float(hits.float().mean())


def check(result: Evaluation, rig: Rig, make: Callable[[], nn.Module]) -> None:
    quiet = MemoryLoader(rig.loader.images, rig.loader.labels)
    expected = numbers_of(make, rig.evaluator.model.state_dict(), quiet)
    assert (result.loss, result.top1) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
@pytest.mark.parametrize("averaged", [True, False])
def test_every_evaluation_is_of_the_weights_of_now(
    make: Callable[[], nn.Module], averaged: bool
) -> None:
    rig = build(Setup(Plan(ConstantSchedule(0.1, 8), ConstantRule(2)), net=make))
    replicas = [worker.model.flat for worker in rig.workers]
    losses = []
    for step in range(3):
        for worker, replica in enumerate(replicas):
            generator = torch.Generator().manual_seed(step if averaged else 10 * step + worker)
            for buffer in replica.buffers.values():
                buffer.add_(0.5 * torch.randn(buffer.shape, generator=generator))
        result = rig.evaluator.evaluate(replicas, step, averaged=averaged)
        check(result, rig, make)
        losses.append(result.loss)
    assert len(set(losses)) == 3


@pytest.mark.parametrize("name", ["weights", "statistics"])
def test_the_last_row_of_a_run_is_of_the_saved_weights(name: str) -> None:
    plan = Plan(ConstantSchedule(0.3, 8), ConstantRule(2))
    rig = train(Setup(plan, net=NETS[name], evaluate_every=2))
    rows = [row for row in rig.tracker.rows if row["kind"] == "eval"]
    assert len(rows) == 4
    assert rig.trainer.evaluation is not None
    assert rows[-1]["loss"] == rig.trainer.evaluation.loss
    check(rig.trainer.evaluation, rig, NETS[name])


def alone(name: str) -> tuple[Rig, nn.Module]:
    rig = build(Setup(Plan(ConstantSchedule(0.1, 8), ConstantRule(2)), net=NETS[name]))
    return rig, rig.evaluator.model


@pytest.mark.parametrize("name", ["weights", "statistics"])
def test_validation_of_a_model_that_was_used_before(name: str) -> None:
    rig, model = alone(name)
    loader = MemoryLoader(rig.loader.images, rig.loader.labels)
    with torch.no_grad():
        model.eval()(loader.images)
        for parameter in model.parameters():
            parameter.add_(1)
    arguments = (loader, len(loader.labels), 10, rig.communicator, Precision("fp32", CPU))
    check(validate(model, *arguments), rig, NETS[name])


def test_statistics_are_those_of_the_weights_of_now() -> None:
    """And nothing that was kept while they were gathered outlives that."""
    rig, model = alone("statistics")
    images = digits_like()[0]
    with torch.no_grad():
        model.eval()(images)
    reestimate(model, [images[:48], images[48:]], rig.communicator)
    fresh = NETS["statistics"]()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(images), fresh.eval()(images))


def test_the_hessian_is_in_all_parameters() -> None:
    """What was kept from a pass without gradients would be a constant to it."""
    used, fresh = Keeping(), Keeping()
    used.load_state_dict(fresh.state_dict())
    images, labels = digits_like(16)
    with torch.no_grad():
        used.eval()(images)
    first, second = (
        hessian_trace(net, images, labels, probes=4, seed=1).mean for net in (used, fresh)
    )
    assert first == pytest.approx(second, rel=1e-6)
    assert first != 0


def test_a_loaded_model_keeps_nothing_of_how_it_was_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def used_before(*_: Any, **__: Any) -> nn.Module:
        net = Keeping()
        with torch.no_grad():
            net.eval()(torch.zeros(1, 3, 6, 6))
        return net

    trained, images = Keeping().eval(), digits_like()[0]
    path = write(tmp_path / "model.safetensors", ABOUT, trained)
    monkeypatch.setattr(model_file, "build_network", used_before)
    with torch.no_grad():
        assert torch.equal(load_model(path).module(images), trained(images))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_vit_5m_224", "levit_128s", "efficientvit_m0", "test_vit"])
def test_networks_of_timm(name: str) -> None:
    """Those that keep a tensor in the timm that is installed, and one that does not. To be run with
    timm 1.0.20 too, the oldest that is allowed."""

    def make() -> nn.Module:
        torch.manual_seed(1)
        return build_network("timm", name, 4, 224, channels_last=False)

    model = make()
    size = 160 if name == "test_vit" else 224
    loader = MemoryLoader(torch.randn(8, 3, size, size), torch.arange(8) % 4)
    rig, _ = alone("nothing")
    arguments = (loader, 8, 4, rig.communicator, Precision("fp32", CPU))
    before = validate(model, *arguments)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    result = validate(model, *arguments)
    expected = numbers_of(make, model.state_dict(), loader)
    assert (result.loss, result.top1) == pytest.approx(expected, rel=1e-4)
    assert result.loss != pytest.approx(before.loss, rel=1e-2)
