"""How long training waits for its data: against loaders that sleep and say for how long."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qsr import ConstantRule, ConstantSchedule, Plan
from qsr.sync.topology import Topology
from tests.sleeping import NAP_SECONDS, Sleeper, put_to_sleep
from tests.support import Rig, Setup, build, run_ranks

PLAN = Plan(ConstantSchedule(0.1, 12), ConstantRule(4))


def rows(rig: Rig, kind: str = "train") -> list[dict[str, Any]]:
    return [row for row in rig.tracker.rows if row["kind"] == kind]


def test_the_waiting_is_the_loaders_sleep() -> None:
    rig = build(Setup(PLAN, log_every=3))
    evaluations = Sleeper(rig.evaluator._loader, 0.2)
    rig.evaluator._loader = evaluations
    sleeper = put_to_sleep(rig)
    rig.trainer.train()
    progress = rig.trainer.progress
    assert sleeper.seconds >= 2 * 12 * NAP_SECONDS
    assert evaluations.seconds >= 2.0  # none of it is waited for in training
    slack = 0.5  # for a busy machine, and a quarter of what the evaluations would add
    for seconds in (progress.data_seconds, progress.data_idle_seconds):
        assert sleeper.seconds <= seconds < sleeper.seconds + slack
    assert progress.data_seconds <= progress.train_seconds


def test_rows_have_the_total_and_the_share_since_the_last_row() -> None:
    rig = build(Setup(PLAN, log_every=3))
    put_to_sleep(rig)
    rig.trainer.train()
    before = {"data_seconds": 0.0, "data_idle_seconds": 0.0, "train_seconds": 0.0}
    for row in rows(rig):
        assert row["data_seconds"] - before["data_seconds"] >= 2 * 3 * NAP_SECONDS
        idle = row["data_idle_seconds"] - before["data_idle_seconds"]
        trained = row["train_seconds"] - before["train_seconds"]
        assert row["waiting_percent"] == pytest.approx(100.0 * idle / trained)
        before = row
    assert before["data_seconds"] == rig.trainer.progress.data_seconds


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    setup = Setup(PLAN, log_every=3, folder=tmp_path)
    first = build(replace(setup, stop_after=6))
    sleeper = put_to_sleep(first, 0.1)
    first.trainer.train()
    second = build(setup)  # its loader does not sleep
    assert second.trainer.restore()
    assert second.trainer.progress.data_seconds == first.trainer.progress.data_seconds
    second.trainer.train()
    waited = [row["data_seconds"] for row in rows(second)]
    assert waited == sorted(waited)
    assert waited[0] > sleeper.seconds >= 1.2
    # the share is that of the rows' own steps: the first session waited nearly all the time
    assert rows(first)[-1]["waiting_percent"] > rows(second)[-1]["waiting_percent"]


def wait_on_one_rank(rank: int, ranks: int) -> tuple[float, list[dict[str, Any]]]:
    rig = build(Setup(PLAN, log_every=6), Topology(rank, ranks, rank, ranks))
    sleeper = put_to_sleep(rig, NAP_SECONDS if rank == 1 else 0.0)
    rig.trainer.train()
    return sleeper.seconds, rows(rig)


def test_the_rank_that_waits_longest_counts() -> None:
    """All others wait for it, and rank 0 writes the rows."""
    (short, written), (long, _) = run_ranks(wait_on_one_rank, 2)
    assert short < long <= written[-1]["data_seconds"]
    assert written[-1]["waiting_percent"] > 5.0
