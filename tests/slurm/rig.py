"""A Slurm cluster of two nodes on this machine, for tests.

    python -m tests.slurm.rig        start it, say how to use it, stop it on Ctrl-C

The daemons are the real ones, with their own configuration, keys, ports and folders, so that they
meet no other Slurm. The nodes are the addresses 127.0.0.1 and 127.0.0.2: names that resolve. Tried
with Debian 12's slurm-wlm 22.05 as root.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qsr.cluster.slurm import die_with_parent

NODES = ("127.0.0.1", "127.0.0.2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch")
_APT_OPTIONS = ("-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=20")
PREEMPTION = "SlurmctldParameters=preempt_send_user_signal"

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
SlurmdParameters=config_overrides
SlurmdTimeout=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
NodeName=127.0.0.1 NodeHostname={host} Port={ports[1]} CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=127.0.0.2 NodeHostname={host} Port={ports[2]} CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 \
GraceTime={grace_seconds} PreemptMode=REQUEUE OverSubscribe=FORCE:1
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
{preemption}
"""


def missing_reason() -> str | None:
    """Why there can be no cluster here; None if there can. Installs it where that is possible."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root here"
    if _installed():
        return None
    if shutil.which("apt-get") is None:
        return "Slurm is not installed, and there is no apt-get: install slurm-wlm and munge"
    with Path(tempfile.gettempdir(), "qsr-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes come here at once
        if not _installed():
            for command in ("update", "install -y --no-install-recommends slurm-wlm munge"):
                try:
                    done = subprocess.run(
                        ["apt-get", *_APT_OPTIONS, *command.split()],
                        env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
                        capture_output=True,
                        text=True,
                        check=False,
                        timeout=120,
                    )
                except subprocess.TimeoutExpired:
                    return f"apt-get {command} takes too long"
                if done.returncode:
                    return f"apt-get {command} failed: {done.stderr.strip().splitlines()[-1:]}"
    return None if _installed() else "apt-get brought no complete Slurm"


def _installed() -> bool:
    return all(shutil.which(program) for program in PROGRAMS)


class Rig:
    """The cluster; `with Rig() as rig`.

    Its partitions: a job in `high` takes the nodes of one in `low`, which gets `grace_seconds` and
    is requeued. How the latter is told depends on `preempt_by_user_signal`.
    """

    grace_seconds = 20

    def __init__(self) -> None:
        # not pytest's folder: munge wants one that all users can enter, and a short path
        self.folder = Path(tempfile.mkdtemp(prefix="qsr-slurm-"))
        self.environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._ports = _free_ports(3)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Rig":
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        (self.folder / "munge").mkdir(mode=0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self._configure(preemption="")
        try:
            self._start_all()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _configure(self, preemption: str) -> None:
        text = _CONFIGURATION.format(
            host=socket.gethostname(),
            folder=self.folder,
            ports=self._ports,
            grace_seconds=self.grace_seconds,
            preemption=preemption,
        )
        (self.folder / "slurm.conf").write_text(text)

    def _start_all(self) -> None:
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
        paths = [f"--{option}={self.folder}/munge/{name}" for option, name in names.items()]
        self._start("munged", ["munged", "--foreground", "--syslog", *paths])
        wait_until((self.folder / "munge" / "socket").exists, 10)
        self._start("slurmctld", ["slurmctld", "-c", "-D"])
        for node in NODES:
            self.start_daemon(node)
        self.wait_for_nodes()

    def _start(self, name: str, command: Sequence[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env=self.environment,
                start_new_session=True,  # Ctrl-C is for the tests, which then stop the daemons
                preexec_fn=die_with_parent,
            )

    def start_daemon(self, node: str) -> None:
        """Start a node's daemon."""
        self._start(node, ["slurmd", "-N", node, "-D"])

    def kill_daemon(self, node: str) -> None:
        """As if the node had died, but for its processes."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def wait_for_nodes(self) -> None:
        """Until both nodes take jobs, or have some."""
        states = {"idle", "mixed", "allocated", "completing"}
        wait_until(lambda: set(self.run("sinfo", "-h", "-N", "-o", "%T").split()) <= states, 60)

    @contextlib.contextmanager
    def preempt_by_user_signal(self) -> Iterator[None]:
        """The other of Slurm's two preemption modes: the job gets the signal that it asked for by
        --signal, at once, instead of SIGTERM."""
        self._reconfigure(PREEMPTION)
        try:
            yield
        finally:
            self._reconfigure("")

    def _reconfigure(self, preemption: str) -> None:
        self._configure(preemption)
        self.run("scontrol", "reconfigure")

    def run(self, *command: str) -> str:
        """What a Slurm command prints."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
        return done.stdout

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED and so on."""
        return self._show(job, "JobState")

    def restarts(self, job: str) -> int:
        """How often it was requeued."""
        return int(self._show(job, "Restarts"))

    def number(self, job: str) -> str:
        """The job's own number, which an element of an array has too."""
        return self._show(job, "JobId")

    def minutes(self, job: str) -> int:
        """How long it has run, rounded up. Slurm writes [DAYS-]HOURS:MINUTES:SECONDS."""
        hours, minutes, _ = self._show(job, "RunTime").rpartition("-")[2].split(":")
        return 60 * int(hours) + int(minutes) + 1

    def _show(self, job: str, field: str) -> str:
        words = self.run("scontrol", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{field}="))

    def wait_for(self, job: str, *states: str, seconds: float = 120) -> None:
        """Until the job is in one of `states`. What was requeued starts at once, instead of after
        the two minutes that Slurm would let it wait."""

        def reached() -> bool:
            now = self.state(job)
            if now == "PENDING" and "PENDING" not in states and self.restarts(job):
                with contextlib.suppress(RuntimeError):  # it has just started
                    self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
            return now in states

        wait_until(reached, seconds)

    def processes(self, job: str | None = None) -> list[int]:
        """Living processes that belong to this cluster, or to one of its jobs."""
        marks = [f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()]
        if job is not None:
            marks.append(f"SLURM_JOB_ID={job}".encode())
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                values = path.read_bytes().split(b"\0")
                if int(path.parent.name) != os.getpid() and all(mark in values for mark in marks):
                    found.append(int(path.parent.name))
        return found

    def stop(self) -> None:
        """End all jobs and daemons, and remove the folder."""
        if "slurmctld" in self._daemons:
            with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
                self.run("scancel", "--user=root")
        for name in reversed(self._daemons):
            self._daemons[name].terminate()
        for daemon in self._daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        self._daemons.clear()
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s")
        time.sleep(0.2)


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def main() -> int:
    reason = missing_reason()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    with Rig() as rig:
        print(f"export SLURM_CONF={rig.environment['SLURM_CONF']}   # Ctrl-C stops the cluster")
        print(rig.run("sinfo"), end="", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
