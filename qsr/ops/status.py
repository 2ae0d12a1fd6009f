"""The status of runs, from their folders and from Slurm."""

import fcntl
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from qsr.cluster.slurm import IN_QUEUE, WAITING, JobState
from qsr.config.load import parse_identity
from qsr.config.planning import make_sampler
from qsr.errors import ConfigError
from qsr.run.folder import RunFolder, is_number, read_json, read_last_rows
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
    """Estimated from the speed so far, including evaluations; None when it is done."""
    waiting_percent: float | None = None
    """Share of the training time so far in which training waited for data."""
    skipped_updates: int | None = None
    """Updates that workers skipped so far, because fp16 gradients overflowed; None in other
    precisions."""


@dataclass(frozen=True)
class _Measured:
    """What the rows of a run say. Unknown values are None."""

    step: int = 0
    epoch: float | None = None
    h: int | None = None
    top1: float | None = None
    seconds_per_step: float | None = None
    waiting_percent: float | None = None
    skipped_updates: int | None = None
    damage: Sequence[str] = ()


class _Files:
    """The small files of a run folder, each read once; problems are collected in `damage`."""

    def __init__(self, folder: Path) -> None:
        self.paths = RunFolder(folder)
        self.damage: list[str] = []
        if not os.access(folder, os.R_OK | os.X_OK):
            self.damage.append(f"{folder} cannot be read: permission denied")

    @cached_property
    def job(self) -> dict[str, Any] | None:
        job = self._record(self.paths.job, job=str, log=str)
        if job is not None and not re.fullmatch(r"[0-9_]+", job["job"], re.ASCII):
            # squeue would reject the whole query, including the other jobs
            self.damage.append(f"{self.paths.job}: {job['job']!r} is not a job number")
            return None
        return job

    @cached_property
    def failure(self) -> dict[str, Any] | None:
        return self._record(self.paths.failure, rank=int, error=str)

    def measured(self) -> _Measured:
        """What the run has measured so far."""
        path = self.paths.metrics
        try:
            found = _measured(path, _version(path))
        except ConfigError as error:
            self.damage.append(str(error))
            return _Measured()
        self.damage += found.damage
        return found

    def total_steps(self) -> int | None:
        """Number of steps of the run, if job.json or its settings and data give it."""
        data = self._record(self.paths.data, train_images=int)
        steps = (self.job or {}).get("steps")
        if isinstance(steps, int) or data is None:
            return steps if isinstance(steps, int) else None
        path = self.paths.config
        try:
            return _planned_steps(path, _version(path), data["train_images"])
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


def _version(path: Path) -> tuple[int, int]:
    """Changes when the file does. Raises ConfigError."""
    try:
        about = path.stat()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
    return about.st_size, about.st_mtime_ns


@lru_cache(maxsize=10_000)
def _planned_steps(path: Path, version: tuple[int, int], train_images: int) -> int:
    """Cached by the file's version, because a watched run's settings are read every few seconds."""
    config = parse_identity(read_yaml(path))
    return config.epochs * make_sampler(config, train_images).steps_per_epoch


@lru_cache(maxsize=10_000)
def _measured(path: Path, version: tuple[int, int]) -> _Measured:
    """From the last rows of a metrics.jsonl; cached by the file's version."""
    rows, damaged, whole = read_last_rows(path)
    trained = _rows_with(rows, "train", "epoch", "h", "train_seconds")
    evaluated = _rows_with(rows, "eval", "epoch", "top1", "seconds")
    damaged += sum(row["kind"] != "round" for row in rows) - len(trained) - len(evaluated)
    good = sorted([*trained, *evaluated], key=lambda row: int(row["step"]))
    return _Measured(
        step=max((row["step"] for row in good), default=0),
        epoch=good[-1]["epoch"] if good else None,
        h=trained[-1]["h"] if trained else None,
        top1=evaluated[-1]["top1"] if evaluated else None,
        seconds_per_step=_seconds_per_step(trained, evaluated, whole=whole),
        waiting_percent=_waiting_percent(trained[-1]) if trained else None,
        skipped_updates=_skipped_updates(trained[-1]) if trained else None,
        damage=[f"{path} has {damaged} damaged line{'s' if damaged > 1 else ''}"] * (damaged > 0),
    )


def _rows_with(rows: Sequence[dict[str, Any]], kind: str, *names: str) -> list[dict[str, Any]]:
    of_kind = (row for row in rows if row["kind"] == kind)
    return [row for row in of_kind if all(is_number(row.get(name)) for name in names)]


def _seconds_per_step(
    trained: Sequence[Mapping[str, Any]], evaluated: Sequence[Mapping[str, Any]], *, whole: bool
) -> float | None:
    """Evaluations included; over the whole run, or over the rows that were read."""
    if not trained:
        return None
    first = {"step": 0, "train_seconds": 0.0} if whole else trained[0]
    last = trained[-1]
    between = (row for row in evaluated if first["step"] < row["step"] <= last["step"])
    spent = last["train_seconds"] - first["train_seconds"] + sum(row["seconds"] for row in between)
    steps = last["step"] - first["step"]
    return float(spent / steps) if steps > 0 and math.isfinite(spent / steps) else None


def _waiting_percent(row: Mapping[str, Any]) -> float | None:
    """Rows of earlier versions have no times of waiting."""
    idle, spent = row.get("data_idle_seconds"), row["train_seconds"]
    if idle is None or not is_number(idle) or spent <= 0:
        return None
    return float(100.0 * idle / spent)


def _skipped_updates(row: Mapping[str, Any]) -> int | None:
    skipped = row.get("skipped_updates")
    return skipped if isinstance(skipped, int) else None


def job_of(folder: Path) -> str | None:
    """The number of the run's last job, if it can be read."""
    job = _Files(folder).job
    return None if job is None else str(job["job"])


def read_status(folder: Path, jobs: Mapping[str, JobState] | None) -> RunStatus:
    """The status of the run in `folder`. `jobs`: job states by number; None if Slurm does not
    answer. A damaged file only makes the values that depend on it unknown."""
    files = _Files(folder)
    state, detail = _state(files, jobs)
    found = files.measured() if os.access(files.paths.metrics, os.F_OK) else _Measured()
    step = max([found.step, *_checkpoints(files.paths)])
    total = files.total_steps()
    left = total is not None and state != "done" and found.seconds_per_step is not None
    return RunStatus(
        folder=folder,
        state=state,
        detail="; ".join([*filter(None, [detail]), *files.damage]),
        step=step,
        total_steps=total,
        epoch=found.epoch,
        h=found.h,
        top1=found.top1,
        seconds_left=(found.seconds_per_step or 0.0) * ((total or 0) - step) if left else None,
        waiting_percent=found.waiting_percent,
        skipped_updates=found.skipped_updates,
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
