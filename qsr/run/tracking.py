"""What a run reports while it trains: metrics.jsonl, its mirror on wandb, the progress bar.

metrics.jsonl is the record. The mirror can neither stop nor slow the run: it lives in a process of
its own, and whatever goes wrong there becomes one warning at the end.
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
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qsr.cluster.slurm import STOP_SIGNALS
from qsr.config.schema import Config, TrackingConfig
from qsr.output import warn
from qsr.run.durable import replace_file, write_file
from qsr.run.folder import parse_object

Row = Mapping[str, float | int | str | bool]
"""One line of metrics: "kind" ("train" or "eval"), "step" (steps done), and measured values."""


class Tracker(Protocol):
    """Where a trainer reports; every rank has one, and only the main rank's writes."""

    def log(self, row: Row) -> None:
        """Report one row."""

    def sync(self) -> None:
        """See that a power failure takes nothing of what was reported, as far as that can be."""

    def rewind(self, step: int) -> None:
        """Forget what was reported after `step` steps: the run goes on from there."""

    def close(self) -> None:
        """Write out everything."""


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
            with contextlib.suppress(OSError):  # a full disk, under stderr too, does not end a run
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


_ROW_START = re.compile(rb'\n|(?<=.)(?=\{"kind")')
"""Between rows, also where damage has made another byte of a line's end."""


class JsonlTracker:
    """Appends rows to a file, one JSON object a line.

    `log` raises OSError if the disk is full; the row then waits for the next one, or the end.
    What is in the file and cannot be read as a row is moved to a file beside it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting = b""
        # a line that a kill cut short would spoil the next one
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
        """The file, open at its end, with the rows up to this step alone."""
        rows, damaged = _rows(self._path.read_bytes() if self._path.exists() else b"")
        if damaged:
            self._put_aside(damaged)
        kept = [line + b"\n" for line, row in rows if row["step"] <= step]
        replace_file(self._path, kept)
        return self._path.open("ab", buffering=0)

    def close(self) -> None:
        try:
            self.sync()
        except OSError as error:
            warnings.warn(
                f"{self._path} lacks its last rows ({error})", RuntimeWarning, stacklevel=2
            )
        self._file.close()

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def _put_aside(self, damaged: Sequence[bytes]) -> None:
        aside = self._path.with_name(f"{self._path.name}.damaged-{secrets.token_hex(4)}")
        write_file(aside, [line + b"\n" for line in damaged])
        lines = "1 line" if len(damaged) == 1 else f"{len(damaged)} lines"
        warn(f"{self._path}: {lines} could not be read; the rest is kept, they are in {aside.name}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, as far as they can be read; raises OSError."""
    return [row for _, row in _rows(path.read_bytes())[0]]


def _rows(text: bytes) -> tuple[list[tuple[bytes, dict[str, Any]]], list[bytes]]:
    """The rows of a file, each with its line, and the lines that are none. A last line that a kill
    cut short is neither."""
    lines = _ROW_START.split(text)
    rows, damaged = [], []
    for line in filter(None, lines):
        try:
            row = parse_object(line)
            if not (type(row["step"]) is int and isinstance(row["kind"], str)):
                raise ValueError("no row")
            rows.append((line, row))
        except (ValueError, KeyError):
            damaged.append(line)
    if damaged and lines[-1] == damaged[-1]:
        damaged.pop()
    return rows, damaged


class WandbTracker:
    """Mirrors rows to Weights & Biases from a process of its own, fed by a thread.

    Where there is no network wandb blocks for minutes, at the end of its process too, and may
    raise. The run never waits for it, except that `close` gives it `close_seconds` to finish and
    ends it then.
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
            start_new_session=True,  # a stop is for the run, which then closes the mirror
        )
        settings = {
            "project": config.tracking.wandb_project,
            "entity": config.tracking.wandb_entity,
            "name": f"{config.experiment}/seed_{config.seed}",
            "id": _wandb_id(folder / "wandb_id"),
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
        """Nothing: it is a mirror."""

    def rewind(self, step: int) -> None:
        """Nothing: wandb keeps the first row of a step."""

    def close(self) -> None:
        self._rows.put(None)
        self._thread.join(self._close_seconds)
        late = self._thread.is_alive()
        if late:
            self._process.kill()  # wandb's own helper process ends with it
            self._thread.join()
        if late or self._process.returncode:
            reason = f"still busy after {self._close_seconds:.0f} s" if late else self._last_words()
            warnings.warn(
                f"wandb: {reason}; the mirror is incomplete, metrics.jsonl is complete",
                RuntimeWarning,
                stacklevel=2,
            )
        self._output.close()

    def _feed(self, settings: Mapping[str, str | int | None]) -> None:
        """Write to the process, which may take its time, and wait for its end."""
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
        return next((line for line in reversed(lines) if line), "ended without a word")


def _wandb_id(path: Path) -> str:
    """The run's name on wandb's server: the same in every session of the run folder."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        stored = path.read_text().strip()
        if re.fullmatch(r"[\w-]+", stored):
            return stored
    name = secrets.token_hex(8)
    with contextlib.suppress(OSError):  # the next session's mirror is another one then
        replace_file(path, [name.encode()])
    return name


def mirror_rows() -> None:
    """The mirror's process: pass what comes in on standard input, settings and then rows, to wandb.

    The input ends with the run, however that ends; the mirror outlives it by `patience` seconds.
    Slurm tells all processes of a step to stop: that is for the run.
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
    except Exception as error:  # as the one line that `close` reports
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))


class _Console(Console):
    """Rich's ends the program when nobody reads any more."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class ProgressTracker:
    """A live bar on a terminal, with a line per evaluation above it; elsewhere only such lines, at
    most one every `quiet_seconds` and the last."""

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
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self._console,
            # rows of a large model come less often than rich's 30 s: it would never tell
            speed_estimate_period=3600.0,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=total_steps, text="")
        self._bar.start()

    def log(self, row: Row) -> None:
        if row["kind"] == "train":
            text = (
                f"epoch {row['epoch']:.1f}  round {row['round']} (H={row['h']})  "
                f"lr {row['lr']:.2e}  loss {row['loss']:.3f}  {row['images_per_second']:.0f} img/s"
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
            f"top-1 {row['top1']:.2f} %  loss {row['loss']:.3f}{shadow}",
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
    trackers: list[Tracker] = [JsonlTracker(folder / "metrics.jsonl")]
    if settings.wandb != "none":
        try:
            trackers.append(WandbTracker(config, folder))
        except OSError as error:
            warn(f"warning: no mirror on wandb: {error}")
    if settings.progress:
        # without the overrides, which would push all else from a terminal's line
        name = config.experiment
        if "=" in name:
            name = name.partition("=")[0].rpartition("/")[0] + "/..."
        trackers.append(ProgressTracker(f"{name} seed {config.seed}", total_steps))
    return RunTracker(*trackers)
