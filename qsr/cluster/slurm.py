"""Slurm from inside a job, and through its commands. Standard library only."""

import ctypes
import hashlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qsr.errors import ClusterError, SlurmError
from qsr.output import warn

STOPPED = 75
"""Exit status of a run that was asked to stop and has saved: unfinished, but without an error. This
is EX_TEMPFAIL of sysexits.h; with RequeueExit=75 in slurm.conf, Slurm requeues such a job."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Signals that ask a job to stop: from Slurm, depending on its settings, or a closing terminal."""

WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")
"""States of a job that waits to start or restart."""

IN_QUEUE = (
    *WAITING,
    *("CONFIGURING", "RUNNING", "SIGNALING", "SUSPENDED", "STOPPED", "RESIZING", "STAGE_OUT"),
    "COMPLETING",
)
"""States of a job that has not ended yet."""

_FIRST_PORT, _LAST_PORT = 15_000, 31_999
"""Below the ports that Linux uses for outgoing connections (32768 and up)."""


OWN_JOB = "QSR_JOB"
"""Environment variable that qsr's batch scripts set to the job's number. It marks the job as
dedicated to the run, so that the run may requeue it."""


@dataclass(frozen=True)
class SlurmTask:
    """This process, as a task of a step that srun started."""

    job: str
    """The job's number in the form that Slurm's commands accept."""
    restarts: int
    """How often the job was requeued."""
    step: str
    rank: int
    ranks: int
    local_rank: int
    """Number of this rank on its node."""
    local_ranks: int
    """Number of ranks on this node."""
    first_node: str
    """Node of rank 0."""
    cpus: int | None
    """CPU cores per rank, if the job specifies them."""

    @property
    def attempt(self) -> str:
        """A name unique to this start of this job."""
        return f"{self.job}.{self.restarts}.{self.step}"

    def port(self, number: int) -> int:
        """The `number`-th port (from 0) to try for rank 0 of this attempt; the next one is used if
        another program occupies it."""
        digest = hashlib.sha256(f"{self.attempt}/{number}".encode()).digest()
        return _FIRST_PORT + int.from_bytes(digest[:8], "big") % (_LAST_PORT - _FIRST_PORT + 1)


def current_task(environment: Mapping[str, str] = os.environ) -> SlurmTask | None:
    """This process's task, from the variables of srun; None if srun did not start it (the shell of
    a batch script has SLURM_NTASKS and SLURM_PROCID too, but no SLURM_STEP_ID). Raises ClusterError
    if the variables are inconsistent."""
    if "SLURM_STEP_ID" not in environment:
        return None

    def text(name: str) -> str:
        if not environment.get(name):
            raise ClusterError(f"SLURM_STEP_ID is set, but {name} is not: {_FIX}")
        return environment[name]

    def number(name: str, default: int | None = None) -> int:
        return whole_number(environment, name, default, fix=_FIX)

    each = _counts(text("SLURM_STEP_TASKS_PER_NODE"))
    node, rank, ranks = (number(f"SLURM_{n}") for n in ("NODEID", "PROCID", "STEP_NUM_TASKS"))
    if not (node < len(each) and rank < ranks):
        raise ClusterError(
            f"SLURM_NODEID={node} or SLURM_PROCID={rank} is out of range for the step's "
            f"{len(each)} nodes and {ranks} tasks: {_FIX}"
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


_FIX = "start the program with srun, or unset Slurm's variables"


def whole_number(
    environment: Mapping[str, str], name: str, default: int | None = None, *, fix: str
) -> int:
    """The non-negative integer in a launcher's variable. Raises ClusterError, with `fix` at the end
    of its message, if the value is not one, or is not set and has no default."""
    value = environment.get(name)
    if not value and default is not None:
        return default
    if not value or not re.fullmatch(r"[0-9]{1,9}", value):
        found = f"is {value!r}, not a number" if value else "is not set"
        raise ClusterError(f"{name} {found}: {fix}")
    return int(value)


def own_job(environment: Mapping[str, str] = os.environ) -> str:
    """The number of the job that this process runs in, in the form that Slurm's commands accept; ""
    outside of a job. A task of an array is ARRAY_TASK, because the job number of the last task also
    stands for the whole array."""
    if "SLURM_ARRAY_JOB_ID" in environment and "SLURM_ARRAY_TASK_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID", "")


def _counts(text: str) -> list[int]:
    """Expand Slurm's compact list of counts: "2(x3),1" is 2, 2, 2, 1."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part)
        if found is None:
            raise ClusterError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, not a list: {_FIX}")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _first_host(nodelist: str) -> str:
    """The first host of Slurm's compact list: rack07node1 for "rack[07-09]node[1,3],x"."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodelist).partition(",")[0]


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, so that no unattended process keeps
    training. Linux only; has no effect elsewhere."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)


def leave_when_signalled() -> None:
    """Exit immediately, with the status of a stopped run, when a stop signal arrives, unless this
    program was started to ignore it. For the seconds before the run handles signals itself, when
    there is nothing to save yet."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda _number, _frame: os._exit(stopped_status()))


def stopped_status() -> int:
    """The exit status of a process after its run was asked to stop and all ranks have saved.

    If the job is dedicated to the run (see OWN_JOB), rank 0 first requeues it; any other job is
    left alone. The other ranks exit with 0, because srun kills all remaining tasks, including rank
    0, as soon as one exits with another status. Call this only when all ranks have saved; Slurm
    ends them soon after.
    """
    task = current_task()
    if task is None:
        return STOPPED
    if task.rank > 0:
        return 0
    if os.environ.get("RANK", "0") != "0":  # another rank of torchrun within the same task
        return STOPPED
    for number in STOP_SIGNALS:  # further signals must not interrupt the requeue
        signal.signal(number, signal.SIG_IGN)
    try:
        requeue(task.job)
        warn(f"job {task.job}: requeued")
    except SlurmError as error:
        warn(f"job {task.job}: not requeued: {error}")
    return STOPPED


def requeue(job: str) -> None:
    """Requeue the running job that this process is in; Slurm then ends its processes.

    Raises SlurmError if the job is not dedicated to the run; if it is no longer running, because a
    requeue would restart a cancelled job; or if Slurm refuses, as for a job with --no-requeue.
    """
    if not os.environ.get(OWN_JOB) or os.environ[OWN_JOB] != os.environ.get("SLURM_JOB_ID"):
        raise SlurmError(
            "it was not submitted by qsr submit or slurm/train.sbatch with requeue enabled; "
            "run the same command to resume"
        )
    state = query([job]).get(job)
    if state is None or state.name not in ("RUNNING", "SIGNALING"):
        now = state.name if state else "gone"
        raise SlurmError(f"it is {now}, so Slurm decides whether it is restarted")
    _run("scontrol", "requeue", job)


@dataclass(frozen=True)
class JobState:
    """A job's state as reported by squeue."""

    name: str
    """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, TIMEOUT and so on."""
    restarts: int
    """How often it was requeued."""
    reason: str
    """Why it is in this state, as reported by Slurm."""
    title: str = ""
    """The job's name. Job numbers may be reused, on another cluster or after many jobs."""


def query(jobs: Sequence[str]) -> dict[str, JobState]:
    """The states of these jobs, as far as Slurm remembers them: queued and running ones, and those
    that ended a few minutes ago. Needs no accounting. Raises SlurmError if Slurm does not
    answer."""
    if not jobs:
        return {}
    columns = "JobArrayID:|,State:|,RestartCnt:|,Reason:|,Name:|"
    wanted = ("--array", "--states=all", f"--jobs={','.join(jobs)}", f"--Format={columns}")
    try:
        text = _run("squeue", "-h", *wanted)
    except SlurmError as error:
        if "Invalid job id" in str(error):  # Slurm knows none of these jobs
            return {}
        raise
    rows = (line.split("|", 4) for line in text.splitlines())
    return {
        job: JobState(name, int(restarts), reason, title.removesuffix("|"))
        for job, name, restarts, reason, title in rows
    }


def submit_script(script: Path) -> str:
    """Submit a batch script; the job's number. Raises SlurmError."""
    return _run("sbatch", "--parsable", str(script)).strip().partition(";")[0]


def most_elements() -> int | None:
    """The size of the largest job array: 0 or 1 if there are none, None if Slurm does not say."""
    try:
        found = re.search(r"(?m)^MaxArraySize\s*=\s*([0-9]+)", _run("scontrol", "show", "config"))
    except SlurmError:
        return None
    return int(found[1]) if found else None


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
