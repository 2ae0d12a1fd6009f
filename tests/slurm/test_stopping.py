"""F2 and F25 on a real Slurm: jobs that are told to stop are requeued when all ranks have saved;
jobs that are somebody else's are not."""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.conftest import LONG, ROOT, Jobs, same_weights, steps
from tests.slurm.rig import Rig, wait_until

RANKS = range(4)
SAVE = f"srun --kill-on-bad-exit=1 {sys.executable} -m tests.slurm.saver"
OWN = "export QSR_JOB=$SLURM_JOB_ID; "


class Savers:
    """Jobs of two nodes with two ranks on each that do nothing but save when told to stop."""

    def __init__(self, rig: Rig, folder: Path) -> None:
        self._rig = rig
        self._folder = folder

    def start(self, *options: str, own: bool = True) -> str:
        """The job, when all of its ranks listen to signals. `own`: whether its script says, as
        those of qsr do, that it may be requeued."""
        size = ("--nodes=2", "--ntasks-per-node=2", f"--chdir={ROOT}")
        save = f"{OWN if own else ''}{SAVE} {self._folder}"
        output = f"--output={self._folder}/log.out"
        command = ("sbatch", "--parsable", *size, output, *options, f"--wrap={save}")
        job = self._rig.run(*command).strip()
        wait_until(lambda: len(list(self._folder.glob("ready_*"))) == len(RANKS), 60)
        return job

    def saved(self) -> list[str]:
        """The signals that made ranks save, those of rank 0 first."""
        return [path.read_text() for path in sorted(self._folder.glob("saved_*"))]

    def log(self) -> str:
        return (self._folder / "log.out").read_text()


@pytest.fixture
def savers(rig: Rig, tmp_path: Path) -> Savers:
    return Savers(rig, tmp_path)


PREEMPTIONS = [(False, "SIGTERM"), (True, "SIGUSR2")]
"""By the user's own signal or not, and what the ranks get then."""


def preempt(rig: Rig) -> str:
    """Have a job of higher priority take both nodes."""
    size = ("--nodes=2", "--ntasks-per-node=2", "--output=/dev/null")
    return rig.run("sbatch", "--parsable", "--partition=high", *size, "--wrap=sleep 2").strip()


def mode(rig: Rig, by_user_signal: bool) -> contextlib.AbstractContextManager[None]:
    return rig.preempt_by_user_signal() if by_user_signal else contextlib.nullcontext()


@pytest.mark.slurm
@pytest.mark.parametrize(("by_user_signal", "name"), PREEMPTIONS)
def test_both_ways_of_preemption_end_in_a_requeue(
    rig: Rig, savers: Savers, by_user_signal: bool, name: str
) -> None:
    with mode(rig, by_user_signal):
        job = savers.start("--signal=USR2@60", "--requeue")
        other = preempt(rig)
        rig.wait_for(other, "COMPLETED")
        assert savers.saved() == [name for _ in RANKS]
        rig.wait_for(job, "COMPLETED", "FAILED")
    assert (rig.state(job), rig.restarts(job)) == ("COMPLETED", 1), savers.log()


@pytest.mark.slurm
def test_before_the_time_limit_a_job_is_requeued(rig: Rig, savers: Savers) -> None:
    job = savers.start("--signal=USR2@60", "--requeue", "--time=1")
    rig.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT", seconds=200)
    assert savers.saved() == ["SIGUSR2" for _ in RANKS]
    assert (rig.state(job), rig.restarts(job)) == ("COMPLETED", 1), savers.log()


@pytest.mark.slurm
def test_a_job_that_its_user_cancels_does_not_come_back(rig: Rig, savers: Savers) -> None:
    job = savers.start("--requeue")
    rig.run("scancel", job)
    rig.wait_for(job, "CANCELLED", "COMPLETED", "FAILED")
    assert savers.saved() == ["SIGTERM" for _ in RANKS]
    assert (rig.state(job), rig.restarts(job)) == ("CANCELLED", 0)


@pytest.mark.slurm
def test_without_requeue_the_status_says_that_it_was_stopped(rig: Rig, savers: Savers) -> None:
    job = savers.start("--no-requeue")
    rig.run("scancel", "--signal=USR1", job)
    rig.wait_for(job, "FAILED", "COMPLETED")
    assert (rig.state(job), rig.restarts(job)) == ("FAILED", 0)
    assert f"job {job}: not requeued: Requested operation is presently disabled" in savers.log()
    assert f"exit code {os.EX_TEMPFAIL}" in savers.log()


def test_a_job_that_is_somebody_elses_is_left_alone(rig: Rig, savers: Savers) -> None:
    """A run that its script has started by hand saves, and does nothing to the job."""
    job = savers.start("--requeue", own=False)
    rig.run("scancel", "--signal=USR1", job)
    rig.wait_for(job, "FAILED", "COMPLETED")
    assert savers.saved() == ["SIGUSR1" for _ in RANKS]
    assert (rig.state(job), rig.restarts(job)) == ("FAILED", 0)
    assert f"job {job}: not requeued: it was not submitted by qsr submit" in savers.log()
    assert f"exit code {os.EX_TEMPFAIL}" in savers.log()


@pytest.mark.slurm
def test_a_task_of_an_array_comes_back_alone(rig: Rig, tmp_path: Path) -> None:
    """Each in turn, that with the array's own number too, while another one runs on."""
    size = ("--array=1-2", "--nodes=1", "--ntasks-per-node=2", f"--chdir={ROOT}", "--requeue")
    folder = f"{tmp_path}/$SLURM_ARRAY_TASK_ID"
    save = f"mkdir -p {folder}; {OWN}{SAVE} {folder}"
    output = f"--output={tmp_path}/log.out"
    array = rig.run("sbatch", "--parsable", *size, output, f"--wrap={save}").strip()
    wait_until(lambda: len(list(tmp_path.glob("*/ready_*"))) == 4, 60)
    first, second = f"{array}_1", f"{array}_2"
    rig.run("scancel", "--signal=USR1", first)
    rig.wait_for(first, "COMPLETED", "FAILED")
    assert (rig.state(first), rig.restarts(first)) == ("COMPLETED", 1)
    assert (rig.state(second), rig.restarts(second)) == ("RUNNING", 0)
    rig.run("scancel", "--signal=USR1", second)
    rig.wait_for(second, "COMPLETED", "FAILED")
    assert (rig.state(second), rig.restarts(second)) == ("COMPLETED", 1)
    assert rig.restarts(first) == 1


@pytest.mark.slurm
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("by_user_signal", "name"), PREEMPTIONS)
@pytest.mark.parametrize("way", ["submitit", "sbatch"])
def test_a_preempted_run_loses_no_step(
    rig: Rig, jobs: Jobs, undisturbed: Callable[..., Path], by_user_signal: bool, name: str,
    way: str,
) -> None:  # fmt: skip
    folder = jobs.folder(*LONG)
    with mode(rig, by_user_signal):
        job = jobs.submit(*LONG) if way == "submitit" else jobs.sbatch(*LONG)
        wait_until(lambda: len(steps(folder)) > 1, 120)
        other = preempt(rig)
        rig.wait_for(other, "COMPLETED")
        saved = steps(folder)[-1]
        rig.wait_for(job, "COMPLETED", "FAILED", seconds=240)
    assert (rig.state(job), rig.restarts(job)) == ("COMPLETED", 1), jobs.log(folder)
    assert same_weights(folder, undisturbed(*LONG))
    assert f"stopped after step {saved} by {name}, everything is saved" in jobs.log(folder)


@pytest.mark.slurm
def test_a_job_preempted_while_it_starts_is_requeued(
    rig: Rig, jobs: Jobs, undisturbed: Callable[..., Path]
) -> None:
    job, folder = jobs.submit(*LONG), jobs.folder(*LONG)
    wait_until(lambda: "Loading pickle" in jobs.log(folder), 60)
    rig.wait_for(preempt(rig), "COMPLETED")
    rig.wait_for(job, "COMPLETED", "FAILED", seconds=240)
    assert (rig.state(job), rig.restarts(job)) == ("COMPLETED", 1), jobs.log(folder)
    assert same_weights(folder, undisturbed(*LONG))


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_the_time_limit_of_a_run_loses_no_step(
    rig: Rig, jobs: Jobs, undisturbed: Callable[..., Path]
) -> None:
    """Slurm may send the signal up to a minute early, and its limits are in minutes: the limit is
    moved when there is something to lose."""
    limit = ("cluster.time_limit_minutes=20", "cluster.signal_lead_seconds=60")
    job, folder = jobs.submit(*LONG, *limit), jobs.folder(*LONG)
    wait_until(lambda: len(steps(folder)) > 1, 180)
    rig.run("scontrol", "update", f"JobId={job}", f"TimeLimit={rig.minutes(job) + 1}")
    wait_until(lambda: rig.restarts(job) == 1, 60)
    saved = steps(folder)[-1]
    rig.run("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    rig.wait_for(job, "COMPLETED", "FAILED", seconds=300)
    assert rig.state(job) == "COMPLETED", jobs.log(folder)
    assert f"stopped after step {saved} by SIGUSR2, everything is saved" in jobs.log(folder)
    assert same_weights(folder, undisturbed(*LONG))
