"""F2: a signal asks for the machines back. All ranks save after the same step, whichever rank got
it, and the run resumes as if nothing had happened."""

import os
import re
import signal
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qsr import ConstantRule, CosineSchedule, EveryStepRule, Plan
from qsr.cluster.signals import StopFlag
from qsr.sync.topology import Topology
from tests.cli import ENVIRONMENT, call, command, folder_in, same_weights, wait_for
from tests.faults.accidents import Accident
from tests.support import Setup, build, new_folder, run_ranks

# rounds of 5 of 24 steps; an evaluation every 8
LOCAL = Plan(CosineSchedule(0.1, 1e-4, 4, 24), ConstantRule(5))
GRADIENTS = Plan(CosineSchedule(0.1, 1e-4, 4, 24), EveryStepRule("gradients"))
SETUP = Setup(LOCAL, evaluate_every=8, log_every=4)


def signalling(rank: int, mode: str, at: int, name: str = "SIGTERM") -> Accident:
    return Accident(rank, mode, at, partial(signal.raise_signal, signal.Signals[name]))


def session(rank: int, ranks: int, setup: Setup) -> dict[str, Any]:
    """One session of the run; what a test wants to know of it."""
    flag = StopFlag()
    with flag.listening(["SIGTERM", "SIGUSR1", "SIGUSR2"]):
        rig = build(replace(setup, stop=flag), Topology(rank, ranks, rank, setup.workers))
        rig.trainer.restore()
        first = rig.trainer.progress.step
        rig.trainer.train()
    weights = torch.cat([rig.parameters(i) for i in range(len(rig.workers))]).tolist()
    evaluations = [(row["step"], row["loss"]) for row in rig.tracker.rows if row["kind"] == "eval"]
    return {
        "first": first,
        "last": rig.trainer.progress.step,
        "stopping": rig.trainer.stopping,
        "finished": rig.trainer.finished,
        "weights": weights,
        "evaluations": evaluations,
    }


def run(setup: Setup) -> list[dict[str, Any]]:
    results = run_ranks(session, 2, setup)
    assert all(isinstance(result, dict) for result in results), results
    return results


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, list[dict[str, Any]]]:
    plans = {"local": LOCAL, "gradients": GRADIENTS}
    return {
        name: run(replace(SETUP, plan=plan, net=signalling(0, "train", 0), folder=new_folder()))
        for name, plan in plans.items()
    }


@pytest.mark.parametrize(
    ("plan", "rank", "mode", "at", "name", "stopped_at"),
    [
        # a worker's n-th step; the others learn of it at the next evaluation or round's end
        ("local", 1, "train", 1, "SIGUSR2", 4),  # the first step
        ("local", 1, "train", 7, "SIGUSR1", 8),  # inside a round; an evaluation is due at 8
        ("local", 0, "train", 9, "SIGTERM", 10),  # the last step before an average
        ("gradients", 1, "train", 12, "SIGTERM", 11),  # DDP begins with two passes for nothing
        ("local", 0, "eval", 2, "SIGUSR1", 8),  # in the evaluation after step 8
        ("local", 1, "train", 23, "SIGTERM", 24),  # before the last evaluation
        ("local", 1, "eval", 24, "SIGTERM", 24),  # in the last evaluation
    ],
)
def test_all_ranks_save_after_the_same_step_and_go_on_from_there(
    plan: str,
    rank: int,
    mode: str,
    at: int,
    name: str,
    stopped_at: int,
    undisturbed: dict[str, list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    base = replace(SETUP, plan={"local": LOCAL, "gradients": GRADIENTS}[plan], folder=tmp_path)
    stopped = run(replace(base, net=signalling(rank, mode, at, name)))
    assert [(r["last"], r["stopping"], r["finished"]) for r in stopped] == [
        (stopped_at, True, False)
    ] * 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [
        f"step_{stopped_at:09d}"
    ]
    resumed = run(replace(base, net=signalling(rank, mode, 0)))
    assert [r["first"] for r in resumed] == [stopped_at] * 2  # no step is lost
    for mine, other in zip(resumed, undisturbed[plan], strict=True):
        assert (mine["last"], mine["finished"]) == (24, True)
        assert mine["weights"] == other["weights"]
    # each evaluation once, those that the stop put off too
    done = stopped[0]["evaluations"] + resumed[0]["evaluations"]
    assert done == undisturbed[plan][0]["evaluations"]


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        (1, "SIGTERM"),
        pytest.param(1, "SIGUSR1", marks=pytest.mark.slow),
        pytest.param(2, "SIGTERM", marks=pytest.mark.slow),
        pytest.param(2, "SIGUSR1", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_command_saves_and_the_same_command_goes_on(
    ranks: int, name: str, digits: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    one = ("cluster.ranks=1", "cluster.threads_per_rank=1") if ranks == 1 else ()
    arguments = command(digits, tmp_path, "checkpoint.every_steps=10", *one)
    process = subprocess.Popen(
        arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path, "step_000000010", process)
    process.send_signal(signal.Signals[name])
    output, errors = process.communicate(timeout=60)
    assert process.returncode == os.EX_TEMPFAIL, errors
    assert errors == ""
    stopped = re.search(r"stopped after step (\d+) by (.+), everything is saved; run the", output)
    assert stopped is not None
    assert stopped[2] == (name if ranks == 1 else "a signal to the launcher")
    newest = max(path.name for path in (folder_in(tmp_path) / "checkpoints").iterdir())
    assert newest == f"step_{int(stopped[1]):09d}"
    assert call(arguments).returncode == 0
    if ranks == 2:
        assert same_weights(folder_in(tmp_path), uninterrupted)
