"""Where runs stand: from real run folders, and from what Slurm may say of their jobs."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from qsr import build
from qsr.cluster.failures import record_failure
from qsr.cluster.place import find_place
from qsr.cluster.slurm import JobState
from qsr.config.load import load_config, run_folder
from qsr.ops.jobs import write_job
from qsr.ops.status import (
    RunStatus,
    State,
    job_of,
    read_status,
    status_table,
)
from qsr.report.collect import find_runs
from qsr.run.folder import RunFolder, read_rows
from qsr.run.identity import make_run_folder
from qsr.run.lock import take
from tests.cli import ROOT, RUN, call, command, folder_in, start, wait_for

STATUS = [sys.executable, str(ROOT / "scripts" / "status.py")]
NO_JOBS: dict[str, JobState] = {}
OTHER = JobState("PENDING", 5, "somebody else's")


def settings(digits: Path, runs: Path) -> list[str]:
    return [
        *(*RUN, f"data.root={digits}", f"runs_dir={runs}", "data.loader=torchvision"),
        *("cluster.ranks=1", "cluster.threads_per_rank=1", "tracking.log_every_steps=10"),
    ]


@pytest.fixture(scope="module")
def halfway(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of a run that a session left after 22 of its 44 steps."""
    runs = tmp_path_factory.mktemp("halfway")
    build.run(load_config([*settings(digits, runs), "stop_after_steps=22"]))
    return runs


@pytest.fixture
def runs(halfway: Path, tmp_path: Path) -> Path:
    """A copy."""
    return Path(shutil.copytree(halfway, tmp_path / "runs"))


@pytest.fixture
def folder(runs: Path) -> Path:
    return folder_in(runs)


def submitted(
    digits: Path, runs: Path, steps: int | None = 44, log: Path = Path("/logs/17.out")
) -> None:
    """Write what scripts/submit.py leaves of job 17."""
    config = load_config(settings(digits, runs))
    make_run_folder(RunFolder(run_folder(config)))
    write_job(config, "17", "demo", runs / ".snapshots" / "0123", steps, str(log))


def state(folder: Path, jobs: Mapping[str, JobState] | None = NO_JOBS) -> tuple[State, str]:
    status = read_status(folder, jobs)
    return status.state, status.detail


def test_how_far_a_run_is(folder: Path) -> None:
    status = read_status(folder, NO_JOBS)
    rows = read_rows(folder / "metrics.jsonl")[0]
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("train", 10), ("train", 20), ("eval", 22),
    ]  # fmt: skip
    assert (status.folder, status.step, status.total_steps) == (folder, 22, 44)
    assert (status.epoch, status.h, status.top1) == (1.0, rows[1]["h"], rows[2]["top1"])
    # 22 more steps at the speed of the first 20; the evaluation came after them
    assert rows[1]["train_seconds"] > 0
    assert status.seconds_left == pytest.approx(rows[1]["train_seconds"] / 20 * 22)


def test_evaluations_take_time_too(folder: Path) -> None:
    metrics = folder / "metrics.jsonl"
    one, two, evaluation = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(one + evaluation.replace('"step": 22', '"step": 15') + two)
    rows = read_rows(metrics)[0]
    spent = rows[2]["train_seconds"] + rows[1]["seconds"]
    status = read_status(folder, NO_JOBS)
    assert status.seconds_left == pytest.approx(spent / 20 * (44 - status.step))


def test_how_much_of_a_run_was_waiting_for_data(folder: Path) -> None:
    metrics = folder / "metrics.jsonl"
    *before, last = read_rows(metrics)[0][:2]
    for idle, said in ((6.2, "; waiting for data 31 %"), (1.0, ""), (None, "")):
        row = {**last, "train_seconds": 20.0, "data_idle_seconds": idle}
        if idle is None:  # of an earlier version
            del row["data_idle_seconds"]
        metrics.write_text("".join(json.dumps(each) + "\n" for each in (*before, row)))
        status = read_status(folder, NO_JOBS)
        assert status.waiting_percent == pytest.approx(5.0 * (idle or 0.0))
        line = status_table([status]).splitlines()[1]
        assert line.endswith(f"  (run the same command to resume{said})")


def test_done(digits: Path, runs: Path, folder: Path) -> None:
    build.run(load_config(settings(digits, runs)))
    assert state(folder) == ("done", "")
    status = read_status(folder, NO_JOBS)
    assert (status.step, status.total_steps, status.epoch) == (44, 44, 2.0)
    submitted(digits, runs)
    assert state(folder, None) == ("done", "")  # whatever Slurm says
    (line,) = status_table([status]).splitlines()[1:]
    assert line.split()[:4] == ["done", "44/44", "2.0", str(status.h)]
    assert line.split()[5:7] == ["-", str(folder)]  # no time left


def test_stopped(folder: Path) -> None:
    assert state(folder) == ("stopped", "run the same command to resume")
    assert state(folder, None) == (
        "stopped",
        "run the same command to resume",
    )  # it was never a job


def test_running(folder: Path) -> None:
    lock = take(folder)
    assert state(folder) == ("running", "")
    lock.release()
    assert state(folder) == ("stopped", "run the same command to resume")


def test_failed_with_the_first_error(digits: Path, runs: Path, folder: Path) -> None:
    error = ValueError("the image is bad\nand more")
    record_failure(folder / "failure.json", replace(find_place(), rank=3), error)
    assert state(folder) == ("failed", "rank 3: ValueError: the image is bad")
    lock = take(folder)  # another try
    assert state(folder) == ("running", "")
    lock.release()
    submitted(digits, runs)
    waiting = {"17": JobState("PENDING", 0, "Priority")}
    assert state(folder, waiting) == ("queued", "job 17: Priority")
    ended = {"17": JobState("FAILED", 0, "NonZeroExitCode")}
    assert state(folder, ended) == ("failed", "rank 3: ValueError: the image is bad")


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        (JobState("PENDING", 0, "Resources"), ("queued", "job 17: Resources")),
        (JobState("PENDING", 2, "BeginTime"), ("preempted", "job 17: BeginTime")),
        (JobState("REQUEUE_HOLD", 1, "launch failed"), ("preempted", "job 17: launch failed")),
        (JobState("CONFIGURING", 0, "None"), ("running", "job 17")),
        (JobState("RUNNING", 0, "None"), ("running", "job 17")),  # no rank has come to the lock
        (JobState("SIGNALING", 0, "None"), ("running", "job 17")),
        (JobState("COMPLETING", 0, "None"), ("running", "job 17")),
        (JobState("CANCELLED", 0, "None"), ("stopped", "job 17: CANCELLED; run the same command "
         "to resume")),
        (JobState("COMPLETED", 0, "None"), ("stopped", "job 17: COMPLETED; run the same command "
         "to resume")),  # stop_after_steps
        (JobState("OUT_OF_MEMORY", 0, "OutOfMemory"), ("failed", "job 17: OUT_OF_MEMORY, see "
         "/logs/17.out")),
    ],
)  # fmt: skip
def test_what_slurm_says_of_the_job(
    job: JobState, expected: tuple[State, str], digits: Path, runs: Path, folder: Path
) -> None:
    submitted(digits, runs)
    assert state(folder, {"18": OTHER, "17": job}) == expected


def test_a_job_that_slurm_has_forgotten(digits: Path, runs: Path, folder: Path) -> None:
    """Its log tells whether it ever started: one that is cancelled before is forgotten at once."""
    log = runs / "17.out"
    submitted(digits, runs, log=log)
    gone = "job 17: gone before it started; run the same command to resume"
    assert state(folder, {"18": OTHER}) == ("stopped", gone)
    log.touch()
    assert state(folder, {"18": OTHER}) == (
        "failed", f"job 17: ended for an unknown reason, see {log}"
    )  # fmt: skip


def test_unknown_while_slurm_does_not_answer(digits: Path, runs: Path, folder: Path) -> None:
    submitted(digits, runs)
    assert state(folder, None) == ("unknown", "job 17")
    lock = take(folder)
    assert state(folder, None) == ("running", "")  # that much can be seen
    lock.release()


def test_a_run_whose_job_has_not_begun(digits: Path, tmp_path: Path) -> None:
    """There is no more than job.json."""
    submitted(digits, tmp_path)
    (folder,) = find_runs([tmp_path])
    assert job_of(folder) == "17"
    status = read_status(folder, {"17": JobState("PENDING", 0, "Priority")})
    nothing = (None, None, None, None)
    assert (status.state, status.step, status.total_steps) == ("queued", 0, 44)
    assert (status.epoch, status.h, status.top1, status.seconds_left) == nothing
    submitted(digits, tmp_path, steps=None)  # its data were not where it was submitted
    assert read_status(folder, NO_JOBS).total_steps is None


def test_runs_are_found_below_and_at_paths(runs: Path, folder: Path) -> None:
    copy = runs / ".snapshots" / "0123" / "config.yaml"
    copy.parent.mkdir(parents=True)
    copy.touch()
    assert find_runs([runs]) == find_runs([folder]) == find_runs([runs, folder]) == [folder]
    assert find_runs([runs / "nothing"]) == []


@pytest.mark.parametrize("text", ["", "workers: [", "epochs: 2", "[1, 2]", "\0"])
def test_a_damaged_folder_does_not_hide_the_others(text: str, runs: Path, folder: Path) -> None:
    (folder / "config.yaml").write_text(text)
    (folder / "metrics.jsonl").open("a").write('{"kind": "train", "st')  # it is being written
    status = read_status(folder, NO_JOBS)
    assert (status.state, status.step, status.total_steps) == ("stopped", 22, None)
    assert status_table([status]).splitlines()[1].startswith("stopped  22/?  1.0")


def test_the_table() -> None:
    runs = [
        RunStatus(
            Path("runs/a/seed_1"), "running", "", 93_100, 93_600, 298.4, 1_024, 80.982, 3_570.0
        ),
        RunStatus(
            Path("runs/a/seed_2"), "queued", "job 17: Priority", 0, 300, None, None, None, None
        ),
        RunStatus(Path("runs/b/seed_1"), "done", "", 300, 300, 15.0, 8, 9.5, 12.0),
        RunStatus(Path("runs/b/seed_2"), "unknown", "job 18", 7, None, 0.3, 4, None, 36_000.0),
    ]
    assert status_table(runs) == (
        "state    step           epoch  H      top-1 %  left         run\n"
        "running  93,100/93,600  298.4  1,024  80.98    1 h 00 min   runs/a/seed_1\n"
        "queued   0/300          -      -      -        -            runs/a/seed_2  (job 17: "
        "Priority)\n"
        "done     300/300        15.0   8      9.50     -            runs/b/seed_1\n"
        "unknown  7/?            0.3    4      -        10 h 00 min  runs/b/seed_2  (job 18)"
    )


def test_a_real_run_while_it_runs_and_after_it_was_killed(digits: Path, tmp_path: Path) -> None:
    run = start(command(digits, tmp_path, "epochs=50", "checkpoint.every_steps=5"))
    try:
        wait_for(tmp_path, "step_000000005", run)
        seen = call([*STATUS, str(tmp_path)])
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    assert (seen.returncode, seen.stderr) == (0, "")
    assert seen.stdout.splitlines()[1].startswith("running  ")
    killed = call([*STATUS, str(tmp_path)])
    assert killed.stdout.splitlines()[1].startswith("stopped  ")
    assert "/1,100 " in killed.stdout


def test_where_there_are_no_runs(tmp_path: Path) -> None:
    done = call([*STATUS, str(tmp_path), "elsewhere"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"refused: no runs in {tmp_path}, elsewhere\n"
