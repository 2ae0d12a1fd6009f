"""profile.steps: a trace that is read back."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qsr import ConstantRule, ConstantSchedule, Plan
from qsr.sync.communicator import Communicator
from qsr.sync.topology import Topology
from qsr.train.profile import StepProfiler
from tests.support import CPU, Setup, run_ranks, train

SETUP = Setup(Plan(ConstantSchedule(0.1, 12), ConstantRule(4)))


def events(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [event for event in found if event.get("ph") == "X"]


def recorded(path: Path) -> list[str]:
    steps = [event for event in events(path) if event["name"].startswith("step ")]
    return [event["name"] for event in sorted(steps, key=lambda event: event["ts"])]


def test_the_trace_holds_these_steps_and_what_they_did(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    profiled = train(replace(SETUP, folder=tmp_path, profiled=(5, 7)))
    path = tmp_path / "profile" / "rank_000.json.gz"
    assert recorded(path) == ["step 5", "step 6", "step 7"]
    passes = [event for event in events(path) if event["name"] == "aten::linear"]
    assert len(passes) == 3 * 2  # one of each of two workers
    for number in (5, 6, 7):
        (step,) = (event for event in events(path) if event["name"] == f"step {number}")
        inside = [event for event in passes if 0 <= event["ts"] - step["ts"] <= step["dur"]]
        assert len(inside) == 2
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert capfd.readouterr().err.strip() == f"note: profile written to {path}"
    assert torch.equal(profiled.parameters(), train(SETUP).parameters())


def test_without_it_nothing_is_written(tmp_path: Path) -> None:
    train(replace(SETUP, folder=tmp_path))
    assert not (tmp_path / "profile").exists()


def test_a_session_records_the_steps_that_it_takes(tmp_path: Path) -> None:
    train(replace(SETUP, folder=tmp_path, stop_after=6))
    train(replace(SETUP, folder=tmp_path, profiled=(5, 8)))
    assert recorded(tmp_path / "profile" / "rank_000.json.gz") == ["step 7", "step 8"]


def test_what_a_session_recorded_before_it_ended_is_written(tmp_path: Path) -> None:
    profiler = StepProfiler(2, 9, tmp_path, Communicator(Topology(0, 1, 0, 1), CPU, 60.0))
    for number in (1, 2, 3):
        with profiler.step(number):
            torch.ones(3).sum()
    assert not list(tmp_path.iterdir())
    profiler.close()
    profiler.close()
    assert recorded(tmp_path / "rank_000.json.gz") == ["step 2", "step 3"]


def test_a_folder_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "profile").touch()
    train(replace(SETUP, folder=tmp_path, profiled=(1, 2)))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the profile was not written: ")


def _rank(rank: int, ranks: int, folder: Path) -> None:
    train(replace(SETUP, folder=folder, profiled=(1, 2)), Topology(rank, ranks, rank, 2))


def test_every_rank_writes_its_own(tmp_path: Path) -> None:
    assert run_ranks(_rank, 2, tmp_path) == [None, None]
    names = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert names == ["rank_000.json.gz", "rank_001.json.gz"]
    for name in names:
        assert recorded(tmp_path / "profile" / name) == ["step 1", "step 2"]
