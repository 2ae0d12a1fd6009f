"""What Slurm tells a process, in its short forms, and what follows from it."""

import pytest

from qsr.slurm import SlurmTask, _counts, _first_host, current_task

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[03-05,09]",
}
"""Rank 5 of 7, on the third of four nodes."""


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("8", [8]),
        ("8(x4)", [8, 8, 8, 8]),
        ("2(x3),1", [2, 2, 2, 1]),
        ("1,2(x2),1", [1, 2, 2, 1]),
        ("16(x12)", [16] * 12),
    ],
)
def test_counts_of_tasks(text: str, counts: list[int]) -> None:
    assert _counts(text) == counts


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("node[007-012]", "node007"),
        ("node[3,5-7]", "node3"),
        ("a[1-2],b[5,7]", "a1"),
        ("rack[07-09]node[1,3],x", "rack07node1"),
        ("gpu-[01-08].cluster.example", "gpu-01.cluster.example"),
        ("127.0.0.[1-2]", "127.0.0.1"),
    ],
)
def test_the_first_node_of_a_list(nodelist: str, first: str) -> None:
    assert _first_host(nodelist) == first


def test_a_task_of_a_step() -> None:
    assert current_task(STEP) == SlurmTask(
        job="4711",
        restarts=0,
        step="0",
        rank=5,
        ranks=7,
        local_rank=1,
        local_ranks=2,
        first_node="gpu03",
        cpus=None,
    )
    requeued = current_task(STEP | {"SLURM_RESTART_COUNT": "3", "SLURM_CPUS_PER_TASK": "8"})
    assert requeued is not None
    assert (requeued.restarts, requeued.cpus) == (3, 8)
    assert requeued.attempt == "4711.3.0"


def test_the_last_node_may_have_fewer_tasks() -> None:
    last = current_task(STEP | {"SLURM_NODEID": "3", "SLURM_PROCID": "6", "SLURM_LOCALID": "0"})
    assert last is not None
    assert (last.rank, last.local_ranks) == (6, 1)


def test_what_srun_did_not_start_is_no_task() -> None:
    assert current_task({}) is None
    batch = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "7", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    assert current_task(batch) is None  # the shell of a batch script


def ports(job: str = "4711", restarts: str = "0", step: str = "0") -> list[int]:
    changes = {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": restarts, "SLURM_STEP_ID": step}
    task = current_task(STEP | changes)
    assert task is not None
    return [task.port(number) for number in range(8)]


def test_ports_follow_from_the_attempt() -> None:
    assert ports() == ports()
    others = [ports(), ports(job="4712"), ports(restarts="1"), ports(step="1")]
    assert len({port for some in others for port in some}) == 4 * 8  # these four do not meet
    # not those that need root, nor those that Linux gives to outgoing connections
    many = [port for job in range(1000) for port in ports(job=str(job))]
    assert 15_000 <= min(many) < 15_100
    assert 31_900 < max(many) < 32_000
