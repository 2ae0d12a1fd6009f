"""Settings -> torch optimizer."""

from collections.abc import Iterable, Sequence
from typing import assert_never

import torch
from torch import nn

from qsr.config import schema


def build_optimizer(
    settings: schema.OptimizerConfig, parameters: Iterable[nn.Parameter], *, fused: bool
) -> torch.optim.Optimizer:
    """The optimizer of one worker, with weight decay on every parameter as in the paper's recipes.

    `fused`: use torch's fused kernel. An fp16 run needs it, because only fused kernels skip a step
    with overflowed gradients without making the host wait.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    lr = 0.0  # the trainer sets the rate before every step
    match settings:
        case schema.SgdConfig():
            optimizer = torch.optim.SGD(
                trainable,
                lr=lr,
                momentum=settings.momentum,
                nesterov=settings.nesterov,
                weight_decay=settings.weight_decay,
                fused=fused,
            )
            if fused and settings.momentum:
                # torch's fused SGD allocates momentum buffers uninitialised, and uses them as they
                # are if an overflow skips the first update
                for parameter in trainable:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return optimizer
        case schema.AdamWConfig():
            return torch.optim.AdamW(
                trainable,
                lr=lr,
                betas=(settings.beta1, settings.beta2),
                eps=settings.eps,
                weight_decay=settings.weight_decay,
                fused=fused,
            )
    assert_never(settings)


def averaged_state_keys(settings: schema.OptimizerConfig, sync: schema.SyncConfig) -> Sequence[str]:
    """Names of the optimizer states that are averaged with the parameters."""
    match settings:
        case schema.SgdConfig():
            momentum, second_moment = "momentum_buffer", ""
        case schema.AdamWConfig():
            momentum, second_moment = "exp_avg", "exp_avg_sq"
        case _:
            assert_never(settings)
    keys = [momentum] if sync.average_momentum else []
    return [*keys, second_moment] if sync.average_second_moment else keys


def states_per_parameter(settings: schema.OptimizerConfig) -> int:
    """How many values the optimizer keeps for each parameter."""
    match settings:
        case schema.SgdConfig():
            return 1 if settings.momentum else 0
        case schema.AdamWConfig():
            return 2
    assert_never(settings)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
