"""Local SGD under Hugging Face's Accelerate (1.2 or newer).

Accelerate wraps a model in DistributedDataParallel, which averages gradients in every step. To
switch that off, prepare the model with `evaluation_mode=True`. It then gets its device, mixed
precision and compilation, but no wrapper, and trains like any other.

    model = accelerator.prepare_model(model, evaluation_mode=True)
    optimizer, loader = accelerator.prepare(optimizer, loader)
    sync = AcceleratedLocalSGD(accelerator, model, optimizer, QuadraticRule(h_base=4, alpha=0.0175),
                               total_steps=93_600, warmup_steps=10_000, peak_lr=0.008)
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss(model(x), y))
            optimizer.step(); optimizer.zero_grad()
            if accelerator.sync_gradients:
                scheduler.step()
            sync.step()

A scheduler that went through `accelerator.prepare` takes one step for each process. So leave it out
and step it yourself, as above, or make it for `num_processes` times as many steps.
"""

from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from qsr.core.rules import Rule
from qsr.errors import TrainingError
from qsr.sync.local_sgd import LocalSGD

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
_WRAPPED = (
    "the model is wrapped in DistributedDataParallel, which averages gradients in every step: use "
    "accelerator.prepare_model(model, evaluation_mode=True) instead of accelerator.prepare(model)"
)


class AcceleratedLocalSGD(LocalSGD):
    """LocalSGD whose steps follow Accelerate's gradient accumulation.

    Collective: every process of the Accelerator builds one. `average_gradients` and `step` do
    nothing and return False in micro-batches that do not update the model, so call them in each.

    Args:
        accelerator: the Accelerator that prepared the rest.
        model: the prepared model, see the head of this module.
        optimizer: the prepared optimizer, or torch's own.
        rule, options: the other arguments of LocalSGD. `total_steps` and `warmup_steps` count
            updates, not micro-batches. `flatten` is False unless `delay_steps` needs it, because
            safetensors, with which Accelerate saves, refuses parameters that share a buffer.

    Raises ValueError if the model is wrapped in DistributedDataParallel or sharded by Accelerate.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        rule: Rule | None = None,
        **options: Any,
    ) -> None:
        if accelerator.distributed_type in _SHARDED:
            raise ValueError(
                f"Accelerate spreads one model over all processes ({accelerator.distributed_type}),"
                f" so there are no workers to average: launch with MULTI_GPU or MULTI_CPU"
            )
        if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
            raise ValueError(_WRAPPED)
        bare = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        options.setdefault("flatten", bool(options.get("delay_steps")))
        super().__init__(model, bare, rule, **options)
        self._accelerator = accelerator
        model.register_forward_pre_hook(_refuse_wrapper)
        accelerator.register_save_state_pre_hook(self._refuse_to_save_one)

    def average_gradients(self) -> bool:
        """Collective, like `LocalSGD.average_gradients`, in the last micro-batch of a step; before
        accelerator.clip_grad_norm_."""
        return bool(self._accelerator.sync_gradients) and super().average_gradients()

    def step(self) -> bool:
        """Collective at the end of a round, like `LocalSGD.step`. Call it in every micro-batch,
        after optimizer.step()."""
        return bool(self._accelerator.sync_gradients) and super().step()

    def _refuse_to_save_one(self, *_: object) -> None:
        """Called at the beginning of accelerator.save_state()."""
        if self.workers > 1 and not self.workers_are_equal:
            raise TrainingError(
                "accelerator.save_state() keeps the model of one process, but within a round each "
                "worker has its own: save when sync.workers_are_equal, or one file per worker"
            )


def _refuse_wrapper(*_: object) -> None:
    """Called before every forward pass: DistributedDataParallel may hide around the bare model."""
    if DistributedDataParallel._get_active_ddp_module() is not None:
        raise ValueError(_WRAPPED)
