"""One session at a time in a run folder.

The lock is the kernel's, on the file run.lock, so that it ends with the process that holds it,
however that ends. The file stays, and tells who held it last.
"""

import fcntl
import json
import os
import platform
import secrets
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from qsr.config.load import ConfigError
from qsr.distributed import Communicator

PATIENCE_SECONDS = 2.0
"""For a session that is just ending, and for a holder that has not yet written who it is."""


class FolderInUseError(ConfigError):
    """One line: which session is at work in the folder."""


class RunLock:
    """A lock that this process holds."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Let others in. Can be called again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def claim(folder: Path, communicator: Communicator) -> RunLock:
    """Collective: take the run folder for this session; rank 0 holds the lock.

    Raises ConfigError on every rank if another session holds it, or if a rank does not see the
    folder that rank 0 sees.
    """
    lock, problem = RunLock(None), ""
    if communicator.topology.is_main:
        try:
            lock = take(folder)
        except (ConfigError, OSError) as error:
            problem = str(error)
    problem = communicator.gather_texts(problem)[0] or _not_shared(folder, communicator)
    if problem:
        lock.release()
        raise ConfigError(problem)
    return lock


def check_free(folder: Path, patience_seconds: float = PATIENCE_SECONDS) -> None:
    """Raises ConfigError, as `take`, if a session is at work in the folder."""
    if (folder / "run.lock").exists():
        RunLock(_acquire(folder, patience_seconds)).release()


def take(folder: Path, patience_seconds: float = PATIENCE_SECONDS) -> RunLock:
    """Raises ConfigError, in one line that names the holder, if another session still has the lock
    after `patience_seconds`; OSError if the file cannot be written."""
    descriptor = _acquire(folder, patience_seconds)
    record = {
        "host": platform.node(),
        "process": os.getpid(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(record).encode() + b"\n", 0)
    return RunLock(descriptor)


def _acquire(folder: Path, patience_seconds: float) -> int:
    # open for writing: NFS makes of flock a lock that needs it
    descriptor = os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT, 0o666)
    give_up = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
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
            print(warning, file=sys.stderr, flush=True)
            return descriptor


def _holder(text: bytes) -> str:
    try:
        record = json.loads(text)
        job = record["slurm_job"]
        return (
            f"process {record['process']} on {record['host']}"
            f"{f', Slurm job {job}' if job else ''}, since {record['since']}"
        )
    except (ValueError, TypeError, KeyError):
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
