"""A data set with a subset of another one's classes, for cheaper studies. No images are copied."""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from qsr.core.seeds import seed_for
from qsr.data.datasets import ImageFolder, open_image_folders
from qsr.errors import DataError


def choose_classes(classes: Sequence[str], count: int, seed: int) -> list[str]:
    """Choose `count` of `classes` at random with `seed`; returns them sorted.

    Every class has its own draw, so with the same seed 10 classes are a subset of 100, and the
    choice does not depend on a random generator's algorithm.

    Raises:
        DataError: there are fewer than `count` classes.
    """
    if not 1 <= count <= len(classes):
        raise DataError(
            f"cannot choose {count:,} of {len(classes):,} classes: use 1 to {len(classes):,}"
        )
    return sorted(sorted(classes, key=lambda name: seed_for(seed, f"subset/{name}"))[:count])


def read_classes(path: Path) -> list[str]:
    """The classes listed in a text file, one per line; returns them sorted.

    Raises:
        DataError: it cannot be read, is empty, or lists a class twice.
    """
    try:
        names = path.read_text("utf-8", "surrogateescape").split("\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    classes = sorted(name.strip() for name in names if name.strip())
    if not classes:
        raise DataError(f"{path} lists no classes: write one per line")
    for name, following in pairwise(classes):
        if name == following:
            raise DataError(f"{path} lists {name} twice: remove one of the lines")
    return classes


def link_subset(
    train: ImageFolder, to: str | os.PathLike[str], classes: Sequence[str], seed: int | None
) -> tuple[ImageFolder, ImageFolder]:
    """Create the data set `to` from some classes of the data set that `train` belongs to.

    `to/{train,val}/CLASS` are symbolic links to the absolute paths of that data set's class
    folders: they work across file systems, take no space, and break when it is moved. subset.json
    records the source and the classes. The tree is built next to `to` and renamed at the end. If it
    already exists, nothing is done.

    Args:
        seed: the seed that `classes` were drawn with, for subset.json.

    Raises:
        DataError: a class does not exist, `to` contains something else, or it cannot be written.
    """
    for name in classes:
        if name not in train.classes:
            raise DataError(f"{train.root} has no class {name}: correct the list")
    to = Path(to).absolute()
    record = {
        "root": str(train.root),
        "root_train_files": train.fingerprint,
        "seed": seed,
        "classes": list(classes),
    }
    text = json.dumps(record, indent=2) + "\n"
    try:
        if to.exists():
            if not (to / "subset.json").exists() or (to / "subset.json").read_text() != text:
                raise DataError(f"{to} contains something else: remove it, or choose another --to")
        else:
            _link(train.root, to, classes, text)
    except OSError as error:
        raise DataError(f"cannot write {to} ({error}): choose another --to") from error
    return open_image_folders(to, expected_classes=len(classes))


def _link(root: Path, to: Path, classes: Sequence[str], record: str) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
    try:
        for split in ("train", "val"):
            (scratch / split).mkdir()
            for name in classes:
                (scratch / split / name).symlink_to(root / split / name, target_is_directory=True)
        (scratch / "subset.json").write_text(record)
        scratch.chmod(0o755)  # mkdtemp creates it with mode 700
        scratch.rename(to)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
