"""Files that outlive a crash: on the disk before anything counts on them.

Every system call that changes the disk goes through `os`, so that tests can end a process at each.
What not every file system can do has its substitute here; folder_trial.py tries all of it.
"""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

_CHUNK_BYTES = 2**22
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_FOR_FOLDERS = (
    *(errno.EINVAL, errno.EBADF, errno.EISDIR, errno.EACCES, errno.EPERM),
    *(errno.ENOSYS, errno.EOPNOTSUPP),
)
"""What file systems answer that cannot sync a folder. They keep names as they keep them."""
_TRANSIENT = (errno.ESTALE, errno.EAGAIN, errno.EINTR)
_TRIES, _PAUSE_SECONDS = 4, 0.1

_T = TypeVar("_T")


class Written(NamedTuple):
    """What a file holds."""

    bytes: int
    sha256: str


def write_file(path: Path, content: Iterable[bytes | memoryview]) -> Written:
    """Write a file, piece by piece, and wait until the disk has it; raises OSError.

    The checksum is of what was to be written, computed on the way. A file of this user's that has
    this name and no other is overwritten in place and cut to the new length, so that its space is
    never given up; anything else, a link above all, makes way for a new file.
    """
    digest, size = hashlib.sha256(), 0
    descriptor = _open_own(path)
    try:
        for piece in content:
            size += len(piece)
            for start in range(0, len(piece), _CHUNK_BYTES):
                chunk = memoryview(piece)[start : start + _CHUNK_BYTES]
                digest.update(chunk)
                write_all(descriptor, chunk)
        if os.fstat(descriptor).st_size > size:
            os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Written(size, digest.hexdigest())


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data`, however little a single call takes; raises OSError."""
    while data:
        data = data[os.write(descriptor, data) :]


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
    _patiently(lambda: partial.replace(path))
    sync_folder(path.parent)


def reserve(path: Path, size: int) -> None:
    """Take `size` bytes of the disk now for the `replace_file` of `path`; raises OSError."""
    descriptor = _open_own(partial_name(path))
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise
        _fill(descriptor, size)
    finally:
        os.close(descriptor)


def partial_name(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(path.name + ".partial")


def rename_folder(folder: Path, name: Path) -> None:
    """Give a folder another name beside its own, which nothing has, and wait until the disk has it;
    raises OSError."""
    _patiently(lambda: folder.rename(name))
    sync_folder(name.parent)


def sync_folder(folder: Path) -> None:
    """Have the disk hold the folder's names as they are; raises OSError. Where a file system has no
    such thing, it keeps the names in its own time: what is in the files has been synced before."""
    descriptor = _patiently(lambda: os.open(folder, os.O_RDONLY))
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_FOR_FOLDERS:
            raise
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a folder such that no part of it is ever seen under its name; raises OSError. Of a
    symbolic link only the link goes, and a file goes as a folder does."""
    if folder.suffix != ".partial":
        partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
        try:
            rename_folder(folder, partial)
            folder = partial
        except OSError as error:
            if error.errno != errno.EXDEV:  # an overlay does not rename what lies below
                raise
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink()


def _open_own(path: Path) -> int:
    """A descriptor for writing of this user's own regular file, which has no other name; made anew
    if what is there is none. Never follows a link."""
    there = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO would wait for a reader
    with contextlib.suppress(OSError):
        descriptor = os.open(path, there)
        found = os.fstat(descriptor)
        alone = stat.S_ISREG(found.st_mode) and found.st_nlink == 1
        if alone and found.st_uid == os.geteuid():
            return descriptor
        os.close(descriptor)
    if os.path.lexists(path):
        path.unlink()
    new = os.O_WRONLY | os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL
    return _patiently(lambda: os.open(path, new, 0o666))


def _fill(descriptor: int, size: int) -> None:
    """What posix_fallocate does, where there is none."""
    zeros = memoryview(bytes(min(size, _CHUNK_BYTES)))
    for start in range(0, size, _CHUNK_BYTES):
        write_all(descriptor, zeros[: size - start])
    os.fsync(descriptor)  # a network's disk may say only now that it is full


def _patiently(action: Callable[[], _T]) -> _T:
    """Do what a network's file system may refuse for a moment; raises OSError."""
    for _ in range(_TRIES - 1):
        try:
            return action()
        except OSError as error:
            if error.errno not in _TRANSIENT:
                raise
            time.sleep(_PAUSE_SECONDS)
    return action()
