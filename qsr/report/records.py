"""results/runs: what finished runs leave to the repository, without weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from qsr.config.load import differences
from qsr.report.collect import ReportError, Run, read_run

RECORD_FILES = (
    "config.yaml",
    "data.json",
    "environment.json",
    "metrics.jsonl",
    "summary.json",
)

Summary = dict[str, Any]
"""What summary.json of a finished run holds."""


def add_record(folder: Path, records: Path) -> Path:
    """Copy the records of the finished run in `folder`, but for the name of its host, to
    `records`/EXPERIMENT/seed_SEED, and return that.

    A record of the same run is replaced. Raises ReportError, and writes nothing, if the run has
    not finished or if `records` holds one of that name with other settings or data, whatever the
    seed: means over seeds are of one run.
    """
    missing = [name for name in RECORD_FILES if not (folder / name).exists()]
    if missing and "summary.json" not in missing:
        raise ReportError(f"{folder} has no {', '.join(missing)}: it is no complete run folder")
    run = read_run(folder)
    experiment: Path = records / run.summary["experiment"]
    for stored in sorted(experiment.glob("seed_*")):
        _check_same(run, stored)
    target = experiment / f"seed_{run.config.seed}"
    contents = {name: (folder / name).read_text() for name in RECORD_FILES}
    environment = json.loads(contents["environment.json"])
    environment.pop("host", None)
    contents["environment.json"] = json.dumps(environment, indent=2) + "\n"
    target.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (target / name).write_text(text)
    return target


def read_summaries(records: Path) -> dict[str, list[Summary]]:
    """The summaries in `records` by experiment, each experiment's in order of the seeds.

    Raises ReportError if one lies where another run belongs.
    """
    summaries: dict[str, list[Summary]] = {}
    for path in sorted(records.rglob("summary.json")):
        summary: Summary = json.loads(path.read_text())
        place = f"{summary['experiment']}/seed_{summary['seed']}"
        if path.parent != records / place:
            raise ReportError(f"{path} is the summary of {place}: records are made by add")
        summaries.setdefault(summary["experiment"], []).append(summary)
    return {name: sorted(runs, key=lambda run: run["seed"]) for name, runs in summaries.items()}


def _check_same(run: Run, stored: Path) -> None:
    """Raise ReportError if the record in `stored` is not of `run`, the seed aside."""
    other = read_run(stored)
    changed = differences(replace(run.config, seed=other.config.seed), other.config)
    now = json.loads((run.folder / "data.json").read_text())
    before = json.loads((stored / "data.json").read_text())
    changed += [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key)
    ]
    if changed:
        raise ReportError(
            f"{run.folder} is another run than {stored} of the same name ({'; '.join(changed)}): "
            f"remove {stored.parent}, or give this one a name of its own"
        )
