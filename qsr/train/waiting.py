"""The time that training waits for batches."""

from collections.abc import Iterator

import torch

from qsr.data import Batch
from qsr.sync.stopwatch import Stopwatch


class DataWait:
    """Measures how long training waits for batches, by the host's clock and by the device's.

    The host's time is what it spends in asking for batches. The device's is what passes there from
    the end of all that was queued before a batch was asked for until the batch can be used: the
    device is idle, or prepares the batch. A host that runs ahead of a GPU may wait while the GPU
    computes, and a loader that works on the GPU may let only the GPU wait. On the CPU both are the
    same. Measuring makes neither wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._clocks = (Stopwatch(torch.device("cpu")), Stopwatch(device))
        self._taken = (0.0, 0.0)

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the waiting for each is counted."""
        host, device = self._clocks
        while True:
            with host.running(), device.running():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def take(self) -> tuple[float, float]:
        """Seconds since the last call, of the host and of the device. Waits for the GPU, so call it
        where the host waits anyway."""
        (host, device), before = (clock.seconds() for clock in self._clocks), self._taken
        self._taken = (host, device)
        return host - before[0], device - before[1]
