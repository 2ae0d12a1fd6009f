"""Slurm, as a process of a job sees it, and as its command line tells. Standard library only."""

import ctypes
import hashlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qsr.output import warn

STOPPED = 75
"""Exit status of a run that was told to stop and has saved: not done, and nothing is wrong. It is
EX_TEMPFAIL of sysexits.h; where slurm.conf says RequeueExit=75, Slurm requeues such a job."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""What Slurm, or who configures it, may send to ask a job to leave; a terminal, as it closes."""

WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")
"""States of a job that waits for its first start or the next one."""

IN_QUEUE = (
    *WAITING,
    *("CONFIGURING", "RUNNING", "SIGNALING", "SUSPENDED", "STOPPED", "RESIZING", "STAGE_OUT"),
    "COMPLETING",
)
"""States of a job that has not ended for good."""

_FIRST_PORT, _LAST_PORT = 15_000, 31_999
"""Below what Linux gives to outgoing connections (32768 and up)."""


class SlurmError(Exception):
    """One line: what Slurm would not do."""


@dataclass(frozen=True)
class SlurmTask:
    """This process, as a task of a step that srun started."""

    job: str
    restarts: int
    """How often the job was requeued."""
    step: str
    rank: int
    ranks: int
    local_rank: int
    """Number of this rank on its node."""
    local_ranks: int
    """Ranks on this node."""
    first_node: str
    """Where rank 0 is."""
    cpus: int | None
    """CPU cores of each rank, if the job says so."""

    @property
    def attempt(self) -> str:
        """A name that no other job has, nor an earlier start of this one."""
        return f"{self.job}.{self.restarts}.{self.step}"

    def port(self, number: int) -> int:
        """The port at which the ranks of this attempt look for rank 0, or, if another program has
        it, the next one: `number` counts from 0."""
        digest = hashlib.sha256(f"{self.attempt}/{number}".encode()).digest()
        return _FIRST_PORT + int.from_bytes(digest[:8], "big") % (_LAST_PORT - _FIRST_PORT + 1)


def current_task(environment: Mapping[str, str] = os.environ) -> SlurmTask | None:
    """What srun told this process; None if it was not started by srun (the shell of a batch script
    has SLURM_NTASKS and SLURM_PROCID too, but is in no step)."""
    if "SLURM_STEP_ID" not in environment:
        return None
    node = int(environment["SLURM_NODEID"])
    cpus = environment.get("SLURM_CPUS_PER_TASK")
    return SlurmTask(
        job=environment["SLURM_JOB_ID"],
        restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
        step=environment["SLURM_STEP_ID"],
        rank=int(environment["SLURM_PROCID"]),
        ranks=int(environment["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(environment["SLURM_LOCALID"]),
        local_ranks=_counts(environment["SLURM_STEP_TASKS_PER_NODE"])[node],
        first_node=_first_host(environment["SLURM_STEP_NODELIST"]),
        cpus=int(cpus) if cpus else None,
    )


def _counts(text: str) -> list[int]:
    """Slurm's short form of a list: "2(x3),1" is 2, 2, 2, 1."""
    counts = []
    for part in text.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts


def _first_host(nodelist: str) -> str:
    """The first of Slurm's short form of names: of "rack[07-09]node[1,3],x", rack07node1."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodelist).partition(",")[0]


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it is gone, so that nothing goes
    on training that no one watches. Linux; elsewhere nothing happens."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)


def leave_when_signalled() -> None:
    """Leave as a stopped run does, at once, when a signal asks for it, unless this program was
    started to ignore it. For the seconds before the run itself listens to signals: nothing is there
    yet to be saved."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda _number, _frame: os._exit(stopped_status()))


def stopped_status() -> int:
    """What a process exits with after its run was told to stop and all ranks have saved.

    In a job, rank 0 puts it back into the queue first. The others leave with 0, because srun ends
    the rest, rank 0 too, as soon as one leaves with anything else. Call it when all ranks have
    saved; Slurm ends them soon after.
    """
    task = current_task()
    if task is None:
        return STOPPED
    if task.rank > 0:
        return 0
    for number in STOP_SIGNALS:  # the next one must not keep this rank from it
        signal.signal(number, signal.SIG_IGN)
    try:
        requeue(task.job)
        warn(f"job {task.job}: requeued")
    except SlurmError as error:
        warn(f"job {task.job}: not requeued: {error}")
    return STOPPED


def requeue(job: str) -> None:
    """Put a running job back into the queue; Slurm ends its processes.

    Raises SlurmError if the job is not running any more, because a requeue would bring back what a
    user has cancelled; or if Slurm refuses, as it does for a job with --no-requeue.
    """
    state = query([job]).get(job)
    if state is None or state.name not in ("RUNNING", "SIGNALING"):
        now = state.name if state else "gone"
        raise SlurmError(f"it is {now}, and Slurm decides whether it comes back")
    _run("scontrol", "requeue", job)


@dataclass(frozen=True)
class JobState:
    """What squeue knows of a job."""

    name: str
    """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, TIMEOUT and so on."""
    restarts: int
    """How often it was requeued."""
    reason: str
    """Why it is in this state, in Slurm's words."""


def query(jobs: Sequence[str]) -> dict[str, JobState]:
    """The states of those of these jobs that Slurm remembers: the queued and running, and for some
    minutes the ended ones. Needs no accounting. Raises SlurmError if Slurm does not answer."""
    if not jobs:
        return {}
    columns = "JobID:|,State:|,RestartCnt:|,Reason:|"
    listed = ",".join(jobs)
    try:
        text = _run("squeue", "-h", "--states=all", f"--jobs={listed}", f"--Format={columns}")
    except SlurmError as error:
        if "Invalid job id" in str(error):  # it knows none of them
            return {}
        raise
    rows = (line.split("|") for line in text.splitlines())
    return {job: JobState(name, int(restarts), reason) for job, name, restarts, reason, *_ in rows}


def partitions() -> list[str]:
    """The names of the cluster's partitions. Raises SlurmError if Slurm does not answer."""
    return sorted(set(_run("sinfo", "--noheader", "--format=%R").split()))


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not installed here") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} does not answer") from None
    if done.returncode:
        raise SlurmError(" ".join(done.stderr.split()) or f"{command[0]} failed")
    return done.stdout
