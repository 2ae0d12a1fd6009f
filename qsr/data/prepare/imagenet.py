"""ImageNet (ILSVRC 2012) as an image folder, from image-net.org's archives.

The training archive is a tar with one tar per class. The validation archive is flat; its labels
come from the devkit. Both splits are built class by class in `root/.incomplete`: a class is
unpacked into a scratch folder and renamed when it is complete; a split is moved into place when all
its classes are complete. A process killed at any time therefore never leaves a partial class or
split under its final name, and the next one resumes with the missing classes.
"""

import os
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from qsr.data.datasets import IMAGENET, Counts, ImageFolder, open_image_folders
from qsr.data.names import is_service
from qsr.data.prepare.archives import extract_files, extract_inner_archive, list_files
from qsr.data.prepare.ground_truth import WNID
from qsr.data.prepare.lock import lock
from qsr.data.prepare.progress import show_progress
from qsr.errors import DataError

WORKSHOP = ".incomplete"
"""Folder in the root where the splits are built."""


class _Split(NamedTuple):
    """How to build and check a split."""

    name: str
    classes: Mapping[str, Callable[[Path], None]]
    """Class -> a function that unpacks its images into a given folder."""
    check: Callable[[Path], None]
    """Raises DataError unless the split in a given folder is complete."""


def prepare_imagenet(
    root: str | os.PathLike[str],
    train_tar: Path,
    val_tar: Path,
    val_labels: Mapping[str, str],
    *,
    threads: int,
    expected: Counts = IMAGENET,
) -> tuple[ImageFolder, ImageFolder]:
    """Build `root/{train,val}/WNID/*.JPEG`, or the missing parts of it.

    Args:
        val_labels: file name -> wnid of the validation images.
        threads: number of classes that are unpacked at once.
        expected: what the archives must contain.

    Raises:
        DataError: an archive is damaged or not the expected one, the labels do not match, a split
            at `root` is incomplete, a file cannot be written, or another process is building in
            `root`. Errors in the archives' headers are raised before anything is written.
    """
    root = Path(root).absolute()
    train, val = _train_split(train_tar, expected), _val_split(val_tar, val_labels, expected)
    if train.classes.keys() != val.classes.keys():
        odd = min(train.classes.keys() ^ val.classes.keys())
        raise DataError(
            f"{train_tar} and the labels of {val_tar} have different classes, for example {odd}: "
            "one of them is not from ImageNet"
        )
    missing = []
    for split in (train, val):
        if (root / split.name).exists():
            split.check(root / split.name)
        else:
            missing.append(split)
    if missing or (root / WORKSHOP).exists():
        _build(root, missing, threads)
    return open_image_folders(
        root,
        expected_classes=expected.classes,
        expected_train=expected.train,
        expected_val=expected.val,
    )


def _train_split(archive: Path, expected: Counts) -> _Split:
    members = {}
    for member in list_files(archive):
        wnid = member.name.removesuffix(".tar")
        if member.name == wnid or not WNID.fullmatch(wnid):
            raise DataError(
                f"{archive} contains {member.name}, not one WNID.tar per class: use ImageNet's "
                "training archive"
            )
        members[wnid] = member
    if len(members) != expected.classes:
        raise DataError(
            f"{archive} contains {len(members):,} classes, not {expected.classes:,}: download it "
            "again, or set --counts"
        )
    return _Split(
        "train",
        {wnid: partial(extract_inner_archive, archive, member) for wnid, member in members.items()},
        partial(_check_train, classes=members.keys(), images=expected.train),
    )


def _val_split(archive: Path, labels: Mapping[str, str], expected: Counts) -> _Split:
    members = list_files(archive)
    if len(members) != expected.val:
        raise DataError(
            f"{archive} contains {len(members):,} images, not {expected.val:,}: download it again, "
            "or set --counts"
        )
    of_class: dict[str, list[tarfile.TarInfo]] = defaultdict(list)
    for member in members:
        if member.name not in labels:
            raise DataError(
                f"the ground truth ({len(labels):,} labels) has no label for {member.name}, one of "
                f"{len(members):,} images in {archive}: use the labels of this archive"
            )
        of_class[labels[member.name]].append(member)
    if len(labels) != len(members):
        odd = min(labels.keys() - {member.name for member in members})
        raise DataError(
            f"{archive} does not contain {odd}, which the ground truth lists: use the labels of "
            "this archive"
        )
    return _Split(
        "val",
        {wnid: partial(extract_files, archive, found) for wnid, found in of_class.items()},
        partial(_check_val, files={f"{wnid}/{name}" for name, wnid in labels.items()}),
    )


def _build(root: Path, splits: list[_Split], threads: int) -> None:
    work = root / WORKSHOP
    try:
        work.mkdir(parents=True, exist_ok=True)
        with (work / "lock").open("w") as file:
            lock(file, root)
            for split in splits:
                _unpack(split, work, threads)
                split.check(work / split.name)
                (work / split.name).rename(root / split.name)
            shutil.rmtree(work)
    except OSError as error:
        raise DataError(f"cannot write to {root} ({error}): choose another --root") from error


def _unpack(split: _Split, work: Path, threads: int) -> None:
    """Unpack the classes that `work/SPLIT` does not have yet."""
    complete, scratch = work / split.name, work / f"{split.name}.partial"
    if scratch.exists():
        shutil.rmtree(scratch)  # left by a process that was killed
    complete.mkdir(exist_ok=True)
    scratch.mkdir()

    def unpack(wnid: str) -> None:
        (scratch / wnid).mkdir()
        split.classes[wnid](scratch / wnid)
        (scratch / wnid).rename(complete / wnid)

    missing = sorted(split.classes.keys() - {folder.name for folder in complete.iterdir()})
    done_before = len(split.classes) - len(missing)
    # Threads suffice: most of the time is spent in system calls.
    with (
        show_progress(split.name, len(split.classes), "classes") as show,
        ThreadPoolExecutor(threads) as pool,
    ):
        for done, _ in enumerate(pool.map(unpack, missing), start=done_before + 1):
            show(done)
    scratch.rmdir()


def _check_train(folder: Path, *, classes: Set[str], images: int) -> None:
    files = _files(folder)
    found = sum(map(len, files.values()))
    if files.keys() != classes or found != images:
        raise DataError(
            f"{folder} has {found:,} images in {len(files):,} classes, not {images:,} in "
            f"{len(classes):,}: check the training archive, remove {folder} and retry"
        )


def _check_val(folder: Path, *, files: Set[str]) -> None:
    found = {f"{wnid}/{name}" for wnid, names in _files(folder).items() for name in names}
    odd = min(found ^ files, default=None)
    if odd is not None:
        what = "is missing" if odd in files else "is not listed in the ground truth"
        raise DataError(f"{folder}/{odd} {what}: remove {folder} and retry")


def _files(folder: Path) -> dict[str, list[str]]:
    """Class -> the names of its files."""
    try:
        return {
            wnid.name: [file.name for file in os.scandir(wnid) if not is_service(file.name)]
            for wnid in os.scandir(folder)
            if wnid.is_dir() and not is_service(wnid.name)
        }
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error}") from error
