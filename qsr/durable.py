"""Files that outlive a crash: on the disk before anything counts on them.

Every system call that changes the disk goes through `os`, so that tests can end a process at each.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_CHUNK_BYTES = 2**22


class Written(NamedTuple):
    """What a file holds."""

    bytes: int
    sha256: str


def write_file(path: Path, content: Iterable[bytes | memoryview]) -> Written:
    """Write a file, piece by piece, and wait until the disk has it; raises OSError.

    The checksum is of what was to be written, computed on the way. A file that is there already is
    overwritten in place and cut to the new length, so that its space is never given up.
    """
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        for piece in content:
            size += len(piece)
            for start in range(0, len(piece), _CHUNK_BYTES):
                chunk = memoryview(piece)[start : start + _CHUNK_BYTES]
                digest.update(chunk)
                while chunk:
                    chunk = chunk[os.write(descriptor, chunk) :]
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Written(size, digest.hexdigest())


def read_file(path: Path) -> Written:
    """Read a file to its last byte, for its size and checksum; raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return Written(size, digest.hexdigest())


def replace_file(path: Path, content: Iterable[bytes | memoryview]) -> None:
    """Write `content` under another name, then give it this one: after a crash the old file is
    there or the new one. Raises OSError."""
    partial = partial_name(path)
    write_file(partial, content)
    partial.replace(path)
    sync_folder(path.parent)


def reserve(path: Path, size: int) -> None:
    """Take `size` bytes of the disk now for the `replace_file` of `path`; raises OSError."""
    descriptor = os.open(partial_name(path), os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.posix_fallocate(descriptor, 0, size)
    finally:
        os.close(descriptor)


def partial_name(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(path.name + ".partial")


def sync_folder(folder: Path) -> None:
    """Have the disk hold the folder's names as they are; raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a folder such that no part of it is ever seen under its name; raises OSError."""
    if folder.suffix != ".partial":
        folder = folder.rename(partial_name(folder))
        sync_folder(folder.parent)
    shutil.rmtree(folder)
