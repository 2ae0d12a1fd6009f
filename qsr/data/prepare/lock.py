"""One process at a time."""

import fcntl
from pathlib import Path
from typing import IO, Any

from qsr.errors import DataError


def lock(file: IO[Any], what: Path) -> None:
    """Keep `file` locked until it is closed or the process ends, however that happens.

    Raises:
        DataError: another process keeps it locked; the message says that it works on `what`.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"another process works on {what}: wait for it, or end it") from None
    except OSError:
        pass  # some network file systems have no locks
