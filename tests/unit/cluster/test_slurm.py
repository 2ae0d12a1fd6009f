"""What Slurm tells a process, in its short forms, and what follows from it."""

import pytest

from qsr.cluster.place import find_place
from qsr.cluster.slurm import SlurmTask, _counts, _first_host, current_task
from qsr.errors import ClusterError

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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_NODEID": "9"}, "SLURM_NODEID=9 or SLURM_PROCID=5 is out of range for the step's"),
        ({"SLURM_PROCID": "7"}, "SLURM_NODEID=2 or SLURM_PROCID=7 is out of range"),
        ({"SLURM_PROCID": "-1"}, "SLURM_PROCID is '-1', not a number"),
        ({"SLURM_LOCALID": ""}, "SLURM_LOCALID is not set"),
        ({"SLURM_JOB_ID": ""}, "SLURM_STEP_ID is set, but SLURM_JOB_ID is not"),
        ({"SLURM_CPUS_PER_TASK": "8.5"}, "SLURM_CPUS_PER_TASK is '8.5', not a number"),
        ({"SLURM_RESTART_COUNT": "\u0663"}, "SLURM_RESTART_COUNT is '\u0663', not a number"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3"}, "SLURM_STEP_TASKS_PER_NODE is '2(x3', not a list"),
    ],
)
def test_what_makes_no_sense_is_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ClusterError) as refused:
        current_task(STEP | changes)
    assert str(refused.value).startswith(message)
    assert str(refused.value).endswith(": start the program with srun, or unset Slurm's variables")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": "abc", "WORLD_SIZE": "2"}, "RANK is 'abc', not a number"),
        ({"RANK": "", "WORLD_SIZE": ""}, "RANK is not set"),
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK is set, but MASTER_ADDR is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, "MASTER_PORT is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "70000"},
         "MASTER_PORT=70000 is not a port number"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is 0"),
    ],
)  # fmt: skip
def test_what_torchrun_would_not_say_is_named(
    given: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, text in given.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(ClusterError) as refused:
        find_place()
    assert str(refused.value).startswith(message)
    assert str(refused.value).endswith(
        ": start the ranks with torchrun, or unset RANK and WORLD_SIZE"
    )


def test_a_task_of_an_array_is_named_as_such() -> None:
    task = current_task(STEP | {"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "3"})
    assert task is not None
    assert (task.job, task.attempt) == ("4700_3", "4700_3.0.0")


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
