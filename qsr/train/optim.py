"""Settings -> torch optimizer."""

import copy
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import assert_never

import torch
from torch import Tensor, nn

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


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def states_after_a_step(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """The states that the optimizer keeps for each parameter, in its order, after its first step:
    tensors on the meta device, with shapes and types but no values. The optimizer is not
    changed."""
    twin = copy.copy(optimizer)
    twin.state = defaultdict(dict)
    twin.param_groups = []
    for group in optimizer.param_groups:
        parameters = [nn.Parameter(torch.empty_like(p, device="meta")) for p in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        # plain kernels: fused and foreach ones need a device
        twin.param_groups.append(group | {"params": parameters, "fused": False, "foreach": False})
    twin.step()
    return [
        {key: value for key, value in twin.state[parameter].items() if value is not None}
        for group in twin.param_groups
        for parameter in group["params"]
    ]
