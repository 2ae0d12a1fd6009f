"""Averages that travel while training goes on: a change of the algorithm, off by default."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qsr.averaging import FINGERPRINT_SIZE, Averager, Fingerprint, PendingAverage
from qsr.flat import FlatBuffers
from qsr.worker import Worker

PREFIX = "correction/"
"""Of the corrections' names."""


class DelayedAverage:
    """The average of a round, applied some steps after the round's end.

    At the end the workers' parameters are copied; the copies are averaged while the workers train
    on. When the average is due, each worker adds to its parameters by how much it differs from the
    worker's copy, its correction: the steps taken meanwhile stay. Takes the memory of one more
    model for each worker of the rank, and of one for the average.
    """

    def __init__(self, averager: Averager, workers: Sequence[Worker]) -> None:
        self._averager = averager
        self._workers = workers
        self._copies = [_like(worker) for worker in workers]
        self._average = _like(workers[0])
        self._pending: PendingAverage | None = None
        self.due: int | None = None
        """The step at whose end the average is applied; None: none is under way."""

    def begin(self, fingerprint: Fingerprint, due: int) -> None:
        """Collective: a round has ended; its average is applied at the end of step `due`."""
        for copy, worker in zip(self._copies, self._workers, strict=True):
            for dtype, buffer in worker.model.flat.buffers.items():
                copy.buffers[dtype].copy_(buffer)
        self._pending = self._averager.begin(self._copies, fingerprint, self._average)
        self.due = due

    def corrections(self) -> list[dict[str, Tensor]]:
        """Collective: those of each worker of the rank, by the parameters' names; none if no
        average is under way."""
        if self.due is None:
            return [{} for _ in self._workers]
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            for copy in self._copies:
                for dtype, average in self._average.buffers.items():
                    torch.sub(average, copy.buffers[dtype], out=copy.buffers[dtype])
        return [
            dict(zip(_names(worker), copy.views, strict=True))
            for worker, copy in zip(self._workers, self._copies, strict=True)
        ]

    def apply_(self) -> None:
        """Collective: move the workers' parameters by the corrections."""
        self.corrections()
        for copy, worker in zip(self._copies, self._workers, strict=True):
            for dtype, buffer in worker.model.flat.buffers.items():
                buffer.add_(copy.buffers[dtype])
        self.due = None

    def load(self, corrections: Sequence[Mapping[str, Tensor]], due: int) -> None:
        """Take up what `corrections` and `due` gave."""
        for worker, copy, stored in zip(self._workers, self._copies, corrections, strict=True):
            for name, view in zip(_names(worker), copy.views, strict=True):
                view.copy_(stored[name])
        self.due = due


def _like(worker: Worker) -> FlatBuffers:
    return FlatBuffers(worker.model.flat.views, FINGERPRINT_SIZE)


def _names(worker: Worker) -> list[str]:
    return [PREFIX + name for name in worker.parameters()]
