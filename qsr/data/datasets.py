"""Image folders on disk, checked before a run trusts them.

A data set is a tree `root/{train,val}/CLASS/IMAGE`; the classes in alphabetical order are the
labels 0, 1, ... A tree that would shift labels is refused by name; what is left out is noted.
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
"""So many files of a split are decoded at the start of a run."""


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
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What its user should know: what was left out and why, in lines without line breaks."""

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        """Path of a file, to open."""
        return f"{self.root}/{self.files[index]}"

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when a file or class is added, lost or renamed."""
        return hashlib.sha256(os.fsencode("\n".join(self.files))).hexdigest()[:16]


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
            holds a folder, a link points nowhere or makes two classes of one, something is neither
            file nor folder, the splits have different classes, or a count is not the expected one.
    """
    root = Path(root).absolute()
    for folder in (root, root / "train", root / "val"):
        if not folder.is_dir():
            raise DataError(
                f"no folder {folder}: the data root must hold train/CLASS/* and val/CLASS/*"
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
    """List the validation split alone; root/train need not be there. Raises DataError, as
    `open_image_folders`."""
    root = Path(root).absolute()
    if not (root / "val").is_dir():
        raise DataError(f"no folder {root / 'val'}: the data root must hold val/CLASS/*")
    listing = Listing(root / "val")
    _check_count(root / "val", "classes", len(listing.classes), expected_classes)
    val = _list_images(root, "val", listing)
    _check_count(root / "val", "images", len(val), expected_images)
    return val


def try_some(*splits: ImageFolder) -> None:
    """Decode a few files of each split, spread over its classes: data of a kind that is not read
    are refused before a run starts, without the time to read them all. Raises DataError."""
    for split in splits:
        spread = range(0, len(split), max(1, len(split) // FILES_TRIED))[:FILES_TRIED]
        reasons = {index: defect(split.path(index)) for index in spread}
        if broken := {index: reason for index, reason in reasons.items() if reason is not None}:
            raise unreadable_files(split, broken)


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
                f"the first that differ are train/{in_train} and val/{in_val}{hint}"
            )


def _check_count(folder: Path, what: str, found: int, expected: int | None) -> None:
    if expected is not None and found != expected:
        raise DataError(
            f"{folder} has {found:,} {what}, not {expected:,}: complete it or correct the config"
        )
