"""Run folders -> records."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qsr.config import schema
from qsr.config.load import differences, parse_identity
from qsr.config.planning import plan_to_follow
from qsr.core.adaptive import ReplayRule
from qsr.core.plan import Plan
from qsr.errors import ConfigError, ReportError
from qsr.run.folder import NO_RUNS, RunFolder, read_json, read_rows
from qsr.run.yaml_file import read_yaml


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder."""

    folder: Path
    config: schema.Config
    """Execution settings are those of configs/train.yaml: a report does not depend on them."""
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def label(self) -> str:
        """Label of the run in a table."""
        return self.config.sync.label

    @property
    def plan(self) -> Plan:
        """The rounds of the run."""
        images = self.summary["train_images"]
        plan = plan_to_follow(self.config, images)
        if isinstance(plan, Plan):
            return plan
        lengths = [int(row["h"]) for row in self.metrics if row["kind"] == "round"]
        return Plan(plan.schedule, ReplayRule(tuple(lengths)))

    def evaluations(self) -> list[dict[str, Any]]:
        """The metrics rows of its evaluations."""
        return [row for row in self.metrics if row["kind"] == "eval"]


def read_run(folder: Path) -> Run:
    """Read a finished run. Raises ReportError if `folder` is not one that this version can read."""
    files = RunFolder(folder)
    if not files.summary.exists():
        raise ReportError(f"{folder} holds no finished run: run its training command to finish it")
    try:
        config = parse_identity(read_yaml(files.config))
    except ConfigError as error:
        raise ReportError(
            f"{folder} cannot be read by this version ({error}): remove it, or use the version "
            f"that made it"
        ) from None
    try:
        summary = read_json(files.summary)
        rows, damaged = read_rows(files.metrics)
    except ConfigError as error:
        raise ReportError(str(error)) from None
    if damaged:
        raise ReportError(f"{files.metrics}, line {damaged[0]}, is damaged")
    return Run(folder, config, summary, rows)


def walk(root: Path) -> Iterator[Path]:
    """`root` and the folders below it, through symbolic links too, each once, sorted by path. Skips
    subfolders of runs and copies of the code."""
    seen, closed = set(), []
    found = os.walk(root, onerror=lambda error: closed.append(error.filename), followlinks=True)
    for path, folders, _ in found:
        try:
            about = Path(path).stat()
        except OSError:  # removed meanwhile
            continue
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(set(folders) - NO_RUNS)
        yield Path(path)
    yield from map(Path, closed)  # they cannot be listed, but known paths in them may be readable


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run folders at and below these paths, following symbolic links, sorted."""
    found = map(RunFolder, {folder for path in paths for folder in walk(path)})
    return sorted(
        files.path
        for files in found
        if os.access(files.config, os.F_OK) or os.access(files.job, os.F_OK)
    )


def group_by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs by rule, in order of first appearance. Raises ReportError if runs of one rule
    differ in more than the seed."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        group = groups.setdefault(run.label, [])
        group.append(run)
        changed = differences(replace(run.config, seed=group[0].config.seed), group[0].config)
        if changed:
            raise ReportError(
                f"{run.folder} and {group[0].folder} differ in more than the seed: "
                f"{'; '.join(changed)}"
            )
    return groups
