"""Crash-safe file operations: data is on disk before anything relies on it.

Every system call that changes the disk goes through `os`, so that tests can kill a process at each
one. Operations that some file systems lack have a fallback here; folder_trial.py tries them all.
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
"""Errors of file systems that cannot sync a folder; when they store names is up to them."""
_TRANSIENT = (errno.ESTALE, errno.EAGAIN, errno.EINTR)
_TRIES, _PAUSE_SECONDS = 4, 0.1

_T = TypeVar("_T")


class Written(NamedTuple):
    """Size and checksum of a file's contents."""

    bytes: int
    sha256: str


def write_file(path: Path, content: Iterable[bytes | memoryview]) -> Written:
    """Write a file in chunks and sync it to disk; raises OSError.

    The checksum is computed from the data passed in. A regular file of this user with no other hard
    link is overwritten in place and truncated to the new length, so that its reserved space is
    never released; anything else, links in particular, is replaced by a new file.
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
    """Write all of `data`, in several calls if necessary; raises OSError."""
    while data:
        data = data[os.write(descriptor, data) :]


def read_file(path: Path) -> Written:
    """Read a whole file and return its size and checksum; raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return Written(size, digest.hexdigest())


def replace_file(path: Path, content: Iterable[bytes | memoryview]) -> None:
    """Write `content` under a temporary name, then rename it: after a crash either the old or the
    new file is there. Raises OSError."""
    partial = partial_name(path)
    write_file(partial, content)
    _patiently(lambda: partial.replace(path))
    sync_folder(path.parent)


def reserve(path: Path, size: int) -> None:
    """Reserve `size` bytes of disk space for a later `replace_file` of `path`; raises OSError."""
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
    """The temporary name under which `replace_file` writes a file."""
    return path.with_name(path.name + ".partial")


def rename_folder(folder: Path, name: Path) -> None:
    """Rename a folder to an unused name in the same parent folder and sync that to disk; raises
    OSError."""
    _patiently(lambda: folder.rename(name))
    sync_folder(name.parent)


def sync_folder(folder: Path) -> None:
    """Sync the folder's entries to disk; raises OSError. A file system without this operation
    writes them in its own time; the contents of the files have been synced before."""
    descriptor = _patiently(lambda: os.open(folder, os.O_RDONLY))
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_FOR_FOLDERS:
            raise
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that it is never seen half removed under its name; raises OSError. A
    symbolic link is removed without its target; a file is removed like a folder."""
    if folder.suffix != ".partial":
        partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
        try:
            rename_folder(folder, partial)
            folder = partial
        except OSError as error:
            if error.errno != errno.EXDEV:  # overlayfs cannot rename folders of its lower layer
                raise
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink()


def _open_own(path: Path) -> int:
    """A descriptor for writing to `path`: the file that is there if it is regular, owned by this
    user and has no other hard link, otherwise a new file. Never follows a symbolic link."""
    there = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # do not block on a FIFO
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
    """Fallback for posix_fallocate: write zeros."""
    zeros = memoryview(bytes(min(size, _CHUNK_BYTES)))
    for start in range(0, size, _CHUNK_BYTES):
        write_all(descriptor, zeros[: size - start])
    os.fsync(descriptor)  # a network file system may report a full disk only now


def _patiently(action: Callable[[], _T]) -> _T:
    """Run `action`, retrying errors that are transient on network file systems; raises OSError."""
    for _ in range(_TRIES - 1):
        try:
            return action()
        except OSError as error:
            if error.errno not in _TRANSIENT:
                raise
            time.sleep(_PAUSE_SECONDS)
    return action()
