"""Listing an image tree: which folders are classes, and which files are images."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from qsr.data.decoding import shows_image
from qsr.data.names import appearance, how_they_differ, is_service, same_letters
from qsr.errors import DataError
from qsr.output import printable

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
    ".jpe", ".jfif", ".gif", ".avif", ".jp2", ".j2k", ".pbm", ".pnm",
)  # fmt: skip
"""Lower-case extensions of image files, torchvision's first. Files with any other extension, or
none, are opened to see whether they are images."""

MAX_NAMED_FILES = 3
"""Errors and notes name this many files and count the rest."""


class Listing:
    """The classes and images of one split, and what was skipped.

    Args:
        folder: the split's folder.

    Raises:
        DataError: the folder cannot be listed, or has no classes or the same class twice.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._service: list[str] = []
        self._no_images: list[str] = []
        self._strays: list[str] = []
        self._alike: list[str] = []
        self.classes = self._list_classes()
        """Names in alphabetical order."""

    def images(self, name: str) -> list[str]:
        """The names of a class's images, sorted. Raises DataError if there are none, or if the
        folder contains anything but files."""
        folder = self._folder / name
        found, others = [], []
        for entry in _scan(folder):
            if is_service(entry.name):
                self._service.append(f"{name}/{entry.name}")
            elif _is_folder(entry):
                raise DataError(f"{entry.path} is a folder inside a class: move its images up")
            elif entry.name.lower().endswith(IMAGE_EXTENSIONS) or _shows_image(entry.path):
                found.append(entry.name)
            else:
                others.append(f"{name}/{entry.name}")
        if not found:
            # Skipping it would shift the labels of all later classes.
            what = f", but {len(others):,} other files" if others else ""
            raise DataError(
                f"no images in class folder {folder}{what}: restore them or remove the folder"
            )
        self._no_images += others
        return sorted(found)

    def notes(self) -> tuple[str, ...]:
        """What has been skipped so far, with counts and names, and which classes look alike."""
        skipped = {
            "hidden, or created by other programs": self._service,
            "not images of a supported format": self._no_images,
            "outside the class folders": self._strays,
        }
        notes = [
            f"skipped in {self._folder}, {why}: {_some(names)}"
            for why, names in skipped.items()
            if names
        ]
        if self._alike:
            notes.append(f"similar class names in {self._folder}: {_some(self._alike)}")
        return tuple(map(printable, notes))

    def _list_classes(self) -> tuple[str, ...]:
        found: dict[str, os.DirEntry[str]] = {}
        for entry in _scan(self._folder):
            if is_service(entry.name):
                self._service.append(entry.name)
            elif _is_folder(entry):
                found[entry.name] = entry
            else:
                self._strays.append(entry.name)
        if not found:
            raise DataError(f"no class folders in {self._folder}: expected {self._folder}/CLASS/*")
        _check_links(found)
        classes = tuple(sorted(found))
        self._check_alike(classes)
        return classes

    def _check_alike(self, classes: tuple[str, ...]) -> None:
        first: dict[str, str] = {}
        for name in classes:
            other = first.setdefault(appearance(name), name)
            if same_letters(other) == same_letters(name) and other != name:
                raise DataError(
                    f"{self._folder} has the same class twice: {how_they_differ(other, name)}; "
                    "move the images of one into the other"
                )
            if other != name:
                self._alike.append(how_they_differ(other, name))


def _some(names: list[str]) -> str:
    """The number of names, and the first few of them."""
    named = ", ".join(sorted(names)[:MAX_NAMED_FILES])
    return f"{len(names):,} ({named}{', ...' if len(names) > MAX_NAMED_FILES else ''})"


def _scan(folder: Path) -> Iterator["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}") from error


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether it is a folder, not a file. Raises DataError if it is neither."""
    try:
        if entry.is_file(follow_symlinks=False):  # no system call
            return False
        mode = entry.stat().st_mode  # raises if a symbolic link is broken or circular
    except OSError as error:
        raise DataError(f"cannot follow {entry.path}: {error.strerror}") from error
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise DataError(
            f"{entry.path} is a pipe, socket or device, not a file or folder: remove it"
        )
    return stat.S_ISDIR(mode)


def _shows_image(path: str) -> bool:
    try:
        return shows_image(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _check_links(classes: dict[str, "os.DirEntry[str]"]) -> None:
    """Raise DataError if a symbolic link makes one folder two classes."""
    links = {name for name, entry in classes.items() if entry.is_symlink()}
    if not links:
        return
    first: dict[tuple[int, int], str] = {}
    for name, entry in sorted(classes.items()):
        status = entry.stat()
        other = first.setdefault((status.st_dev, status.st_ino), name)
        if other != name and links & {name, other}:
            raise DataError(
                f"{entry.path} and class {other} are the same folder: its images would have two "
                "labels; remove the link"
            )
