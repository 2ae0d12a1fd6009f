"""F3: the disk is full. At the start the run is refused. Later all ranks continue without the
checkpoint, and nothing that was saved is lost."""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from qsr import ConstantRule, ConstantSchedule, EveryStepRule, Plan, build
from qsr.config import schema
from qsr.config.load import load_config, run_folder
from qsr.core.outer import OuterOptions
from qsr.errors import CheckpointError
from qsr.run.durable import partial_name
from qsr.run.folder import Row, read_rows
from qsr.run.tracking import JsonlTracker
from qsr.sync.topology import Topology
from qsr.train.state import checkpoint_bytes
from tests.cli import RUN
from tests.faults.inject import fill, needs_mounts, no_file_above, small_disk_here
from tests.support import (
    NO_EMA,
    Rig,
    Setup,
    adamw,
    constant_sync,
    new_folder,
    run_ranks,
    sgd,
    train,
)
from tests.support import build as build_rig

LOCAL = Plan(ConstantSchedule(0.1, 24), ConstantRule(7))
GRADIENTS = Plan(ConstantSchedule(0.1, 24), EveryStepRule("gradients"))
SETUP = Setup(LOCAL, optimizer=sgd(momentum=0.9), checkpoint_every=5, log_every=1)
CHECKPOINTS = [5, 10, 15, 20, 24]


class LossThatDoes:
    """Cross entropy that first does something in some of a worker's steps."""

    def __init__(self, workers: int, actions: dict[int, Callable[[], Any]]) -> None:
        self._calls, self._workers, self._actions = 0, workers, actions

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        step, worker = divmod(self._calls, self._workers)
        self._calls += 1
        if worker == 0 and step in self._actions:
            self._actions[step]()
        return functional.cross_entropy(model(images), labels)


def rows_of(rig: Rig) -> int:
    return sum(row["kind"] == "train" for row in rig.tracker.rows)


def steps_in(folder: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step_")) for p in (folder / "checkpoints").iterdir())


def train_on_a_full_disk(rank: int, ranks: int, folder: Path, free_again: int | None) -> Any:
    """Full before step 7, and until step `free_again`, or the end."""
    small_disk_here(folder, 300_000)
    seen = []

    def look() -> None:
        seen.append(steps_in(folder))

    def free() -> None:
        (folder / "somebody_elses").unlink()

    actions = {7: lambda: fill(folder), 11: look}
    if free_again is not None:
        actions[free_again] = free
    setup = replace(SETUP, folder=folder, loss=LossThatDoes(2, actions))
    rig = train(setup)
    failure = rig.trainer.checkpoint_failure
    after = steps_in(folder)
    if free_again is None:
        free()
    resumed = train(replace(setup, loss=LossThatDoes(2, {})))
    return (
        seen,
        failure,
        after,
        rows_of(rig),
        rig.parameters().tolist(),
        resumed.parameters().tolist(),
    )


@needs_mounts
@pytest.mark.parametrize(
    ("free_again", "left"), [(12, [20, 24]), (22, [5, 24]), (None, [5])], ids=str
)
def test_a_disk_that_fills_up_costs_no_step(
    free_again: int | None, left: list[int], tmp_path: Path
) -> None:
    ((seen, failure, after, rows, weights, resumed),) = run_ranks(
        train_on_a_full_disk, 1, tmp_path / "disk", free_again
    )
    assert seen == [[5]]  # after the failure at 10: the one before, and no part of this one
    assert after == left
    assert rows == 24
    if free_again is None:
        assert "checkpoint after step 24 could not be written" in failure
        assert "[Errno 28] No space left on device" in failure
    else:
        assert failure is None
    undisturbed = train(replace(SETUP, loss=LossThatDoes(2, {}))).parameters().tolist()
    assert weights == undisturbed
    assert resumed == undisturbed


def train_with_one_rank_full(rank: int, ranks: int, folder: Path) -> Any:
    """No file of rank 1 grows beyond 1,000 bytes from step 7 to step 12."""
    limit = no_file_above(1_000)
    actions = {
        7: limit.__enter__,
        12: lambda: limit.__exit__(None, None, None),
    }
    failures: list[str | None] = []
    actions[11] = lambda: failures.append(rig.trainer.checkpoint_failure)
    loss = LossThatDoes(1, actions if rank == 1 else {11: actions[11]})
    setup = replace(SETUP, folder=folder, loss=loss)
    rig = build_rig(setup, Topology(rank, ranks, rank, 2))
    rig.trainer.restore()
    rig.trainer.train()
    return [*failures, rig.trainer.checkpoint_failure], rig.parameters().tolist()


def test_all_ranks_act_alike_when_one_cannot_write(tmp_path: Path) -> None:
    """Without a mount: a limit on the size of files, which needs no privilege."""
    one, other = run_ranks(train_with_one_rank_full, 2, tmp_path)
    assert one == other
    (failure, at_the_end), weights = one
    assert "after step 10 could not be written" in failure
    assert "(rank 1: [Errno 27] File too large); the newest checkpoint is from step 5" in failure
    assert at_the_end is None
    assert steps_in(tmp_path) == [20, 24]
    assert weights == train(replace(SETUP, loss=LossThatDoes(2, {}))).parameters().tolist()


def a_run(folder: Path, digits: Path, *more: str) -> schema.Config:
    return load_config(
        [
            *(*RUN, f"data.root={digits}", f"runs_dir={folder}", "data.loader=torchvision"),
            *("cluster.ranks=1", "cluster.threads_per_rank=1", *more),
        ]
    )


def start_on_a_small_disk(rank: int, ranks: int, folder: Path, digits: Path, size: int) -> Any:
    small_disk_here(folder, size)
    config = a_run(folder, digits, "stop_after_steps=2")
    try:
        build.run(config)
    except CheckpointError as error:
        return str(error), [path.name for path in folder.rglob("*.partial")]
    return None


@needs_mounts
def test_a_disk_that_is_too_small_is_refused_at_the_start(digits: Path, tmp_path: Path) -> None:
    """What this run needs is known by then: 3 checkpoints and the results."""
    disk = tmp_path / "disk"
    ((message, partial),) = run_ranks(start_on_a_small_disk, 1, disk, digits, 2_500_000)
    folder = run_folder(a_run(disk, digits))
    assert message.startswith(f"{folder}: not enough disk space: 2.")
    assert "(checkpoint.keep=2 plus the one being written) and the results" in message
    assert message.endswith("lower checkpoint.keep, or choose a runs_dir with more space")
    assert message.count("\n") == 0
    assert partial == []
    assert run_ranks(start_on_a_small_disk, 1, disk, digits, 50_000_000) == [None]


def finish_on_a_full_disk(rank: int, ranks: int, folder: Path, digits: Path) -> Any:
    small_disk_here(folder, 20_000_000)
    config = a_run(folder, digits, "checkpoint.every_steps=5", "tracking.log_every_steps=1")
    run, message = run_folder(config), ""

    def fill_after_the_first_checkpoint() -> None:
        while not list(run.glob("checkpoints/step_*[0-9]")):
            time.sleep(0.001)
        # until the room that was taken for the results becomes theirs: what is free in that moment
        # anyone may take
        taken = partial_name(run / "model.safetensors")
        size = taken.stat().st_size
        with contextlib.suppress(FileNotFoundError):
            while taken.stat().st_size == size:
                fill(folder)
                time.sleep(0.001)

    threading.Thread(target=fill_after_the_first_checkpoint, daemon=True).start()
    try:
        build.run(config)
    except CheckpointError as error:
        message = str(error)
    rows = read_rows(run / "metrics.jsonl")[0]
    model = load_file(run / "model.safetensors")
    whole = all(bool(tensor.isfinite().all()) for tensor in model.values())
    summary = json.loads((run / "summary.json").read_text())
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    return message, whole, summary, steps, build.run(config)


@needs_mounts
def test_the_results_have_their_room_from_the_start(digits: Path, tmp_path: Path) -> None:
    """The disk is full from the first checkpoint to the end: model, summary and metrics are
    there, and the session tells what is not."""
    ((message, whole, summary, steps, again),) = run_ranks(
        finish_on_a_full_disk, 1, tmp_path / "disk", digits
    )
    assert "the checkpoint after step 44 could not be written" in message
    assert "training is complete, however, and the results were written" in message
    assert whole
    assert summary["steps"] == 44
    assert steps == list(range(1, 45))
    assert again == summary  # the run is finished


def wide_net() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(108, 2000), nn.BatchNorm1d(2000), nn.Linear(2000, 4)
    )


@pytest.mark.parametrize(
    "optimizer", [sgd(), sgd(momentum=0.9), adamw()], ids=["sgd", "momentum", "adamw"]
)
@pytest.mark.parametrize("plan", [LOCAL, GRADIENTS], ids=["local", "data_parallel"])
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize(
    ("outer", "ema"),
    [
        (OuterOptions(), NO_EMA),
        (OuterOptions(0.7, 0.9), NO_EMA),
        (OuterOptions(), schema.EmaConfig(0.9, 1.0)),
    ],
    ids=["mean", "outer", "ema"],
)
def test_the_estimate_at_the_start_bounds_a_checkpoint(
    plan: Plan,
    optimizer: schema.OptimizerConfig,
    workers: int,
    outer: OuterOptions,
    ema: schema.EmaConfig,
) -> None:
    folder = new_folder()
    setup = Setup(plan, workers, net=wide_net, optimizer=optimizer, stop_after=8, folder=folder)
    setup = replace(setup, outer=outer, ema=ema)
    sync = constant_sync(outer_lr=outer.lr, outer_momentum=outer.momentum)
    estimate = checkpoint_bytes(wide_net(), optimizer, plan, workers, sync, ema)
    train(setup)
    (checkpoint,) = (folder / "checkpoints").iterdir()
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert size <= estimate < 1.01 * size + 4096 * (workers + 2)


def test_rows_wait_until_the_disk_takes_them(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    rows: list[Row] = [{"kind": "train", "step": step} for step in range(1, 7)]
    tracker.log(rows[0])
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with no_file_above(2 * size + 5):  # a row, and then part of one
        tracker.log(rows[1])
        for row in rows[2:5]:
            with pytest.raises(OSError, match="File too large"):
                tracker.log(row)
    tracker.log(rows[5])
    tracker.close()
    assert read_rows(tmp_path / "metrics.jsonl")[0] == rows
