"""Metrics reported during training: metrics.jsonl, the wandb mirror, the progress bar.

metrics.jsonl is the authoritative record. The mirror can neither stop nor slow down the run: it
runs in its own process, and any failure there becomes one warning at the end.
"""

import contextlib
import json
import math
import os
import queue
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qsr.cluster.slurm import STOP_SIGNALS
from qsr.config.naming import run_label
from qsr.config.schema import Config, TrackingConfig
from qsr.output import warn
from qsr.run.durable import replace_file, write_file
from qsr.run.folder import RunFolder, split_rows

Row = Mapping[str, float | int | str | bool]
"""One line of metrics: "kind" ("train" or "eval"), "step" (completed steps) and measured values."""


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


class WandbTracker:
    """Mirrors rows to Weights & Biases in a separate process, fed by a thread.

    Without a network, wandb blocks for minutes (even when its process exits) and may raise. The run
    never waits for it, except that `close` gives it `close_seconds` to finish before killing it.
    """

    def __init__(self, config: Config, folder: Path, close_seconds: float = 30.0) -> None:
        self._rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._close_seconds = close_seconds
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (until close)
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from qsr.run.tracking import mirror_rows; mirror_rows()"],
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # stop signals are for the run, which then closes the mirror
        )
        settings = {
            "project": config.tracking.wandb_project,
            "entity": config.tracking.wandb_entity,
            "name": f"{config.experiment}/seed_{config.seed}",
            "id": _wandb_id(RunFolder(folder).wandb_id),
            "resume": "allow",
            "dir": str(folder),
            "mode": config.tracking.wandb,
            "patience": math.ceil(close_seconds) + 1,
        }
        self._thread = threading.Thread(
            target=self._feed, args=(settings,), name="wandb", daemon=True
        )
        self._thread.start()

    def log(self, row: Row) -> None:
        self._rows.put(row)

    def sync(self) -> None:
        """Does nothing: metrics.jsonl is the record."""

    def rewind(self, step: int) -> None:
        """Does nothing: wandb keeps the first row of each step."""

    def close(self) -> None:
        self._rows.put(None)
        self._thread.join(self._close_seconds)
        late = self._thread.is_alive()
        if late:
            self._process.kill()  # this also ends wandb's helper process
            self._thread.join()
        if late or self._process.returncode:
            reason = f"still busy after {self._close_seconds:.0f} s" if late else self._last_words()
            warnings.warn(
                f"wandb: {reason}; the mirror is incomplete, but metrics.jsonl is complete",
                RuntimeWarning,
                stacklevel=2,
            )
        self._output.close()

    def _feed(self, settings: Mapping[str, str | int | None]) -> None:
        """Write rows to the process, which may read slowly, and wait until it exits."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(json.dumps(settings).encode() + b"\n")
            while (row := self._rows.get()) is not None:
                pipe.write(json.dumps(row).encode() + b"\n")
                pipe.flush()
        self._process.wait()

    def _last_words(self) -> str:
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line), "exited without a message")


def _wandb_id(path: Path) -> str:
    """The run's id on the wandb server, the same in every session of the run folder."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        stored = path.read_text().strip()
        if re.fullmatch(r"[\w-]+", stored):
            return stored
    name = secrets.token_hex(8)
    with contextlib.suppress(OSError):  # then the next session starts a new mirror
        replace_file(path, [name.encode()])
    return name


def mirror_rows() -> None:
    """Main function of the mirror process: pass standard input (settings, then rows) to wandb.

    The input ends with the run, however it ends; the mirror outlives it by `patience` seconds. Stop
    signals, which Slurm sends to all processes of a step, are ignored: they are meant for the run.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    settings = json.loads(sys.stdin.readline())
    patience = settings.pop("patience")
    try:
        import wandb  # an optional dependency, slow to import

        quiet = wandb.Settings(init_timeout=60, silent=True, console="off")
        run = wandb.init(settings=quiet, **settings)
        for line in sys.stdin:
            row = json.loads(line)
            values = {k: v for k, v in row.items() if k not in ("kind", "step")}
            run.log({f"{row['kind']}/{k}": v for k, v in values.items()}, step=row["step"])
        signal.alarm(patience)
        run.finish()
    except Exception as error:  # `close` reports this line
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))


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
            return
        now, last = time.monotonic(), row["step"] == self._total_steps
        if not (self._console.is_terminal or last or now >= self._quiet_until):
            return
        self._quiet_until = now + self._quiet_seconds
        shadow = "  (averaged for this evaluation only)" if row["shadow"] else ""
        self._console.print(
            f"{self._name}  step {row['step']}/{self._total_steps}  epoch {row['epoch']:.1f}  "
            f"top-1 {row['top1']:.2f} %  loss {row['loss']:.3f}{shadow}{self._waiting}",
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
    if settings.wandb != "none":
        try:
            trackers.append(WandbTracker(config, folder))
        except OSError as error:
            warn(f"warning: metrics are not mirrored to wandb: {error}")
    if settings.progress:
        label = run_label(config.experiment, config.seed)
        trackers.append(ProgressTracker(label, total_steps))
    return RunTracker(*trackers)
