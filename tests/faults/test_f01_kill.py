"""F1: the run is killed at any moment, even while it writes a checkpoint. It resumes and ends with
the same bits."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import psutil
import pytest

from qsr.run.durable import replace_file, reserve
from qsr.run.folder import read_rows
from tests.cli import call, command, folder_in, same_weights, start, wait_for
from tests.faults.inject import Lost, crash_everywhere
from tests.faults.small import checkpointer, flip_byte, holds, save, steps_in

LOST = get_args(Lost)
QUICK = (((), LOST[2]), ((5, 10, 12), LOST[1]))
CRASHES = [
    pytest.param(before, lost, marks=() if (before, lost) in QUICK else pytest.mark.slow)
    for before in ((), (5, 10), (5, 10, 12))
    for lost in LOST
]


@pytest.fixture
def quick_disk() -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of crashes need no real disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.mark.parametrize(("before", "lost"), CRASHES)
def test_a_crash_at_any_system_call_leaves_the_old_checkpoint_or_the_new_one(
    quick_disk: Path, before: tuple[int, ...], lost: Lost
) -> None:
    """(5, 10, 12): the newest is damaged, the session has resumed from 10 and saves 12 anew."""
    folder = quick_disk / "checkpoints"
    new = 12
    for step in before:
        save(checkpointer(folder, keep=3), step)
    if new in before:
        flip_byte(folder / "step_000000012" / "worker_001.safetensors", -1)
    kept = quick_disk / "kept"
    if before:
        shutil.copytree(folder, kept)

    def save_one_more() -> None:
        session = checkpointer(folder)
        session.latest()
        save(session, new)

    crashes, found = 0, set()
    for ended in crash_everywhere(save_one_more, folder.parent, lost):
        crashes += 1
        for path in folder.glob("step_*[0-9]"):  # a folder of this name is whole
            step = int(path.name.removeprefix("step_"))
            assert holds(checkpointer(folder), step) or step == new in before
        session = checkpointer(folder)
        newest = session.latest()
        found.add(newest)
        assert newest == new or not ended
        assert newest is None or holds(session, newest)
        save(session, 20)  # and what is left is in nobody's way
        assert checkpointer(folder).latest() == 20
        assert steps_in(folder)[-1] == 20
        shutil.rmtree(folder)
        if before:
            shutil.copytree(kept, folder)
    assert crashes > 20
    assert found == {max((step for step in before if step < new), default=None), new}


@pytest.mark.parametrize("lost", LOST)
def test_a_crash_leaves_the_old_file_or_the_new_one(tmp_path: Path, lost: Lost) -> None:
    path = tmp_path / "records" / "summary.json"
    path.parent.mkdir()
    path.write_bytes(b"the old text")
    found = set()

    def write_anew() -> None:
        reserve(path, len(b"the new text") + 100)
        replace_file(path, [b"the new ", b"text"])

    for ended in crash_everywhere(write_anew, tmp_path, lost):
        found.add(path.read_bytes())
        assert path.read_bytes() == b"the new text" or not ended
        path.write_bytes(b"the old text")
    assert found == {b"the old text", b"the new text"}


def test_kill_9_and_the_same_command_again_give_the_same_bits(
    digits: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    """Two processes, killed after a checkpoint in the middle of a round."""
    arguments = command(digits, tmp_path, "checkpoint.every_steps=10")
    process = start(arguments)
    wait_for(tmp_path, "step_000000010", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    folder = folder_in(tmp_path)
    assert not (folder / "summary.json").exists()
    first = folder / "checkpoints" / "step_000000010" / "state.json"
    state = json.loads(first.read_text())
    step, round_ = state["progress"]["step"], state["round"]
    assert step == 10
    assert round_["start"] < step < round_["start"] + round_["length"]
    resumed = call(arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert same_weights(folder, uninterrupted)
    for name in ("worker_000.safetensors", "worker_001.safetensors", "shared.safetensors"):
        last = Path("checkpoints", "step_000000044", name)
        assert (folder / last).read_bytes() == (uninterrupted / last).read_bytes()
    rows = read_rows(folder / "metrics.jsonl")[0]
    assert [row["step"] for row in rows] == [22, 44, 44]
    assert rows[1]["loss"] == pytest.approx(
        read_rows(uninterrupted / "metrics.jsonl")[0][1]["loss"]
    )
    # and once more: it is finished, and says so without training
    again = call(arguments)
    assert again.stdout == resumed.stdout


def test_ranks_do_not_outlive_the_command_that_started_them(digits: Path, tmp_path: Path) -> None:
    process = start(command(digits, tmp_path, "checkpoint.every_steps=5"))
    wait_for(tmp_path, "step_000000005", process)
    everyone = psutil.Process(process.pid).children(recursive=True)
    assert len(everyone) >= 2
    process.kill()  # it alone
    process.wait()
    _, alive = psutil.wait_procs(everyone, timeout=20)
    assert alive == []


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_kills_at_random_moments_leave_the_same_bits(
    digits: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    """Whenever it is killed, while it writes a checkpoint too, the run comes to the same end."""
    moments = random.Random(0)
    kills, runs = 0, 0
    while kills < 100:
        runs += 1
        folder = tmp_path / f"run_{runs}"
        # a session of its own in the middle of the start, of training, of a checkpoint, of the end
        arguments = command(digits, folder, "checkpoint.every_steps=2")
        finished = False
        while not finished:
            process = start(arguments)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moments.uniform(2, 15) if kills < 100 else None)
            finished = process.poll() is not None
            if finished:
                assert process.returncode == 0
            else:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
        assert same_weights(folder_in(folder), uninterrupted)
        shutil.rmtree(folder)
