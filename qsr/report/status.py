"""Where runs stand, from their folders and from what Slurm says of their jobs."""

import fcntl
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from qsr.config.load import ConfigError, parse_identity
from qsr.config.planning import make_plan
from qsr.slurm import IN_QUEUE, WAITING, JobState

State = Literal["queued", "running", "preempted", "stopped", "failed", "done", "unknown"]


@dataclass(frozen=True)
class RunStatus:
    """One run. What is not known is None."""

    folder: Path
    state: State
    """queued: its job waits for the first time. preempted: its job was requeued and waits. stopped:
    nothing is wrong, and nobody goes on with it. unknown: Slurm does not answer."""
    detail: str
    """Why, if there is something to say."""
    step: int
    total_steps: int | None
    epoch: float | None
    h: int | None
    """Length of the round that was trained last."""
    top1: float | None
    """Percent, at the last evaluation."""
    seconds_left: float | None
    """At the speed so far, evaluations included."""


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run folders at and below these paths, sorted."""
    marks = ("config.yaml", "job.json")
    found = {
        mark.parent
        for path in paths
        for name in marks
        for mark in path.rglob(name)
        if ".snapshots" not in mark.parts
    }
    return sorted(found)


def job_of(folder: Path) -> str | None:
    """The number of the job that the run was last submitted as."""
    record = _read_json(folder / "job.json")
    return None if record is None else str(record["job"])


def read_status(folder: Path, jobs: Mapping[str, JobState] | None) -> RunStatus:
    """`jobs`: what Slurm says, by number; None if it does not answer."""
    rows = _read_rows(folder / "metrics.jsonl")
    trained = [row for row in rows if row["kind"] == "train"]
    evaluated = [row for row in rows if row["kind"] == "eval"]
    step = max([0, *(row["step"] for row in rows), *_checkpoints(folder)])
    state, detail = _state(folder, jobs)
    total = _total_steps(folder)
    return RunStatus(
        folder=folder,
        state=state,
        detail=detail,
        step=step,
        total_steps=total,
        epoch=rows[-1]["epoch"] if rows else None,
        h=trained[-1]["h"] if trained else None,
        top1=evaluated[-1]["top1"] if evaluated else None,
        seconds_left=_seconds_left(trained, evaluated, step, total),
    )


def _state(folder: Path, jobs: Mapping[str, JobState] | None) -> tuple[State, str]:
    if (folder / "summary.json").exists():
        return "done", ""
    if _locked(folder / "run.lock"):
        return "running", ""
    number = job_of(folder)
    if number is not None and jobs is None:
        return "unknown", f"job {number}"
    job = None if number is None or jobs is None else jobs.get(number)
    if job is not None and job.name in WAITING:
        return ("preempted" if job.restarts else "queued"), f"job {number}: {job.reason}"
    if job is not None and job.name in IN_QUEUE:
        return "running", f"job {number}"
    failure = _read_json(folder / "failure.json")
    if failure is not None:
        return "failed", f"rank {failure['rank']}: {failure['error'].splitlines()[0]}"
    if number is None:
        return "stopped", "the same command goes on"
    if job is not None and job.name in ("CANCELLED", "COMPLETED"):
        return "stopped", f"job {number}: {job.name}; the same command goes on"
    log = (_read_json(folder / "job.json") or {})["log"]
    return "failed", f"job {number}: {job.name if job else 'ended without a word'}, see {log}"


def _locked(path: Path) -> bool:
    """Whether a session holds the run's lock."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # no session has ever been there, or the file system has no locks
    return False


def _checkpoints(folder: Path) -> list[int]:
    names = (path.name.removeprefix("step_") for path in folder.glob("checkpoints/step_*"))
    return [int(name) for name in names if name.isdigit()]


def _total_steps(folder: Path) -> int | None:
    steps: int | None = (_read_json(folder / "job.json") or {}).get("steps")
    data = _read_json(folder / "data.json")
    if steps is not None or data is None:
        return steps
    try:
        config = parse_identity(yaml.safe_load((folder / "config.yaml").read_text()))
        return make_plan(config, data["train_images"]).total_steps
    except (ConfigError, OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return None  # damaged, or of another version: the other runs are wanted all the same


def _seconds_left(
    trained: Sequence[Mapping[str, Any]],
    evaluated: Sequence[Mapping[str, Any]],
    step: int,
    total: int | None,
) -> float | None:
    if not trained or total is None:
        return None
    last = trained[-1]
    spent = last["train_seconds"] + sum(
        row["seconds"] for row in evaluated if row["step"] <= last["step"]
    )
    return float(spent / last["step"] * (total - step))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # it is being written
            break
    return rows


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value


def status_table(runs: Sequence[RunStatus]) -> str:
    """One line for each run, below a line of titles."""
    titles = ("state", "step", "epoch", "H", "top-1 %", "left", "run")
    rows: list[tuple[str, ...]] = [titles, *(_cells(run) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(titles))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def _cells(run: RunStatus) -> tuple[str, ...]:
    total = "?" if run.total_steps is None else f"{run.total_steps:,}"
    left = run.state != "done" and run.seconds_left is not None
    minutes = round((run.seconds_left or 0.0) / 60)
    return (
        run.state,
        f"{run.step:,}/{total}",
        "-" if run.epoch is None else f"{run.epoch:.1f}",
        "-" if run.h is None else f"{run.h:,}",
        "-" if run.top1 is None else f"{run.top1:.2f}",
        f"{minutes // 60} h {minutes % 60:02} min" if left else "-",
        f"{run.folder}{f'  ({run.detail})' if run.detail else ''}",
    )
