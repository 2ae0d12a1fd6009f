"""F14: two sessions use one run folder. One works; the other is refused and changes nothing."""

import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qsr import build
from qsr.config.load import load_config
from qsr.errors import ConfigError
from qsr.run.lock import check_free, take
from tests.cli import RUN, call, command, folder_in, is_somewhere, same_weights

HOLDER = """
import sys, time
from pathlib import Path
from qsr.run.lock import take
lock = take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_the_second_is_refused_and_told_who_is_first(tmp_path: Path) -> None:
    slurm = os.environ | {"SLURM_JOB_ID": "4711"}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, env=slurm
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        record = (tmp_path / "run.lock").read_bytes()
        for attempt in (take, check_free):
            with pytest.raises(ConfigError) as refused:
                attempt(tmp_path, 0.1)
            message = str(refused.value)
            assert message.startswith(f"{tmp_path} is in use by process {holder.pid} on ")
            assert f"{os.uname().nodename}, Slurm job 4711, since 20" in message
            assert message.endswith(": wait until it ends, or stop it")
        assert (tmp_path / "run.lock").read_bytes() == record
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    check_free(tmp_path)  # the kernel has let go of it
    lock = take(tmp_path)
    assert f'"process": {os.getpid()}' in (tmp_path / "run.lock").read_text()
    lock.release()
    take(tmp_path, 0.0).release()


def test_what_a_session_starts_does_not_keep_its_lock(tmp_path: Path) -> None:
    """A process that outlives it, as wandb's may."""
    lock = take(tmp_path)
    with subprocess.Popen(["sleep", "60"]) as child:
        lock.release()
        take(tmp_path, 0.0).release()
        child.kill()


def test_a_session_that_is_just_ending_is_waited_for(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {holder.pid}"]):
            take(tmp_path, 60.0).release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    take(tmp_path).release()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path} cannot be locked ([Errno {number}]")
    assert line.endswith("make sure no other session uses it")


def take_at_once(folder: Path, start: Any, done: Any, results: Any) -> None:
    """Whoever takes the lock keeps it until the others have given up."""
    start.wait()
    message = None
    try:
        take(folder, 0.1)
    except ConfigError as error:
        message = str(error)
    results.put((os.getpid(), message))
    done.wait()


@pytest.mark.slow
def test_of_sessions_that_start_at_the_same_instant_one_works(tmp_path: Path) -> None:
    """Forked, so that each is there in milliseconds."""
    context = multiprocessing.get_context("fork")
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        start, done, queue = context.Barrier(3), context.Barrier(3), context.SimpleQueue()
        processes = [
            context.Process(target=take_at_once, args=(folder, start, done, queue))
            for _ in range(3)
        ]
        for process in processes:
            process.start()
        results = [queue.get() for _ in processes]
        for process in processes:
            process.join(60)
        (winner,) = [pid for pid, message in results if message is None]
        messages = [message for _, message in results if message is not None]
        assert all(f"is in use by process {winner} on " in message for message in messages)


def work_through(settings: list[str]) -> None:
    build.run(load_config(settings))


def test_a_second_session_is_refused_and_the_first_is_not_disturbed(
    digits: Path, tmp_path: Path
) -> None:
    settings = [
        *(*RUN, f"data.root={digits}", "data.loader=torchvision", "cluster.ranks=1"),
        *("cluster.threads_per_rank=1", "checkpoint.every_steps=5"),
    ]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    build.run(load_config([*settings, f"runs_dir={alone}"]))
    context = multiprocessing.get_context("forkserver")
    config = [*settings, f"runs_dir={shared}"]
    first = context.Process(target=work_through, args=(config,))
    first.start()
    while not is_somewhere(shared, "step_000000005"):
        assert first.is_alive()
        time.sleep(0.001)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGSTOP)  # it would be finished before the second is refused
    for look in (build.prepare, build.run):
        with pytest.raises(ConfigError, match=f" is in use by process {first.pid} on "):
            look(load_config(config))
    os.kill(first.pid, signal.SIGCONT)
    first.join()
    assert first.exitcode == 0
    assert same_weights(folder_in(shared), folder_in(alone))
    assert build.prepare(load_config(config)).summary is not None  # finished, and free


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_of_runs_that_start_at_the_same_instant_one_trains(digits: Path, tmp_path: Path) -> None:
    one_rank = ("cluster.ranks=1", "cluster.threads_per_rank=1")
    assert call(command(digits, tmp_path / "alone", *one_rank)).returncode == 0
    for number in range(20):
        runs = tmp_path / str(number)
        arguments = command(digits, runs, *one_rank)
        both = [
            subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
            for _ in range(2)
        ]
        errors = [process.communicate(timeout=240)[1] for process in both]
        codes = [process.returncode for process in both]
        assert sorted(codes) == [0, 2]
        (line,) = errors[codes.index(2)].splitlines()
        assert f" is in use by process {both[codes.index(0)].pid} on " in line
        rows = (folder_in(runs) / "metrics.jsonl").read_text().splitlines()
        assert len(rows) == 3
        assert same_weights(folder_in(runs), folder_in(tmp_path / "alone"))
        shutil.rmtree(runs)


def test_several_runs_of_one_process_lock_one_after_the_other(digits: Path, tmp_path: Path) -> None:
    settings = [
        *(*RUN, f"data.root={digits}", f"runs_dir={tmp_path}", "data.loader=torchvision"),
        *("cluster.ranks=1", "stop_after_steps=1"),
    ]
    for seed in (1, 2, 1):
        outcome = build.run(load_config([*settings, f"seed={seed}"]))
        assert isinstance(outcome, build.Stopped)
    assert len(list(tmp_path.rglob("run.lock"))) == 2
