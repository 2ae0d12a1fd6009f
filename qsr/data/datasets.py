"""Image folders on disk, checked before a run trusts them.

A data set is a tree `root/{train,val}/CLASS/IMAGE`; the classes in alphabetical order are the
labels 0, 1, ... A tree that would shift labels or drop images in silence is refused by name.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from qsr.data.batch import DataError

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""Lower-case endings of image files, the same as torchvision's; other files are ignored."""


MAX_NAMED_FILES = 3
"""An error names this many files and counts the rest."""


class Counts(NamedTuple):
    """The size of a known data set."""

    classes: int
    train: int
    val: int


IMAGENET = Counts(classes=1000, train=1_281_167, val=50_000)
"""ILSVRC 2012."""


@dataclass(frozen=True)
class ImageFolder:
    """One split of a data set: which files there are and what they show."""

    root: Path
    split: str
    """"train" or "val"."""
    classes: tuple[str, ...]
    """Names in alphabetical order; a label is a position here."""
    files: tuple[str, ...]
    """Paths relative to `root`, sorted by class, then name."""
    labels: tuple[int, ...]
    """One per file."""

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        """Path of a file, to open."""
        return f"{self.root}/{self.files[index]}"

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when a file or class is added, lost or renamed."""
        return hashlib.sha256("\n".join(self.files).encode()).hexdigest()[:16]


def open_image_folders(
    root: str | os.PathLike[str],
    *,
    expected_train: int | None = None,
    expected_val: int | None = None,
    expected_classes: int | None = None,
) -> tuple[ImageFolder, ImageFolder]:
    """List the training and validation split of the data set at `root`.

    Raises:
        DataError: `root`, `train` or `val` is missing or unreadable, a class folder is empty or
            holds a folder, a link points nowhere, the splits have different classes, or a count is
            not the expected one.
    """
    root = Path(root).absolute()
    for folder in (root, root / "train", root / "val"):
        if not folder.is_dir():
            raise DataError(
                f"no folder {folder}: the data root must hold train/CLASS/* and val/CLASS/*"
            )
    classes = _list_classes(root / "train")
    _check_same_classes(root, classes, _list_classes(root / "val"))
    _check_count(root, "classes", len(classes), expected_classes)
    train = _list_split(root, "train", classes)
    val = _list_split(root, "val", classes)
    _check_count(root / "train", "images", len(train), expected_train)
    _check_count(root / "val", "images", len(val), expected_val)
    return train, val


def open_validation_folder(
    root: str | os.PathLike[str],
    *,
    expected_images: int | None = None,
    expected_classes: int | None = None,
) -> ImageFolder:
    """List the validation split alone; root/train need not be there. Raises DataError, as
    `open_image_folders`."""
    root = Path(root).absolute()
    if not (root / "val").is_dir():
        raise DataError(f"no folder {root / 'val'}: the data root must hold val/CLASS/*")
    classes = _list_classes(root / "val")
    _check_count(root / "val", "classes", len(classes), expected_classes)
    val = _list_split(root, "val", classes)
    _check_count(root / "val", "images", len(val), expected_images)
    return val


def unreadable_files(dataset: ImageFolder, reasons: dict[int, str]) -> DataError:
    """The error that names the files at the indices in `reasons`, and why each was refused."""
    named = [
        f"{dataset.path(index)} (index {index} of {dataset.split}: {reasons[index]})"
        for index in sorted(reasons)[:MAX_NAMED_FILES]
    ]
    if len(reasons) > MAX_NAMED_FILES:
        named.append(f"{len(reasons) - MAX_NAMED_FILES} more")
    return DataError(
        f"cannot read {', '.join(named)}; restore or remove what is broken "
        "(`python scripts/prepare.py check` finds every such file)"
    )


def _list_classes(folder: Path) -> tuple[str, ...]:
    classes = tuple(sorted(entry.name for entry in _scan(folder) if _is_folder(entry)))
    if not classes:
        raise DataError(f"no class folders in {folder}: expected {folder}/CLASS/*")
    return classes


def _list_split(root: Path, split: str, classes: tuple[str, ...]) -> ImageFolder:
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = _list_images(root / split / name)
        files.extend(f"{split}/{name}/{file}" for file in found)
        labels.extend([label] * len(found))
    return ImageFolder(root, split, classes, tuple(files), tuple(labels))


def _list_images(folder: Path) -> list[str]:
    found = []
    for entry in _scan(folder):
        if _is_folder(entry):
            raise DataError(f"{entry.path} is a folder inside a class: move its images up")
        if entry.name.lower().endswith(IMAGE_EXTENSIONS):
            found.append(entry.name)
    if not found:
        # Skipping it would shift the labels of all classes behind it.
        raise DataError(f"no images in class folder {folder}: restore them or remove the folder")
    return sorted(found)


def _scan(folder: Path) -> Iterator["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}") from error


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        if entry.is_symlink():
            entry.stat()  # is_dir takes a link to nothing for a file: a class would be missing
        return entry.is_dir()
    except OSError as error:  # a symbolic link to itself, or to nothing
        raise DataError(f"cannot follow {entry.path}: {error.strerror}") from error


def _check_same_classes(root: Path, train: tuple[str, ...], val: tuple[str, ...]) -> None:
    for in_train, in_val in zip_longest(train, val):
        if in_train != in_val:
            raise DataError(
                f"train and val of {root} have different classes ({len(train)} and {len(val)}); "
                f"the first that differ are train/{in_train} and val/{in_val}"
            )


def _check_count(folder: Path, what: str, found: int, expected: int | None) -> None:
    if expected is not None and found != expected:
        raise DataError(
            f"{folder} has {found:,} {what}, not {expected:,}: complete it or correct the config"
        )
