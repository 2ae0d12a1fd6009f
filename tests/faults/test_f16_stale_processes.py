"""F16: processes of an earlier start are still alive, another program has the port, or strangers
connect to it. The ranks of the new start find each other and nobody else."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from qsr.cluster.group import join_process_group
from qsr.cluster.place import find_place
from qsr.cluster.processes import start_ranks
from qsr.cluster.rendezvous import meet
from qsr.cluster.slurm import SlurmTask, current_task
from qsr.errors import ClusterError
from qsr.sync.topology import Topology
from tests.cli import RUN, TORCHRUN, TRAIN, call, folder_in, same_weights, start, wait_for
from tests.support import CPU, free_port, run_ranks

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
    communicator = join_process_group(Topology(rank, ranks, rank, ranks), CPU, timeout_seconds)
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
        "ClusterError: the 2 ranks could not connect to each other: rank 0 was not found on "
        "localhost within 8 s: check its log, and whether a firewall blocks connections between "
        "the nodes"
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


def silent(port: int) -> list[socket.socket]:
    """More than rank 0 keeps at a time."""
    return [socket.create_connection(("localhost", port), 5) for _ in range(300)]


def slow(port: int) -> list[socket.socket]:
    """A byte now and then, so that no single wait is long."""
    connection = socket.create_connection(("localhost", port), 5)

    def drip() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection.sendall(b"x")
                time.sleep(0.5)

    threading.Thread(target=drip, daemon=True).start()
    return [connection]


def garbage(port: int) -> list[socket.socket]:
    """No names, names without an end, and the beginning of one."""
    made = []
    for text in (b"\0\xff\n", b"x" * 100_000, b"GET / HTTP/1.1\r\n\r\n", b"9104.0", b"\n"):
        made.append(socket.create_connection(("localhost", port), 5))
        with contextlib.suppress(OSError):  # it may have been sent away before its end
            made[-1].sendall(text)
    return made


@pytest.mark.parametrize("strangers", [silent, slow, garbage])
def test_strangers_at_the_port_keep_nobody_waiting(
    strangers: Callable[[int], list[socket.socket]],
) -> None:
    """A rank is answered while they are connected, in less time than one of them is given."""
    zero, one = (SlurmTask(job(), 0, "0", rank, 2, rank, 2, "localhost", None) for rank in (0, 1))
    one = replace(one, job=zero.job)
    store = meet(zero, TIMEOUT_SECONDS)
    (port,) = [p for p in map(zero.port, range(8)) if knows(p, zero)][:1]
    held = strangers(port)
    began = time.monotonic()
    meet(one, TIMEOUT_SECONDS).set("from rank 1", "1")
    assert time.monotonic() - began < 2.0
    assert store.get("from rank 1") == b"1"
    if strangers is slow:  # and it is sent away after its seconds, however busy it is
        held[0].settimeout(8.0)
        with contextlib.suppress(ConnectionError):
            assert held[0].recv(1) == b""
    for connection in held:
        connection.close()


def knows(port: int, task: SlurmTask) -> bool:
    """Whether rank 0 of the task is at this port."""
    with contextlib.suppress(OSError), socket.create_connection(("localhost", port), 5) as there:
        there.settimeout(5.0)
        there.sendall(f"{task.attempt}\n".encode())
        return there.makefile("rb").readline().startswith(f"{task.attempt} ".encode())
    return False


@pytest.mark.parametrize("answer", [b"x", b"{attempt} no-port\n", b"{attempt} 99999\n", b""])
def test_what_another_program_answers_is_no_store(answer: bytes) -> None:
    """It stands at the first port, and drips what it has to say; rank 0 is at the second."""
    zero = SlurmTask(job(), 0, "0", 0, 2, 0, 2, "localhost", None)
    text = answer.replace(b"{attempt}", zero.attempt.encode())

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with contextlib.suppress(OSError):
            connection.sendall(text)
            while text == b"x":
                time.sleep(0.5)
                connection.sendall(text)
            connection.close()

    with socket.create_server(("", zero.port(0))) as listener:
        threading.Thread(target=drip, args=(listener,), daemon=True).start()
        store = meet(zero, TIMEOUT_SECONDS)
        began = time.monotonic()
        meet(replace(zero, rank=1), 20.0).set("from rank 1", "1")
        assert time.monotonic() - began < 6.0  # its seconds, and some
    assert store.get("from rank 1") == b"1"


def again_at_the_same_store(rank: int, ranks: int, port: int, restarts: int) -> float:
    """As torchrun's ranks, which it starts anew while its store stays."""
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restarts)
    return meet_and_sum(rank, ranks, 10.0**restarts)


def test_ranks_that_torchrun_starts_again_meet_anew() -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for restarts, sums in ((0, [3.0, 3.0]), (1, [30.0, 30.0]), (2, [300.0, 300.0])):
        assert run_ranks(again_at_the_same_store, 2, store.port, restarts) == sums


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_under_torchrun_goes_on_after_each_killed_rank(
    digits: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    """torchrun --max-restarts with a port of the user's, which it keeps."""
    settings = (*RUN, f"data.root={digits}", f"runs_dir={tmp_path}", "checkpoint.every_steps=10")
    launcher = [*TORCHRUN, "--max-restarts=3", f"--master-port={free_port()}", *TRAIN[1:]]
    process = start([*launcher, *settings])
    for step in ("step_000000010", "step_000000030"):
        wait_for(tmp_path, step, process)
        psutil.Process(process.pid).children()[-1].kill()
    assert process.wait(timeout=300) == 0
    assert same_weights(folder_in(tmp_path), uninterrupted)


@pytest.mark.slow
def test_a_start_under_torchrun_tells_its_own_failure(digits: Path, tmp_path: Path) -> None:
    settings = (*RUN, f"data.root={digits}", f"runs_dir={tmp_path}")
    for ranks, wrong, message in (
        (3, (), "3 ranks were launched, which do not divide workers=2"),
        (2, ("cluster.device=cuda",), "cluster.device=cuda, but torch sees no GPU"),
    ):
        launcher = [*TORCHRUN[:-1], f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]
        done = call([*launcher, *TRAIN[1:], *settings, *wrong])
        assert done.returncode != 0
        said = [line for line in done.stderr.splitlines() if line.startswith(("refused", "failed"))]
        assert said
        assert all(message in line for line in said), said


def test_the_launchers_store_is_for_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsr.cluster.processes.start_processes", _listening)
    with pytest.raises(ZeroDivisionError, match=r"127\.0\.0\.1"):
        start_ranks(job, 2)


def _listening(_function: object, arguments: tuple[Any, ...], **_options: object) -> None:
    """Instead of starting ranks: raise an error that says where the store listens."""
    found = psutil.Process().net_connections("tcp")
    here = [c.laddr.ip for c in found if c.status == "LISTEN" and c.laddr.port == arguments[1]]
    raise ZeroDivisionError(*here)


def test_no_free_port_is_an_error_that_names_them() -> None:
    (text,) = run_ranks(without_a_port, 1, job())
    assert text.startswith("the 2 ranks could not connect to each other: none of the ports ")
    assert "is free on localhost" in text


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
