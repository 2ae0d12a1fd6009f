"""Local SGD under Lightning (2.4 or newer).

    trainer = Trainer(
        devices=8, strategy=LocalStrategy(), max_epochs=300,
        callbacks=[LocalSGDCallback(QuadraticRule(h_base=4, alpha=0.0175), warmup_steps=10_000,
                                    peak_lr=0.008)],
    )

All of Lightning's strategies for several processes average gradients or shard the model.
`LocalStrategy` starts the processes as "ddp" does, but leaves the model alone.
"""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn

from qsr.core.rules import Rule
from qsr.errors import CheckpointError
from qsr.sync.local_sgd import LocalSGD


class LocalStrategy(DDPStrategy):
    """Processes as in Lightning's "ddp" strategy, each with a model of its own.

    A checkpoint is one file for each process, because the workers differ within a round: PATH is
    that of worker 0, PATH.worker1 that of worker 1. Resume with `ckpt_path=PATH`, on as many
    processes as before.
    """

    average_gradients: Callable[[], object] | None = None
    """Called between the backward pass and the update, before clipping."""

    def configure_ddp(self) -> None:
        """Called by `setup`: do not wrap the model."""

    def optimizer_step(
        self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **options: Any
    ) -> Any:
        """Take one step of the optimizer. Collective if `average_gradients` is."""
        if self.average_gradients is not None:
            loss = closure()  # the forward and backward pass
            self.average_gradients()
            closure = lambda: loss  # noqa: E731
        return super().optimizer_step(optimizer, closure, model, **options)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write this worker's file; every process must call it."""
        path = self._own(filepath)
        self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, *options: Any, **named: Any) -> dict[str, Any]:
        """Read this worker's file. Raises CheckpointError if it is missing."""
        path = self._own(checkpoint_path)
        if not Path(path).exists():
            raise CheckpointError(
                f"{path} is missing: start as many processes as wrote the checkpoint, on machines "
                f"that see all its files"
            )
        checkpoint: dict[str, Any] = super().load_checkpoint(path, *options, **named)
        return checkpoint

    def remove_checkpoint(self, filepath: Any) -> None:
        """Delete this worker's file."""
        self.checkpoint_io.remove_checkpoint(self._own(filepath))

    def _own(self, path: Any) -> str:
        return f"{path}.worker{self.global_rank}" if self.global_rank else str(path)


class LocalSGDCallback(Callback):
    """Averages the parameters of a LightningModule over the workers at the end of every round.

    Every process is one worker. At the start of a run all get the parameters and buffers of the
    first. Steps are Lightning's own (`trainer.global_step`): one for each update, whatever
    `accumulate_grad_batches`. Validation sees the workers' mean; ModelCheckpoint saves each
    worker's own parameters, from which a run resumes, also in the middle of a round.

    Args:
        rule, options: the arguments of LocalSGD, without model and optimizer. `total_steps` is by
            default what the Trainer expects from `max_epochs` or `max_steps`.
        batchnorm_batches: batches of the training data, per worker, from which the statistics of
            BatchNorm layers are estimated before each validation; 0: leave each worker's own. The
            batches are inputs, or tuples that begin with them; `forward` must accept them.

    Raises ValueError at the start of `fit` if the strategy is of several processes and not a
    LocalStrategy, or if the module has not exactly one optimizer.
    """

    def __init__(
        self, rule: Rule | None = None, *, batchnorm_batches: int = 0, **options: Any
    ) -> None:
        self.sync: LocalSGD | None = None
        """Exists from the first training step on; `sync.summary()` says how far it is."""
        self._rule, self._options, self._batchnorm_batches = rule, options, batchnorm_batches
        self._loaded: Mapping[str, Any] = {}
        self._steps = 0
        self._evaluation = contextlib.ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what would average gradients."""
        strategy = trainer.strategy
        if stage == "fit" and trainer.world_size > 1 and not isinstance(strategy, LocalStrategy):
            raise ValueError(
                f"{type(strategy).__name__} averages gradients in every step or shards the model: "
                f"use Trainer(strategy=LocalStrategy()), from qsr.integrations.lightning"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collective: build LocalSGD, after Lightning has restored model and optimizer."""
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"the module has {len(trainer.optimizers)} optimizers: return one from "
                f"configure_optimizers, with a parameter group for each part of the model"
            )
        options = dict(self._options)
        if "plan" not in options:
            options.setdefault("total_steps", _total_steps(trainer))
        self.sync = LocalSGD(pl_module, trainer.optimizers[0], self._rule, **options)
        if self._loaded:
            self.sync.load_state_dict(self._loaded)
        else:
            self.sync.broadcast()
        self._steps = trainer.global_step
        rule = self._rule if self.sync.plan is None else self.sync.plan.rule
        if isinstance(trainer.strategy, LocalStrategy):
            parallel = rule is not None and rule.averages(0) == "gradients"
            trainer.strategy.average_gradients = self.sync.average_gradients if parallel else None

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Collective at the end of a round: count an update, if there was one."""
        if self.sync is not None and trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self.sync.step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if the workers' models differ."""
        if self.sync is not None and self.sync.workers > 1 and not self.sync.workers_are_equal:
            rank_zero_warn(
                "training has stopped within a round, so the workers' models differ: resume to "
                "the last step, or use the model within callback.sync.averaged()"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collective, during `fit`: make the model the workers' mean."""
        if self.sync is None or trainer.sanity_checking or not _is_fitting(trainer):
            return
        self._evaluation.enter_context(self.sync.averaged())
        if self._batchnorm_batches:
            # a new pass over the loader draws from torch's generator: training must not see it
            with torch.random.fork_rng(devices=[]):
                loader: Any = trainer.train_dataloader
                self.sync.reestimate_batchnorm(loader, self._batchnorm_batches)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the worker its own parameters back."""
        self._evaluation.close()

    def on_exception(self, *_: object) -> None:
        """The same, if validation failed."""
        self._evaluation.close()

    def state_dict(self) -> dict[str, Any]:
        """What this worker needs to resume; collective if `delay_steps` > 0."""
        return dict(self._loaded) if self.sync is None else self.sync.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called by Lightning before the training starts; `on_train_start` uses it."""
        self._loaded = state_dict


def _total_steps(trainer: Trainer) -> int:
    steps = trainer.estimated_stepping_batches
    if not isinstance(steps, int):
        raise ValueError("the run has no end: give Trainer max_epochs or max_steps")
    return steps


def _is_fitting(trainer: Trainer) -> bool:
    return bool(trainer.state.fn == "fit")
