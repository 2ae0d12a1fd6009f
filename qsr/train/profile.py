"""A trace of some steps for Perfetto or chrome://tracing, from every rank."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from qsr.sync.communicator import Communicator


class StepProfiler:
    """Records the steps `first` to `last`, counted from 1, and what the host and the device do in
    them: `folder`/rank_RRR.json.gz. Steps that another session has taken are missing in it."""

    def __init__(self, first: int, last: int, folder: Path, communicator: Communicator) -> None:
        self._steps = range(first, last + 1)
        self._folder = folder
        self._communicator = communicator
        self._running: profile | None = None

    @contextmanager
    def step(self, number: int, settle: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Context for step `number`, counted from 1. After the last one the trace is written.

        `settle` waits for all collectives that this rank has begun. torch's recording must not
        start or stop while a thread of gloo's is recorded: that loses steps, or corrupts memory.
        """
        if number not in self._steps:
            yield
            return
        if self._running is None:
            settle()
            self._running = self._start()
        with record_function(f"step {number}"):
            yield
        if number == self._steps[-1]:
            settle()
            self.close()

    def close(self) -> None:
        """Write what was recorded, if the session ends in between. Errors of the disk are shown and
        do not end the run."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.stop()
        name = f"rank_{self._communicator.topology.rank:03d}.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder, prefix=".") as aside:
                written = Path(aside) / name
                running.export_chrome_trace(str(written))
                written.replace(self._folder / name)
        except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
            self._communicator.warn(f"warning: the profile was not written: {error}")
        else:
            self._communicator.warn(f"note: profile written to {self._folder / name}")

    def _start(self) -> profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silence, also without a GPU
        activities = [ProfilerActivity.CPU]
        if self._communicator.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        running = profile(activities=activities)
        running.start()
        return running
