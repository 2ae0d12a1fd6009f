"""Data sets for tests: trees of real images, or of empty files where names alone count."""

from pathlib import Path

import numpy as np
from PIL import Image


def plant(root: Path, *files: str) -> Path:
    """Empty files below `root`."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


GOOD = ("train/a/1.jpg", "train/a/2.JPEG", "train/b/x.png", "val/a/1.jpg", "val/b/1.webp")
"""A sound tree of two classes."""


def textured_image(width: int, height: int, seed: int) -> Image.Image:
    """An RGB image with structure on every scale, as photographs have."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth) + random.normal(0, 8, (height, width, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def write_tree(root: Path, classes: int, train: int, val: int) -> None:
    """Images of many sizes in `root/{train,val}/cN/`, `train` and `val` per class."""
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"c{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                seed = 10_000 * (split == "val") + 100 * label + i
                width, height = np.random.default_rng(seed).integers(60, 180, 2).tolist()
                textured_image(width, height, seed).save(folder / f"{i:03d}.jpg", quality=90)
