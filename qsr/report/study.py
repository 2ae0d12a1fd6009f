"""Any set of runs, grouped by the settings in which they differ; a group's runs differ in nothing
but their seeds."""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from qsr.errors import ReportError
from qsr.report.collect import Run, find_runs, read_run
from qsr.report.study_settings import (
    Settings,
    add_differing,
    chosen,
    differing,
    is_labelled,
    is_named,
    settings_of,
    shortest,
    value_text,
)
from qsr.run.folder import RunFolder, is_number


@dataclass(frozen=True)
class Group:
    """Runs that compute the same from different seeds."""

    label: str
    runs: list[Run]
    """In order of their seeds."""
    settings: Settings

    @property
    def seeds(self) -> list[int]:
        """Seeds of its runs, in order."""
        return [run.config.seed for run in self.runs]

    @cached_property
    def rule_label(self) -> str:
        """The rule in words."""
        return self.runs[0].label


@dataclass(frozen=True)
class Study:
    """Finished runs in groups."""

    groups: list[Group]
    by: list[str]
    """The settings by which the runs are grouped."""
    also: list[str]
    """Other settings in which groups differ."""
    reference: Group | None
    """The group to which the others are compared."""
    left_out: list[str]
    """A line for each run that is in no group: its folder, and why."""

    @property
    def runs(self) -> list[Run]:
        """All runs, group by group."""
        return [run for group in self.groups for run in group.runs]

    @property
    def others(self) -> list[Group]:
        """The groups that are compared to the reference; none without one."""
        return [group for group in self.groups if self.reference not in (None, group)]

    def values(self, name: str) -> str:
        """The values of a setting in the groups, as text."""
        texts = (value_text(group.settings.get(name)) for group in self.groups)
        return ", ".join(dict.fromkeys(texts))


def read_study(
    paths: Iterable[str | Path], *, by: Sequence[str] = (), to: str | None = None
) -> Study:
    """Read the runs at and below `paths`.

    `by`: the settings by which to group (`sync` stands for all of sync.*); without it, all in which
    the runs differ. `to`: the group for paired differences: its label, or settings that only it
    has, as in "sync.rule=constant". Unfinished and unreadable runs, and copies of others, are left
    out, and listed. Raises ReportError if no run is left, if runs of one group differ in more than
    the seed, or if `by` or `to` names nothing.
    """
    places = list(map(Path, paths))
    runs, left_out = _read(places)
    if not runs:
        raise ReportError(_no_runs(places, left_out))
    runs, repeated = _each_once(runs)
    left_out += repeated
    settings = [settings_of(run) for run in runs]
    names = differing(settings)
    keys = chosen(by, names, settings) if by else names
    parts = _parts(runs, settings, keys)
    for part in parts:
        _check_same(part, keys)
    groups = _sorted(_labelled(parts, keys))
    also = [name for name in names if name not in keys and not is_labelled(name, keys)]
    return Study(groups, keys, also, None if to is None else _find(groups, to), left_out)


def _read(places: Sequence[Path]) -> tuple[list[Run], list[str]]:
    runs, left_out, seen = [], [], set()
    for folder in find_runs(places):
        if folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        if not RunFolder(folder).summary.exists():
            left_out.append(f"{folder} has not finished")
            continue
        try:
            run = read_run(folder)
        except ReportError as error:
            left_out.append(str(error))
            continue
        if is_number(run.summary.get("train_images")):
            runs.append(run)
        else:
            left_out.append(f"{RunFolder(folder).summary} has no train_images")
    return runs, left_out


def _each_once(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The runs without those that compute the same from the same seed as one before, and a line for
    each of these."""
    first: dict[tuple[str, int], Run] = {}
    repeated = []
    for run in runs:
        key = json.dumps(settings_of(run), sort_keys=True), run.config.seed
        same = first.setdefault(key, run)
        if same is not run:
            repeated.append(f"{run.folder} is the same run as {same.folder}")
    return list(first.values()), repeated


def _no_runs(places: Sequence[Path], left_out: Sequence[str]) -> str:
    where = ", ".join(map(str, places))
    if not left_out:
        return f"no runs in {where}: name run folders, or folders above them"
    more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    return f"no finished run in {where}: {'; '.join(left_out[:3])}{more}"


def labelled_runs(study: Study) -> dict[str, Run]:
    """Each run of a study by a label of its own: its group's, with the seed where groups have
    several runs."""
    several = any(len(group.runs) > 1 for group in study.groups)
    return {
        group.label + (f", seed {run.config.seed}" if several else ""): run
        for group in study.groups
        for run in group.runs
    }


_Part = list[tuple[Run, Settings]]


def _parts(runs: Sequence[Run], settings: Sequence[Settings], keys: Sequence[str]) -> list[_Part]:
    """The runs with equal values of `keys`, each part in order of the seeds."""
    parts: dict[tuple[str, ...], _Part] = {}
    for run, found in zip(runs, settings, strict=True):
        key = tuple(value_text(found.get(name)) for name in keys)
        parts.setdefault(key, []).append((run, found))
    return [sorted(part, key=lambda pair: pair[0].config.seed) for part in parts.values()]


def _check_same(part: _Part, keys: Sequence[str]) -> None:
    """Raise ReportError unless the runs of a group differ in nothing but their seeds."""
    first, settings = part[0]
    names = differing([found for _, found in part])
    if names:
        name = names[0]
        value = value_text(settings.get(name))
        other = next(run for run, found in part if value_text(found.get(name)) != value)
        changes = "; ".join(
            f"{name} ({', '.join(dict.fromkeys(value_text(s.get(name)) for _, s in part))})"
            for name in names
        )
        where = ", ".join(f"{key}={value_text(settings.get(key))}" for key in keys)
        raise ReportError(
            f"runs with {where} differ in more than the seed: {changes}, as {first.folder} and "
            f"{other.folder} do; group by these too, --by {','.join(shortest([*keys, *names]))}, "
            f"or name fewer runs"
        )


def _labelled(parts: Sequence[_Part], keys: Sequence[str]) -> list[Group]:
    """Groups with labels that tell them apart: the rule in words if it is part of the question,
    and the settings that are needed beside it."""
    settings = [part[0][1] for part in parts]
    runs = [[run for run, _ in part] for part in parts]
    rules = [found[0].label if is_named("sync", keys) else "" for found in runs]
    shown = add_differing(keys, settings, rules)
    groups = []
    for found, values, rule in zip(runs, settings, rules, strict=True):
        words = [f"{name}={value_text(values.get(name))}" for name in shown]
        label = ", ".join(filter(None, [rule, *words])) or found[0].label
        groups.append(Group(label, found, values))
    return groups


def _sorted(groups: Sequence[Group]) -> list[Group]:
    """By falling volume of the rule, then by label, with numbers in order."""

    def place(group: Group) -> tuple[Any, ...]:
        return (-_volume(group, groups), group.rule_label, _numbers(group), group.label)

    return sorted(groups, key=place)


def _volume(group: Group, groups: Sequence[Group]) -> float:
    """Mean volume of all runs under the group's rule."""
    of_rule = (other.runs for other in groups if other.rule_label == group.rule_label)
    volumes = (run.summary.get("volume") for runs in of_rule for run in runs)
    return fmean(volume if volume is not None and is_number(volume) else 0.0 for volume in volumes)


def _numbers(group: Group) -> list[float]:
    """The numbers in the group's label, for its place among others."""
    found = []
    for piece in group.label.split(", "):
        with suppress(ValueError):
            found.append(float(piece.rpartition("=")[2]))
    return found


def _find(groups: Sequence[Group], text: str) -> Group:
    """The group with this label, or the only one with these settings. Raises ReportError."""
    found = [group for group in groups if group.label == text]
    found = found or [group for group in groups if _has(group.settings, text)]
    if len(found) == 1:
        return found[0]
    what = "several groups" if found else "no group"
    labels = "; ".join(group.label for group in found or groups)
    raise ReportError(f"--to {text!r} names {what}: choose from {labels}")


def _has(settings: Mapping[str, Any], text: str) -> bool:
    """Whether a group has all of these settings, as in "sync.rule=constant,sync.h=4"."""
    wanted = [piece.strip().partition("=") for piece in text.split(",")]
    return all(
        name in settings and _equal(value_text(settings[name]), value) for name, _, value in wanted
    )


def _equal(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other
