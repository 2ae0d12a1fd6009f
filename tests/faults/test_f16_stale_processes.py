"""F16: processes of an earlier start of a job are still there, or another program has the port. The
ranks of the new start find each other and nobody else."""

import os
import socket
import time
from pathlib import Path

import pytest
import torch

from qsr.distributed import ClusterError, Communicator, Topology
from qsr.place import find_place
from qsr.slurm import SlurmTask, current_task
from tests.support import CPU, run_ranks

TIMEOUT_SECONDS = 8.0


def as_task(rank: int, ranks: int, job: str, restarts: int) -> SlurmTask:
    """Make this process a task of a job that srun has started."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    os.environ |= {
        "SLURM_JOB_ID": job,
        "SLURM_RESTART_COUNT": str(restarts),
        "SLURM_STEP_ID": "0",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(ranks),
        "SLURM_STEP_TASKS_PER_NODE": str(ranks),
        "SLURM_STEP_NODELIST": "localhost",
    }
    task = current_task()
    assert task is not None
    assert find_place().attempt == f"{job}.{restarts}.0"
    return task


def meet_and_sum(
    rank: int, ranks: int, value: float, timeout_seconds: float = TIMEOUT_SECONDS
) -> float:
    """The sum over the ranks of `value` x (rank + 1)."""
    communicator = Communicator(Topology(rank, ranks, rank, ranks), CPU, timeout_seconds)
    return float(communicator.total(torch.tensor([value * (rank + 1)])))


def first_start_and_second(rank: int, ranks: int, job: str, folder: Path) -> float:
    """Ranks 0 and 1 are of the job's first start and wait for ever; 2 and 3 are of the second."""
    second, own = divmod(rank, 2)
    as_task(own, 2, job, second)
    if not second:
        result = meet_and_sum(own, 2, 1.0)
        (folder / f"first_{own}").touch()
        while len(list(folder.glob("second_*"))) < 2:
            time.sleep(0.05)
        return result
    while len(list(folder.glob("first_*"))) < 2:
        time.sleep(0.05)
    result = meet_and_sum(own, 2, 10.0)
    (folder / f"second_{own}").touch()
    return result


def test_ranks_of_an_earlier_start_are_not_met(tmp_path: Path) -> None:
    """1 + 2 for the first start, which lives on at its port; 10 + 20 for the second."""
    assert run_ranks(first_start_and_second, 4, job(), tmp_path) == [3.0, 3.0, 30.0, 30.0]


def late_rank_of_the_first_start(rank: int, ranks: int, job: str) -> float:
    """Rank 2 is rank 1 of the first start, whose rank 0 has died; 0 and 1 are the second start."""
    if rank == 2:
        as_task(1, 2, job, 0)
        return meet_and_sum(1, 2, 100.0)
    as_task(rank, 2, job, 1)
    return meet_and_sum(rank, 2, 10.0)


def test_a_rank_that_was_left_behind_cannot_join() -> None:
    one, other, late = run_ranks(late_rank_of_the_first_start, 3, job())
    assert (one, other) == (30.0, 30.0)
    assert late == (
        "ClusterError: the 2 ranks did not come together: rank 0 was not found on localhost within "
        "8 s: has it failed, or is a firewall between the nodes?"
    )


def beside_other_programs(rank: int, ranks: int, job: str, folder: Path) -> float:
    task = as_task(rank, ranks, job, 0)
    held = []
    if rank == 0:
        for number in range(3):  # programs that say nothing, at the first ports that are tried
            held.append(socket.create_server(("", task.port(number))))
        (folder / "held").touch()
    while not (folder / "held").exists():
        time.sleep(0.05)
    return meet_and_sum(rank, ranks, 1.0, 60.0)  # each of them gets seconds to say something


@pytest.mark.timeout(120)
def test_ports_that_others_hold_are_passed_over(tmp_path: Path) -> None:
    assert run_ranks(beside_other_programs, 2, job(), tmp_path) == [3.0, 3.0]


def test_no_free_port_is_an_error_that_names_them() -> None:
    (text,) = run_ranks(without_a_port, 1, job())
    assert text.startswith("the 2 ranks did not come together: localhost has no free port among")


def without_a_port(rank: int, ranks: int, job: str) -> str:
    task = as_task(0, 2, job, 0)
    held = [socket.create_server(("", task.port(number))) for number in range(8)]
    try:
        meet_and_sum(0, 2, 1.0)
    except ClusterError as error:
        return str(error)
    finally:
        for server in held:
            server.close()
    return "no error"


def job() -> str:
    """The number of a job that no other test at work here has."""
    return f"{os.getpid()}{time.monotonic_ns()}"
