"""Synthetic JPEGs that take as long to decode as photographs: 500 x 375 pixels, about 68 kB."""

from pathlib import Path

import numpy as np
from PIL import Image

from qsr.data import ImageFolder, open_image_folders

SIZE = (500, 375)
"""Width and height; every fourth image is in portrait format."""


def write_photos(
    root: Path, count: int, size: tuple[int, int] = SIZE
) -> tuple[ImageFolder, ImageFolder]:
    """Write a tree with two classes; the validation split has the same images as training."""
    for number in range(count):
        folder = root / "train" / f"class_{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        width, height = reversed(size) if number % 4 == 3 else size
        photo(width, height, number).save(folder / f"{number:04d}.jpg", quality=90)
    (root / "val").symlink_to("train")
    return open_image_folders(root)


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Smooth noise on three scales, weaker at finer scales, with a little grain."""
    random = np.random.default_rng(seed)
    pixels = 128 + random.normal(0, 4.3, (height, width, 1))
    for cells, strength in ((6, 60), (24, 37), (96, 23)):
        coarse = random.normal(0, 1, (cells * height // width + 2, cells + 2, 3))
        pixels = pixels + strength * _enlarge(coarse.astype(np.float32), width, height)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _enlarge(coarse: np.ndarray, width: int, height: int) -> np.ndarray:
    channels = [Image.fromarray(coarse[..., channel]) for channel in range(3)]
    wanted = [c.resize((width, height), Image.Resampling.BICUBIC) for c in channels]
    return np.stack([np.asarray(channel) for channel in wanted], axis=-1)
