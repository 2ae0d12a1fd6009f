"""What a training loop that is not ours must have: checks, and its process group."""

import math
import os
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qsr.core.outer import OuterOptions
from qsr.errors import DisagreementError
from qsr.sync.communicator import Communicator
from qsr.sync.topology import Topology


def join_group(
    parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup | None
) -> Communicator:
    """The communicator of the processes of `group`, each of them one worker; of this process alone
    without torch.distributed. Raises ValueError if a process group is missing."""
    device = next(iter(parameters.values())).device
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "several processes were started, but there is no process group: call "
                "torch.distributed.init_process_group() before LocalSGD"
            )
        return Communicator(Topology(0, 1, 0, 1), device, 0.0)
    rank, workers = dist.get_rank(group), dist.get_world_size(group)
    backends = str(dist.get_backend_config(group))
    return Communicator(
        Topology(rank, workers, rank, workers),
        device,
        math.inf,
        group=group,
        control=torch.device("cpu") if "cpu:" in backends or "gloo" in backends else device,
        patience="raise the timeout of init_process_group",
    )


def check_arguments(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup | None,
    delay_steps: int,
    outer: OuterOptions,
) -> None:
    """Raise ValueError if the model or the optimizer cannot be used."""
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise ValueError(
            f"{type(optimizer).__name__} wraps an optimizer: give LocalSGD the one inside, such as "
            f"accelerate's optimizer.optimizer"
        )
    if delay_steps < 0:
        raise ValueError(f"delay_steps cannot be negative, got {delay_steps}")
    if delay_steps and not outer.ends_at_mean:
        raise ValueError("an outer optimizer needs the average at the round's end: delay_steps=0")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the model has no trainable parameters")
    # over the same processes it would average all gradients already
    for module in model.modules():
        if not isinstance(module, DistributedDataParallel):
            continue
        inside = set(dist.get_process_group_ranks(module.process_group))
        if len(inside & set(dist.get_process_group_ranks(group))) < 2:
            continue
        raise ValueError(
            "the model is wrapped in DistributedDataParallel over the workers' own processes, "
            "which averages gradients in every step: give LocalSGD the bare model, or a group of "
            "processes of different workers"
        )


def check_same_arguments(
    communicator: Communicator, run: str, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Collective: raise DisagreementError unless all workers have the same model, and `run`, which
    describes the other arguments."""
    shapes = {name: list(p.shape) for name, p in parameters.items()}
    differs = communicator.first_difference({"run": run, "parameters": shapes})
    if differs is not None:
        raise DisagreementError(
            f"worker {differs.rank} builds another LocalSGD than worker 0 ({differs.what}): use "
            f"the same model and arguments on all"
        )
