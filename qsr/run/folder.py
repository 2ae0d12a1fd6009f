"""The run folder: the names of its files, and reading and writing of the small ones.

Readers of damaged or foreign files raise a one-line error.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from qsr.errors import ConfigError
from qsr.run.durable import replace_file

MODEL_NAME = "model.safetensors"
"""File name of the averaged model in a run folder."""

Row = Mapping[str, float | int | str | bool]
"""One line of metrics: "kind" ("train", "eval" or "round"), "step" (completed steps) and measured
values."""

NO_RUNS = {".arrays", ".snapshots", "checkpoints", "profile", "slurm", "tensorboard", "wandb"}
"""Folders below the folder of all runs in which there are no runs."""

_ROW_START = re.compile(rb'(?<=.)(?=\{"kind")')
"""Separates rows where the newline between them is corrupted."""

_LAST_BYTES = (2**16, 2**20)
"""How much of the end of a metrics.jsonl is read, and how much where that holds no evaluation; a
row has about 350 bytes."""

_IN_A_SUMMARY = ("steps", "averages", "volume", "top1", "planned")


class RunFolder:
    """Paths of a run: config.yaml, data.json, environment.json, metrics.jsonl, summary.json,
    run.lock, checkpoints/ and model.safetensors (the final averaged model), with averages over time
    model_ema.safetensors and model_uniform.safetensors. Submitted runs also have job.json and
    slurm/ with the job files, failed ones failure.json, profiled ones profile/ with the ranks'
    traces, mirrored ones tensorboard/ and wandb/."""

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
        self.profile = path / "profile"
        self.wandb_id = path / "wandb_id"
        self.tensorboard = path / "tensorboard"

    def averaged_model(self, name: str) -> Path:
        """The model file of an average over time: ema or uniform."""
        return self.path / f"model_{name}.safetensors"

    def summary_if_finished(self) -> dict[str, Any] | None:
        """The summary if the run is finished, otherwise None. Raises ConfigError."""
        if not self.summary.exists():
            return None
        summary = read_record(self.summary)
        for name in _IN_A_SUMMARY:
            if name not in summary:
                raise _lost(self.summary, f"{name} is missing")
        return summary


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON. Raises OSError."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically: a reader sees either the old or the new file. Raises OSError."""
    replace_file(path, [text.encode()])


def read_record(path: Path) -> dict[str, Any]:
    """A JSON record of the run folder. Raises ConfigError."""
    try:
        return parse_object(read_small(path))
    except ValueError as error:
        raise _lost(path, error) from None


def _lost(path: Path, why: object) -> ConfigError:
    return ConfigError(
        f"{path} cannot be read ({why}): restore it, or remove only this file and run the same "
        f"command to write it again"
    )


MOST_BYTES = 2**20
"""Size limit of files that are read as a whole; a run's config.yaml has about 2,000 bytes."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError if it is anything else."""
    try:
        return parse_object(read_small(path))
    except ValueError as error:
        raise unreadable(path, error) from None


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object. Raises ValueError for anything else."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a metrics.jsonl, and the numbers (from 1) of the lines that are not rows; see
    `split_rows`. Raises ConfigError if the file cannot be read."""
    try:
        rows, damaged = split_rows(_read(path))
    except ValueError as error:
        raise unreadable(path, error) from None
    return [row for _, row in rows], [number for number, _ in damaged]


def read_last_rows(path: Path) -> tuple[list[dict[str, Any]], int, bool]:
    """The last rows of a metrics.jsonl, among which is an evaluation if possible; how many lines
    between them are not rows; and whether these are all. Reads the file's end, so that a thousand
    long runs are read in seconds. Raises ConfigError if the file cannot be read."""
    for most in _LAST_BYTES:
        try:
            content, whole = _read_end(path, most)
        except ValueError as error:
            raise unreadable(path, error) from None
        rows, damaged = split_rows(content)
        if whole or any(row["kind"] == "eval" for _, row in rows):
            break
    return [row for _, row in rows], len(damaged) + (not rows and not whole), whole


def split_rows(
    content: bytes,
) -> tuple[list[tuple[bytes, dict[str, Any]]], list[tuple[int, bytes]]]:
    """The rows in the content of a metrics.jsonl, each with its bytes, and what is not a row, each
    with the number (from 1) of its line. A row is an object with a kind, a step above 0 and finite
    numbers. A last line that is incomplete is ignored: it is being written, or was cut off."""
    rows, damaged = [], []
    *lines, last = content.split(b"\n")
    for number, line in enumerate([*lines, *filter(None, [last])], start=1):
        for piece in _ROW_START.split(line):
            try:
                row = parse_object(piece)
            except ValueError:
                row = {}
            if _is_row(row):
                rows.append((piece, row))
            else:
                damaged.append((number, piece))
    if damaged and damaged[-1][0] > len(lines):
        damaged.pop()
    return rows, damaged


def _is_row(row: Mapping[str, Any]) -> bool:
    if row.get("kind") not in ("train", "eval", "round"):
        return False
    step, values = row.get("step"), (value for name, value in row.items() if name != "kind")
    return (
        all(is_number(value) or isinstance(value, bool) for value in values)
        and isinstance(step, int)
        and step > 0
    )


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number (bool does not count)."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return numeric and abs(value) <= sys.float_info.max


def read_small(path: Path) -> str:
    """The text of a file of at most MOST_BYTES. Raises ValueError if it cannot be read."""
    content = _read(path, MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"larger than {MOST_BYTES:,} bytes")
    return content.decode()


def _read(path: Path, most: int = -1) -> bytes:
    with _opened(path) as file:
        return file.read(most)


def _read_end(path: Path, most: int) -> tuple[bytes, bool]:
    """The whole lines in the last `most` bytes, and whether these are all."""
    with _opened(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - most))
        content = file.read(most)
    return (content, True) if size <= most else (content.partition(b"\n")[2], False)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Raises ValueError if the file cannot be read."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block
            raise ValueError("not a regular file")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise ValueError(error.strerror) from None


def unreadable(path: Path, error: ValueError) -> ConfigError:
    """The error for a file that a reader of its format refused."""
    return ConfigError(f"{path} cannot be read ({error})")
