"""F27: one run of a list fails, or is refused when its turn comes. The others still run, each
failure is listed at the end, and the same command tries only those that are not done."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from qsr.build import Stopped
from qsr.cluster.group import join_process_group, leave_process_group
from qsr.config.load import load_configs, run_folder
from qsr.config.schema import Config
from qsr.errors import ConfigError, LostRankError, RunFailedError
from qsr.run.lock import take
from qsr.session import Failed, execute, raise_failures
from qsr.sync.topology import Topology
from tests.cli import ENVIRONMENT, TORCHRUN, TRAIN, call
from tests.support import CPU, run_ranks

SHORT = (
    *("data=folder", "data.image_size=32", "data.loader=torchvision", "model=small_resnet"),
    *("epochs=2", "global_batch=4", "workers=2", "sync=constant", "sync.h=2"),
    *("schedule.peak_lr=0.1", "schedule.warmup_epochs=0", "data.name=photos"),
    *("evaluation.batchnorm_micro_batches=2", "tracking=none", "tracking.progress=false"),
    "cluster.threads_per_rank=1",
)
"""Four steps on a few photos."""
DIVERGES = "schedule.peak_lr=1e20"


def settings(own_photos: Path, runs: Path, *extra: str) -> list[str]:
    return [*SHORT, f"data.root={own_photos}", f"runs_dir={runs}", *extra]


def runs_of(own_photos: Path, runs: Path, *extra: str) -> list[Config]:
    return load_configs(settings(own_photos, runs, *extra))


def finished(runs: Path) -> list[str]:
    return sorted(path.parent.name for path in runs.rglob("summary.json"))


def test_one_process_goes_on_after_each_kind_of_failure(
    own_photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One diverges, one is in use, one has a checkpoint that is not whole, one is right."""
    rates = "schedule.peak_lr=1e20,0.1,0.2,0.3"
    configs = runs_of(own_photos, tmp_path, rates, "cluster.ranks=1", "checkpoint.every_steps=100")
    used, damaged = run_folder(configs[1]), run_folder(configs[2])
    used.mkdir(parents=True)
    (damaged / "checkpoints" / "step_000000001").mkdir(parents=True)
    lock = take(used)
    diverged, refused, failed, done = execute(configs)
    lock.release()
    assert isinstance(diverged, Failed)
    assert isinstance(refused, Failed)
    assert isinstance(failed, Failed)
    assert isinstance(done, dict)
    assert "TrainingError: the loss is not finite" in diverged.reason
    assert f"{used} is in use by process {os.getpid()}" in refused.reason
    assert "CheckpointError: " in failed.reason
    assert "step_000000001" in failed.reason
    told = capfd.readouterr().err
    assert f"failed: {run_folder(configs[0])}: rank 0: TrainingError" in told
    assert f"refused: {used}: {used} is in use" in told
    with pytest.raises(RunFailedError, match="in use by process"):
        raise_failures([diverged, refused, done])
    # the same list again: what was done is not done anew, what was in use is
    before = (run_folder(configs[3]) / "metrics.jsonl").stat().st_mtime_ns
    outcomes = execute(configs)
    assert [isinstance(outcome, dict) for outcome in outcomes] == [False, True, False, True]
    assert (run_folder(configs[3]) / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_single_run_raises_as_ever(own_photos: Path, tmp_path: Path) -> None:
    configs = runs_of(own_photos, tmp_path, "cluster.ranks=1")
    folder = run_folder(configs[0])
    folder.mkdir(parents=True)
    lock = take(folder)
    with pytest.raises(ConfigError, match="is in use"):
        execute(configs)
    lock.release()


def test_what_is_wrong_before_anything_starts_refuses_the_whole_list(
    own_photos: Path, tmp_path: Path
) -> None:
    sizes = ["model=small_vit", "data.image_size=32,30", "cluster.ranks=1"]
    with pytest.raises(ConfigError, match=r"data\.image_size=30 is not a multiple"):
        execute(runs_of(own_photos, tmp_path, *sizes))
    assert finished(tmp_path) == []


def test_the_command_names_the_failed_run_and_carries_out_the_rest(
    own_photos: Path, tmp_path: Path
) -> None:
    """Two ranks that are started for each run."""
    words = settings(own_photos, tmp_path, f"{DIVERGES},0.2", "cluster.ranks=2")
    done = call([*TRAIN, *words])
    assert done.returncode == 1
    assert done.stdout.startswith("top-1 ")
    *_, head, last = done.stderr.splitlines()
    assert head == "failed: 1 of 2 runs; run the same command to try them again:"
    assert last.startswith(f"  {run_folder(load_configs(words)[0])}: ")
    assert "TrainingError: the loss is not finite" in last
    assert len(finished(tmp_path)) == 1


@pytest.mark.slow
def test_under_torchrun_the_ranks_meet_again_for_the_next_run(
    own_photos: Path, tmp_path: Path
) -> None:
    done = call(
        [*TORCHRUN, *TRAIN[1:], *settings(own_photos, tmp_path, "schedule.peak_lr=1e20,0.2,0.1")]
    )
    assert done.returncode == 1
    assert done.stdout.count("top-1 ") == 2
    assert done.stderr.count("failed: 1 of 3 runs; run the same command to try them again:") == 1
    assert len(finished(tmp_path)) == 2


def abandoned_then_whole(rank: int, ranks: int) -> float:
    """The first group loses a rank in the middle; its process lives and goes on to the next."""
    place = Topology(rank, ranks, rank, ranks)
    first = join_process_group(place, CPU, 60.0, "first")
    first.barrier()
    if rank == 0:
        with pytest.raises(LostRankError, match="rank 1"):
            first.sum_(torch.ones(1000))
    leave_process_group()
    second = join_process_group(place, CPU, 60.0, "second")
    total = float(second.total(torch.tensor([1.0 + rank])))
    leave_process_group()
    return total


def test_ranks_that_have_lost_each_other_form_the_next_group() -> None:
    assert run_ranks(abandoned_then_whole, 2) == [3.0, 3.0]


@contextmanager
def long_list(
    own_photos: Path, runs: Path, *extra: str
) -> Iterator[tuple[subprocess.Popen[str], list[Path]]]:
    """A list that is being carried out, and its folders. It ends with the test, whatever that
    finds."""
    words = settings(own_photos, runs, "epochs=2000", "cluster.ranks=2", *extra)
    with subprocess.Popen(
        [*TRAIN, *words], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process, [run_folder(config) for config in load_configs(words)]
        finally:
            process.kill()


def wait_for_rows(folder: Path, process: subprocess.Popen[Any]) -> None:
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None, "ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_stop_signal_ends_the_list(own_photos: Path, tmp_path: Path) -> None:
    """And what had failed before is named all the same."""
    with long_list(own_photos, tmp_path, f"{DIVERGES},0.2,0.1") as (process, folders):
        wait_for_rows(folders[1], process)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "failed: 1 of 3 runs" in told
    assert not (folders[2] / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_killed_rank_costs_its_run_alone(own_photos: Path, tmp_path: Path) -> None:
    with long_list(own_photos, tmp_path, "seed=1,2", "stop_after_steps=600") as (process, folders):
        wait_for_rows(folders[0], process)
        ranks = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if child.ppid() != process.pid and not child.children()
        ]
        ranks[-1].kill()
        _, told = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "seed_1: rank 1 was killed by SIGKILL" in told
    assert (folders[1] / "checkpoints" / "step_000000600").is_dir()


def test_runs_that_stop_where_they_are_told_to_are_no_failures(
    own_photos: Path, tmp_path: Path
) -> None:
    configs = runs_of(own_photos, tmp_path, "seed=1,2", "cluster.ranks=1", "stop_after_steps=2")
    outcomes = execute(configs)
    assert outcomes == [Stopped(2, "stop_after_steps", by_signal=False)] * 2
