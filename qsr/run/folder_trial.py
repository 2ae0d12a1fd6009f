"""Checks that a folder's file system supports what a run needs by trying each operation twice.

The second round works on the files left by the first one: some file systems cannot rename a file
onto an existing one, or lose locks.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qsr.errors import ConfigError
from qsr.run.durable import (
    read_file,
    remove_folder,
    rename_folder,
    replace_file,
    reserve,
    write_all,
    write_file,
)

_PREFIX, _SUFFIX = "trial-", ".partial"
TRIALS = f"{_PREFIX}*{_SUFFIX}"
"""Glob pattern of the folders that a killed trial leaves behind."""

_CONTENT = bytes(range(256)) * 256
_SHORTER = _CONTENT[:1000]


def try_folder(folder: Path) -> str:
    """Try every file operation of a run in a temporary subfolder of `folder`, or of its nearest
    existing parent.

    Returns the name of a missing feature that a run can do without ("locks"), or "". Raises
    ConfigError if a required operation fails.
    """
    with refusing(folder):
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        with _named("making a folder"):
            trial = Path(tempfile.mkdtemp(_SUFFIX, _PREFIX, there))
        try:
            for _ in range(2):
                _try_files(trial)
                _try_folders(trial)
            locks = [_locks(trial / "lock") for _ in range(2)]
            with _named("removing files and folders"):
                remove_folder(trial)
        finally:
            shutil.rmtree(trial, ignore_errors=True)
    return "" if all(locks) else "locks"


@contextlib.contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Turn an OSError into a ConfigError whose message names the run folder."""
    try:
        yield
    except OSError as error:
        fix = "choose another runs_dir"
        if error.errno == errno.ENAMETOOLONG:
            fix = "choose a shorter runs_dir, or change fewer settings on the command line"
        raise ConfigError(f"{folder} cannot be written: {fix} ({error})") from None


def _try_files(trial: Path) -> None:
    with _named("writing and syncing a file"):
        written = write_file(trial / "file", [_CONTENT])
    with _named("reading back a file"):
        if read_file(trial / "file") != written:
            raise OSError(errno.EIO, "its contents differ from what was written")
    with (
        _named("appending to a file and syncing it"),
        (trial / "rows").open("ab", buffering=0) as rows,
    ):
        write_all(rows.fileno(), _SHORTER)
        os.fsync(rows.fileno())
    with _named("comparing inode numbers"), (trial / "rows").open() as again:
        if not os.path.samestat(os.fstat(again.fileno()), (trial / "rows").stat()):
            raise OSError(errno.EIO, "the open file and its path have different numbers")
    with _named("reserving disk space"):
        reserve(trial / "results", len(_CONTENT))
    with _named("replacing a file"):
        replace_file(trial / "results", [_SHORTER])
        if (trial / "results").read_bytes() != _SHORTER:
            raise OSError(errno.EIO, "its contents differ from what was written")


def _try_folders(trial: Path) -> None:
    partial, final = trial / "step.partial", trial / "step"
    with _named("making a folder"):
        partial.mkdir()
        write_file(partial / "file", [_SHORTER])
    if final.exists():
        with _named("removing a folder"):
            remove_folder(final)
    with _named("renaming a folder"):
        rename_folder(partial, final)
    with _named("listing a folder"):
        names = {path.relative_to(trial).as_posix() for path in trial.rglob("*")}
        if not {"file", "rows", "results", "step", "step/file"} <= names:
            raise OSError(errno.EIO, "some of the written files are missing")


def _locks(path: Path) -> bool:
    """Whether flock works: a first lock succeeds and a second one is refused."""
    with path.open("w") as one, path.open("w") as other:
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
    return False


@contextlib.contextmanager
def _named(operation: str) -> Iterator[None]:
    """Add the operation that was tried to an OSError."""
    try:
        yield
    except OSError as error:
        about = f": '{error.filename}'" if error.filename else ""
        reason = f"{error.strerror or error}{about}, while {operation}"
        raise OSError(error.errno, reason) from None
