"""What a batch script can hold: settings become words of its lines, never lines of their own."""

import dataclasses
import re
import shlex
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qsr.config.schema import SlurmCluster
from qsr.errors import ConfigError


def check_batch_script(cluster: SlurmCluster, experiment: str, folder: Path) -> None:
    """Raise ConfigError if a setting could not be quoted in the run's batch script. Values are not
    shown, because there may be keys among them."""
    settings = dataclasses.asdict(cluster)
    named = {f"cluster.{name}": value for name, value in settings.items()}
    for name, value in {**named, "experiment": experiment, "runs_dir": str(folder)}.items():
        if any(_breaks_lines(text) for text in _texts(value)):
            raise ConfigError(
                f"{name}: a batch script cannot hold its line break or control character; take it "
                f"out of the setting"
            )
    for option in cluster.sbatch:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", option):
            raise ConfigError(f"cluster.sbatch: {option!r} is no long name of an option of sbatch")
    for name in ("python", "container"):  # words of shell as they are
        try:
            shlex.split(settings[name] or "")
        except ValueError as error:
            raise ConfigError(f"cluster.{name} has an open quote ({error}): close it") from None
    if any(mark in str(folder) for mark in "%\\"):
        raise ConfigError(
            f"{folder}: Slurm reads % and \\ in the names of its logs in a way of its own; choose "
            f"another runs_dir, or values without them"
        )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for pair in value.items():
            yield from _texts(pair)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part)
    else:
        yield str(value)


def _breaks_lines(text: str) -> bool:
    """Control characters, and bytes of names that are not UTF-8. Tabs indent lines of `setup`."""
    return any(unicodedata.category(mark) in ("Cc", "Cs") and mark != "\t" for mark in text)
