"""F20: signals act as whoever started the run intended. A signal that was ignored at the start
stays ignored on every rank. A signal to the whole process group saves, as one to the command does,
and so do a closed terminal and the first Ctrl-C. No rank outlives its launcher."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from qsr.cluster.processes import socket_folder
from qsr.cluster.signals import StopFlag, handling
from qsr.errors import ClusterError
from tests.cli import ENVIRONMENT, ROOT, call, command, folder_in, same_weights, start, wait_for
from tests.faults.inject import needs_mounts

STOPS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGINT")


def ignoring(*names: str) -> list[str]:
    """What runs a command as nohup and `trap '' NAME` do."""
    traps = "".join(f"trap '' {name.removeprefix('SIG')}; " for name in names)
    return ["sh", "-c", f'{traps}exec "$@"', "sh"]


# In this process


@pytest.mark.parametrize("name", STOPS)
def test_a_signal_that_is_ignored_is_left_alone(name: str) -> None:
    number, flag = signal.Signals[name], StopFlag()
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with flag.listening(STOPS):
            signal.raise_signal(number)
            assert signal.getsignal(number) is signal.SIG_IGN
            assert flag.reason is None
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("name", STOPS)
def test_a_signal_that_has_waited_is_noticed(name: str) -> None:
    """As in a rank that is started while its group is told to end."""
    number, flag = signal.Signals[name], StopFlag()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        signal.raise_signal(number)
        with flag.listening(STOPS):
            assert flag.reason == name
        assert number in signal.pthread_sigmask(signal.SIG_BLOCK, [])  # and waits again
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_the_second_ctrl_c_ends_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    flag = StopFlag()
    with flag.listening(["SIGINT"]):
        signal.raise_signal(signal.SIGINT)
        assert flag.reason == "SIGINT"
        assert "press Ctrl-C again to exit immediately" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_burst_of_signals_neither_hangs_the_launcher_nor_is_lost() -> None:
    """A handler interrupts itself: all that it does must bear that."""
    flag = StopFlag()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    burst = (
        f"import os, signal\nfor n in range(20000):\n"
        f"    os.kill({os.getpid()}, (signal.SIGUSR1, signal.SIGUSR2)[n % 2])\n"
    )
    with receiver, sender, flag.passing_on(["SIGUSR1", "SIGUSR2"], sender):
        sending = subprocess.Popen([sys.executable, "-c", burst])
        while sending.poll() is None:
            time.sleep(0.001)
        assert flag.reason in ("SIGUSR1", "SIGUSR2")
        assert StopFlag(receiver).reason == "a signal to the launcher"
        assert StopFlag(receiver).reason == "a signal to the launcher"  # for the other ranks, too


def test_dispositions_are_given_back() -> None:
    before = {name: signal.getsignal(signal.Signals[name]) for name in STOPS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with handling(STOPS, lambda *_: None):
        pass
    assert {name: signal.getsignal(signal.Signals[name]) for name in STOPS} == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


def test_the_fork_servers_socket_has_a_folder_that_is_short_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tempfile.mkdtemp(dir="/tmp")
    monkeypatch.setattr(tempfile, "tempdir", short)
    assert socket_folder() == short
    long = tmp_path / ("scratch_of_job_" * 6)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert socket_folder() == "/tmp"
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(
        ClusterError, match=r"TMPDIR=.* is too long .*: set TMPDIR to a writable folder with a"
    ):
        socket_folder()


# Whole runs


def _steps(runs: Path) -> list[int]:
    folder = folder_in(runs) / "checkpoints"
    return sorted(int(path.name.removeprefix("step_")) for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    ["train.py", "submit.py"],
)
def test_what_the_program_was_started_to_ignore_disturbs_no_rank(
    script: str, digits: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    """All of them: nohup's, those of a batch script's trap, Ctrl-C in a shell's background."""
    python, _, *settings = command(digits, tmp_path, "checkpoint.every_steps=10")
    process = start([*ignoring(*STOPS), python, str(ROOT / "scripts" / script), *settings])
    wait_for(tmp_path, "step_000000010", process)
    for name in STOPS:
        os.killpg(process.pid, signal.Signals[name])
    assert process.wait(120) == 0
    assert same_weights(folder_in(tmp_path), uninterrupted)


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("SIGTERM", 75),  # timeout, systemctl stop, kill -- -PGID, scancel of a batch step
        pytest.param("SIGHUP", 75, marks=pytest.mark.slow),  # the terminal closes
        pytest.param("SIGUSR1", 75, marks=pytest.mark.slow),
        pytest.param("SIGINT", 130, marks=pytest.mark.slow),  # Ctrl-C in a terminal
    ],
)
def test_a_signal_to_the_whole_group_saves(
    name: str, status: int, digits: Path, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        command(digits, tmp_path, "checkpoint.every_steps=10"),
        env=ENVIRONMENT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(tmp_path, "step_000000010", process)
    os.killpg(process.pid, signal.Signals[name])
    output, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    last = int(output.partition("stopped after step ")[2].split()[0])
    assert 10 <= last < 44
    assert _steps(tmp_path)[-1] == last
    told = "saving and stopping; press Ctrl-C again to exit immediately\n"
    assert errors == (told if name == "SIGINT" else "")


@pytest.mark.parametrize(
    "early",
    [
        pytest.param(0.5, marks=pytest.mark.slow),
        pytest.param(2.0, marks=pytest.mark.slow),
        pytest.param(4.0, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_group_before_the_ranks_are_there(
    early: float, digits: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    arguments = command(digits, tmp_path)
    process = start(arguments)
    time.sleep(early)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) in (75, -signal.SIGTERM)  # of the first moment Python knows nothing
    assert call(arguments).returncode == 0
    assert same_weights(folder_in(tmp_path), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGHUP", 75)])
def test_a_run_of_one_process_saves(name: str, status: int, digits: Path, tmp_path: Path) -> None:
    one = ("cluster.ranks=1", "cluster.threads_per_rank=1", "checkpoint.every_steps=10")
    process = start(command(digits, tmp_path, *one))
    wait_for(tmp_path, "step_000000010", process)
    process.send_signal(signal.Signals[name])
    assert process.wait(60) == status
    assert _steps(tmp_path)[-1] > 10


@pytest.mark.slow
def test_ctrl_c_twice_ends_ranks_that_cannot_save(digits: Path, tmp_path: Path) -> None:
    process = start(command(digits, tmp_path, "checkpoint.every_steps=10"))
    wait_for(tmp_path, "step_000000010", process)
    ranks = _ranks(process.pid)
    ranks[0].suspend()
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(1)
    assert process.wait(30) == 130
    _, left = psutil.wait_procs(ranks, timeout=10)
    assert left == []


# Ranks and nothing else: they wait until a file is there

WAITING = """
import sys, time
from pathlib import Path
from qsr.cluster.processes import start_ranks

def wait(folder):
    import os
    (folder / f"rank_{os.environ['RANK']}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    return "well"

if __name__ == "__main__":
    assert start_ranks(wait, 2, Path(sys.argv[1])) == "well"
"""


def _waiting(folder: Path, *before: str, **variables: str) -> subprocess.Popen[bytes]:
    (folder / "waiting.py").write_text(WAITING)
    process = subprocess.Popen(
        [*before, sys.executable, str(folder / "waiting.py"), str(folder)],
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | variables,
    )
    for rank in (0, 1):
        wait_for(folder, f"rank_{rank}", process)
    return process


def _ranks(launcher: int) -> list[psutil.Process]:
    """The fork server's children."""
    children = psutil.Process(launcher).children()
    (server,) = [child for child in children if "forkserver" in " ".join(child.cmdline())]
    return server.children()


def test_a_stopped_rank_does_not_outlive_its_launcher(tmp_path: Path) -> None:
    process = _waiting(tmp_path)
    children = psutil.Process(process.pid).children(recursive=True)
    ranks = _ranks(process.pid)
    assert len(ranks) == 2
    ranks[0].suspend()
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(children, timeout=10)
    assert left == []


@pytest.mark.slow
def test_a_temporary_folder_may_be_long_and_cleaned_while_ranks_train(tmp_path: Path) -> None:
    folder = tmp_path / ("scratch_of_job_" * 6)
    folder.mkdir()
    process = _waiting(tmp_path, TMPDIR=str(folder))
    for path in folder.rglob("*"):
        path.unlink()
    (tmp_path / "go").touch()
    assert process.wait(30) == 0


@pytest.mark.slow
@needs_mounts
@pytest.mark.parametrize("options", ["ro", "size=64k", "size=64k,mode=000"])
def test_ranks_need_no_shared_memory(options: str, tmp_path: Path) -> None:
    mount = f'mount -t tmpfs -o {options} tmpfs /dev/shm && exec "$@"'
    process = _waiting(tmp_path, "unshare", "-m", "sh", "-c", mount, "sh")
    (tmp_path / "go").touch()
    assert process.wait(30) == 0
