"""Checks that settings can be quoted in a batch script: a value must not break a line."""

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
    """Raise ConfigError if a setting cannot be quoted in the run's batch script. The message does
    not show values, because they may be secrets."""
    settings = dataclasses.asdict(cluster)
    named = {f"cluster.{name}": value for name, value in settings.items()}
    for name, value in {**named, "experiment": experiment, "runs_dir": str(folder)}.items():
        if any(_breaks_lines(text) for text in _texts(value)):
            raise ConfigError(
                f"{name} contains a line break or control character, which a batch script cannot "
                f"hold: remove it"
            )
    for option in cluster.sbatch:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", option):
            raise ConfigError(
                f"cluster.sbatch: {option!r} is not the long name of an sbatch option"
            )
    for name in ("python", "container"):  # inserted as shell words
        try:
            shlex.split(settings[name] or "")
        except ValueError as error:
            raise ConfigError(f"cluster.{name} has an unclosed quote ({error}): close it") from None
    if any(mark in str(folder) for mark in "%\\"):
        raise ConfigError(
            f"{folder}: % and \\ have a special meaning in Slurm's log file names: choose a "
            f"runs_dir, and values of settings, without them"
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
    """Whether there are control characters (except tabs, for `setup`) or bytes not in UTF-8."""
    return any(unicodedata.category(mark) in ("Cc", "Cs") and mark != "\t" for mark in text)
