"""One step: forward and backward passes over a worker's micro-batches, and the update."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from qsr.core.seeds import seed_for
from qsr.data import Batch
from qsr.sync.synchronizer import Synchronizer
from qsr.train.compiling import CompileClock
from qsr.train.losses import TrainingLoss
from qsr.train.monitor import Monitor
from qsr.train.optim import set_lr
from qsr.train.passes import make_passes
from qsr.train.precision import Precision
from qsr.train.worker import Worker


class Stepper:
    """Takes steps with the workers of this rank."""

    def __init__(
        self,
        workers: Sequence[Worker],
        synchronizer: Synchronizer,
        monitor: Monitor,
        *,
        loss: TrainingLoss,
        micro_batch: int,
        clip_norm: float | None,
        precision: Precision,
        seed: int,
        compile_clock: CompileClock | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        """`compile_clock`: runs while a compiled network takes its first step. `cuda_graphs`: make
        the passes as CUDA graphs, on a GPU."""
        self.workers = workers
        self.monitor = monitor
        self.micro_batch = micro_batch
        self._synchronizer = synchronizer
        self._clip_norm = clip_norm
        self._passes = make_passes(
            loss, precision, synchronizer.communicator.warn, graphs=cuda_graphs
        )
        self._seed = seed
        self._compile_clock = compile_clock

    def find_gradients(
        self,
        workers: Sequence[Worker],
        batches: Iterator[Batch],
        step: int,
    ) -> int:
        """Compute the gradient of each worker's batch and leave it on its parameters, for `update`.
        Returns the bytes that each worker contributed to an average over the workers.

        Collective if the synchronizer averages gradients in this step: the mean is what is left.
        Batches are taken one by one, so that loading overlaps with computing. While the loss scale
        is being searched for, batches whose fp16 gradients overflow are repeated (see `LossScale`);
        all ranks whose gradients are averaged see the same overflow and repeat.
        """
        averaged_bytes = 0
        may_repeat = any(worker.scaler.is_searching for worker in workers)
        kept: list[Batch] = []
        while True:
            losses: list[Tensor] = []
            for worker in workers:
                batch = next(batches)
                if may_repeat:
                    kept.append(batch)
                losses += self._forward_backward(worker, batch, step)
            averaged_bytes += self._synchronizer.average_gradients()
            overflowed = [self._must_repeat(worker) for worker in workers]
            if not any(overflowed):
                break
            self.monitor.count_repeated(len(workers))
            batches, kept = iter(kept), []
        for loss in losses:
            self.monitor.count_loss(loss)
            self._synchronizer.count_loss(loss)
        if self._compile_clock is not None:
            seconds = self._compile_clock.stop()
            self._compile_clock = None
            self._synchronizer.communicator.warn(f"note: compiled in {seconds:.0f} s")
        return averaged_bytes

    def _forward_backward(self, worker: Worker, batch: Batch, step: int) -> list[Tensor]:
        """Compute the mean gradient of the batch, times the loss scale. Returns the loss of each
        micro-batch. Collective like `find_gradients`."""
        # a new seed for each step: dropout draws the same in a resumed run, and however many
        # workers share a process
        seed = seed_for(self._seed, "model", worker=worker.shard, step=step)
        _seed_generators(seed, batch.images.device)
        worker.model.zero_gradients()
        forward = self._synchronizer.forward_of(worker.model)
        images = batch.images.split(self.micro_batch)
        labels = batch.labels.split(self.micro_batch)
        losses = []
        with self._passes.step():
            for number, (x, y) in enumerate(zip(images, labels, strict=True)):
                mixup = seed_for(
                    self._seed, "mixup", worker=worker.shard, step=step, micro_batch=number
                )
                with self._synchronizer.backward_context(last=number + 1 == len(images)):
                    losses.append(self._passes(worker, forward, x, y, mixup, len(images)))
        return losses

    def _must_repeat(self, worker: Worker) -> bool:
        """Divide the gradients by the loss scale. True if they overflowed and the batch must be
        repeated."""
        if not worker.scaler.is_enabled():
            return False
        worker.scaler.unscale_(worker.optimizer)
        return worker.scaler.must_repeat(worker.optimizer)

    def update(self, worker: Worker, lr: float) -> None:
        """Update the worker's parameters with the gradients from `find_gradients`."""
        set_lr(worker.optimizer, lr)
        if worker.scaler.is_enabled():
            self.monitor.count_skipped(worker)
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(worker.model.module.parameters(), self._clip_norm)
        worker.scaler.step(worker.optimizer)
        worker.scaler.update()


def _seed_generators(seed: int, device: torch.device) -> None:
    """torch.manual_seed for this device only. The original seeds every kind of device, and until a
    GPU is used it stores a stack trace per call, which takes a millisecond and memory."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
