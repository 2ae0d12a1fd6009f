"""The folder of a run: the names of its files, and how its small files are read and written.

Whatever may be in a file, its reader gives what was written there, or one line.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.nodes import Node

from qsr.errors import ConfigError
from qsr.run.durable import replace_file

MODEL_NAME = "model.safetensors"
"""The averaged model, in a run folder."""

_IN_A_SUMMARY = ("steps", "averages", "volume", "top1", "planned")


class RunFolder:
    """Paths of a run: config.yaml, data.json, environment.json, metrics.jsonl, summary.json,
    run.lock, checkpoints/ and model.safetensors, the averaged model at the end. Of a run that was
    submitted: job.json, and slurm/ with the jobs' files. Of one that failed: failure.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.data = path / "data.json"
        self.environment = path / "environment.json"
        self.job = path / "job.json"
        self.jobs = path / "slurm"
        self.failure = path / "failure.json"
        self.summary = path / "summary.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.model = path / MODEL_NAME
        self.lock = path / "run.lock"
        self.wandb_id = path / "wandb_id"

    def summary_if_finished(self) -> dict[str, Any] | None:
        """The summary, if this run has come to its end. Raises ConfigError."""
        if not self.summary.exists():
            return None
        summary = read_record(self.summary)
        for name in _IN_A_SUMMARY:
            if name not in summary:
                raise _lost(self.summary, f"it has no {name}")
        return summary


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` such that a reader finds the old file or the new one."""
    replace_file(path, [text.encode()])


def read_record(path: Path) -> dict[str, Any]:
    """One of the folder's JSON records. Raises ConfigError."""
    try:
        return parse_object(read_small(path))
    except ValueError as error:
        raise _lost(path, error) from None


def _lost(path: Path, why: object) -> ConfigError:
    return ConfigError(
        f"{path} cannot be read ({why}): bring it back, or remove this file alone, and the same "
        f"command writes it anew"
    )


MOST_BYTES = 2**20
"""Of a file that is read as a whole; config.yaml of a run has some 2,000."""


class _Loader(yaml.SafeLoader):
    """Without aliases, by which a few lines can stand for 10^9 values. Nothing here writes them."""

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "aliases are not read here", None)
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping of YAML. Raises ConfigError if the file holds something else."""
    try:
        return parse_yaml(read_small(path))
    except ValueError as error:
        raise _unreadable(path, error) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ConfigError if the file holds something else."""
    try:
        return parse_object(read_small(path))
    except ValueError as error:
        raise _unreadable(path, error) from None


def parse_yaml(text: str) -> dict[str, Any]:
    """A mapping of YAML. Raises ValueError for anything else, whatever is wrong with it."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("no names with values")
    return value


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object. Raises ValueError for anything else, whatever is wrong with it."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a metrics.jsonl, and the numbers of the lines, from 1, that are none: a row is an
    object with a kind, a step above 0 and finite numbers. What comes after the last line's end is
    being written, or was cut short, and is left out. Raises ConfigError if the file cannot be
    read."""
    rows, damaged = [], []
    try:
        text = _read(path).decode(errors="replace")
    except ValueError as error:
        raise _unreadable(path, error) from None
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            row = parse_object(line)
        except ValueError:
            row = {}
        if _is_row(row):
            rows.append(row)
        else:
            damaged.append(number)
    return rows, damaged


def _is_row(row: Mapping[str, Any]) -> bool:
    if row.get("kind") not in ("train", "eval"):
        return False
    step, values = row.get("step"), (value for name, value in row.items() if name != "kind")
    return (
        all(is_number(value) or isinstance(value, bool) for value in values)
        and isinstance(step, int)
        and step > 0
    )


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return numeric and abs(value) <= sys.float_info.max


def read_small(path: Path) -> str:
    """The text of a file that is read as a whole. Raises ValueError, whatever is wrong with it."""
    content = _read(path, MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    return content.decode()


def _read(path: Path, most: int = -1) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise ValueError(error.strerror) from None


def _unreadable(path: Path, error: ValueError) -> ConfigError:
    return ConfigError(f"{path} cannot be read ({error})")
