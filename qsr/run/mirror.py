"""Mirrors of metrics.jsonl: Weights & Biases, TensorBoard.

A mirror can neither stop nor slow down the run: it is a process of its own, fed by a thread, and
any failure there becomes one warning at the end.
"""

import contextlib
import importlib.util
import json
import math
import queue
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qsr.cluster.slurm import STOP_SIGNALS
from qsr.config.schema import Config
from qsr.errors import ConfigError
from qsr.run.durable import replace_file
from qsr.run.folder import Row, RunFolder, read_rows


class Mirror:
    """Mirrors rows in a separate process.

    wandb without a network, or a file system that hangs, blocks for minutes (even when the process
    exits) and may raise. The run never waits for it, except that `close` gives it `close_seconds`
    to finish before killing it.
    """

    def __init__(self, name: str, settings: Mapping[str, Any], close_seconds: float) -> None:
        self._name = name
        self._rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._close_seconds = close_seconds
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (until close)
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from qsr.run.mirror import main; main()"],
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # stop signals are for the run, which then closes the mirror
        )
        first = {"mirror": name, "patience": math.ceil(close_seconds) + 1, **settings}
        self._thread = threading.Thread(target=self._feed, args=(first,), name=name, daemon=True)
        self._thread.start()

    def log(self, row: Row) -> None:
        self._rows.put(row)

    def sync(self) -> None:
        """Does nothing: metrics.jsonl is the record."""

    def rewind(self, step: int) -> None:
        """Does nothing, where the first row of each step is kept."""

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
                f"{self._name}: {reason}; the mirror is incomplete, but metrics.jsonl is complete",
                RuntimeWarning,
                stacklevel=2,
            )
        self._output.close()

    def _feed(self, settings: Mapping[str, Any]) -> None:
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


class WandbTracker(Mirror):
    """Mirrors to Weights & Biases, which keeps the first row of each step."""

    def __init__(self, config: Config, folder: Path, close_seconds: float = 30.0) -> None:
        settings = {
            "project": config.tracking.wandb_project,
            "entity": config.tracking.wandb_entity,
            "name": f"{config.experiment}/seed_{config.seed}",
            "id": _wandb_id(RunFolder(folder).wandb_id),
            "resume": "allow",
            "dir": str(folder),
            "mode": config.tracking.wandb,
        }
        super().__init__("wandb", settings, close_seconds)


class TensorBoardTracker(Mirror):
    """Mirrors to TensorBoard's event files, in tensorboard/ in the run folder. A resumed run's
    files are written anew from metrics.jsonl, so that each row is there once, also one that a
    killed session had not passed on."""

    def __init__(self, folder: Path, close_seconds: float = 30.0) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ModuleNotFoundError("it is not installed: pip install tensorboard")
        files = RunFolder(folder)
        self._metrics = files.metrics
        super().__init__("tensorboard", {"folder": str(files.tensorboard)}, close_seconds)

    def rewind(self, step: int) -> None:
        self.log({"kind": "rewind", "step": step})
        with contextlib.suppress(ConfigError):  # the file cannot be read
            for row in read_rows(self._metrics)[0]:
                if row["step"] <= step:
                    self.log(row)


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


def main() -> None:
    """Main function of the mirror process: pass standard input (settings, then rows) on.

    The input ends with the run, however it ends; the mirror outlives it by `patience` seconds. Stop
    signals, which Slurm sends to all processes of a step, are ignored: they are meant for the run.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    settings = json.loads(sys.stdin.readline())
    patience = settings.pop("patience")
    mirror = {"wandb": _to_wandb, "tensorboard": _to_tensorboard}[settings.pop("mirror")]
    try:
        mirror(settings, map(json.loads, sys.stdin), patience)
    except Exception as error:  # `close` reports this line
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))


def _to_wandb(settings: dict[str, Any], rows: Iterable[Row], patience: int) -> None:
    import wandb  # an optional dependency, slow to import

    quiet = wandb.Settings(init_timeout=60, silent=True, console="off")
    run = wandb.init(settings=quiet, **settings)
    for row in rows:
        run.log(_values(row), step=int(row["step"]))
    signal.alarm(patience)
    run.finish()


def _to_tensorboard(settings: dict[str, Any], rows: Iterable[Row], patience: int) -> None:
    from torch.utils.tensorboard import SummaryWriter  # as above

    folder = Path(settings["folder"])
    writer = None
    for row in rows:
        if writer is None or row["kind"] == "rewind":
            earlier = list(folder.glob("events.out.tfevents.*"))
            # a TensorBoard that is open now drops what it has read of the earlier files
            writer = SummaryWriter(str(folder), purge_step=0, flush_secs=5)
            for path in earlier:
                path.unlink()
        if row["kind"] != "rewind":
            for name, value in _values(row).items():
                writer.add_scalar(name, value, int(row["step"]))
    signal.alarm(patience)
    if writer is not None:
        writer.flush()  # raises what its thread met
        writer.close()


def _values(row: Row) -> dict[str, Any]:
    """The measured values, by names that both show in groups."""
    return {f"{row['kind']}/{k}": v for k, v in row.items() if k not in ("kind", "step")}
