"""Metrics reported during training: metrics.jsonl, its mirrors, the progress bar.

metrics.jsonl is the authoritative record.
"""

import contextlib
import json
import os
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qsr.config.naming import run_label
from qsr.config.schema import Config, TrackingConfig
from qsr.output import warn
from qsr.run.durable import replace_file, write_file
from qsr.run.folder import Row, RunFolder, split_rows
from qsr.run.mirror import TensorBoardTracker, WandbTracker


class Tracker(Protocol):
    """Receives a trainer's metrics; every rank has one, but only the main rank's writes them."""

    def log(self, row: Row) -> None:
        """Report one row."""

    def sync(self) -> None:
        """Make the reported rows durable, as far as possible."""

    def rewind(self, step: int) -> None:
        """Discard rows reported after `step` steps, because the run resumes from there."""

    def close(self) -> None:
        """Write everything out and release resources."""


class NullTracker:
    """Reports nothing."""

    def log(self, row: Row) -> None:
        pass

    def sync(self) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


class RunTracker:
    """Reports to all of a run's trackers."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    def log(self, row: Row) -> None:
        for tracker in self._trackers:
            with contextlib.suppress(OSError):  # a full disk must not end a run
                tracker.log(row)

    def sync(self) -> None:
        for tracker in self._trackers:
            with contextlib.suppress(OSError):
                tracker.sync()

    def rewind(self, step: int) -> None:
        for tracker in self._trackers:
            tracker.rewind(step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> "RunTracker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class JsonlTracker:
    """Appends rows to a file, one JSON object per line.

    `log` raises OSError if the disk is full; the row is then written with the next one, or at the
    end. Lines of an existing file that are not rows are moved to a separate file next to it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting = b""
        # an incomplete line left by a killed session would corrupt the next one
        self._file = self._rewritten(sys.maxsize)

    def log(self, row: Row) -> None:
        self._waiting += json.dumps(row, allow_nan=False).encode() + b"\n"
        self._write()

    def sync(self) -> None:
        self._write()
        os.fsync(self._file.fileno())

    def rewind(self, step: int) -> None:
        rewritten = self._rewritten(step)
        self._file.close()
        self._file = rewritten

    def _rewritten(self, step: int) -> FileIO:
        """The file opened for appending, with only the rows up to this step."""
        rows, damaged = split_rows(self._path.read_bytes() if self._path.exists() else b"")
        if damaged:
            self._put_aside([line for _, line in damaged])
        kept = [line + b"\n" for line, row in rows if row["step"] <= step]
        replace_file(self._path, kept)
        return self._path.open("ab", buffering=0)

    def close(self) -> None:
        try:
            self.sync()
        except OSError as error:
            warnings.warn(
                f"{self._path}: the last rows could not be written ({error})",
                RuntimeWarning,
                stacklevel=2,
            )
        self._file.close()

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def _put_aside(self, damaged: Sequence[bytes]) -> None:
        aside = self._path.with_name(f"{self._path.name}.damaged-{secrets.token_hex(4)}")
        write_file(aside, [line + b"\n" for line in damaged])
        lines = "1 line" if len(damaged) == 1 else f"{len(damaged)} lines"
        warn(f"{self._path}: moved {lines} that could not be read to {aside.name}")


WORTH_SAYING_PERCENT = 5.0
"""A run that waits less for its data is not told so."""


def waiting_words(percent: float) -> str:
    """What users are told if so much of the training time is waiting for data."""
    return f"waiting for data {percent:.0f} %" if percent > WORTH_SAYING_PERCENT else ""


class _Console(Console):
    """Keeps the program running when the output's reader is gone; rich would end it."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class ProgressTracker:
    """A live progress bar on a terminal, with a line per evaluation above it. Elsewhere only these
    lines, at most one every `quiet_seconds`, plus the last one."""

    def __init__(
        self,
        name: str,
        total_steps: int,
        console: Console | None = None,
        quiet_seconds: float = 10.0,
    ) -> None:
        self._console = console or _Console(file=sys.stderr)
        self._name = name
        self._total_steps = total_steps
        self._quiet_seconds = quiet_seconds
        self._quiet_until = 0.0
        self._waiting = ""  # for data, since the last row
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self._console,
            # rich's default of 30 s is too short: large models report less often
            speed_estimate_period=3600.0,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=total_steps, text="")
        self._bar.start()

    def log(self, row: Row) -> None:
        if row["kind"] == "train":
            words = waiting_words(float(row["waiting_percent"]))
            self._waiting = words and f"  {words}"
            text = (
                f"epoch {row['epoch']:.1f}  round {row['round']} (H={row['h']})  "
                f"lr {row['lr']:.2e}  loss {row['loss']:.3f}  {row['images_per_second']:.0f} img/s"
                f"{self._waiting}"
            )
            self._bar.update(self._task, completed=int(row["step"]), text=text)
        if row["kind"] != "eval":
            return
        now, last = time.monotonic(), row["step"] == self._total_steps
        if not (self._console.is_terminal or last or now >= self._quiet_until):
            return
        self._quiet_until = now + self._quiet_seconds
        averages = "".join(
            f"  {name} {row[f'{name}_top1']:.2f} %"
            for name in ("ema", "uniform")
            if f"{name}_top1" in row
        )
        shadow = "  (averaged for this evaluation only)" if row["shadow"] else ""
        self._console.print(
            f"{self._name}  step {row['step']}/{self._total_steps}  epoch {row['epoch']:.1f}  "
            f"top-1 {row['top1']:.2f} %  loss {row['loss']:.3f}{shadow}{averages}{self._waiting}",
            highlight=False,
            soft_wrap=True,
        )

    def sync(self) -> None:
        pass

    def rewind(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def close(self) -> None:
        self._bar.stop()


def build_tracker(config: Config, folder: Path, total_steps: int) -> RunTracker:
    """The trackers of the main rank."""
    settings: TrackingConfig = config.tracking
    trackers: list[Tracker] = [JsonlTracker(RunFolder(folder).metrics)]
    mirrors: dict[str, tuple[bool, Callable[[], Tracker]]] = {
        "wandb": (settings.wandb != "none", lambda: WandbTracker(config, folder)),
        "TensorBoard": (settings.tensorboard, lambda: TensorBoardTracker(folder)),
    }
    for name, (wanted, start) in mirrors.items():
        try:
            if wanted:
                trackers.append(start())
        except (OSError, ImportError) as error:
            warn(f"warning: metrics are not mirrored to {name}: {error}")
    if settings.progress:
        label = run_label(config.experiment, config.seed)
        trackers.append(ProgressTracker(label, total_steps))
    return RunTracker(*trackers)
