"""A run's config.yaml as text becomes values; apart from folder.py, which needs no YAML library."""

from pathlib import Path
from typing import Any

import yaml

from qsr.run.folder import read_small, unreadable

# libyaml, where PyYAML has it: ten times as fast, and status reads a thousand files
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_MOST_NESTED = 100
"""Levels of a file; a run's config.yaml has five."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The YAML mapping in a file. Raises ConfigError if it is anything else."""
    try:
        return parse_yaml(read_small(path))
    except ValueError as error:
        raise unreadable(path, error) from None


def parse_yaml(text: str) -> dict[str, Any]:
    """A YAML mapping. Raises ValueError for anything else."""
    try:
        _check_structure(text)
        value = yaml.load(text, _LOADER)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    if not isinstance(value, dict):
        raise ValueError("not a YAML mapping")
    return value


def _check_structure(text: str) -> None:
    """Reject aliases, with which a few lines can expand to 10^9 values (qsr never writes them), and
    nesting that exceeds a recursive reader's stack."""
    depth = 0
    for event in yaml.parse(text, _LOADER):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("aliases are not allowed")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_NESTED:
            raise ValueError("nested too deeply")
