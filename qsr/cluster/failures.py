"""Records the first failure of a run: when one rank fails, the others soon fail for lack of it.

failure.json in the run folder describes the first failure; the next session removes it on start.
"""

import contextlib
import json
import platform
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsr.cluster.place import Place
from qsr.errors import QsrError, RunFailedError

_KINDS = {"attempt": str, "rank": int, "time": float, "error": str, "description": str}
"""The fields of failure.json that are read, with their types."""


def record_failure(path: Path, place: Place, error: Exception) -> str | None:
    """Write failure.json at `path` and return None if this rank is the first of this attempt to
    fail; otherwise return the description of the first failure, or None if it is the same error."""
    own = {
        "attempt": place.attempt,
        "rank": place.rank,
        "host": platform.node(),
        "time": time.time(),
        "error": f"{type(error).__name__}: {error}",
        "description": describe(place.rank, error),
    }
    with contextlib.suppress(OSError):  # no folder yet, or a full disk: the logs have the error
        earlier = read_failure(path)
        if earlier is not None and not _of_this_start(earlier, place):
            path.unlink(missing_ok=True)
        try:
            # the file system decides who is first, because the nodes' clocks may differ
            with path.open("x") as file:
                file.write(json.dumps(own, indent=2) + "\n")
        except FileExistsError:
            first = read_failure(path)
            if first is not None and first["error"] != own["error"]:
                return str(first["description"])
    return None


def _of_this_start(record: Mapping[str, Any], place: Place) -> bool:
    return bool(record["attempt"] == place.attempt) and (
        place.since is None or record["time"] >= place.since
    )


def read_failure(path: Path) -> dict[str, Any] | None:
    """The record written by `record_failure`; None if it is missing or invalid."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and all(
        isinstance(record.get(name), kind) for name, kind in _KINDS.items()
    )
    return record if whole else None


def describe(rank: int, error: Exception) -> str:
    """A rank's failure as shown to the user: one line, plus the traceback if it is a bug in qsr."""
    if isinstance(error, RunFailedError):  # its message already names the rank
        return str(error)
    line = f"rank {rank}: {type(error).__name__}: {error}"
    if isinstance(error, QsrError):
        return line
    return line + "\n" + "".join(traceback.format_exception(error))
