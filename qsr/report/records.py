"""results/runs: records of finished runs, without weights."""

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
from qsr.run.folder import RunFolder, is_number, read_json
from qsr.run.yaml_file import read_yaml

_DATA = ("train_images", "val_images", "train_files", "val_files", "loader")
_ENVIRONMENT = (
    *("code", "earlier_code", "python", "packages", "git", "system", "cpu", "cores", "device"),
    *("gpu", "ranks", "workers_per_rank", "threads_per_rank"),
)
_WORDS = ("experiment", "config_hash", "rule", "model", "data")
"""What a record keeps; of the summary these words and all numbers. Execution settings are left out,
because they may contain accounts, paths, environment variables and the like."""

Summary = dict[str, Any]
"""The contents of summary.json of a finished run."""


def add_record(folder: Path, records: Path) -> Path:
    """Write the results of the finished run in `folder` to `records`/EXPERIMENT/seed_SEED, and
    return that folder. Of where it ran, only versions and hardware are written.

    A record of the same run is replaced. Raises ReportError, and writes nothing, if the run has not
    finished, if its files contradict each other or its experiment's file, or if `records` holds a
    run of that name, with any seed, with other settings or data, because means over seeds need
    seeds of the same run.
    """
    files = RunFolder(folder)
    needed = (files.config, files.data, files.environment, files.metrics)
    missing = [path.name for path in needed if not path.exists()]
    if missing and files.summary.exists():
        raise ReportError(f"{folder} has no {', '.join(missing)}: it is not a complete run folder")
    run = read_run(folder)
    try:
        settings = read_yaml(files.config)
        data, environment = read_json(files.data), read_json(files.environment)
    except ConfigError as error:
        raise ReportError(str(error)) from None
    _check_run(run, settings, data)
    experiment = records / run.config.experiment
    for stored in sorted(experiment.glob("seed_*")):
        _check_same(run, data, stored)
    _check_experiment(run)
    target = RunFolder(experiment / f"seed_{run.config.seed}")
    numbers = {name: value for name, value in run.summary.items() if is_number(value)}
    summary = {name: run.summary[name] for name in run.summary if name in {*_WORDS, *numbers}}
    planned = run.summary.get("planned", {})
    contents = {
        target.config: yaml.safe_dump(without_execution(settings), sort_keys=False),
        target.data: _json({name: data[name] for name in _DATA if name in data}),
        target.environment: _json({n: environment[n] for n in environment if n in _ENVIRONMENT}),
        target.metrics: "".join(json.dumps(row) + "\n" for row in run.metrics),
        target.summary: _json(summary | ({"planned": planned} if planned else {})),
    }
    target.path.mkdir(parents=True, exist_ok=True)
    for path, text in contents.items():
        path.write_text(text)
    return target.path


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _check_run(run: Run, settings: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Raise ReportError unless the files of a run folder belong to one finished run."""
    config, summary, name = run.config, run.summary, run.config.experiment
    if Path(name).is_absolute() or not set(name.split("/")).isdisjoint(("", ".", "..")):
        raise ReportError(f"{run.folder}: experiment={name} is not a path inside the records")
    images = data.get("train_images")
    if not isinstance(images, int) or images < config.global_batch:
        raise ReportError(
            f"{RunFolder(run.folder).data}: train_images={images} is not enough for a run"
        )
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
            f"{run.folder}/summary.json contradicts config.yaml, data.json or metrics.jsonl: "
            f"{'; '.join(wrong)}"
        )
    _check_numbers(run.folder, {**summary, **_planned(run)})
    if max(row["step"] for row in run.metrics) > plan.total_steps or last["top1"] > 100:
        raise ReportError(
            f"{run.folder}/metrics.jsonl has steps after the run's end, or a top1 above 100"
        )


def _planned(run: Run) -> dict[str, Any]:
    planned = run.summary.get("planned", {})
    if not isinstance(planned, dict):
        raise ReportError(f"{run.folder}/summary.json: planned={planned!r} is not a plan")
    return {f"planned.{name}": value for name, value in planned.items()}


def _check_numbers(folder: Path, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if name in _WORDS or name == "planned":
            continue
        if not is_number(value) or value < 0:
            raise ReportError(f"{folder}/summary.json: {name}={value!r} is not a valid measurement")


def _check_experiment(run: Run) -> None:
    """Raise ReportError if a run has the name of an experiment's file but other settings."""
    name = run.config.experiment
    if not (CONFIG_DIR / "experiment" / f"{name}.yaml").is_file():
        return
    changed = differences(
        run.config, load_config([f"experiment={name}", f"seed={run.config.seed}"])
    )
    if changed:
        raise ReportError(
            f"{run.folder} differs from configs/experiment/{name}.yaml "
            f"({'; '.join(changed)}): run it again"
        )


def read_summaries(records: Path) -> dict[str, list[Summary]]:
    """The summaries in `records` by experiment, in order of the seeds.

    Raises ReportError if one cannot be read, or is in the folder of another run.
    """
    summaries: dict[str, list[Summary]] = {}
    for folder in walk(records):
        path = RunFolder(folder).summary
        if not path.exists():
            continue
        try:
            summary: Summary = read_json(path)
        except ConfigError as error:
            raise ReportError(str(error)) from None
        place = f"{summary.get('experiment')}/seed_{summary.get('seed')}"
        if folder != records / place:
            raise ReportError(f"{path} is the summary of {place}: make records only with add")
        summaries.setdefault(summary["experiment"], []).append(summary)
    return {name: sorted(runs, key=lambda run: run["seed"]) for name, runs in summaries.items()}


def _check_same(run: Run, data: Mapping[str, Any], stored: Path) -> None:
    """Raise ReportError if the record in `stored` differs from `run` in more than the seed."""
    other = read_run(stored)
    changed = differences(replace(run.config, seed=other.config.seed), other.config)
    try:
        before = read_json(RunFolder(stored).data)
    except ConfigError as error:
        raise ReportError(str(error)) from None
    changed += [
        f"{key}: {before.get(key)} -> {data.get(key)}"
        for key in sorted({*data, *before}.intersection(_DATA))
        if data.get(key) != before.get(key)
    ]
    if changed:
        raise ReportError(
            f"{run.folder} and {stored} have the same name but differ ({'; '.join(changed)}): "
            f"remove {stored.parent}, or give this run another name"
        )
