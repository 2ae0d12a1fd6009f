"""F8: one rank fails. The others end within seconds, wherever they are. The user sees the first
error and its rank, and no process is left."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from qsr import ConstantRule, CosineSchedule, EveryStepRule, Plan
from qsr.cluster.group import join_process_group
from qsr.cluster.processes import start_ranks
from qsr.errors import RunFailedError
from qsr.sync.topology import Topology
from tests.faults.accidents import Accident
from tests.support import CPU, Setup, build, run_ranks

SCHEDULE = CosineSchedule(0.1, 1e-4, 4, 24)
LOCAL = Plan(SCHEDULE, ConstantRule(5))
GRADIENTS = Plan(SCHEDULE, EveryStepRule("gradients"))


def fail(*_: Any) -> None:
    raise ValueError("an accident")


def session(phase: str, folder: Path) -> None:
    """A run of two ranks in which one fails."""
    monkeypatch = pytest.MonkeyPatch()  # of this process, which ends with the run
    rank = int(os.environ["RANK"])
    if phase == "before the ranks meet" and rank == 1:
        fail()
    net = {
        "forward pass in a round": Accident(1, "train", 7, fail),
        "forward pass, data parallel": Accident(1, "train", 7, fail),
        "evaluation": Accident(1, "eval", 2, fail),
    }.get(phase, Accident(1, "train", 0, fail))
    plan = GRADIENTS if "parallel" in phase else LOCAL
    setup = Setup(plan, net=net, evaluate_every=8, checkpoint_every=8, folder=folder)
    rig = build(setup, Topology(rank, 2, rank, 2))
    if phase == "data loader" and rank == 1:
        batches = rig.trainer._data.batches(rig.workers, 0, 24)
        monkeypatch.setattr(rig.loader, "batches", lambda _: _some(batches, 6))
    if phase == "tracker" and rank == 0:
        monkeypatch.setattr(rig.tracker, "log", fail)
    if phase == "checkpoint" and rank == 1:
        monkeypatch.setattr(rig.trainer.state._checkpointer, "save", fail)
    rig.trainer.train()
    if phase == "after the last step" and rank == 1:
        fail()


def _some(batches: Any, number: int) -> Any:
    for _ in range(number):
        yield next(batches)
    fail()


@pytest.mark.parametrize(
    ("phase", "rank"),
    [
        ("before the ranks meet", 1),
        ("data loader", 1),
        ("forward pass in a round", 1),
        ("forward pass, data parallel", 1),
        ("evaluation", 1),
        ("checkpoint", 1),
        ("tracker", 0),
        ("after the last step", 1),
    ],
)
def test_the_first_error_is_shown_and_everyone_ends(phase: str, rank: int, tmp_path: Path) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    started = time.monotonic()
    with pytest.raises(RunFailedError) as caught:
        start_ranks(session, 2, phase, tmp_path)
    assert time.monotonic() - started < 40  # imports and a slow machine included; no timeout of 60
    first_line, *trace = str(caught.value).splitlines()
    assert first_line == f"rank {rank}: ValueError: an accident"
    assert "in fail" in "\n".join(trace)  # not foreseen: it comes with its traceback
    new = [c for c in psutil.Process().children(recursive=True) if c.pid not in before]
    ranks = [child for child in new if child.children() == [] and _is_a_rank(child)]
    assert ranks == []


def left_by_the_last(rank: int, ranks: int) -> str:
    communicator = join_process_group(Topology(rank, ranks, rank, ranks), CPU, 60.0)
    communicator.barrier()
    if rank == ranks - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    question = communicator.begin_sum([0.0])
    for _ in range(100):
        communicator.sum_(torch.ones(1000))
    question.wait()
    return "no error"


def test_those_that_are_left_name_the_one_that_is_gone() -> None:
    """Rank 1 of four is no neighbour of rank 3: it notices when its own neighbours go."""
    *left, gone = run_ranks(left_by_the_last, 4)
    assert gone == -signal.SIGKILL
    for text in left:
        assert re.fullmatch(
            r"LostRankError: rank 3 is gone: rank \d was waiting for an average when the "
            r"connection closed",
            text,
        ), left


def _is_a_rank(process: psutil.Process) -> bool:
    """Whether a process was forked by the fork server, which stays with its resource tracker."""
    parent = process.parent()
    return parent is not None and parent.pid != os.getpid()
