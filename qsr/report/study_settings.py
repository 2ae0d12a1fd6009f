"""The settings of runs, and those in which they differ."""

import json
from collections.abc import Sequence
from typing import Any

from qsr.config.load import EXECUTION, LATER, identity
from qsr.config.overrides import suggest
from qsr.errors import ConfigError, ReportError
from qsr.report.collect import Run
from qsr.run.folder import RunFolder, read_json

Settings = dict[str, Any]
"""Settings that decide what a run computes, without the seed, by dotted name; and the facts about
its data, by name in data.json."""

_DATA = "data.json"
_FACTS = ("train_images", "val_images", "train_files", "val_files", "loader")
_LABELLED = (
    *("rule", "average", "h", "h_base", "alpha", "coefficient", "exponent", "growth"),
    "switch_epoch",
)
"""The settings of a rule that its label names."""


def settings_of(run: Run) -> Settings:
    """The settings of a run. Of the data, what its data.json holds: older runs hold less."""
    found = LATER | identity(run.config)
    del found["seed"]
    path = RunFolder(run.folder).data
    try:
        facts = read_json(path) if path.exists() else {}
    except ConfigError as error:
        raise ReportError(str(error)) from None
    return found | {f"{_DATA}.{name}": facts[name] for name in _FACTS if name in facts}


def value_text(value: Any) -> str:
    """A setting's value as a user would give it; a dash for a setting that a run does not have."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value)


def differing(settings: Sequence[Settings]) -> list[str]:
    """The names of the settings in which runs differ, sorted. Facts about the data that were not
    recorded do not differ."""
    names = sorted({name for found in settings for name in found})
    return [name for name in names if len(_values(name, settings)) > 1]


def _values(name: str, settings: Sequence[Settings]) -> set[str]:
    recorded = [found for found in settings if name in found or not is_named(_DATA, [name])]
    return {value_text(found.get(name)) for found in recorded}


def is_named(prefix: str, names: Sequence[str]) -> bool:
    """Whether one of the names is `prefix` or below it."""
    return any(name == prefix or name.startswith(prefix + ".") for name in names)


def is_labelled(name: str, keys: Sequence[str]) -> bool:
    """Whether the rule's label names this setting; groups by a setting of the rule have it."""
    group, _, leaf = name.rpartition(".")
    return is_named("sync", keys) and group == "sync" and leaf in _LABELLED


def shortest(names: Sequence[str]) -> list[str]:
    """The names, with `sync` for all of a rule's settings."""
    return list(dict.fromkeys("sync" if is_named("sync", [name]) else name for name in names))


def chosen(by: Sequence[str], names: Sequence[str], settings: Sequence[Settings]) -> list[str]:
    """The settings that `by` names; the name of a group of settings stands for those in which the
    runs differ. Raises ReportError."""
    known = sorted({name for found in settings for name in found})
    found: list[str] = []
    for word in by:
        if word == "seed":
            raise ReportError("--by seed: the runs of a group are its seeds; leave it out")
        if any(is_named(name, [word]) for name in EXECUTION):
            raise ReportError(f"--by {word}: it does not change what a run computes; leave it out")
        if not is_named(word, known):
            raise ReportError(f"--by {word} is not a setting of these runs; {_hint(word, names)}")
        found += [word] if word in known else [name for name in names if is_named(word, [name])]
    return list(dict.fromkeys(found))


def _hint(word: str, names: Sequence[str]) -> str:
    return suggest(word, names) if names else "they differ in no setting: leave it out"


def add_differing(
    names: Sequence[str], settings: Sequence[Settings], words: Sequence[str]
) -> list[str]:
    """The fewest of `names`, in order, that tell apart groups that `words` does not tell apart; the
    names of kinds (model.name) come first, and what a rule's label names last."""
    shown: list[str] = []
    count = len(set(words))
    for name in sorted(names, key=_order):
        if count == len(settings):
            break
        pieces = zip(words, *([value_text(s.get(n)) for s in settings] for n in [*shown, name]),
                     strict=True)  # fmt: skip
        now = len(set(pieces))
        if now > count:
            shown, count = [*shown, name], now
    return shown


def _order(name: str) -> tuple[bool, bool, str]:
    last = is_named(_DATA, [name]) or is_labelled(name, [name])
    return (last, not name.endswith(".name"), name)
