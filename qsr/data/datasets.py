"""Image folders on disk, validated before a run uses them.

A data set is a tree `root/{train,val}/CLASS/IMAGE`; the classes in alphabetical order are the
labels 0, 1, ... A tree that would shift labels raises an error; skipped files are noted.
"""

import hashlib
import os
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from qsr.data.decoding import defect
from qsr.data.listing import MAX_NAMED_FILES, Listing
from qsr.data.names import appearance, how_they_differ
from qsr.errors import DataError

FILES_TRIED = 16
"""Number of files of each split that are decoded at the start of a run."""


class Counts(NamedTuple):
    """The size of a known data set."""

    classes: int
    train: int
    val: int


IMAGENET = Counts(classes=1000, train=1_281_167, val=50_000)
"""ILSVRC 2012."""


@dataclass(frozen=True)
class ImageFolder:
    """One split of a data set: its files and their labels."""

    root: Path
    split: str
    """"train" or "val"."""
    classes: tuple[str, ...]
    """Names in alphabetical order; a label is a position here."""
    files: tuple[str, ...]
    """Paths relative to `root`, sorted by class, then name."""
    labels: tuple[int, ...]
    """One per file."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """Notes for the user: which files were skipped and why, each on one line."""

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        """Full path of the file at `index`."""
        return f"{self.root}/{self.files[index]}"

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when a file or class is added, removed or renamed."""
        return hashlib.sha256(os.fsencode("\n".join(self.files))).hexdigest()[:16]


def open_image_folders(
    root: str | os.PathLike[str],
    *,
    expected_train: int | None = None,
    expected_val: int | None = None,
    expected_classes: int | None = None,
) -> tuple[ImageFolder, ImageFolder]:
    """List the training and validation splits of the data set at `root`.

    Raises:
        DataError: `root`, `train` or `val` is missing or unreadable, a class folder is empty or
            contains a folder, a link is broken or makes one class appear twice, an entry is neither
            a file nor a folder, the splits have different classes, or a count is not as expected.
    """
    root = Path(root).absolute()
    for folder in (root, root / "train", root / "val"):
        if not folder.is_dir():
            raise DataError(
                f"no folder {folder}: the data root must contain train/CLASS/* and val/CLASS/*"
            )
    listings = {split: Listing(root / split) for split in ("train", "val")}
    classes = listings["train"].classes
    _check_same_classes(root, classes, listings["val"].classes)
    _check_count(root, "classes", len(classes), expected_classes)
    train, val = (_list_images(root, split, listing) for split, listing in listings.items())
    _check_count(root / "train", "images", len(train), expected_train)
    _check_count(root / "val", "images", len(val), expected_val)
    return train, val


def open_validation_folder(
    root: str | os.PathLike[str],
    *,
    expected_images: int | None = None,
    expected_classes: int | None = None,
) -> ImageFolder:
    """List the validation split only; `root/train` need not exist. Raises DataError as
    `open_image_folders` does."""
    root = Path(root).absolute()
    if not (root / "val").is_dir():
        raise DataError(
            f"no folder {root / 'val'}: set data.root=PATH to a folder with val/CLASS/*"
        )
    listing = Listing(root / "val")
    _check_count(root / "val", "classes", len(listing.classes), expected_classes)
    val = _list_images(root, "val", listing)
    _check_count(root / "val", "images", len(val), expected_images)
    return val


def try_some(*splits: ImageFolder) -> None:
    """Decode a few files of each split, spread over its classes. Raises DataError: data in an
    unsupported format is rejected before a run starts, without reading every file."""
    for split in splits:
        spread = range(0, len(split), max(1, len(split) // FILES_TRIED))[:FILES_TRIED]
        reasons = {index: defect(split.path(index)) for index in spread}
        if broken := {index: reason for index, reason in reasons.items() if reason is not None}:
            raise unreadable_files(split, broken)


def unreadable_files(dataset: ImageFolder, reasons: dict[int, str]) -> DataError:
    """An error that names the files at the indices in `reasons` and why each was rejected."""
    named = [
        f"{dataset.path(index)} (index {index} of {dataset.split}: {reasons[index]})"
        for index in sorted(reasons)[:MAX_NAMED_FILES]
    ]
    if len(reasons) > MAX_NAMED_FILES:
        named.append(f"{len(reasons) - MAX_NAMED_FILES} more")
    return DataError(
        f"cannot read {', '.join(named)}; restore or remove the broken files "
        "(`qsr prepare check` finds all of them)"
    )


def _list_images(root: Path, split: str, listing: Listing) -> ImageFolder:
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(listing.classes):
        found = listing.images(name)
        files.extend(f"{split}/{name}/{file}" for file in found)
        labels.extend([label] * len(found))
    return ImageFolder(root, split, listing.classes, tuple(files), tuple(labels), listing.notes())


def _check_same_classes(root: Path, train: tuple[str, ...], val: tuple[str, ...]) -> None:
    only_in_val = {appearance(name): name for name in set(val) - set(train)}
    for in_train, in_val in zip_longest(train, val):
        if in_train != in_val:
            twins = [
                how_they_differ(name, only_in_val[appearance(name)])
                for name in train
                if name not in val and appearance(name) in only_in_val
            ]
            hint = f"; {twins[0]}: rename one" if twins else ""
            raise DataError(
                f"train and val of {root} have different classes ({len(train)} and {len(val)}); "
                f"the first difference is train/{in_train} and val/{in_val}{hint}"
            )


def _check_count(folder: Path, what: str, found: int, expected: int | None) -> None:
    if expected is not None and found != expected:
        raise DataError(
            f"{folder} has {found:,} {what}, not {expected:,}: complete the data set or correct "
            "the config"
        )
