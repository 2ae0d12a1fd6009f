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

from qsr.errors import ClusterError, SlurmError
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


OWN_JOB = "QSR_JOB"
"""The variable in which a batch script of this project hands down the number of its job: the record
that the job is there for the run alone, and may be requeued with it."""


@dataclass(frozen=True)
class SlurmTask:
    """This process, as a task of a step that srun started."""

    job: str
    """As Slurm's commands name it."""
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
    has SLURM_NTASKS and SLURM_PROCID too, but is in no step). Raises ClusterError if that makes no
    sense."""
    if "SLURM_STEP_ID" not in environment:
        return None

    def text(name: str) -> str:
        if not environment.get(name):
            raise ClusterError(f"SLURM_STEP_ID is set, but {name} is not: {_MEND}")
        return environment[name]

    def number(name: str, default: int | None = None) -> int:
        return whole_number(environment, name, default, mend=_MEND)

    each = _counts(text("SLURM_STEP_TASKS_PER_NODE"))
    node, rank, ranks = (number(f"SLURM_{n}") for n in ("NODEID", "PROCID", "STEP_NUM_TASKS"))
    if not (node < len(each) and rank < ranks):
        raise ClusterError(
            f"SLURM_NODEID={node} and SLURM_PROCID={rank} lie outside of the step's {len(each)} "
            f"nodes and {ranks} tasks: {_MEND}"
        )
    cpus = number("SLURM_CPUS_PER_TASK", 0)
    text("SLURM_JOB_ID")
    return SlurmTask(
        job=own_job(environment),
        restarts=number("SLURM_RESTART_COUNT", 0),
        step=text("SLURM_STEP_ID"),
        rank=rank,
        ranks=ranks,
        local_rank=number("SLURM_LOCALID"),
        local_ranks=each[node],
        first_node=_first_host(text("SLURM_STEP_NODELIST")),
        cpus=cpus or None,
    )


_MEND = "start it with srun, or unset Slurm's variables"


def whole_number(
    environment: Mapping[str, str], name: str, default: int | None = None, *, mend: str
) -> int:
    """A count in a launcher's variable. Raises ClusterError, which ends with `mend`, if it is no
    such number, or if it is not there and has no default."""
    value = environment.get(name)
    if not value and default is not None:
        return default
    if not value or not re.fullmatch(r"[0-9]{1,9}", value):
        found = f"is {value!r}, not a number" if value else "is not set"
        raise ClusterError(f"{name} {found}: {mend}")
    return int(value)


def own_job(environment: Mapping[str, str] = os.environ) -> str:
    """The job that this process is in, as Slurm's commands name it; "" in none. A task of an array
    is ARRAY_TASK, because the number of its last task alone is that of the whole array."""
    if "SLURM_ARRAY_JOB_ID" in environment and "SLURM_ARRAY_TASK_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID", "")


def _counts(text: str) -> list[int]:
    """Slurm's short form of a list: "2(x3),1" is 2, 2, 2, 1."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part)
        if found is None:
            raise ClusterError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, not a list: {_MEND}")
        counts += [int(found[1])] * int(found[2] or 1)
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

    In a job that is there for the run alone (see OWN_JOB), rank 0 puts it back into the queue
    first. In one that is somebody else's nothing is done to it. The other ranks leave with 0,
    because srun ends the rest, rank 0 too, as soon as one leaves with anything else. Call it when
    all ranks have saved; Slurm ends them soon after.
    """
    task = current_task()
    if task is None:
        return STOPPED
    if task.rank > 0:
        return 0
    if os.environ.get("RANK", "0") != "0":  # torchrun's, beside its rank 0 in the same task
        return STOPPED
    for number in STOP_SIGNALS:  # the next one must not keep this rank from it
        signal.signal(number, signal.SIG_IGN)
    try:
        requeue(task.job)
        warn(f"job {task.job}: requeued")
    except SlurmError as error:
        warn(f"job {task.job}: not requeued: {error}")
    return STOPPED


def requeue(job: str) -> None:
    """Put the running job that this process is in back into the queue; Slurm ends its processes.

    Raises SlurmError if the job is not this run's own; if it is not running any more, because a
    requeue would bring back what a user has cancelled; or if Slurm refuses, as it does for a job
    with --no-requeue.
    """
    if not os.environ.get(OWN_JOB) or os.environ[OWN_JOB] != os.environ.get("SLURM_JOB_ID"):
        raise SlurmError(
            "scripts/submit.py or slurm/train.sbatch did not submit it to be requeued; the same "
            "command goes on with the run"
        )
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
    title: str = ""
    """The job's name. Numbers come again, on another cluster or after many jobs."""


def query(jobs: Sequence[str]) -> dict[str, JobState]:
    """The states of those of these jobs that Slurm remembers: the queued and running, and for some
    minutes the ended ones. Needs no accounting. Raises SlurmError if Slurm does not answer."""
    if not jobs:
        return {}
    columns = "JobArrayID:|,State:|,RestartCnt:|,Reason:|,Name:|"
    wanted = ("--array", "--states=all", f"--jobs={','.join(jobs)}", f"--Format={columns}")
    try:
        text = _run("squeue", "-h", *wanted)
    except SlurmError as error:
        if "Invalid job id" in str(error):  # it knows none of them
            return {}
        raise
    rows = (line.split("|", 4) for line in text.splitlines())
    return {
        job: JobState(name, int(restarts), reason, title.removesuffix("|"))
        for job, name, restarts, reason, title in rows
    }


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
