"""Where runs stand: from real run folders, and from what Slurm may say of their jobs."""

import contextlib
import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
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
)
from qsr.ops.status_table import screen, status_table, what_differs
from qsr.report.collect import find_runs
from qsr.run.folder import RunFolder, read_rows
from qsr.run.identity import make_run_folder
from qsr.run.lock import take
from tests.cli import ENVIRONMENT, ROOT, RUN, call, command, folder_in, start, wait_for

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


def test_how_much_of_a_run_was_waiting_for_data_and_skipped(folder: Path) -> None:
    metrics = folder / "metrics.jsonl"
    *before, last = read_rows(metrics)[0][:2]
    for idle, skipped, said in ((6.2, 3, ["31", "%", "3"]), (None, None, ["-", "-"])):
        row = {**last, "train_seconds": 20.0, "data_idle_seconds": idle, "skipped_updates": skipped}
        if idle is None:  # of an earlier version, in fp32
            del row["data_idle_seconds"], row["skipped_updates"]
        metrics.write_text("".join(json.dumps(each) + "\n" for each in (*before, row)))
        status = read_status(folder, NO_JOBS)
        assert status.waiting_percent == (idle and pytest.approx(5.0 * idle))
        assert status.skipped_updates == skipped
        assert status_table([status]).splitlines()[1].split()[4 : 4 + len(said)] == said


def test_of_a_long_run_only_the_end_is_read(folder: Path) -> None:
    """A step takes 2 s in the rows that are read and took 9 s before; the last evaluation was
    20,000 rows ago, 1 MiB from the end at most, or is not looked for."""
    (first, *_) = read_rows(folder / "metrics.jsonl")[0]
    (evaluation,) = (row for row in read_rows(folder / "metrics.jsonl")[0] if row["kind"] == "eval")
    (folder / "data.json").write_text('{"train_images": 2000000}')

    def write(rows: int, evaluated: int) -> None:
        with (folder / "metrics.jsonl").open("w") as file:
            file.write("{damaged\n")
            for step in range(1, rows + 1):
                seconds = 9.0 * rows + 2.0 * (step - rows)
                train = {**first, "step": step, "train_seconds": seconds, "loss": 0.123456789}
                file.write(json.dumps(train) + "\n")
                if step == evaluated:
                    file.write(json.dumps({**evaluation, "step": step, "seconds": 0.0}) + "\n")

    write(20_000, evaluated=19_990)
    status = read_status(folder, NO_JOBS)
    assert (status.step, status.top1) == (20_000, evaluation["top1"])
    assert status.total_steps is not None
    assert status.seconds_left == pytest.approx(2.0 * (status.total_steps - 20_000))
    assert "damaged" not in status.detail  # that line is far away
    write(20_000, evaluated=19_000)  # beyond the first 64 KiB
    assert read_status(folder, NO_JOBS).top1 == evaluation["top1"]
    write(20_000, evaluated=10)
    assert read_status(folder, NO_JOBS).top1 is None


def test_done(digits: Path, runs: Path, folder: Path) -> None:
    build.run(load_config(settings(digits, runs)))
    assert state(folder) == ("done", "")
    status = read_status(folder, NO_JOBS)
    assert (status.step, status.total_steps, status.epoch) == (44, 44, 2.0)
    submitted(digits, runs)
    assert state(folder, None) == ("done", "")  # whatever Slurm says
    (line,) = status_table([status]).splitlines()[1:]
    assert line.split()[:4] == ["done", "44/44", "2.0", str(status.h)]
    assert line.split()[-2:] == ["-", str(folder)]  # no time left


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


SWEEP = Path("runs/demo")
RUNS = [
    RunStatus(
        SWEEP / "quadratic/epochs=9,sync.alpha=0.2/seed_1", "running", "", 93_100, 93_600, 298.4,
        1_024, 80.982, 3_570.0, 31.2, 4,
    ),
    RunStatus(
        SWEEP / "quadratic/epochs=9,sync.alpha=0.4/seed_1", "queued", "job 17: Priority", 0, 300,
        None, None, None, None,
    ),
    RunStatus(SWEEP / "constant/epochs=9/seed_1", "done", "", 300, 300, 15.0, 8, 9.5, None, 0.2),
]  # fmt: skip


def test_the_table() -> None:
    assert status_table(RUNS) == (
        "state    step           epoch  H      waiting  skipped  top-1 %  left        run\n"
        "running  93,100/93,600  298.4  1,024  31 %     4        80.98    1 h 00 min  "
        "runs/demo/quadratic/epochs=9,sync.alpha=0.2/seed_1\n"
        "queued   0/300          -      -      -        -        -        -           "
        "runs/demo/quadratic/epochs=9,sync.alpha=0.4/seed_1  (job 17: Priority)\n"
        "done     300/300        15.0   8      0 %      -        9.50     -           "
        "runs/demo/constant/epochs=9/seed_1"
    )


def test_runs_are_named_by_what_differs() -> None:
    assert what_differs(RUNS) == [
        "quadratic/sync.alpha=0.2", "quadratic/sync.alpha=0.4", "constant",
    ]  # fmt: skip
    assert what_differs(RUNS[:2]) == ["sync.alpha=0.2", "sync.alpha=0.4"]
    seeds = [replace(RUNS[0], folder=Path("/runs/demo") / f"seed_{seed}") for seed in (1, 2)]
    assert what_differs(seeds) == ["seed_1", "seed_2"]
    assert what_differs([*seeds, replace(RUNS[0], folder=Path("runs"))])[0] == "/runs/demo/seed_1"
    assert what_differs(RUNS[:1]) == ["seed_1"]


def test_on_a_narrow_terminal_columns_go_first_and_names_fold_last() -> None:
    assert status_table(RUNS, 200).splitlines()[0].split()[2:4] == ["epoch", "H"]
    assert status_table(RUNS[:2], 90) == (
        "state    step           waiting  skipped  top-1 %  left        run\n"
        "running  93,100/93,600  31 %     4        80.98    1 h 00 min  sync.alpha=0.2\n"
        "queued   0/300          -        -        -        -           sync.alpha=0.4\n"
        "    (job 17: Priority)"
    )
    folded = status_table(RUNS, 80).splitlines()
    assert max(map(len, folded)) <= 80
    assert [line[63:] for line in folded[1:3]] == ["quadratic/sync.al", "pha=0.2"]


@pytest.mark.parametrize("height", [5, 8, 40])
def test_a_screen_shows_those_that_need_attention(height: int) -> None:
    many = [replace(RUNS[2], folder=SWEEP / f"seed_{seed}") for seed in range(1_000)]
    many[500] = replace(many[500], state="running")
    lines = screen(many, 80, height).splitlines()
    assert len(lines) == height
    assert lines[0] == "1 running, 999 done"
    assert lines[-1] == f"and {1_000 - height + 3:,} more"
    assert [line.split()[-1] for line in lines if line.startswith("running")] == ["seed_500"]


# Watching


def metrics_of(folder: Path, step: int) -> None:
    """One more row, of this step."""
    row = read_rows(folder / "metrics.jsonl")[0][0] | {"step": step}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def until(seen: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_watching_on_a_terminal_refreshes_in_place_until_ctrl_c(runs: Path, folder: Path) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 100, 0, 0))
    before = termios.tcgetattr(slave)
    watching = subprocess.Popen(
        [*STATUS, str(runs), "--watch"], stdout=slave, stdin=slave, stderr=slave,
        start_new_session=True, env=ENVIRONMENT | {"TERM": "xterm"},
    )  # fmt: skip
    os.set_blocking(master, False)
    shown = b""

    def is_shown(text: bytes) -> bool:
        nonlocal shown
        with contextlib.suppress(BlockingIOError):
            shown += os.read(master, 65_536)
        return text in shown

    until(lambda: is_shown(b" 22/44 "))
    metrics_of(folder, 30)
    until(lambda: is_shown(b" 30/44 "))
    assert b"\x1b[1A\x1b[2K" in shown.partition(b" 22/44 ")[2]  # over the same lines
    watching.send_signal(signal.SIGINT)
    assert watching.wait(30) == 130
    until(lambda: is_shown(b"\x1b[?25h"))  # the cursor is back
    assert b"Traceback" not in shown
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)


def test_watching_without_a_terminal_prints_changes(
    runs: Path, folder: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with log.open("w") as file:
        watching = subprocess.Popen([*STATUS, "--watch", str(runs)], stdout=file, env=ENVIRONMENT)
    until(lambda: " 22/44 " in log.read_text())
    metrics_of(folder, 30)
    until(lambda: " 30/44 " in log.read_text())
    watching.send_signal(signal.SIGINT)
    assert watching.wait(30) == 130
    header, first, nothing, *_ = lines = log.read_text().splitlines()
    assert (header, nothing) == (lines[3], "")
    assert first.endswith(f"{folder}  (run the same command to resume)")
    assert len(lines) == 6


def test_a_status_needs_no_torch(runs: Path) -> None:
    code = (
        "import sys; from qsr.cli.status import main\n"
        "import rich.live; status = main(sys.argv[1:])\n"
        "sys.exit(f'{status} ' + str({'torch', 'numpy', 'pandas'} & set(sys.modules)))"
    )
    done = call([sys.executable, "-c", code, str(runs)])
    assert done.stderr.splitlines()[-1] == "0 set()"


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


def test_watching_waits_for_the_first_run(tmp_path: Path, folder: Path) -> None:
    runs = tmp_path / "later"
    watching = subprocess.Popen(
        [*STATUS, "--watch", str(runs)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=ENVIRONMENT, text=True,
    )  # fmt: skip
    assert watching.stdout is not None
    assert watching.stderr is not None
    assert watching.stderr.readline() == f"no runs in {runs} yet: waiting for them\n"
    shutil.copytree(folder, runs / "one")
    assert watching.stdout.readline().startswith("state")
    assert str(runs / "one") in watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    assert watching.wait(30) == 130


def test_where_there_are_no_runs(tmp_path: Path) -> None:
    done = call([*STATUS, str(tmp_path), "elsewhere"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "refused: no folder elsewhere\n"
    done = call([*STATUS, str(tmp_path)])
    assert (done.returncode, done.stderr) == (2, f"refused: no runs in {tmp_path}\n")
    done = call([*STATUS, str(tmp_path), "--wach"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "refused: status has no --wach; --help says what it takes\n"
