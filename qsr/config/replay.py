"""Rounds from a file, for sync=replay."""

import json
from pathlib import Path

from qsr.core.adaptive import read_rounds, rounds_text
from qsr.errors import ConfigError

_METRICS = "metrics.jsonl"


def rounds_of(file: str) -> str:
    """The rounds in a file, as the settings hold them: those that an adaptive run has logged, if it
    is the run's folder or its metrics.jsonl; otherwise those that the text gives. Raises
    ConfigError."""
    path = Path(file)
    try:
        path = path / _METRICS if path.is_dir() else path
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"sync.file={file}: {path} cannot be read ({reason})") from None
    try:
        return rounds_text(_logged(text) if path.name == _METRICS else read_rounds(text))
    except ValueError as error:
        raise ConfigError(f"sync.file={file}: {error}") from None


def _logged(text: str) -> tuple[int, ...]:
    """The rounds in a metrics.jsonl. Raises ValueError if there are none, or some are missing."""
    rows = [json.loads(line) for line in text.splitlines() if '"kind": "round"' in line]
    if not rows:
        raise ValueError("no rounds in it: only adaptive runs log theirs")
    try:
        lengths = tuple(int(row["h"]) for row in rows)
        complete = [row["round"] for row in rows] == list(range(len(rows)))
        if complete and rows[-1]["step"] == sum(lengths):
            return lengths
    except (KeyError, TypeError):
        pass
    raise ValueError("some of its rounds are missing")
