"""A run's name: its experiment, and the settings that the command line changes.

It depends on what the command line changes and not on how that is written: a value that the
experiment has already, in whatever spelling, is no part of the name.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qsr.config.compose import chosen_files, compose_files
from qsr.config.overrides import text_of
from qsr.config.parsing import flatten

_ABSENT = object()


class RunNames:
    """Names runs whose settings come from `folders`. `is_execution` says which settings are no part
    of a name."""

    def __init__(self, folders: Sequence[Path], is_execution: Callable[[str], bool]) -> None:
        self._folders = folders
        self._is_execution = is_execution

    def name(
        self,
        choices: Mapping[str, str | None],
        overrides: Iterable[str],
        settings: Mapping[str, Any],
    ) -> str:
        """The experiment's name and the sorted changes. `choices`: the files chosen on the command
        line, by group; `overrides`: the names of all overrides; `settings`: what was composed."""
        files = {
            group: name
            for group, name in choices.items()
            if name is not None and not self._is_execution(group)
        }
        changes = [f"{group}={text_of(files[group])}" for group in self._changing(files)]
        if any(self._counts(name) for name in set(overrides) - choices.keys()):
            changes += self._changed_values(files, settings)
        experiment = files.get("experiment", "custom")
        if not changes:
            return experiment
        return f"{experiment}/{_shortened(','.join(sorted(map(_as_folder, changes))))}"

    def _changing(self, files: Mapping[str, str]) -> list[str]:
        """The groups whose file the experiment does not choose itself."""
        others = files.keys() - {"experiment"}
        experiment = {"experiment": files.get("experiment")}
        chosen = chosen_files(experiment, self._folders) if others else {}
        return [group for group in others if files[group] != chosen.get(group)]

    def _changed_values(self, files: Mapping[str, str], settings: Mapping[str, Any]) -> list[str]:
        before, now = dict(flatten(compose_files(files, self._folders))), dict(flatten(settings))
        return [
            f"{key}={text_of(now[key]) if key in now else ''}"
            for key in now.keys() | before.keys()
            if self._counts(key) and not _equal(now.get(key, _ABSENT), before.get(key, _ABSENT))
        ]

    def _counts(self, name: str) -> bool:
        return name != "seed" and not self._is_execution(name)


def parts_of(experiment: str) -> tuple[str, str]:
    """The name of the file and the overrides, which may be empty, of `Config.experiment`."""
    name, _, changes = experiment.rpartition("/")
    return (name, changes) if "=" in changes else (experiment, "")


_LABEL_CHARACTERS = 60
"""Room for a run's overrides in a line that says more than its name."""


def run_label(experiment: str, seed: int) -> str:
    """A run in a line of progress, as in "demo/quadratic sync.alpha=0.025 seed 2". `experiment`:
    that of a Config, with its overrides; if they are long, their groups are left out."""
    name, changes = parts_of(experiment)
    if not changes:
        return f"{name} seed {seed}"
    parts = re.split(r",(?=[\w./]+=)", changes)
    if len(" ".join(parts)) > _LABEL_CHARACTERS:
        parts = [re.sub(r"^[\w./]+\.(?=\w+=)", "", part) for part in parts]
    text = " ".join(parts)
    if len(text) > _LABEL_CHARACTERS:
        text = text[: _LABEL_CHARACTERS - 3] + "..."
    return f"{name} {text} seed {seed}"


def _equal(one: Any, other: Any) -> bool:
    """Also tells true from 1, which Python does not."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _as_folder(change: str) -> str:
    return re.sub(r"[/\x00-\x1f\x7f]", "_", change)


def _shortened(text: str) -> str:
    """Folder names are limited to 255 bytes, and tables need short ones."""
    if len(text.encode()) <= 120:
        return text
    short = text.encode()[:100].decode(errors="ignore")
    return short + "," + hashlib.sha256(text.encode()).hexdigest()[:8]
