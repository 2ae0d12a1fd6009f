"""One session at a time in a run folder.

The lock is the kernel's, on the file run.lock, so that it ends with the process that holds it,
however that ends. The file stays, and tells who held it last.
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

from qsr.errors import ConfigError, FolderInUseError
from qsr.output import warn
from qsr.run.folder import parse_object
from qsr.run.folder_trial import TRIALS
from qsr.sync.communicator import Communicator

_NAME = "run.lock"
PATIENCE_SECONDS = 2.0
"""For a session that is just ending, and for a holder that has not yet written who it is."""


class RunLock:
    """A lock that this process holds, and the folder that it holds it in, whatever becomes of its
    name."""

    def __init__(self, folder: Path, descriptor: int) -> None:
        self._path = folder
        self._folder: int | None = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._lock = descriptor

    def locate(self) -> str:
        """Where the folder is now: its path, another one if it was moved, "" if it was deleted or
        another session has taken it."""
        assert self._folder is not None
        for path in (self._path, Path(f"/proc/self/fd/{self._folder}").resolve()):
            if _is(path, self._folder):
                lock = path / _NAME  # somebody may have removed it
                return str(path) if _is(lock, self._lock) or not lock.exists() else ""
        return ""

    def release(self) -> None:
        """Let others in. Can be called again."""
        if self._folder is not None:
            os.close(self._folder)
            os.close(self._lock)
            self._folder = None


def claim(folder: Path, communicator: Communicator) -> RunLock | None:
    """Collective: take the run folder for this session; rank 0 holds the lock, the others None.

    Raises ConfigError on every rank if another session holds it, or if a rank does not see the
    folder that rank 0 sees.
    """
    lock, problem = None, ""
    if communicator.topology.is_main:
        try:
            lock = take(folder)
            for left in folder.glob(TRIALS):  # by a session that was killed in its first second
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
    """Raises ConfigError, as `take`, if a session is at work in the folder."""
    if os.path.lexists(folder / _NAME):
        os.close(_acquire(folder, patience_seconds))


def take(folder: Path, patience_seconds: float = PATIENCE_SECONDS) -> RunLock:
    """Raises ConfigError, in one line that names the holder, if another session still has the lock
    after `patience_seconds`, or if the lock's file cannot be used; OSError if it cannot be
    written."""
    descriptor = _acquire(folder, patience_seconds)
    record = {
        "host": platform.node(),
        "process": os.getpid(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(record).encode() + b"\n", 0)
    return RunLock(folder, descriptor)


def _acquire(folder: Path, patience_seconds: float) -> int:
    descriptor = _open(folder / _NAME)
    give_up = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(folder / _NAME, descriptor):
                return descriptor
            os.close(descriptor)  # the file was removed a moment ago: a lock that nobody sees
            descriptor = _open(folder / _NAME)
        except BlockingIOError:
            if time.monotonic() > give_up:
                holder = _holder(os.pread(descriptor, 4096, 0))
                os.close(descriptor)
                raise FolderInUseError(
                    f"{folder} is in use by {holder}: wait for its end, or end it"
                ) from None
            time.sleep(0.05)
        except OSError as error:
            warning = f"{folder} cannot be locked ({error}): nothing keeps a second session out"
            warn(warning)
            return descriptor


def _open(path: Path) -> int:
    """The lock's file, made if need be. Raises ConfigError if it is none that a session may write
    to: through a link it would write to a file of somebody else's."""
    try:
        # for writing: NFS makes of flock a lock that needs it; O_NONBLOCK: a FIFO would wait
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ConfigError(f"{path} is a symbolic link: remove it") from None
        raise ConfigError(
            f"{path} cannot be opened for writing ({error.strerror}): have its owner let you "
            f"write to it, or remove it if no session is at work"
        ) from None
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
        return descriptor
    os.close(descriptor)
    what = "has another name too (a hard link)" if stat.S_ISREG(found.st_mode) else "is no file"
    raise ConfigError(f"{path} {what}: remove it")


def _is(path: Path, descriptor: int) -> bool:
    """Whether this path leads to what this process has opened. Where a network's file system does
    not answer for a moment it is taken to."""
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
    """Collective: what to tell the user if some rank sees another folder than rank 0, or ""."""
    if communicator.topology.ranks == 1:
        return ""
    main = communicator.topology.is_main
    # a name that no rank has looked for before: a network file system may remember that a name
    # was not there
    token = communicator.gather_texts(secrets.token_hex(8) if main else "")[0]
    mark = folder / f"shared-{token}.partial"
    if main:
        for left in folder.glob("shared-*.partial"):  # by a session that was killed here
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
        f"{folder} of rank 0 is not there for rank {blind[0]}: choose a runs_dir that all "
        f"machines share"
    )
