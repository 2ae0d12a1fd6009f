"""Run folders -> records."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qsr.config import schema
from qsr.config.load import differences, parse_identity
from qsr.config.planning import make_plan
from qsr.core.plan import Plan
from qsr.errors import ConfigError, ReportError
from qsr.run.folder import read_json, read_rows, read_yaml


@dataclass(frozen=True)
class Run:
    """A finished run, as its folder tells it."""

    folder: Path
    config: schema.Config
    """With the execution settings of configs/train.yaml: a report is about what a run computes."""
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def label(self) -> str:
        """What distinguishes the run among those of one table."""
        return self.config.sync.label

    @property
    def plan(self) -> Plan:
        """Its rounds."""
        return make_plan(self.config, self.summary["train_images"])

    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of metrics of its evaluations."""
        return [row for row in self.metrics if row["kind"] == "eval"]


def read_run(folder: Path) -> Run:
    """A finished run. Raises ReportError if `folder` is none, or none that this version reads."""
    if not (folder / "summary.json").exists():
        raise ReportError(f"{folder} holds no finished run: its training command goes on with it")
    try:
        config = parse_identity(read_yaml(folder / "config.yaml"))
    except ConfigError as error:
        raise ReportError(
            f"{folder} cannot be read by this version ({error}): remove it, or use the version "
            f"that made it"
        ) from None
    try:
        summary = read_json(folder / "summary.json")
        rows, damaged = read_rows(folder / "metrics.jsonl")
    except ConfigError as error:
        raise ReportError(str(error)) from None
    if damaged:
        raise ReportError(f"{folder}/metrics.jsonl, line {damaged[0]}, is damaged")
    return Run(folder, config, summary, rows)


def walk(root: Path) -> Iterator[Path]:
    """The folders at and below `root`, behind symbolic links too, each once, sorted by their paths;
    those of runs are not gone through, nor are copies of the code."""
    seen, closed = set(), []
    found = os.walk(root, onerror=lambda error: closed.append(error.filename), followlinks=True)
    for path, folders, _ in found:
        try:
            about = Path(path).stat()
        except OSError:  # removed since
            continue
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(set(folders) - _NO_RUNS)
        yield Path(path)
    yield from map(Path, closed)  # they cannot be listed, and may be gone through all the same


_NO_RUNS = {".snapshots", "checkpoints", "slurm", "wandb"}


def group_by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by rule, in order of first appearance. Raises ReportError if runs of one rule differ in
    more than their seed."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        group = groups.setdefault(run.label, [])
        group.append(run)
        changed = differences(replace(run.config, seed=group[0].config.seed), group[0].config)
        if changed:
            raise ReportError(
                f"{run.folder} and {group[0].folder} are no seeds of one run: {'; '.join(changed)}"
            )
    return groups


def label_runs(runs: Sequence[Run]) -> dict[str, Run]:
    """Any runs by what tells them apart: their rules, where that is not enough with their seeds,
    or else their folders."""
    rules = [run.label for run in runs]
    seeds = [f"{run.label}, seed {run.config.seed}" for run in runs]
    labels = next(
        (labels for labels in (rules, seeds) if len(set(labels)) == len(runs)),
        [str(run.folder) for run in runs],
    )
    return dict(zip(labels, runs, strict=True))
