"""Where runs stand, from their folders and from what Slurm says of their jobs."""

import fcntl
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qsr.cluster.slurm import IN_QUEUE, WAITING, JobState
from qsr.config.load import parse_identity
from qsr.config.planning import make_plan
from qsr.errors import ConfigError
from qsr.report.collect import walk
from qsr.run.folder import is_number, read_json, read_rows, read_yaml

State = Literal["queued", "running", "preempted", "stopped", "failed", "done", "unknown"]


@dataclass(frozen=True)
class RunStatus:
    """One run. What is not known is None."""

    folder: Path
    state: State
    """queued: its job waits for the first time. preempted: its job was requeued and waits. stopped:
    nothing is wrong, and nobody goes on with it. unknown: Slurm does not answer."""
    detail: str
    """Why, if there is something to say; and which of its files are damaged."""
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
    """The run folders at and below these paths, behind symbolic links too, sorted."""
    marks = ("config.yaml", "job.json")
    found = {
        folder
        for path in paths
        for folder in walk(path)
        if any(os.access(folder / name, os.F_OK) for name in marks)
    }
    return sorted(found)


class _Files:
    """The small files of a run folder, each read once; what is wrong with them is noted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damage: list[str] = []
        if not os.access(folder, os.R_OK | os.X_OK):
            self.damage.append(f"{folder} cannot be read: permission denied")
        self.job = self._record("job.json", job=str, log=str)
        if self.job is not None and not re.fullmatch(r"[0-9_]+", self.job["job"], re.ASCII):
            # squeue would not answer at all, not for the other jobs either
            self.damage.append(f"{folder}/job.json: {self.job['job']!r} is no number of a job")
            self.job = None
        self.failure = self._record("failure.json", rank=int, error=str)
        self.data = self._record("data.json", train_images=int)
        self.trained, self.evaluated = self._rows()

    def total_steps(self) -> int | None:
        """Of the run, if its settings and its data tell."""
        steps = (self.job or {}).get("steps")
        if isinstance(steps, int) or self.data is None:
            return steps if isinstance(steps, int) else None
        path = self.folder / "config.yaml"
        try:
            config = parse_identity(read_yaml(path))
            return make_plan(config, self.data["train_images"]).total_steps
        except (ConfigError, ValueError) as error:
            self.damage.append(str(error) if str(path) in str(error) else f"{path}: {error}")
        return None

    def _record(self, name: str, **fields: type) -> dict[str, Any] | None:
        path = self.folder / name
        if not os.access(path, os.F_OK):
            return None
        try:
            record = read_json(path)
        except ConfigError as error:
            self.damage.append(str(error))
            return None
        if all(isinstance(record.get(field), kind) for field, kind in fields.items()):
            return record
        self.damage.append(f"{path} has no {' and '.join(fields)}")
        return None

    def _rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Of training and of evaluations."""
        path = self.folder / "metrics.jsonl"
        if not os.access(path, os.F_OK):
            return [], []
        try:
            rows, damaged = read_rows(path)
        except ConfigError as error:
            self.damage.append(str(error))
            return [], []
        trained = _rows_with(rows, "train", "epoch", "h", "train_seconds")
        evaluated = _rows_with(rows, "eval", "epoch", "top1", "seconds")
        missing = len(damaged) + len(rows) - len(trained) - len(evaluated)
        if missing:
            self.damage.append(f"{path} has {missing} damaged line{'s' if missing > 1 else ''}")
        return trained, evaluated


def _rows_with(rows: Sequence[dict[str, Any]], kind: str, *names: str) -> list[dict[str, Any]]:
    of_kind = (row for row in rows if row["kind"] == kind)
    return [row for row in of_kind if all(is_number(row.get(name)) for name in names)]


def job_of(folder: Path) -> str | None:
    """The number of the job that the run was last submitted as, if that can be read."""
    job = _Files(folder).job
    return None if job is None else str(job["job"])


def read_status(folder: Path, jobs: Mapping[str, JobState] | None) -> RunStatus:
    """`jobs`: what Slurm says, by number; None if it does not answer. Damaged files cost no more
    than what only they tell."""
    files = _Files(folder)
    trained, evaluated = files.trained, files.evaluated
    rows = sorted([*trained, *evaluated], key=lambda row: int(row["step"]))
    step = max([0, *(row["step"] for row in rows), *_checkpoints(folder)])
    total = files.total_steps()
    state, detail = _state(files, jobs)
    return RunStatus(
        folder=folder,
        state=state,
        detail="; ".join([*filter(None, [detail]), *files.damage]),
        step=step,
        total_steps=total,
        epoch=rows[-1]["epoch"] if rows else None,
        h=trained[-1]["h"] if trained else None,
        top1=evaluated[-1]["top1"] if evaluated else None,
        seconds_left=_seconds_left(trained, evaluated, step, total),
    )


def _state(files: _Files, jobs: Mapping[str, JobState] | None) -> tuple[State, str]:
    if os.access(files.folder / "summary.json", os.F_OK):
        return "done", ""
    if _locked(files.folder / "run.lock"):
        return "running", ""
    number = None if files.job is None else files.job["job"]
    if number is not None and jobs is None:
        return "unknown", f"job {number}"
    job = None if number is None or jobs is None else jobs.get(number)
    if job is not None and job.name in WAITING:
        return ("preempted" if job.restarts else "queued"), f"job {number}: {job.reason}"
    if job is not None and job.name in IN_QUEUE:
        return "running", f"job {number}"
    if files.failure is not None:
        first_line = files.failure["error"].partition("\n")[0]
        return "failed", f"rank {files.failure['rank']}: {first_line}"
    if files.job is None:
        return "stopped", "the same command goes on"
    if job is not None and job.name in ("CANCELLED", "COMPLETED"):
        return "stopped", f"job {number}: {job.name}; the same command goes on"
    ended = job.name if job else "ended without a word"
    return "failed", f"job {number}: {ended}, see {files.job['log']}"


def _locked(path: Path) -> bool:
    """Whether a session holds the run's lock."""
    try:
        if path.is_file():  # a pipe would be waited for
            with path.open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # not ours to read, or the file system has no locks
    return False


def _checkpoints(folder: Path) -> list[int]:
    names = (path.name.removeprefix("step_") for path in folder.glob("checkpoints/step_*"))
    return [int(name) for name in names if name.isdecimal() and name.isascii()]


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
    left = float(spent / last["step"] * (total - step))
    return left if math.isfinite(left) else None


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
        _printable(f"{run.folder}{f'  ({run.detail})' if run.detail else ''}"),
    )


def _printable(text: str) -> str:
    """On one line, whatever bytes a name has."""
    shown = os.fsencode(text).decode(errors="replace")
    return "".join(sign if sign.isprintable() else "?" for sign in shown)
