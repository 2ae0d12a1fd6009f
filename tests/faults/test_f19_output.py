"""F19: output never decides. Standard output and standard error may be full, closed, slow or gone,
on any rank at any moment, and wandb may fail: training continues, the record is on disk, and the
exit status is the run's. Scripts that only print end as shell tools do."""

import contextlib
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qsr.config.load import load_config
from qsr.run.folder import Row, read_rows
from qsr.run.mirror import WandbTracker
from qsr.run.tracking import RunTracker, build_tracker
from tests.cli import ENVIRONMENT, ROOT, command, folder_in, same_weights, wait_for

# 300 kB and 40 kB: more than a pipe holds, and than a terminal does
TALKER = """
import contextlib, os
from qsr.output import program, warn

def main(words):
    for number in range(3000):
        print(f"{number:099d}")
        if number % 8 == 0:
            warn(f"{number:099d}")
    with contextlib.suppress(OSError):
        os.write(2, bytes(200_000))  # as a library in another language does
    print("a line that is not flushed", end="")
    with open(words[0], "w") as record:
        record.write("complete")
    return 75

program(main)
"""


@contextlib.contextmanager
def full() -> Iterator[int]:
    """A full disk."""
    number = os.open("/dev/full", os.O_WRONLY)
    yield number
    os.close(number)


@contextlib.contextmanager
def read_by(reader: Callable[[int], None]) -> Iterator[int]:
    """A pipe, at whose other end is this."""
    out, into = os.pipe()
    thread = threading.Thread(target=reader, args=(out,), daemon=True)
    thread.start()
    yield into
    os.close(into)


def gone(out: int) -> None:
    os.close(out)


def gone_later(out: int) -> None:
    os.read(out, 1)  # the first line has come
    os.close(out)


def never_reads(out: int) -> None:
    pass


@contextlib.contextmanager
def without_waiting() -> Iterator[int]:
    """A pipe that another program has made one which does not wait, and that nobody reads."""
    with read_by(never_reads) as into:
        fcntl.fcntl(into, fcntl.F_SETFL, os.O_NONBLOCK)
        yield into


@contextlib.contextmanager
def terminal(hangs_up: bool) -> Iterator[int]:
    master, slave = pty.openpty()
    if hangs_up:
        os.close(master)
    yield slave
    os.close(slave)


OUTPUTS: dict[str, Callable[[], contextlib.AbstractContextManager[int]]] = {
    "full": full,
    "gone": lambda: read_by(gone),
    "gone later": lambda: read_by(gone_later),
    "never read": lambda: read_by(never_reads),
    "never read, does not wait": without_waiting,
    "a terminal that hung up": lambda: terminal(hangs_up=True),
    "a terminal that nobody reads": lambda: terminal(hangs_up=False),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_program_ends_as_if_its_output_were_well(kind: str, tmp_path: Path) -> None:
    record = tmp_path / "record"
    with OUTPUTS[kind]() as output:
        done = subprocess.run(
            [sys.executable, "-c", TALKER, str(record)],
            stdout=output,
            stderr=output,
            env=ENVIRONMENT,
            timeout=60,
            check=False,
        )
    assert done.returncode == 75
    assert record.read_text() == "complete"


def test_nothing_is_lost_for_a_reader_that_is_only_slow() -> None:
    """It pauses at the start and all along, for less than what counts as having stalled."""
    process = subprocess.Popen(
        [sys.executable, "-c", TALKER, os.devnull],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if len(lines) % 600 == 1:
            time.sleep(0.3)
    assert process.wait(30) == 75
    assert lines == [b"%099d\n" % n for n in range(3000)] + [b"a line that is not flushed"]


def test_what_others_say_is_not_written_into_the_files_of_a_run(tmp_path: Path) -> None:
    """A file that is opened gets the number of a standard stream that is closed."""
    program = (
        "import os, sys\n"
        "from qsr.output import program, warn\n"
        "def main(words):\n"
        "    with open(words[0], 'w') as record:\n"
        "        record.write('complete')\n"
        "        record.flush()\n"
        "        os.write(1, b'noise'); os.write(2, b'noise'); warn('noise')\n"
        "    return 3\n"
        "program(main)\n"
    )
    record = tmp_path / "record"
    closed = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh"]
    done = subprocess.run(
        [*closed, sys.executable, "-c", program, str(record)], env=ENVIRONMENT, check=False
    )
    assert done.returncode == 3
    assert record.read_text() == "complete"


def test_a_name_that_the_output_cannot_spell_is_shown_escaped() -> None:
    program = (
        "from qsr.output import program, say\n"
        "program(lambda _: say('gr\\u00fcn \\udce4') or 5)\n"  # \udce4: a byte that is not UTF-8
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (5, rb"gr\xfcn \udce4" + b"\n", b"")


def test_a_silent_rank_is_not_held_up_either() -> None:
    """Another rank has filled the pipe that both share; this one says nothing itself."""
    program = (
        "import os, sys, time\n"
        "from qsr.output import guard\n"
        "guard()\n"
        "time.sleep(5)\n"
        "os.write(2, bytes(200_000))\n"
        "sys.exit(7)\n"
    )
    with read_by(never_reads) as full_pipe:
        os.set_blocking(full_pipe, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(full_pipe, bytes(1000))
        os.set_blocking(full_pipe, True)
        done = subprocess.run(
            [sys.executable, "-c", program], stderr=full_pipe, env=ENVIRONMENT, timeout=60
        )
    assert done.returncode == 7


# Whole runs


@pytest.mark.slow
def test_a_run_of_two_ranks_with_no_output_at_all(
    digits: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    """Standard output is full, standard error a pipe that is full and that nobody reads."""
    arguments = command(digits, tmp_path, "checkpoint.every_steps=10", "tracking.progress=true")
    with full() as output, read_by(never_reads) as errors:
        os.set_blocking(errors, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(errors, bytes(1000))
        os.set_blocking(errors, True)
        done = subprocess.run(
            arguments, stdout=output, stderr=errors, env=ENVIRONMENT, timeout=240, check=False
        )
    assert done.returncode == 0
    _is_whole(folder_in(tmp_path), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gone", "gone later", "a terminal that hung up"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_whose_output_goes_away(
    kind: str, ranks: int, digits: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    one = ("cluster.ranks=1", "cluster.threads_per_rank=1") if ranks == 1 else ()
    arguments = command(digits, tmp_path, "checkpoint.every_steps=10", *one)
    with OUTPUTS[kind]() as output:
        done = subprocess.run(
            arguments, stdout=output, stderr=output, env=ENVIRONMENT, timeout=240, check=False
        )
    assert done.returncode == 0
    if ranks == 2:
        _is_whole(folder_in(tmp_path), uninterrupted)
    assert (folder_in(tmp_path) / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_run_with_closed_streams(
    closed: str, digits: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    arguments = command(digits, tmp_path, "checkpoint.every_steps=10")
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *arguments],
        env=ENVIRONMENT,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0
    _is_whole(folder_in(tmp_path), uninterrupted)


@pytest.mark.slow
def test_a_stopped_run_ends_with_75_though_nobody_can_be_told(digits: Path, tmp_path: Path) -> None:
    with read_by(gone) as output:
        process = subprocess.Popen(
            command(digits, tmp_path, "checkpoint.every_steps=10"),
            stdout=output,
            stderr=output,
            env=ENVIRONMENT,
        )
        wait_for(tmp_path, "step_000000010", process)
        process.terminate()
        assert process.wait(60) == 75


@pytest.mark.parametrize("output", ["gone", "full"])
def test_a_refused_run_ends_with_2(output: str, tmp_path: Path) -> None:
    with OUTPUTS[output]() as errors:
        done = subprocess.run(
            command(tmp_path, tmp_path, "wrong=1"), stderr=errors, env=ENVIRONMENT, check=False
        )
    assert done.returncode == 2


def _is_whole(folder: Path, expected: Path) -> None:
    assert same_weights(folder, expected)
    assert json.loads((folder / "summary.json").read_text())["steps"] == 44
    places = [(row["kind"], row["step"]) for row in read_rows(folder / "metrics.jsonl")[0]]
    assert places == [
        (row["kind"], row["step"]) for row in read_rows(expected / "metrics.jsonl")[0]
    ]


# The trackers, where nobody has replaced the streams: a notebook, a program of one's own


def test_the_bar_does_not_end_a_program_whose_reader_goes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, into = os.pipe()
    os.close(out)
    with contextlib.suppress(BrokenPipeError), os.fdopen(into, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        values = {"epoch": 1.0, "top1": 1.0, "loss": 1.0, "shadow": False}
        row: Row = {"kind": "eval", "step": 1, **values}
        with build_tracker(load_config(["experiment=demo/quadratic"]), tmp_path, 1) as tracker:
            tracker.log(row)
        monkeypatch.undo()
    assert read_rows(tmp_path / "metrics.jsonl")[0] == [row]


def mirrored() -> list[str]:
    return ["experiment=demo/quadratic", "tracking=offline", "tracking.progress=false"]


def test_a_mirror_that_is_gone_is_one_warning(tmp_path: Path) -> None:
    mirror = WandbTracker(load_config(mirrored()), tmp_path, close_seconds=5.0)
    mirror._process.kill()
    for step in range(2000):
        RunTracker(mirror).log({"kind": "train", "step": step, "loss": 1.0})
    with pytest.warns(RuntimeWarning, match=r"wandb: .*metrics.jsonl is complete") as warned:
        mirror.close()
    assert len(warned) == 1


def test_a_mirror_that_cannot_start_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no_python"))
    with build_tracker(load_config(mirrored()), tmp_path, 1) as tracker:
        tracker.log({"kind": "train", "step": 1})
    assert read_rows(tmp_path / "metrics.jsonl")[0] == [{"kind": "train", "step": 1}]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: metrics are not mirrored to wandb: ")
    assert "no_python" in line


@pytest.mark.parametrize("left", ["", "\n"])
def test_a_name_on_wandb_that_a_full_disk_left_empty_is_drawn_anew(
    left: str, tmp_path: Path
) -> None:
    (tmp_path / "wandb_id").write_text(left)
    for _ in range(2):
        mirror = WandbTracker(load_config(mirrored()), tmp_path, close_seconds=0.1)
        mirror._process.kill()
        with pytest.warns(RuntimeWarning):
            mirror.close()
    assert len((tmp_path / "wandb_id").read_text()) == 16


# Scripts that only print

PRINTERS = {
    "plan": ["plan.py", "experiment=demo/quadratic", "seed=1,2,3"],
    "what-if": ["plan.py", "what-if", "--json"],
    "status": ["status.py"],
    "report": ["report.py"],
}


def _printer(name: str, uninterrupted: Path, output: int) -> subprocess.CompletedProcess[str]:
    script, *words = PRINTERS[name]
    folders = [str(uninterrupted)] if name in ("status", "report") else []
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *words, *folders],
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )


@pytest.mark.parametrize("name", PRINTERS)
def test_without_a_reader_they_end_quietly(name: str, uninterrupted: Path) -> None:
    with read_by(gone) as output:
        done = _printer(name, uninterrupted, output)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")  # 141 for a shell


@pytest.mark.parametrize("name", PRINTERS)
def test_on_a_full_disk_they_say_so(name: str, uninterrupted: Path) -> None:
    with full() as output:
        done = _printer(name, uninterrupted, output)
    assert done.returncode == 1
    assert done.stderr == "failed: the output cannot be written: No space left on device\n"
