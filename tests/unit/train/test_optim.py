"""One step of each optimizer against its published formula, and what is averaged of its state."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from qsr.config import schema
from qsr.train.optim import averaged_state_keys, build_optimizer, set_lr, states_per_parameter
from tests.support import adamw, constant_sync, sgd


def network() -> nn.Module:
    """With the parameters that recipes often exempt from weight decay: biases and norms."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5), nn.LayerNorm(5)
    )
    for parameter in model.parameters():  # no value is 0, so that decay is seen
        nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def set_gradients(parameters: Sequence[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def flat(parameters: Sequence[nn.Parameter], *, gradient: bool = False) -> list[float]:
    tensors = [p.grad if gradient else p.detach() for p in parameters]
    return torch.cat([t.flatten() for t in tensors if t is not None]).double().tolist()


def sgd_by_hand(
    settings: schema.SgdConfig, w: float, gradients: Sequence[float], lrs: Sequence[float]
) -> float:
    momentum = 0.0
    for g, lr in zip(gradients, lrs, strict=True):
        g += settings.weight_decay * w
        momentum = settings.momentum * momentum + g
        w -= lr * (g + settings.momentum * momentum if settings.nesterov else momentum)
    return w


def adamw_by_hand(
    settings: schema.AdamWConfig, w: float, gradients: Sequence[float], lrs: Sequence[float]
) -> float:
    m = v = 0.0
    for t, (g, lr) in enumerate(zip(gradients, lrs, strict=True), start=1):
        w -= lr * settings.weight_decay * w
        m = settings.beta1 * m + (1 - settings.beta1) * g
        v = settings.beta2 * v + (1 - settings.beta2) * g * g
        m_hat, v_hat = m / (1 - settings.beta1**t), v / (1 - settings.beta2**t)
        w -= lr * m_hat / (math.sqrt(v_hat) + settings.eps)
    return w


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("settings", "by_hand"),
    [
        (sgd(), sgd_by_hand),
        (sgd(weight_decay=0.1), sgd_by_hand),
        (sgd(momentum=0.9, weight_decay=0.1), sgd_by_hand),
        (sgd(momentum=0.9, weight_decay=0.1, nesterov=True), sgd_by_hand),
        (adamw(weight_decay=0.1), adamw_by_hand),
        (adamw(weight_decay=0.0, beta1=0.8, beta2=0.95, eps=1e-3), adamw_by_hand),
    ],
    # str of a function holds its address, which differs between the processes of one test run
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_steps_by_hand_on_every_parameter(settings: Any, by_hand: Any, fused: bool) -> None:
    """One step, then two more at other rates; weight decay on biases and norms too."""
    parameters = list(network().parameters())
    optimizer = build_optimizer(settings, parameters, fused=fused)
    start, gradients = flat(parameters), []
    lrs = [0.1, 0.05, 0.2]
    for step, lr in enumerate(lrs):
        set_gradients(parameters, seed=step)
        gradients.append(flat(parameters, gradient=True))
        set_lr(optimizer, lr)
        optimizer.step()
        expected = [
            by_hand(settings, w, history, lrs[: step + 1])
            for w, history in zip(start, zip(*gradients, strict=True), strict=True)
        ]
        assert flat(parameters) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_rate_is_set_before_the_first_step() -> None:
    """An optimizer that nobody gave a rate moves nothing, rather than by some default."""
    parameters = list(network().parameters())
    for settings in (sgd(weight_decay=0.1), adamw()):
        optimizer = build_optimizer(settings, parameters, fused=False)
        before = flat(parameters)
        set_gradients(parameters, 1)
        optimizer.step()
        assert flat(parameters) == before


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    first = next(model.parameters()).requires_grad_(False)
    optimizer = build_optimizer(sgd(), model.parameters(), fused=False)
    (group,) = optimizer.param_groups
    assert len(group["params"]) == len(list(model.parameters())) - 1
    assert all(parameter is not first for parameter in group["params"])


def test_fused_sgd_starts_with_zero_momentum() -> None:
    parameters = list(network().parameters())
    optimizer = build_optimizer(sgd(momentum=0.9), parameters, fused=True)
    for parameter in parameters:
        buffer = optimizer.state[parameter]["momentum_buffer"]
        assert buffer.shape == parameter.shape
        assert buffer.stride() == parameter.stride()
        assert not buffer.any()
    assert optimizer.param_groups[0]["fused"]


@pytest.mark.parametrize(("momentum", "fused"), [(0.0, True), (0.9, False)])
def test_other_sgd_starts_without_state(momentum: float, fused: bool) -> None:
    optimizer = build_optimizer(sgd(momentum=momentum), network().parameters(), fused=fused)
    assert len(optimizer.state) == 0


@pytest.mark.parametrize("settings", [sgd(momentum=0.9), adamw()], ids=str)
def test_a_first_update_that_overflowed_leaves_zero_moments(settings: Any) -> None:
    """As the loss scale tells it: the fused kernel skips the step by itself."""
    parameters = list(network().parameters())
    before = flat(parameters)
    optimizer: Any = build_optimizer(settings, parameters, fused=True)
    set_lr(optimizer, 0.1)
    set_gradients(parameters, 1)
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), None
    optimizer.step()
    assert flat(parameters) == before
    moments = [value for state in optimizer.state.values() for value in state.values()]
    assert len(moments) >= len(parameters)
    assert not any(moment.any() for moment in moments)


@pytest.mark.parametrize(
    ("settings", "average_momentum", "average_second_moment", "keys"),
    [
        (sgd(momentum=0.9), False, False, []),
        (sgd(momentum=0.9), True, False, ["momentum_buffer"]),
        (adamw(), False, False, []),
        (adamw(), True, False, ["exp_avg"]),
        (adamw(), False, True, ["exp_avg_sq"]),
        (adamw(), True, True, ["exp_avg", "exp_avg_sq"]),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_averaged_states_exist_under_these_names(
    settings: Any,
    average_momentum: bool,
    average_second_moment: bool,
    keys: list[str],
    fused: bool,
) -> None:
    sync = constant_sync(
        average_momentum=average_momentum, average_second_moment=average_second_moment
    )
    assert list(averaged_state_keys(settings, sync)) == keys
    parameters = list(network().parameters())
    optimizer = build_optimizer(settings, parameters, fused=fused)
    set_gradients(parameters, 1)
    optimizer.step()
    for parameter in parameters:
        for key in keys:
            assert optimizer.state[parameter][key].shape == parameter.shape


@pytest.mark.parametrize("settings", [sgd(), sgd(momentum=0.9), adamw()], ids=str)
def test_states_per_parameter(settings: schema.OptimizerConfig) -> None:
    parameters = list(network().parameters())
    optimizer = build_optimizer(settings, parameters, fused=False)
    set_gradients(parameters, seed=1)
    optimizer.step()
    for parameter in parameters:
        kept = [t for t in optimizer.state[parameter].values() if t is not None]
        full = [t for t in kept if t.shape == parameter.shape]
        assert len(full) == states_per_parameter(settings)
        assert all(t.numel() == 1 for t in kept if t.shape != parameter.shape)
