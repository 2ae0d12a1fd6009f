"""Averages that overlap with training: a change of the algorithm, off by default."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from qsr.sync.averaging import Averager, PendingAverage
from qsr.sync.fingerprint import FINGERPRINT_SIZE, Fingerprint
from qsr.sync.flat import FlatBuffers

PREFIX = "correction/"
"""Prefix of the corrections' names in a checkpoint."""


class Flat(Protocol):
    """Parameters in flat buffers."""

    flat: FlatBuffers

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters by name, in the order of `flat.views`."""


class DelayedAverage:
    """The average of a round, applied some steps after the end of the round.

    At the end of the round the parameters of the `replicas`, this rank's workers, are copied, and
    the copies are averaged while the workers continue to train. When the average is due, each
    worker adds its correction, the average minus its copy, to its parameters, so that the steps
    taken meanwhile are kept. This needs memory for one more model per worker of the rank, and for
    one average.
    """

    def __init__(self, averager: Averager, replicas: Sequence[Flat]) -> None:
        self._averager = averager
        self._replicas = replicas
        self._copies = [_like(replica) for replica in replicas]
        self._average = _like(replicas[0])
        self._pending: PendingAverage | None = None
        self.due: int | None = None
        """The average is applied at the end of this step; None: no average is in progress."""

    def begin(self, fingerprint: Fingerprint, due: int) -> None:
        """Collective: begin the average of a round, to be applied at the end of step `due`."""
        for copy, replica in zip(self._copies, self._replicas, strict=True):
            for dtype, buffer in replica.flat.buffers.items():
                copy.buffers[dtype].copy_(buffer)
        self._pending = self._averager.begin(self._copies, fingerprint, self._average)
        self.due = due

    def corrections(self) -> list[dict[str, Tensor]]:
        """Collective: the correction of each worker of the rank, by parameter name; empty if no
        average is in progress."""
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
        """Collective: add the corrections to the workers' parameters."""
        self.corrections()
        for copy, replica in zip(self._copies, self._replicas, strict=True):
            for dtype, buffer in replica.flat.buffers.items():
                buffer.add_(copy.buffers[dtype])
        self.due = None

    def load(self, corrections: Sequence[Mapping[str, Tensor]], due: int) -> None:
        """Restore saved values of `corrections` and `due`."""
        for replica, copy, stored in zip(self._replicas, self._copies, corrections, strict=True):
            for name, view in zip(_names(replica), copy.views, strict=True):
                view.copy_(stored[name])
        self.due = due


def _like(replica: Flat) -> FlatBuffers:
    return FlatBuffers(replica.flat.views, FINGERPRINT_SIZE)


def _names(replica: Flat) -> list[str]:
    return [f"{PREFIX}parameters/{name}" for name in replica.parameters()]
