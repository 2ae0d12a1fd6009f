"""Threads that share the work on a batch."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any


class Crew:
    """So many threads, for functions that leave Python's lock alone most of the time."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="crew")
        # all threads start now: if one of DALI's started them, Python would list that one for ever
        together = Barrier(threads)
        list(self._pool.map(lambda _: together.wait(), range(threads)))

    def close(self) -> None:
        """End the threads; nobody may need them any more."""
        self._pool.shutdown()

    def each(self, function: Callable[..., Any], *rows: Sequence[Any]) -> list[Any]:
        """What `function` makes of each sample; `rows` are its arguments, one per sample. Raises
        what it raises."""
        samples = list(zip(*rows, strict=True))

        def work(first: int) -> list[Any]:
            return [function(*sample) for sample in samples[first :: self._threads]]

        done: list[Any] = [None] * len(samples)
        # a task for each thread and not for each image: Python's part of it is not small
        for first, part in enumerate(self._pool.map(work, range(self._threads))):
            done[first :: self._threads] = part
        return done
