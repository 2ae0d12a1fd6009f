"""What is reported: the file, the terminal, and a mirror that cannot hold up the run."""

import importlib
import importlib.util
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qsr.config.load import load_config
from qsr.config.schema import Config
from qsr.run.folder import Row, RunFolder, read_rows
from qsr.run.mirror import TensorBoardTracker, WandbTracker
from qsr.run.tracking import (
    JsonlTracker,
    ProgressTracker,
    RunTracker,
    build_tracker,
)
from tests.cli import call, command, folder_in, start, wait_for


def train_row(step: int, **changes: float | int) -> Row:
    place = {"epoch": step / 8, "round": 3, "h": 4, "lr": 0.0125}
    measured = {"loss": 1.2345, "images_per_second": 987.6, "waiting_percent": 5.0}
    return {"kind": "train", "step": step, **place, **measured, **changes}


def eval_row(step: int, shadow: bool = False) -> Row:
    values = {"epoch": step / 8, "top1": 61.254, "loss": 0.5, "shadow": shadow}
    return {"kind": "eval", "step": step, **values}


def config(mode: str, *overrides: str) -> Config:
    return load_config(["experiment=demo/quadratic", f"tracking={mode}", "seed=3", *overrides])


# metrics.jsonl


def test_rows_are_on_disk_at_once_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log({"kind": "train", "step": 1, "loss": 0.1})
    assert path.read_text() == '{"kind": "train", "step": 1, "loss": 0.1}\n'
    tracker.log({"kind": "eval", "step": 1, "shadow": True})
    assert read_rows(path)[0] == [
        {"kind": "train", "step": 1, "loss": 0.1},
        {"kind": "eval", "step": 1, "shadow": True},
    ]
    tracker.close()


def test_rewind_drops_later_rows_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    rows = [train_row(2), train_row(4), eval_row(4), train_row(6)]
    for row in rows:
        tracker.log(row)
    tracker.rewind(4)
    assert read_rows(path)[0] == rows[:3]
    tracker.log(train_row(5))
    tracker.close()
    assert read_rows(path)[0] == [*rows[:3], train_row(5)]
    assert list(tmp_path.iterdir()) == [path]


def test_reopening_appends(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        tracker = JsonlTracker(path)
        tracker.log(train_row(step))
        tracker.close()
    assert read_rows(path)[0] == [train_row(1), train_row(2)]


@pytest.mark.parametrize("cut", [1, 20, -1])
@pytest.mark.parametrize("rewind_to", [None, 2, 1])
def test_a_last_line_that_a_kill_cut_short_spoils_nothing(
    tmp_path: Path, cut: int, rewind_to: int | None
) -> None:
    """Cut after one character, in the middle, and before the newline alone (nothing is lost)."""
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log(train_row(1))
    before = path.read_text()
    tracker.log(train_row(2))
    tracker.close()
    last = path.read_text().removeprefix(before)
    path.write_text(before + last[:cut])
    kept = [train_row(1), train_row(2)] if cut == -1 else [train_row(1)]
    assert read_rows(path)[0] == kept

    tracker = JsonlTracker(path)
    if rewind_to is not None:
        tracker.rewind(rewind_to)
        kept = kept[:rewind_to]
    tracker.log(train_row(9))
    tracker.close()
    assert read_rows(path)[0] == [*kept, train_row(9)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_json_cannot_hold_is_refused(tmp_path: Path, value: float) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        tracker.log(train_row(1, loss=value))
    tracker.log(train_row(2))
    tracker.close()
    assert read_rows(tmp_path / "metrics.jsonl")[0] == [train_row(2)]


# The terminal


def on_terminal() -> tuple[ProgressTracker, Callable[[], str]]:
    """A tracker of 10 steps on a terminal, and what that shows in plain characters."""
    shown = StringIO()
    console = Console(file=shown, force_terminal=True, width=200)
    tracker = ProgressTracker("demo seed 1", 10, console)
    return tracker, lambda: re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())


def test_the_bar_shows_where_the_run_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, shown = on_terminal()
    clock = iter([100.0, 160.0])
    # a row a minute, as large models log; the bar is drawn from the rows alone
    monkeypatch.setattr(tracker._bar, "get_time", lambda: next(clock))
    tracker.log(train_row(2))
    tracker.log(train_row(4))
    monkeypatch.undo()
    tracker.close()
    line = shown().splitlines()[-1]
    assert line.startswith("demo seed 1 ")
    # 6 steps left at 2 steps a minute
    text = " 4/10 epoch 0.5  round 3 (H=4)  lr 1.25e-02  loss 1.234  988 img/s 0:03:00"
    assert line.rstrip().endswith(text)


def test_waiting_for_data_is_said_where_it_is_above_5_percent() -> None:
    """Beside the speed, and with the evaluations, which are all that a log file shows."""
    for percent, said in ((0.0, ""), (5.0, ""), (5.6, "  waiting for data 6 %"), (31.4, "  waiting "
                          "for data 31 %")):  # fmt: skip
        tracker, shown = on_terminal()
        tracker.log(train_row(2, waiting_percent=99.0))
        tracker.log(train_row(4, waiting_percent=percent))
        tracker.log(eval_row(4))
        tracker.close()
        (evaluation,) = (line.strip() for line in shown().splitlines() if "top-1" in line)
        assert evaluation.endswith(f"loss 0.500{said}")
        assert f"988 img/s{said} " in shown().splitlines()[-1]


def test_averages_over_time_stand_beside_the_model() -> None:
    tracker, shown = on_terminal()
    tracker.log({**eval_row(4, shadow=True), "ema_top1": 62.5, "ema_loss": 0.4})
    tracker.log({**eval_row(8), "ema_top1": 63.75, "uniform_top1": 60.0})
    tracker.close()
    lines = [line.strip() for line in shown().splitlines() if "top-1" in line]
    assert [line.partition("loss ")[2] for line in lines] == [
        "0.500  (averaged for this evaluation only)  ema 62.50 %",
        "0.500  ema 63.75 %  uniform 60.00 %",
    ]


def test_a_rewound_bar_goes_back() -> None:
    tracker, shown = on_terminal()
    tracker.log(train_row(8))
    tracker.rewind(3)
    tracker.close()
    assert " 3/10 " in shown().splitlines()[-1]


def test_evaluations_stand_above_the_bar() -> None:
    tracker, shown = on_terminal()
    tracker.log(train_row(4))
    tracker.log(eval_row(4, shadow=True))
    tracker.log(eval_row(8))
    tracker.close()
    lines = [line.strip() for line in shown().splitlines() if "top-1" in line]
    assert lines == [
        "demo seed 1  step 4/10  epoch 0.5  top-1 61.25 %  loss 0.500"
        "  (averaged for this evaluation only)",
        "demo seed 1  step 8/10  epoch 1.0  top-1 61.25 %  loss 0.500",
    ]
    assert " 4/10 " in shown().splitlines()[-1]


@pytest.mark.parametrize(("quiet_seconds", "printed"), [(3600.0, [2, 10]), (0.0, [2, 4, 6, 10])])
def test_elsewhere_only_spaced_lines_and_the_last(quiet_seconds: float, printed: list[int]) -> None:
    shown = StringIO()
    tracker = ProgressTracker("demo", 10, Console(file=shown, width=40), quiet_seconds)
    for step in (2, 4, 6, 10):
        tracker.log(train_row(step))
        tracker.log(eval_row(step))
    tracker.close()
    assert shown.getvalue().splitlines() == [
        f"demo  step {step}/10  epoch {step / 8:.1f}  top-1 61.25 %  loss 0.500" for step in printed
    ]


# wandb


def wandb_history(folder: Path) -> list[dict[str, float]]:
    """The numbers in a .wandb file, by step. The file is a LevelDB log of protocol buffers."""
    (file,) = folder.glob("wandb/*run-*/run-*.wandb")
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, at, parts, steps = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block is too short for a head
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = messages.Record.FromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                steps.append(history_numbers(record.history))
    return steps


def history_numbers(history: Any) -> dict[str, float]:
    items = [("/".join(item.nested_key) or item.key, item.value_json) for item in history.item]
    return {key: json.loads(value) for key, value in items if key == "_step" or "/" in key}


def test_wandb_offline_holds_the_rows(tmp_path: Path) -> None:
    tracker = WandbTracker(config("offline"), tmp_path)
    tracker.log({"kind": "train", "step": 5, "loss": 0.75, "h": 4})
    tracker.log({"kind": "eval", "step": 5, "top1": 61.5})
    tracker.log({"kind": "train", "step": 10, "loss": 0.5, "h": 8})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.close()
    assert wandb_history(tmp_path) == [
        {"_step": 5, "train/loss": 0.75, "train/h": 4, "eval/top1": 61.5},
        {"_step": 10, "train/loss": 0.5, "train/h": 8},
    ]


def test_wandb_that_fails_is_one_warning_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "too short")
    tracker = WandbTracker(config("online"), tmp_path)
    tracker.log(train_row(1))
    with pytest.warns(RuntimeWarning, match=r"wandb: \w+Error: .*; the mirror is incomplete") as w:
        tracker.close()
    assert len(w) == 1


def test_wandb_ends_with_a_run_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, sys; from qsr.config.load import load_config\n"
        "from qsr.run.mirror import TensorBoardTracker, WandbTracker\n"
        "config = load_config(['experiment=demo/quadratic', 'tracking=offline'])\n"
        "tracker = WandbTracker(config, pathlib.Path(sys.argv[1]))\n"
        "tracker.log({'kind': 'train', 'step': 7, 'loss': 1.0})\n"
        "print(tracker._process.pid, flush=True)\n"
        "sys.stdin.read(1)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    mirror = int(run.stdout.readline())
    assert is_running(mirror)
    deadline = time.monotonic() + 60.0
    while not list(tmp_path.glob("wandb/*run-*/run-*.wandb")):  # it has heard of the run
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.communicate("x")
    assert run.returncode == -9
    deadline = time.monotonic() + 20.0
    while is_running(mirror):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [step["_step"] for step in wandb_history(tmp_path)] == [7]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


# TensorBoard


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: (step, value) by name."""
    pytest.importorskip("tensorboard")
    reader: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {
        name: [(event.step, event.value) for event in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }


def as_scalars(rows: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    """The same from rows, in single precision, as in event files."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("kind", "step"):
                single = struct.unpack("f", struct.pack("f", float(value)))[0]
                found.setdefault(f"{row['kind']}/{name}", []).append((int(row["step"]), single))
    return found


def test_tensorboard_beside_wandb() -> None:
    """One, the other, both."""
    for words, expected in (
        (["tracking=tensorboard"], ("none", True)),
        (["tracking=offline"], ("offline", False)),
        (["tracking=offline", "tracking.tensorboard=true"], ("offline", True)),
    ):
        settings = load_config(["experiment=demo/quadratic", *words]).tracking
        assert (settings.wandb, settings.tensorboard) == expected


@pytest.mark.slow  # the next one is quick
def test_tensorboard_holds_each_row_once_after_a_kill(digits: Path, tmp_path: Path) -> None:
    """A run is killed after a checkpoint, with rows after it; it resumes."""
    pytest.importorskip("tensorboard")
    logged = ["tracking=tensorboard", "tracking.log_every_steps=1", "checkpoint.every_steps=5"]
    one = ["cluster.ranks=1", "cluster.threads_per_rank=1", "data.loader=torchvision"]
    words = [*command(digits, tmp_path), *logged, *one]
    run = start(words)
    wait_for(tmp_path, "step_000000010", run)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert call(words).returncode == 0
    folder = folder_in(tmp_path)
    rows = read_rows(folder / "metrics.jsonl")[0]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 45))
    assert scalars(folder) == as_scalars(rows)
    assert len(list((folder / "tensorboard").iterdir())) == 1


def test_tensorboard_shows_also_what_a_killed_session_did_not_pass_on(tmp_path: Path) -> None:
    """And an evaluation of the step from which the run resumed stands there once."""
    pytest.importorskip("tensorboard")
    for _ in range(2):
        with RunTracker(JsonlTracker(tmp_path / "metrics.jsonl")) as tracker:
            tracker.rewind(0)
            for step in (2, 4, 6):
                tracker.log(train_row(step))
        with build_tracker(config("tensorboard", "tracking.progress=false"), tmp_path, 8) as both:
            both.rewind(4)
            both.log(eval_row(4))
            both.log(train_row(5))
        rows = read_rows(tmp_path / "metrics.jsonl")[0]
        assert [row["step"] for row in rows] == [2, 4, 4, 5]
        assert scalars(tmp_path) == as_scalars(rows)


def test_tensorboard_that_fails_is_one_warning_with_its_reason(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    RunFolder(tmp_path).tensorboard.write_text("somebody else's")
    tracker = TensorBoardTracker(tmp_path)
    tracker.log(train_row(1))
    reason = r"tensorboard: \w+Error: .*; the mirror is incomplete, but metrics.jsonl is complete"
    with pytest.warns(RuntimeWarning, match=reason) as w:
        tracker.close()
    assert len(w) == 1


def test_without_tensorboard_a_run_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    with build_tracker(config("tensorboard", "tracking.progress=false"), tmp_path, 10) as tracker:
        tracker.log(train_row(1))
    assert read_rows(tmp_path / "metrics.jsonl")[0] == [train_row(1)]
    assert capsys.readouterr().err == (
        "warning: metrics are not mirrored to TensorBoard: it is not installed: pip install "
        "tensorboard\n"
    )


# All of them


def test_a_runs_trackers(tmp_path: Path) -> None:
    with build_tracker(config("none", "tracking.progress=false"), tmp_path, 10) as tracker:
        for step in (1, 2, 3):
            tracker.log(train_row(step))
        tracker.rewind(2)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert read_rows(tmp_path / "metrics.jsonl")[0] == [train_row(1), train_row(2)]


def test_trackers_are_closed_when_the_run_fails(tmp_path: Path) -> None:
    jsonl = JsonlTracker(tmp_path / "metrics.jsonl")
    with pytest.raises(KeyError), RunTracker(jsonl):
        raise KeyError
    with pytest.raises(ValueError, match="closed file"):
        jsonl.log(train_row(1))
