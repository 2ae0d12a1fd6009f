"""results/runs: what finished runs leave to the repository, without weights."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from qsr.config.load import (
    CONFIG_DIR,
    differences,
    load_config,
    settings_hash,
    without_execution,
)
from qsr.errors import ConfigError, ReportError
from qsr.report.collect import Run, read_run, walk
from qsr.run.folder import is_number, read_json, read_yaml

RECORD_FILES = (
    "config.yaml",
    "data.json",
    "environment.json",
    "metrics.jsonl",
    "summary.json",
)

_DATA = ("train_images", "val_images", "train_files", "val_files", "loader")
_ENVIRONMENT = (
    *("code", "earlier_code", "python", "packages", "git", "system", "cpu", "cores", "device"),
    *("gpu", "ranks", "workers_per_rank", "threads_per_rank"),
)
_WORDS = ("experiment", "config_hash", "rule", "model", "data")
"""What is copied into a record; of the summary these, and numbers. Of the settings those of
execution are left out: account, paths, variables of the environment and the like may be there."""

Summary = dict[str, Any]
"""What summary.json of a finished run holds."""


def add_record(folder: Path, records: Path) -> Path:
    """Write what the finished run in `folder` came to, and nothing of where it ran but versions and
    hardware, to `records`/EXPERIMENT/seed_SEED, and return that.

    A record of the same run is replaced. Raises ReportError, and writes nothing, if the run has
    not finished, if its files contradict each other or its experiment's file, or if `records` holds
    one of that name with other settings or data, whatever the seed: means over seeds are of one
    run.
    """
    missing = [name for name in RECORD_FILES if not (folder / name).exists()]
    if missing and "summary.json" not in missing:
        raise ReportError(f"{folder} has no {', '.join(missing)}: it is no complete run folder")
    run = read_run(folder)
    try:
        settings = read_yaml(folder / "config.yaml")
        data, environment = (read_json(folder / f"{n}.json") for n in ("data", "environment"))
    except ConfigError as error:
        raise ReportError(str(error)) from None
    _check_run(run, settings, data)
    experiment = records / run.config.experiment
    for stored in sorted(experiment.glob("seed_*")):
        _check_same(run, data, stored)
    _check_experiment(run)
    target = experiment / f"seed_{run.config.seed}"
    numbers = {name: value for name, value in run.summary.items() if is_number(value)}
    summary = {name: run.summary[name] for name in run.summary if name in {*_WORDS, *numbers}}
    planned = run.summary.get("planned", {})
    contents = {
        "config.yaml": yaml.safe_dump(without_execution(settings), sort_keys=False),
        "data.json": _json({name: data[name] for name in _DATA if name in data}),
        "environment.json": _json({n: environment[n] for n in environment if n in _ENVIRONMENT}),
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in run.metrics),
        "summary.json": _json(summary | ({"planned": planned} if planned else {})),
    }
    target.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (target / name).write_text(text)
    return target


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _check_run(run: Run, settings: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Raise ReportError if the files of a run folder are not of one run that came to its end."""
    config, summary, name = run.config, run.summary, run.config.experiment
    if Path(name).is_absolute() or not set(name.split("/")).isdisjoint(("", ".", "..")):
        raise ReportError(f"{run.folder}: experiment={name} leads out of the records")
    images = data.get("train_images")
    if not isinstance(images, int) or images < config.global_batch:
        raise ReportError(f"{run.folder}/data.json: train_images={images} makes no run")
    plan = replace(run, summary={"train_images": images}).plan
    measured = {"kind": "eval", "step": plan.total_steps}
    nothing: dict[str, Any] = {}
    rows = run.metrics[::-1]
    last = next((row for row in rows if measured.items() <= row.items()), nothing)
    trained = next((row for row in rows if row["kind"] == "train"), nothing)
    expected = {
        "experiment": name,
        "seed": config.seed,
        "config_hash": settings_hash(settings),
        "rule": config.sync.rule,
        "model": config.model.name,
        "data": config.data.name,
        "workers": config.workers,
        "global_batch": config.global_batch,
        "epochs": config.epochs,
        "train_images": images,
        "steps": plan.total_steps,
        "averages": plan.num_rounds,
        "volume": plan.num_rounds / plan.total_steps,
        "top1": last.get("top1"),
        "val_loss": last.get("loss"),
        "train_seconds": trained.get("train_seconds"),
    } | ({"top5": last.get("top5")} if "top5" in summary else {})
    wrong = [
        f"{key}={summary.get(key)!r} instead of {value!r}"
        for key, value in expected.items()
        if value is None or summary.get(key) != value or isinstance(summary.get(key), bool)
    ]
    if wrong:
        raise ReportError(
            f"{run.folder}/summary.json is not what its config.yaml, data.json and metrics.jsonl "
            f"say: {'; '.join(wrong)}"
        )
    _check_numbers(run.folder, {**summary, **_planned(run)})
    if max(row["step"] for row in run.metrics) > plan.total_steps or last["top1"] > 100:
        raise ReportError(f"{run.folder}/metrics.jsonl goes beyond the run")


def _planned(run: Run) -> dict[str, Any]:
    planned = run.summary.get("planned", {})
    if not isinstance(planned, dict):
        raise ReportError(f"{run.folder}/summary.json: planned={planned!r} is no plan")
    return {f"planned.{name}": value for name, value in planned.items()}


def _check_numbers(folder: Path, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if name in _WORDS or name == "planned":
            continue
        if not is_number(value) or value < 0:
            raise ReportError(f"{folder}/summary.json: {name}={value!r} cannot have been measured")


def _check_experiment(run: Run) -> None:
    """A run that bears the name of an experiment's file, without changes, is that experiment."""
    name = run.config.experiment
    if not (CONFIG_DIR / "experiment" / f"{name}.yaml").is_file():
        return
    changed = differences(
        run.config, load_config([f"experiment={name}", f"seed={run.config.seed}"])
    )
    if changed:
        raise ReportError(
            f"{run.folder} is not what configs/experiment/{name}.yaml is now "
            f"({'; '.join(changed)}): run it again"
        )


def read_summaries(records: Path) -> dict[str, list[Summary]]:
    """The summaries in `records` by experiment, each experiment's in order of the seeds.

    Raises ReportError if one cannot be read, or lies where another run belongs.
    """
    summaries: dict[str, list[Summary]] = {}
    for folder in walk(records):
        path = folder / "summary.json"
        if not path.exists():
            continue
        try:
            summary: Summary = read_json(path)
        except ConfigError as error:
            raise ReportError(str(error)) from None
        place = f"{summary.get('experiment')}/seed_{summary.get('seed')}"
        if folder != records / place:
            raise ReportError(f"{path} is the summary of {place}: records are made by add")
        summaries.setdefault(summary["experiment"], []).append(summary)
    return {name: sorted(runs, key=lambda run: run["seed"]) for name, runs in summaries.items()}


def _check_same(run: Run, data: Mapping[str, Any], stored: Path) -> None:
    """Raise ReportError if the record in `stored` is not of `run`, the seed aside."""
    other = read_run(stored)
    changed = differences(replace(run.config, seed=other.config.seed), other.config)
    try:
        before = read_json(stored / "data.json")
    except ConfigError as error:
        raise ReportError(str(error)) from None
    changed += [
        f"{key}: {before.get(key)} -> {data.get(key)}"
        for key in sorted({*data, *before}.intersection(_DATA))
        if data.get(key) != before.get(key)
    ]
    if changed:
        raise ReportError(
            f"{run.folder} is another run than {stored} of the same name ({'; '.join(changed)}): "
            f"remove {stored.parent}, or give this one a name of its own"
        )
