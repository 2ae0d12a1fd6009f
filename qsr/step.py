"""One step of one worker: forward and backward passes over its micro-batches, and the update."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from qsr.core.seeds import seed_for
from qsr.data import Batch
from qsr.gradients import GradientAverager
from qsr.losses import TrainingLoss
from qsr.monitor import Monitor
from qsr.optim import set_lr
from qsr.precision import Precision
from qsr.worker import Worker


class Stepper:
    """Takes steps with the workers of this rank. `gradients` averages those of data parallel
    steps, in runs that have such."""

    def __init__(
        self,
        *,
        loss: TrainingLoss,
        micro_batch: int,
        clip_norm: float | None,
        precision: Precision,
        monitor: Monitor,
        gradients: GradientAverager | None,
        seed: int,
    ) -> None:
        self._loss = loss
        self._micro_batch = micro_batch
        self._clip_norm = clip_norm
        self._precision = precision
        self._monitor = monitor
        self._gradients = gradients
        self._seed = seed

    def find_gradients(
        self,
        workers: Sequence[Worker],
        batches: Iterator[Batch],
        step: int,
        *,
        data_parallel: bool,
    ) -> int:
        """Leave on each worker's parameters the gradient of its local batch, or in a data parallel
        step that of all workers' batches. `update` follows. Collective in a data parallel step.
        The next of the `batches` are taken one by one, so that loading goes on beside computing.

        While fp16 gradients overflow and the loss scale is being looked for, the batches are
        repeated (see `LossScale`); workers that average see the same gradients, and all repeat.
        Returns how often they were gone through: 1 but for that.
        """
        tries = 0
        may_repeat = any(worker.scaler.is_searching for worker in workers)
        kept: list[Batch] = []
        while True:
            tries += 1
            losses: list[Tensor] = []
            for worker in workers:
                batch = next(batches)
                if may_repeat:
                    kept.append(batch)
                losses += self._forward_backward(worker, batch, step, average=data_parallel)
            if data_parallel and self._gradients is not None:
                self._gradients.finish()
            overflowed = [self._must_repeat(worker) for worker in workers]
            if not any(overflowed):
                break
            self._monitor.count_repeated(len(workers))
            batches, kept = iter(kept), []
        for loss in losses:
            self._monitor.count_loss(loss)
        return tries

    def _forward_backward(
        self, worker: Worker, batch: Batch, step: int, *, average: bool
    ) -> list[Tensor]:
        """The mean gradient of the local batch, times the loss scale. Returns the loss of each
        micro-batch. Collective if the last backward pass is to `average`."""
        # a fresh seed a step: dropout draws the same in a resumed run, and whether a worker has
        # a process of its own or not
        seed = seed_for(self._seed, "model", worker=worker.index, step=step)
        _seed_generators(seed, batch.images.device)
        worker.zero_gradients()
        losses = []
        images = batch.images.split(self._micro_batch)
        labels = batch.labels.split(self._micro_batch)
        for number, (x, y) in enumerate(zip(images, labels, strict=True)):
            last = number + 1 == len(images)
            with self._gradient_context(average=last and average):
                seed = seed_for(
                    self._seed, "mixup", worker=worker.index, step=step, micro_batch=number
                )
                with self._precision.autocast():
                    loss = self._loss(worker.forward, x, y, seed)
                worker.scaler.scale(loss / len(images)).backward()
            losses.append(loss.detach())
        return losses

    def _must_repeat(self, worker: Worker) -> bool:
        """Divide the loss scale out of the gradients. True if they overflowed and the batch is to
        be repeated."""
        if not worker.scaler.is_enabled():
            return False
        worker.scaler.unscale_(worker.optimizer)
        return worker.scaler.must_repeat(worker.optimizer)

    def update(self, worker: Worker, lr: float) -> None:
        """Change the worker's parameters by the gradients that `find_gradients` left."""
        set_lr(worker.optimizer, lr)
        if worker.scaler.is_enabled():
            self._monitor.count_skipped(worker)
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(worker.model.module.parameters(), self._clip_norm)
        worker.scaler.step(worker.optimizer)
        worker.scaler.update()

    def _gradient_context(self, *, average: bool) -> AbstractContextManager[object]:
        if self._gradients is None:
            return nullcontext()
        return self._gradients.backward_context(average=average)


def _seed_generators(seed: int, device: torch.device) -> None:
    """torch.manual_seed for this device. That one is for every kind of device, and while no GPU is
    in use it keeps a stack trace of each call: a millisecond, and memory."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
