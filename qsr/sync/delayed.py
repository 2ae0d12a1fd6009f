"""Averages that travel while training goes on: a change of the algorithm, off by default."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qsr.sync.averaging import Averager, PendingAverage
from qsr.sync.fingerprint import FINGERPRINT_SIZE, Fingerprint
from qsr.sync.flat import FlatBuffers, FlatModule

PREFIX = "correction/"
"""What the names of the corrections begin with in a checkpoint."""


class DelayedAverage:
    """The average of a round, applied some steps after the round's end.

    At the round's end the parameters of the `replicas`, this rank's workers, are copied; the copies
    are averaged while the workers train on. When the average is due, each worker adds its
    correction, the average minus its copy, to its parameters: the steps taken meanwhile stay. Takes
    the memory of one more model for each worker of the rank, and of one for the average.
    """

    def __init__(self, averager: Averager, replicas: Sequence[FlatModule]) -> None:
        self._averager = averager
        self._replicas = replicas
        self._copies = [_like(replica) for replica in replicas]
        self._average = _like(replicas[0])
        self._pending: PendingAverage | None = None
        self.due: int | None = None
        """The step at whose end the average is applied; None: none is under way."""

    def begin(self, fingerprint: Fingerprint, due: int) -> None:
        """Collective: a round has ended; its average is applied at the end of step `due`."""
        for copy, replica in zip(self._copies, self._replicas, strict=True):
            for dtype, buffer in replica.flat.buffers.items():
                copy.buffers[dtype].copy_(buffer)
        self._pending = self._averager.begin(self._copies, fingerprint, self._average)
        self.due = due

    def corrections(self) -> list[dict[str, Tensor]]:
        """Collective: the correction of each worker of the rank, by the parameters' names; empty
        if no average is under way."""
        if self.due is None:
            return [{} for _ in self._replicas]
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            for copy in self._copies:
                for dtype, average in self._average.buffers.items():
                    torch.sub(average, copy.buffers[dtype], out=copy.buffers[dtype])
        return [
            dict(zip(_names(replica), copy.views, strict=True))
            for replica, copy in zip(self._replicas, self._copies, strict=True)
        ]

    def apply_(self) -> None:
        """Collective: move the workers' parameters by the corrections."""
        self.corrections()
        for copy, replica in zip(self._copies, self._replicas, strict=True):
            for dtype, buffer in replica.flat.buffers.items():
                buffer.add_(copy.buffers[dtype])
        self.due = None

    def load(self, corrections: Sequence[Mapping[str, Tensor]], due: int) -> None:
        """Restore what `corrections` and `due` gave."""
        for replica, copy, stored in zip(self._replicas, self._copies, corrections, strict=True):
            for name, view in zip(_names(replica), copy.views, strict=True):
                view.copy_(stored[name])
        self.due = due


def _like(replica: FlatModule) -> FlatBuffers:
    return FlatBuffers(replica.flat.views, FINGERPRINT_SIZE)


def _names(replica: FlatModule) -> list[str]:
    return [f"{PREFIX}parameters/{name}" for name in replica.parameters()]
