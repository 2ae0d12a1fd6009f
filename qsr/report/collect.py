"""Run folders -> records."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, assert_never

import yaml

from qsr.config import schema
from qsr.config.load import ConfigError, differences, parse_identity
from qsr.config.planning import make_plan
from qsr.core.plan import Plan


class ReportError(Exception):
    """One line: which folder cannot be reported, and the mend."""


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
        return rule_label(self.config.sync)

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
        config = parse_identity(yaml.safe_load((folder / "config.yaml").read_text()))
    except ConfigError as error:
        raise ReportError(
            f"{folder} cannot be read by this version ({error}): remove it, or use the version "
            f"that made it"
        ) from None
    return Run(
        folder,
        config,
        json.loads((folder / "summary.json").read_text()),
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
    )


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


def rule_label(sync: schema.SyncConfig) -> str:
    """A rule in words, for tables and legends."""
    match sync:
        case schema.EveryStepSync(average="gradients"):
            return "data parallel"
        case schema.EveryStepSync():
            return "local, H = 1"
        case schema.ConstantSync(h=h):
            return f"constant H = {h}"
        case schema.QuadraticSync(h_base=h_base, alpha=alpha):
            return f"QSR, H_base = {h_base}, alpha = {alpha:g}"
        case schema.PowerSync(h_base=h_base, coefficient=c, exponent=p):
            return f"H_base = {h_base}, ({c:g}/lr)^{p:g}"
        case schema.PostLocalSync(switch_epoch=epoch, h=h):
            return f"post-local from epoch {epoch}, H = {h}"
        case schema.SwapSync(switch_epoch=epoch):
            return f"SWAP from epoch {epoch}"
    assert_never(sync)
