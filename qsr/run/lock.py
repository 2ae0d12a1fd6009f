"""Allows one session at a time in a run folder.

The lock is an flock on the file run.lock, so the kernel releases it when the process that holds it
ends, however it ends. The file stays and names the last holder.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import secrets
import shutil
import stat
import time
from datetime import UTC, datetime
from pathlib import Path

from qsr.cluster.slurm import own_job
from qsr.errors import ConfigError, FolderInUseError
from qsr.output import warn
from qsr.run.folder import RunFolder, parse_object
from qsr.run.folder_trial import TRIALS
from qsr.sync.communicator import Communicator

PATIENCE_SECONDS = 2.0
"""Time for a session that is ending, or for a holder that has not written its name yet."""


class RunLock:
    """A lock held by this process on a run folder, which it can still find after a rename."""

    def __init__(self, folder: Path, descriptor: int) -> None:
        self._path = folder
        self._folder: int | None = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._lock = descriptor

    def locate(self) -> str:
        """The folder's current path, also after it was moved; "" if it was deleted or taken by
        another session."""
        assert self._folder is not None
        for path in (self._path, Path(f"/proc/self/fd/{self._folder}").resolve()):
            if _is(path, self._folder):
                lock = RunFolder(path).lock  # may have been removed by somebody
                return str(path) if _is(lock, self._lock) or not lock.exists() else ""
        return ""

    def release(self) -> None:
        """Release the lock. Can be called more than once."""
        if self._folder is not None:
            os.close(self._folder)
            os.close(self._lock)
            self._folder = None


def claim(folder: Path, communicator: Communicator) -> RunLock | None:
    """Collective: lock the run folder for this session. Returns the lock on rank 0, None elsewhere.

    Raises ConfigError on every rank if another session holds the lock, or if a rank does not see
    the same folder as rank 0.
    """
    lock, problem = None, ""
    if communicator.topology.is_main:
        try:
            lock = take(folder)
            for left in folder.glob(TRIALS):  # left by a session that was killed as it started
                shutil.rmtree(left, ignore_errors=True)
        except (ConfigError, OSError) as error:
            problem = str(error)
    problem = communicator.gather_texts(problem)[0] or _not_shared(folder, communicator)
    if problem:
        if lock is not None:
            lock.release()
        raise ConfigError(problem)
    return lock


def check_free(folder: Path, patience_seconds: float = PATIENCE_SECONDS) -> None:
    """Raises ConfigError, like `take`, if a session is using the folder."""
    if os.path.lexists(RunFolder(folder).lock):
        os.close(_acquire(folder, patience_seconds))


def take(folder: Path, patience_seconds: float = PATIENCE_SECONDS) -> RunLock:
    """Lock the folder. Raises ConfigError, naming the holder, if another session still has the lock
    after `patience_seconds`, or if the lock file cannot be used; OSError if it cannot be
    written."""
    descriptor = _acquire(folder, patience_seconds)
    record = {
        "host": platform.node(),
        "process": os.getpid(),
        "slurm_job": own_job() or None,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(record).encode() + b"\n", 0)
    return RunLock(folder, descriptor)


def _acquire(folder: Path, patience_seconds: float) -> int:
    descriptor = _open(RunFolder(folder).lock)
    give_up = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(RunFolder(folder).lock, descriptor):
                return descriptor
            os.close(descriptor)  # the file was just removed: nobody else would see this lock
            descriptor = _open(RunFolder(folder).lock)
        except BlockingIOError:
            if time.monotonic() > give_up:
                holder = _holder(os.pread(descriptor, 4096, 0))
                os.close(descriptor)
                raise FolderInUseError(
                    f"{folder} is in use by {holder}: wait until it ends, or stop it"
                ) from None
            time.sleep(0.05)
        except OSError as error:
            warn(
                f"warning: {folder} cannot be locked ({error}): make sure no other session uses it"
            )
            return descriptor


def _open(path: Path) -> int:
    """Open the lock file, creating it if necessary. Raises ConfigError if it is not safe to write
    to, because through a link the session would overwrite some other file."""
    try:
        # for writing, because flock on NFS requires it; O_NONBLOCK, so as not to block on a FIFO
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ConfigError(f"{path} is a symbolic link: remove it") from None
        raise ConfigError(
            f"{path} cannot be opened for writing ({error.strerror}): ask its owner for write "
            f"access, or remove it if no session is using the folder"
        ) from None
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
        return descriptor
    os.close(descriptor)
    what = "has another hard link" if stat.S_ISREG(found.st_mode) else "is not a regular file"
    raise ConfigError(f"{path} {what}: remove it")


def _is(path: Path, descriptor: int) -> bool:
    """Whether this path is the file or folder open at `descriptor`. Assumed true while a network
    file system does not answer."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def _holder(text: bytes) -> str:
    try:
        record = parse_object(text)
        job = record["slurm_job"]
        return (
            f"process {record['process']} on {record['host']}"
            f"{f', Slurm job {job}' if job else ''}, since {record['since']}"
        )
    except (ValueError, KeyError):
        return "another session"


def _not_shared(folder: Path, communicator: Communicator) -> str:
    """Collective: an error message if some rank sees another folder than rank 0, otherwise ""."""
    if communicator.topology.ranks == 1:
        return ""
    main = communicator.topology.is_main
    # a name that no rank has looked up before, because network file systems cache failed lookups
    token = communicator.gather_texts(secrets.token_hex(8) if main else "")[0]
    mark = folder / f"shared-{token}.partial"
    if main:
        for left in folder.glob("shared-*.partial"):  # left by a session that was killed here
            with contextlib.suppress(OSError):
                left.unlink()
        mark.touch()
    communicator.barrier()
    blind = [r for r, row in enumerate(communicator.gather_floats([mark.exists()])) if not row[0]]
    if main:
        mark.unlink()
    if not blind:
        return ""
    return (
        f"rank {blind[0]} does not see rank 0's {folder}: choose a runs_dir that all machines share"
    )
