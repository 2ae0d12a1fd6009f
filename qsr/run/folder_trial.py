"""Whether a folder's file system can do what a run asks of it: each operation is tried, twice.

The second time meets what the first has left: some file systems cannot put a name in the place of
another, or forget what is locked.
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
"""What a trial that was killed leaves behind."""

_CONTENT = bytes(range(256)) * 256
_SHORTER = _CONTENT[:1000]


def try_folder(folder: Path) -> str:
    """Try all that a run does with its files, in a folder of the trial's own that is removed again:
    in `folder`, or where it would be made.

    Returns what the file system cannot do and a run can do without, "" if there is nothing. Raises
    ConfigError if a run cannot do without it.
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
    """Have an error of the file system become the one line that names the run's folder: raises
    ConfigError instead of OSError."""
    try:
        yield
    except OSError as error:
        mend = "choose another runs_dir"
        if error.errno == errno.ENAMETOOLONG:
            mend = "choose a shorter runs_dir, or change fewer settings on the command line"
        raise ConfigError(f"{folder} cannot be written ({error}): {mend}") from None


def _try_files(trial: Path) -> None:
    with _named("writing and syncing a file"):
        written = write_file(trial / "file", [_CONTENT])
    with _named("reading what was written"):
        if read_file(trial / "file") != written:
            raise OSError(errno.EIO, "it is not what was written")
    with (
        _named("appending to a file and syncing it"),
        (trial / "rows").open("ab", buffering=0) as rows,
    ):
        write_all(rows.fileno(), _SHORTER)
        os.fsync(rows.fileno())
    with _named("knowing an open file by its number"), (trial / "rows").open() as again:
        if not os.path.samestat(os.fstat(again.fileno()), (trial / "rows").stat()):
            raise OSError(errno.EIO, "by its name it has another one")
    with _named("taking room on the disk"):
        reserve(trial / "results", len(_CONTENT))
    with _named("putting a file in the place of another"):
        replace_file(trial / "results", [_SHORTER])
        if (trial / "results").read_bytes() != _SHORTER:
            raise OSError(errno.EIO, "it is not what was written")


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
            raise OSError(errno.EIO, "not all that was written is there")


def _locks(path: Path) -> bool:
    """Whether a file can be locked once, and only once."""
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
    """Have an error say what was tried."""
    try:
        yield
    except OSError as error:
        about = f": '{error.filename}'" if error.filename else ""
        reason = f"{error.strerror or error}{about}, {operation}"
        raise OSError(error.errno, reason) from None
