"""Finding broken image files before a run meets them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from qsr.data.datasets import ImageFolder

FILES_PER_TASK = 64
"""Fewer would fill the memory with a million waiting tasks."""


def check_images(dataset: ImageFolder, threads: int) -> Iterator[tuple[str, str | None]]:
    """Decode every file; yield its path and what is wrong with it (None: nothing), in order."""
    tasks = [
        range(start, min(start + FILES_PER_TASK, len(dataset)))
        for start in range(0, len(dataset), FILES_PER_TASK)
    ]

    def check(indices: range) -> list[tuple[str, str | None]]:
        return [(path, _defect(path)) for path in map(dataset.path, indices)]

    # Threads suffice: Pillow decodes without holding Python's lock.
    with ThreadPoolExecutor(threads) as pool:
        for results in pool.map(check, tasks):
            yield from results


def _defect(path: str) -> str | None:
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # Pillow's decoders raise many types on a broken file
        return f"{type(error).__name__}: {error}"
    return None
