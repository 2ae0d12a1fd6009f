"""Resizing on the CPU, inside a DALI pipeline: torch's kernel takes a fraction of DALI's time."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

Pixels = NDArray[np.uint8]
"""[h, w, 3]."""


class Resizer:
    """Resizes batches of images with antialiased linear filtering, as Pillow does (to within one
    level), and cuts out squares of `side` pixels. `threads` work on a batch."""

    def __init__(self, side: int, threads: int) -> None:
        self._side = side
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="resize")
        # all threads start now: if one of DALI's started them, Python would list that one for ever
        together = Barrier(threads)
        list(self._pool.map(lambda _: together.wait(), range(threads)))

    def close(self) -> None:
        """End the threads; no pipeline may need them any more."""
        self._pool.shutdown()

    def whole(self, images: Sequence[Pixels]) -> list[Pixels]:
        """Each image as a square."""
        return self._each(lambda image: _resize(image, (self._side, self._side)), images)

    def cut(
        self, images: Sequence[Pixels], sizes: Sequence[Any], corners: Sequence[Any]
    ) -> list[Pixels]:
        """A square of each image at its size [2], from the given corner [2] on."""

        def resize_and_cut(image: Pixels, size: Any, corner: Any) -> Pixels:
            top, left = corner.tolist()
            resized = _resize(image, tuple(size.tolist()))
            return resized[top : top + self._side, left : left + self._side]

        return self._each(resize_and_cut, images, sizes, corners)

    def _each(self, function: Any, *rows: Sequence[Any]) -> list[Pixels]:
        samples = list(zip(*rows, strict=True))

        def work(first: int) -> list[Pixels]:
            return [function(*sample) for sample in samples[first :: self._threads]]

        done: list[Any] = [None] * len(samples)
        # a task for each thread and not for each image: Python's part of it is not small
        for first, part in enumerate(self._pool.map(work, range(self._threads))):
            done[first :: self._threads] = part
        return done


def _resize(image: Pixels, size: tuple[int, int]) -> Pixels:
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # channels last, the fast kernel's
    resized = functional.interpolate(pixels, size, mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()
