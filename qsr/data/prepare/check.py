"""Finding broken image files before a run does, and writing a manifest of the good ones."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qsr.data.datasets import ImageFolder
from qsr.data.decoding import UndecodableError, decode, open_plain
from qsr.data.prepare.manifest import CheckRecord, Manifest, SoundFile
from qsr.data.prepare.progress import show_progress
from qsr.errors import DataError
from qsr.output import printable

FILES_PER_TASK = 64
"""With smaller tasks, a large data set would fill the memory with a million queued tasks."""


def check_images(splits: Sequence[ImageFolder], folder: Path, threads: int) -> Iterator[str]:
    """Read, hash and decode every file; yield one line per broken file, in order.

    If no file is broken, the manifest is written to `folder` at the end (see `Manifest`). Until
    then `folder/check.jsonl` records the good files. A check that was killed or found broken files
    resumes from it: files with the same path, size and modification time are not read again.

    Raises:
        DataError: `folder` cannot be written, or another process is writing a check to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with CheckRecord(folder / "check.jsonl") as record, Manifest(folder, splits) as manifest:
            broken = 0
            for split in splits:
                for line in _check_split(split, threads, record, manifest):
                    broken += 1
                    yield line
            if not broken:
                manifest.complete()
                record.remove()
    except OSError as error:
        raise DataError(
            f"cannot write to {folder} ({error.strerror or error}): choose another folder with "
            "--manifest"
        ) from error


def _check_split(
    split: ImageFolder, threads: int, record: CheckRecord, manifest: Manifest
) -> Iterator[str]:
    tasks = [
        split.files[start : start + FILES_PER_TASK]
        for start in range(0, len(split), FILES_PER_TASK)
    ]

    def check(files: Sequence[str]) -> list[SoundFile | str]:
        return [_check_file(split.root, file, record) for file in files]

    done = 0
    # Threads suffice: neither hashing nor Pillow's decoding holds the GIL.
    with (
        show_progress(split.split, len(split), "images") as show,
        ThreadPoolExecutor(threads) as pool,
    ):
        for results in pool.map(check, tasks):
            sound = [result for result in results if isinstance(result, SoundFile)]
            record.add(sound)
            manifest.add(sound)
            yield from (result for result in results if isinstance(result, str))
            done += len(results)
            show(done)


def _check_file(root: Path, file: str, record: CheckRecord) -> SoundFile | str:
    """The record of a good file, or a line that says what is wrong with it."""
    path = f"{root}/{file}"
    try:
        with open_plain(path) as stream:
            status = os.fstat(stream.fileno())
            known = record.find(file, status)
            if known is not None:
                return known
            data = stream.read()
        decode(data)
    except OSError as error:
        return printable(f"{path}: cannot be read: {error.strerror}")
    except UndecodableError as error:
        return printable(f"{path}: {error}")
    return SoundFile(file, len(data), status.st_mtime_ns, hashlib.sha256(data).hexdigest())
