"""A run's config.yaml as text becomes values; apart from folder.py, which needs no YAML library."""

from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.nodes import Node

from qsr.run.folder import read_small, unreadable


class _Loader(yaml.SafeLoader):
    """Rejects aliases, with which a few lines can expand to 10^9 values. qsr never writes them."""

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "aliases are not allowed", None)
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> dict[str, Any]:
    """The YAML mapping in a file. Raises ConfigError if it is anything else."""
    try:
        return parse_yaml(read_small(path))
    except ValueError as error:
        raise unreadable(path, error) from None


def parse_yaml(text: str) -> dict[str, Any]:
    """A YAML mapping. Raises ValueError for anything else."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a YAML mapping")
    return value
