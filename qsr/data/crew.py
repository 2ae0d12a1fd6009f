"""A thread pool for the samples of a batch."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any


class Crew:
    """A fixed number of threads, for functions that mostly run without the GIL."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="crew")
        # start all threads now: started from a DALI thread, they would keep that thread in
        # Python's list of threads forever
        together = Barrier(threads)
        list(self._pool.map(lambda _: together.wait(), range(threads)))

    def close(self) -> None:
        """Stop the threads. Call it only when nothing uses them any more."""
        self._pool.shutdown()

    def each(self, function: Callable[..., Any], *rows: Sequence[Any]) -> list[Any]:
        """Call `function` for each sample and return the results in order. Each of `rows` holds one
        argument per sample. Exceptions of `function` propagate."""
        samples = list(zip(*rows, strict=True))

        def work(first: int) -> list[Any]:
            return [function(*sample) for sample in samples[first :: self._threads]]

        done: list[Any] = [None] * len(samples)
        # one task per thread, not per image, because submitting a task is expensive in Python
        for first, part in enumerate(self._pool.map(work, range(self._threads))):
            done[first :: self._threads] = part
        return done
