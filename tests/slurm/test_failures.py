"""F1, F7 and F8 on a real Slurm: a rank that dies or hangs ends its job soon; a lost node costs a
job nothing but time."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.conftest import LONG, Jobs, ranks, read_json, same_weights, steps
from tests.slurm.rig import NODES, Rig, wait_until

Undisturbed = Callable[..., Path]


def start(rig: Rig, jobs: Jobs, *settings: str) -> tuple[str, Path, list[int]]:
    """A long job that has saved something; its number, its folder, its ranks' processes."""
    job, folder = jobs.submit(*LONG, *settings), jobs.folder(*LONG, *settings)
    wait_until(lambda: len(steps(folder)) > 1, 180)
    processes = ranks(rig, job)
    assert len(processes) == 4
    return job, folder, processes


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_a_killed_rank_ends_the_job_and_the_next_goes_on(
    rig: Rig, jobs: Jobs, undisturbed: Undisturbed
) -> None:
    job, folder, processes = start(rig, jobs)
    os.kill(processes[3], signal.SIGKILL)
    killed = time.monotonic()
    rig.wait_for(job, "FAILED", "COMPLETED", seconds=60)
    assert rig.state(job) == "FAILED"
    assert time.monotonic() - killed < 30
    wait_until(lambda: not rig.processes(job), 30)
    failure = read_json(folder / "failure.json")
    assert re.fullmatch(
        r"LostRankError: rank 3 is gone: rank \d was waiting for an? \w+ when the connection "
        r"closed",
        failure["error"],
    )
    assert re.search(r"(?m)^failed .*rank 3 is gone", jobs.status())
    again = jobs.submit(*LONG)
    rig.wait_for(again, "COMPLETED", "FAILED", seconds=300)
    assert rig.state(again) == "COMPLETED", jobs.log(folder)
    assert same_weights(folder, undisturbed(*LONG))


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_a_hung_rank_ends_the_job_after_the_timeout(rig: Rig, jobs: Jobs) -> None:
    job, folder, processes = start(rig, jobs, "cluster.timeout_seconds=10")
    os.kill(processes[2], signal.SIGSTOP)
    stopped = time.monotonic()
    rig.wait_for(job, "FAILED", "COMPLETED", seconds=90)
    # the timeout, the roll call, SIGTERM, KillWait of 5 s, SIGKILL
    assert 10 <= time.monotonic() - stopped < 45
    assert "rank 2 is not responding" in read_json(folder / "failure.json")["error"]
    wait_until(lambda: not rig.processes(job), 30)


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_a_node_that_is_lost_costs_a_requeue(
    rig: Rig, jobs: Jobs, undisturbed: Undisturbed
) -> None:
    """Slurm hears nothing from a node for SlurmdTimeout and puts its jobs back into the queue."""
    job, folder, processes = start(rig, jobs)
    rig.kill_daemon(NODES[1])
    for process in processes[2:]:  # that node's ranks die with it
        os.kill(process, signal.SIGKILL)
    try:
        wait_until(lambda: rig.restarts(job) == 1 or rig.state(job) == "FAILED", 90)
    finally:
        rig.start_daemon(NODES[1])
        rig.wait_for_nodes()
    if rig.restarts(job) == 0:  # the lost ranks ended it before Slurm missed the node
        job = jobs.submit(*LONG)
    rig.wait_for(job, "COMPLETED", "FAILED", seconds=300)
    assert rig.state(job) == "COMPLETED", jobs.log(folder)
    assert same_weights(folder, undisturbed(*LONG))
