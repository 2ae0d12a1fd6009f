"""What a run measures while it trains, and the check that its loss is finite."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qsr.core.open_plan import AnyPlan
from qsr.core.plan import Round
from qsr.core.sampling import Sampler
from qsr.data import Batch
from qsr.errors import TrainingError
from qsr.sync.communicator import Communicator
from qsr.train.precision import Precision
from qsr.train.waiting import DataWait
from qsr.train.worker import Worker

_MOST_LOSSES = 256
"""Losses that are collected before they are added up at once, because adding each one separately
takes as long as a small layer."""


@dataclass
class Progress:
    """Progress and measurements of a run; every checkpoint holds all of it."""

    step: int = 0
    """Steps done."""
    averages: int = 0
    """Averages over the workers so far, of parameters or of gradients."""
    averaged_bytes: int = 0
    """Bytes that one worker contributed to them."""
    skipped_updates: int = 0
    """Updates that workers skipped because fp16 gradients overflowed."""
    repeated_batches: int = 0
    """Local batches that workers repeated at half the loss scale, for the same reason."""
    train_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    communication_seconds: float = 0.0
    """Part of train_seconds; excludes averages that overlap with the backward pass."""
    data_seconds: float = 0.0
    """Part of train_seconds that the host waited for batches: of the rank that waited longest, in
    each stretch between two reads."""
    data_idle_seconds: float = 0.0
    """The same by the device's clock (see `DataWait`): what waiting for data costs."""
    loss_sum: float = 0.0
    """Sum of the finite losses of all workers since the last row of training metrics."""
    loss_weight: float = 0.0
    """Number of losses in that sum."""
    best_top1: float | None = None
    """Best of the evaluations so far, in percent."""
    evaluation_due: bool = False
    """Whether a stop prevented the evaluation of this step; the next session starts with it."""


class Monitor:
    """Counts on the device without making the host wait; reads the counts when something is due."""

    def __init__(
        self,
        plan: AnyPlan,
        sampler: Sampler,
        communicator: Communicator,
        precision: Precision,
    ) -> None:
        self.progress = Progress()
        self._plan = plan
        self._sampler = sampler
        self._communicator = communicator
        self._precision = precision
        # sum and number of the finite losses, number of other losses, skipped updates
        self._sums = torch.zeros(4, dtype=torch.float64, device=communicator.device)
        self._losses: list[Tensor] = []  # not yet added to the sums
        self._repeated = 0  # batches that this rank repeated since the last read
        self._waiting = DataWait(communicator.device)
        self._communication_before = 0.0  # in earlier sessions
        self._lap_start = 0.0
        self._logged = Progress()  # at the last row of training metrics

    def start(self, progress: Progress) -> None:
        """Begin a session at `progress`."""
        self.progress = progress
        self._communication_before = progress.communication_seconds
        self._lap_start = time.perf_counter()
        self._logged = replace(progress)

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the waiting for each is counted."""
        return self._waiting.timed(batches)

    def lap(self, name: str) -> None:
        """Add the time since the last lap to the field `name` of the progress."""
        now, progress = time.perf_counter(), self.progress
        setattr(progress, name, getattr(progress, name) + now - self._lap_start)
        progress.communication_seconds = self._communication_before + self._communicator.seconds()
        self._lap_start = now

    def count_loss(self, loss: Tensor) -> None:
        """Count the loss of one micro-batch, a tensor on the device."""
        self._losses.append(loss)
        if len(self._losses) == _MOST_LOSSES:
            self._add_losses()

    def _add_losses(self) -> None:
        losses = torch.stack(self._losses).double()
        finite = losses.isfinite()
        self._sums[:3] += torch.stack(
            (losses.where(finite, 0.0).sum(), finite.sum(), (~finite).sum())
        )
        self._losses.clear()

    def count_skipped(self, worker: Worker) -> None:
        """After `unscale_`: count the worker's update if the loss scale will skip it."""
        # a private field of the scaler: reading its scale instead would make the host wait
        found = worker.scaler._found_inf_per_device(worker.optimizer)
        self._sums[3] += torch.stack([flag.sum() for flag in found.values()]).sum().clamp(max=1.0)

    def count_repeated(self, batches: int) -> None:
        """Count local batches that are repeated because fp16 gradients overflowed."""
        self._repeated += batches

    def read(self, round_: Round) -> None:
        """Collective: add the counts of all ranks to the progress.

        Raises TrainingError on every rank if the loss is not finite (in fp16: if none is).
        """
        progress = self.progress
        if self._losses:
            self._add_losses()
        sums = self._sums.tolist()  # the host waits for the device here
        self._sums.zero_()
        counts = [*sums, self._repeated, *self._waiting.take()]
        self._repeated = 0
        *summed, waited, idle = zip(*self._communicator.gather_floats(counts), strict=True)
        loss_sum, loss_weight, not_finite, skipped, repeated = map(sum, summed)
        progress.data_seconds += max(waited)
        progress.data_idle_seconds += max(idle)
        progress.loss_sum += loss_sum
        progress.loss_weight += loss_weight
        each = self._communicator.topology.ranks_per_worker  # which count the same
        progress.skipped_updates += round(skipped) // each
        progress.repeated_batches += round(repeated) // each
        if not_finite and (self._precision.name != "fp16" or loss_weight == 0.0):
            raise TrainingError(
                f"the loss is not finite at or before step {progress.step} (round {round_.index}, "
                f"lr {self._plan.schedule(progress.step - 1):.3g}); earlier checkpoints are "
                f"untouched; try a lower schedule.peak_lr, a longer warm-up or "
                f"optimizer.clip_norm"
            )

    def train_row(self, round_: Round, *, with_communication: bool) -> dict[str, Any]:
        """Training metrics of the steps since the last row."""
        progress, before = self.progress, self._logged
        images = (progress.step - before.step) * self._sampler.global_batch
        seconds = progress.train_seconds - before.train_seconds
        idle = progress.data_idle_seconds - before.data_idle_seconds
        row: dict[str, Any] = {
            "kind": "train",
            "step": progress.step,
            "epoch": progress.step / self._sampler.steps_per_epoch,
            "round": round_.index,
            "h": round_.length,
            "lr": self._plan.schedule(progress.step - 1),
            "averages": progress.averages,
            "train_seconds": progress.train_seconds,
            "images_per_second": images / seconds,
            "data_seconds": progress.data_seconds,
            "data_idle_seconds": progress.data_idle_seconds,
            "waiting_percent": min(100.0, 100.0 * idle / seconds),
        }
        if progress.loss_weight:
            row["loss"] = progress.loss_sum / progress.loss_weight
        if with_communication:
            row["communication_seconds"] = progress.communication_seconds
        if self._precision.name == "fp16":
            row["skipped_updates"] = progress.skipped_updates
            row["repeated_batches"] = progress.repeated_batches
        self._logged = replace(progress)
        progress.loss_sum = progress.loss_weight = 0.0
        return row
