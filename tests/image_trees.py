"""Data sets for tests: trees of real images, or of one-pixel images where names alone count."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qsr.data.listing import IMAGE_EXTENSIONS


def plant(root: Path, *files: str) -> Path:
    """Files below `root`: an image of one pixel where the ending is an image's, else empty."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(PIXEL if file.lower().endswith(IMAGE_EXTENSIONS) else b"")
    return root


def encoded(image: Image.Image, format_: str, **options: Any) -> bytes:
    """The contents of a file."""
    stream = io.BytesIO()
    image.copy().save(stream, format_, **options)  # Pillow leaves options of one format in it
    return stream.getvalue()


PIXEL = encoded(Image.new("RGB", (1, 1)), "PNG")


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
