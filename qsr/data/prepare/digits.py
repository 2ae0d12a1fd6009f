"""A small real data set: handwritten digits, written as a tree of JPEG files.

It exercises the whole data path (files, JPEG decoding, crops, loaders) in seconds on a CPU and
needs no download: the images come with scikit-learn.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from qsr.data.datasets import Counts, open_image_folders
from qsr.data.prepare.tree import build_tree
from qsr.errors import DataError

DIGITS = Counts(classes=10, train=1442, val=355)
"""The data set written by `prepare_digits`."""

HeldOut = Literal["test", "tuning"]

FEW_DIGITS: dict[HeldOut, Counts] = {
    "test": Counts(classes=10, train=200, val=1001),
    "tuning": Counts(classes=10, train=200, val=596),
}
"""The data sets written by `prepare_few_digits`, by what `val` contains."""

VAL_EVERY = 5
FEW_EVERY = 9
FEW_PER_CLASS = 20
UPSCALE = 4
JPEG_QUALITY = 95

SOURCE = """\
Handwritten digits 0-9: 1,797 grey images of 8x8 pixels, upscaled to 32x32 and saved as JPEG.

Source: Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak (1998),
UCI Machine Learning Repository, https://doi.org/10.24432/C50P49; the test part, as distributed
with scikit-learn (sklearn.datasets.load_digits).
Licence: Creative Commons Attribution 4.0 International (CC BY 4.0).
Changes: rescaled from 0-16 to 0-255, upscaled 4 times (bicubic), split into train and val.
"""


def prepare_digits(root: str | os.PathLike[str]) -> None:
    """Write the digits to `root` as `train/DIGIT/*.jpg` and `val/DIGIT/*.jpg`.

    The split is by position: every fifth image of each digit, in scikit-learn's order, goes to
    `val`. The tree is built next to `root` and renamed at the end, so `root` is always complete.
    If it already exists, nothing is done.

    Raises:
        DataError: `root` contains something else, or scikit-learn is not installed.
    """
    _prepare(Path(root), DIGITS, _folder)


def prepare_few_digits(root: str | os.PathLike[str], val: HeldOut) -> None:
    """Write digits as `prepare_digits` does, but with only 20 training images per class, so few
    that networks make errors on the others. `val` is the test set or the tuning set.

    Training, tuning and test sets are disjoint and together contain all 1,797 images. The split is
    by position: of every nine images of a digit, in scikit-learn's order, one goes to training
    until there are 20, three go to tuning, and the others to the test set. Raises DataError as
    `prepare_digits` does.
    """
    folders = {"train": "train", val: "val"}
    _prepare(Path(root), FEW_DIGITS[val], lambda position: folders.get(_few_part(position)))


def check_digits(root: Path, counts: Counts = DIGITS) -> None:
    """Raise DataError unless `root` contains the digits with these counts."""
    try:
        open_image_folders(
            root,
            expected_classes=counts.classes,
            expected_train=counts.train,
            expected_val=counts.val,
        )
    except DataError as error:
        raise DataError(
            f"{root} is not the digits data set: {error}; remove it and retry"
        ) from error


def _prepare(root: Path, counts: Counts, folder_of: Callable[[int], str | None]) -> None:
    build_tree(root, lambda folder: _write(folder, folder_of), lambda it: check_digits(it, counts))


def _folder(position: int) -> str:
    return "val" if position % VAL_EVERY == VAL_EVERY - 1 else "train"


def _few_part(position: int) -> str:
    turn, deal = position % FEW_EVERY, position // FEW_EVERY
    if turn == 0 and deal < FEW_PER_CLASS:
        return "train"
    return "tuning" if turn % 3 == 2 else "test"


def _write(root: Path, folder_of: Callable[[int], str | None]) -> None:
    """`folder_of` maps an image's position among those of its digit to a split, or None to skip
    the image."""
    (root / "SOURCE.txt").write_text(SOURCE)
    images, labels = _load()
    seen = dict.fromkeys(range(DIGITS.classes), 0)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        split = folder_of(seen[label])
        seen[label] += 1
        if split is None:
            continue
        folder = root / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.round(image * (255 / 16)).astype(np.uint8)
        side = UPSCALE * pixels.shape[0]
        picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        picture.save(folder / f"{index:04d}.jpg", quality=JPEG_QUALITY)


def _load() -> tuple[Any, list[int]]:
    """Images [1797, 8, 8], floats from 0 to 16, and their digits."""
    try:
        from sklearn.datasets import load_digits  # an optional dependency
    except ImportError as error:
        raise DataError(
            "the digits data set needs scikit-learn: pip install scikit-learn"
        ) from error
    digits = load_digits()
    return digits.images, digits.target.tolist()
