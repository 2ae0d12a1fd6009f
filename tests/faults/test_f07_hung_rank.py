"""F7: a rank hangs. After cluster.timeout_seconds the others stop and say which rank it is and what
they waited for. Its process is killed too, and the run resumes from the newest checkpoint."""

import re
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from qsr import ConstantRule, CosineSchedule, EveryStepRule, Plan
from qsr.cluster.group import join_process_group
from qsr.cluster.processes import GRACE_SECONDS
from qsr.sync.communicator import Communicator
from qsr.sync.topology import Topology
from tests.cli import call, command, folder_in, same_weights, start, wait_for
from tests.faults.accidents import Accident
from tests.support import CPU, Setup, build, new_folder, run_ranks

TIMEOUT_SECONDS = 1.0
HANG_SECONDS = 4.5
"""Longer than the timeout and the roll call."""

SCHEDULE = CosineSchedule(0.1, 1e-4, 4, 24)
PLANS = {
    "local": Plan(SCHEDULE, ConstantRule(5)),
    "gradients": Plan(SCHEDULE, EveryStepRule("gradients")),
}

COLLECTIVES: dict[str, Callable[[Communicator], object]] = {
    "an average": lambda c: c.sum_(torch.ones(5)),
    "a sum": lambda c: c.total(torch.ones(5)),
    "a comparison": lambda c: c.gather_texts("some text"),
    "an agreement": lambda c: c.begin_sum([0.0]).wait(),
}


def in_a_collective(rank: int, ranks: int, name: str) -> str:
    communicator = join_process_group(Topology(rank, ranks, rank, ranks), CPU, TIMEOUT_SECONDS)
    communicator.barrier()
    if rank == 1:
        time.sleep(HANG_SECONDS)
    else:
        COLLECTIVES[name](communicator)
    return "no error"


@pytest.mark.parametrize("name", COLLECTIVES)
def test_every_collective_names_the_rank_that_is_missing(name: str) -> None:
    assert run_ranks(in_a_collective, 3, name) == [
        "LostRankError: rank 1 is not responding: rank 0 was waiting for "
        f"{name} for 1 s; if it is only slow, raise cluster.timeout_seconds",
        "no error",
        "LostRankError: rank 1 is not responding: rank 2 was waiting for "
        f"{name} for 1 s; if it is only slow, raise cluster.timeout_seconds",
    ]


def training(rank: int, ranks: int, plan: str, mode: str, at: int, folder: Path) -> str:
    net = Accident(1, mode, at, partial(time.sleep, HANG_SECONDS))
    setup = Setup(PLANS[plan], net=net, evaluate_every=8, folder=folder)
    setup.timeout_seconds = TIMEOUT_SECONDS
    build(setup, Topology(rank, ranks, rank, 2)).trainer.train()
    return "no error"


@pytest.mark.parametrize(
    ("plan", "mode", "at", "collective"),
    [
        ("local", "train", 7, "an agreement"),  # inside a round: whether to stop
        ("gradients", "train", 9, "an average"),  # DDP's, in the backward pass
        ("local", "eval", 1, "a sum"),  # of the evaluation's counts
    ],
)
def test_wherever_a_rank_hangs_the_other_ends(
    plan: str, mode: str, at: int, collective: str
) -> None:
    first, _ = run_ranks(training, 2, plan, mode, at, new_folder())
    assert first.startswith("LostRankError: rank 1 is not responding: rank 0 was waiting"), first
    assert f"for {collective} for 1 s" in first


@pytest.mark.slow
def test_a_stopped_process_ends_the_run_and_is_killed(
    digits: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    arguments = command(digits, tmp_path, "checkpoint.every_steps=5")
    timeout = 5
    process = start([*arguments, f"cluster.timeout_seconds={timeout}"], subprocess.PIPE)
    wait_for(tmp_path, "step_000000010", process)
    everyone = psutil.Process(process.pid).children(recursive=True)
    hung = ranks_of(process.pid)[1]
    hung.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    # the timeout, the roll call, twice the grace until SIGKILL, and a slow machine
    assert timeout <= time.monotonic() - stopped < timeout + 2 + 2 * GRACE_SECONDS + 8
    assert re.fullmatch(
        rb"failed: rank 0: LostRankError: rank 1 is not responding: rank 0 was waiting for "
        rb"a\w* \w+ for 5 s; if it is only slow, raise cluster.timeout_seconds\n",
        errors,
    ), errors
    _, alive = psutil.wait_procs(everyone, timeout=5)
    assert alive == []
    again = call(arguments)
    assert again.returncode == 0, again.stderr
    assert same_weights(folder_in(tmp_path), uninterrupted)


def ranks_of(launcher: int) -> list[psutil.Process]:
    """The processes of a run's ranks: the fork server's children, in the order of their start."""
    servers = psutil.Process(launcher).children()
    (ranks,) = filter(None, (server.children() for server in servers))
    return sorted(ranks, key=lambda rank: rank.pid)
