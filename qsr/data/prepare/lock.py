"""A lock that lets one process at a time build or check a data set."""

import fcntl
from pathlib import Path
from typing import IO, Any

from qsr.errors import DataError


def lock(file: IO[Any], what: Path) -> None:
    """Lock `file` until it is closed or the process ends, even if it is killed.

    Raises:
        DataError: another process holds the lock; the message names `what` as in use.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(
            f"{what} is in use by another process: wait for it to finish, or stop it"
        ) from None
    except OSError:
        pass  # some network file systems do not support locks
