"""The status of runs, from their folders and from Slurm."""

import fcntl
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qsr.cluster.slurm import IN_QUEUE, WAITING, JobState
from qsr.config.load import parse_identity
from qsr.config.planning import make_sampler
from qsr.errors import ConfigError
from qsr.run.folder import RunFolder, is_number, read_json, read_rows
from qsr.run.tracking import waiting_words
from qsr.run.yaml_file import read_yaml

State = Literal["queued", "running", "preempted", "stopped", "failed", "done", "unknown"]


@dataclass(frozen=True)
class RunStatus:
    """Status of one run. Unknown values are None."""

    folder: Path
    state: State
    """queued: its job waits for its first start. preempted: its job was requeued and waits.
    stopped: unfinished without an error, and no job or session continues it. unknown: Slurm does
    not answer."""
    detail: str
    """The reason for the state, if any, and which of its files are damaged."""
    step: int
    total_steps: int | None
    epoch: float | None
    h: int | None
    """Length of the last trained round."""
    top1: float | None
    """Percent, at the last evaluation."""
    seconds_left: float | None
    """Estimated from the speed so far, including evaluations."""
    waiting_percent: float = 0.0
    """Share of the training time so far in which training waited for data; 0 if unknown."""


class _Files:
    """The small files of a run folder, each read once; problems are collected in `damage`."""

    def __init__(self, folder: Path) -> None:
        self.paths = RunFolder(folder)
        self.damage: list[str] = []
        if not os.access(folder, os.R_OK | os.X_OK):
            self.damage.append(f"{folder} cannot be read: permission denied")
        self.job = self._record(self.paths.job, job=str, log=str)
        if self.job is not None and not re.fullmatch(r"[0-9_]+", self.job["job"], re.ASCII):
            # squeue would reject the whole query, including the other jobs
            self.damage.append(f"{self.paths.job}: {self.job['job']!r} is not a job number")
            self.job = None
        self.failure = self._record(self.paths.failure, rank=int, error=str)
        self.data = self._record(self.paths.data, train_images=int)
        self.trained, self.evaluated = self._rows()

    def total_steps(self) -> int | None:
        """Number of steps of the run, if job.json or its settings and data give it."""
        steps = (self.job or {}).get("steps")
        if isinstance(steps, int) or self.data is None:
            return steps if isinstance(steps, int) else None
        path = self.paths.config
        try:
            config = parse_identity(read_yaml(path))
            return config.epochs * make_sampler(config, self.data["train_images"]).steps_per_epoch
        except (ConfigError, ValueError) as error:
            self.damage.append(str(error) if str(path) in str(error) else f"{path}: {error}")
        return None

    def _record(self, path: Path, **fields: type) -> dict[str, Any] | None:
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
        """The rows of training and those of evaluations."""
        path = self.paths.metrics
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
    """The number of the run's last job, if it can be read."""
    job = _Files(folder).job
    return None if job is None else str(job["job"])


def read_status(folder: Path, jobs: Mapping[str, JobState] | None) -> RunStatus:
    """The status of the run in `folder`. `jobs`: job states by number; None if Slurm does not
    answer. A damaged file only makes the values that depend on it unknown."""
    files = _Files(folder)
    trained, evaluated = files.trained, files.evaluated
    rows = sorted([*trained, *evaluated], key=lambda row: int(row["step"]))
    step = max([0, *(row["step"] for row in rows), *_checkpoints(files.paths)])
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
        waiting_percent=_waiting_percent(trained[-1]) if trained else 0.0,
    )


def _state(files: _Files, jobs: Mapping[str, JobState] | None) -> tuple[State, str]:
    if os.access(files.paths.summary, os.F_OK):
        return "done", ""
    if _locked(files.paths.lock):
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
        return "stopped", "run the same command to resume"
    if job is not None and job.name in ("CANCELLED", "COMPLETED"):
        return "stopped", f"job {number}: {job.name}; run the same command to resume"
    if job is None and not Path(files.job["log"]).exists():  # as if cancelled while it waited
        return "stopped", f"job {number}: gone before it started; run the same command to resume"
    ended = job.name if job else "ended for an unknown reason"
    return "failed", f"job {number}: {ended}, see {files.job['log']}"


def _locked(path: Path) -> bool:
    """Whether a session holds the run's lock."""
    try:
        if path.is_file():  # opening a pipe would block
            with path.open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # not readable, or the file system has no locks
    return False


def _checkpoints(paths: RunFolder) -> list[int]:
    names = (path.name.removeprefix("step_") for path in paths.checkpoints.glob("step_*"))
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


def _waiting_percent(row: Mapping[str, Any]) -> float:
    """Rows of earlier versions have no times of waiting."""
    idle, spent = row.get("data_idle_seconds", 0.0), row["train_seconds"]
    return float(100.0 * idle / spent) if is_number(idle) and spent > 0 else 0.0


def status_table(runs: Sequence[RunStatus]) -> str:
    """A header line and one line per run."""
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
    remarks = "; ".join(filter(None, [run.detail, waiting_words(run.waiting_percent)]))
    return (
        run.state,
        f"{run.step:,}/{total}",
        "-" if run.epoch is None else f"{run.epoch:.1f}",
        "-" if run.h is None else f"{run.h:,}",
        "-" if run.top1 is None else f"{run.top1:.2f}",
        f"{minutes // 60} h {minutes % 60:02} min" if left else "-",
        _printable(f"{run.folder}{f'  ({remarks})' if remarks else ''}"),
    )


def _printable(text: str) -> str:
    """`text` on one line, with unprintable characters replaced."""
    shown = os.fsencode(text).decode(errors="replace")
    return "".join(sign if sign.isprintable() else "?" for sign in shown)
