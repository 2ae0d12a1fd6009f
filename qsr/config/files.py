"""The small files of a run folder, whatever may be in them: what was written, or one line."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.nodes import Node

from qsr.config.compose import ConfigError

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
