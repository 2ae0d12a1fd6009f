"""Two machines simulated on one: ranks in network namespaces, joined by a link with a given rate.

The link is a pair of virtual Ethernet devices; at both ends tc's token bucket filter limits the
rate. Needs Linux, root, ip and tc. The namespaces are unnamed: each exists as long as a process
that waits for the end of its input, so they disappear with this process, however it ends.
"""

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.measure import ROOT
from qsr.cluster.processes import start_ranks
from qsr.cluster.slurm import die_with_parent

Result = TypeVar("Result")

MACHINES = 2
DEVICE = "veth0"
_PROGRAMS = ("ip", "tc", "taskset", "unshare", "nsenter")
_MTU_BYTES = 9000
"""Packet size without the Ethernet header: jumbo frames, as in clusters. Every packet costs an
interrupt of the processor on which the ranks compute."""
PACKET_BYTES, PAYLOAD_BYTES = _MTU_BYTES + 14, _MTU_BYTES - 52
"""Size of a full TCP packet on the link, and of its payload."""
_BURST_SECONDS = 250e-6
"""Size of a burst after idle time, in seconds of the link: the minimum that the kernel's timer
allows."""
_QUEUE_BYTES = 64 * 2**20
"""More than the ranks ever have in flight, so that nothing is dropped and retransmitted."""


def missing_reason() -> str | None:
    """Why such a link is not possible here; None if it is."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in _PROGRAMS:
        if shutil.which(program) is None:
            return f"{program} is not installed: install iproute2 and util-linux"
    try:
        with Network() as network:
            network.limit(1e9)
    except NetworkError as error:
        return str(error)
    before = os.sched_getscheduler(0)
    try:
        _schedule(0, os.SCHED_FIFO, 1)
    except PermissionError:
        return "real-time priority needs CAP_SYS_NICE"
    _schedule(0, before, 0)
    return None


class NetworkError(Exception):
    """The kernel rejected a namespace or link operation; the message is one line."""


class Network:
    """Two machines and the link between them, at first without a rate limit; a context manager."""

    def __init__(self) -> None:
        self._machines: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Network":
        try:
            self._make()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _make(self) -> None:
        for _ in range(MACHINES):
            # cat in its own namespace: when it echoes a line, the namespace exists
            machine = subprocess.Popen(
                ["unshare", "--net", "cat"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C goes to this process only, which then removes it
            )
            self._machines.append(machine)
            assert machine.stdin is not None
            assert machine.stdout is not None
            assert machine.stderr is not None
            machine.stdin.write(b"\n")
            machine.stdin.flush()
            if machine.stdout.readline() != b"\n":
                raise NetworkError(machine.stderr.read().decode().strip())
        here, there = (str(machine.pid) for machine in self._machines)
        link = ["ip", "link", "add", DEVICE, "netns"]
        _run([*link, here, "type", "veth", "peer", "name", DEVICE, "netns", there])
        for number in range(MACHINES):
            self._run_in(number, "ip", "address", "add", f"{address(number)}/24", "dev", DEVICE)
            self._run_in(number, "ip", "link", "set", DEVICE, "mtu", str(_MTU_BYTES))
            for device in ("lo", DEVICE):
                self._run_in(number, "ip", "link", "set", device, "up")
            # always cubic: bbr would mistake pauses in training for a slower link
            self._run_in(
                number, *("ip", "route", "replace", "10.0.0.0/24", "dev", DEVICE),
                *("src", address(number), "congctl", "cubic"),
            )  # fmt: skip

    def limit(self, bits_per_second: float) -> None:
        """Limit the rate in each direction, packet headers included."""
        burst = max(PACKET_BYTES, round(bits_per_second / 8 * _BURST_SECONDS))
        for number in range(MACHINES):
            self._run_in(
                number, *("tc", "qdisc", "replace", "dev", DEVICE, "root", "tbf"),
                *("rate", f"{round(bits_per_second)}bit"),
                *("burst", str(burst), "limit", str(_QUEUE_BYTES)),
            )  # fmt: skip

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call `function(*arguments)` in a rank on each machine, and return the result from the
        first. `function` must be importable. Raises NetworkError if a rank fails, after ending
        all ranks."""
        ranks: list[subprocess.Popen[bytes]] = []
        with tempfile.TemporaryDirectory(prefix="qsr-network-") as folder:
            Path(folder, "call").write_bytes(pickle.dumps((function, arguments)))
            try:
                for number in range(MACHINES):
                    ranks.append(self._start_rank(number, folder))
                while _any_runs(ranks):
                    time.sleep(0.05)
            finally:
                for rank in ranks:
                    rank.kill()
                    rank.wait()
            returned: Result = pickle.loads(Path(folder, "returned").read_bytes())
            return returned

    def _start_rank(self, number: int, folder: str) -> subprocess.Popen[bytes]:
        # the variables that torchrun would set
        environment = {"RANK": str(number), "WORLD_SIZE": str(MACHINES)}
        environment |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        environment |= {"MASTER_ADDR": address(0), "MASTER_PORT": "29500"}
        environment |= {"GLOO_SOCKET_IFNAME": DEVICE}
        # suppresses the warning that the addresses have no host names
        environment |= {"TORCH_CPP_LOG_LEVEL": "ERROR"}
        return subprocess.Popen(
            self.command(number, sys.executable, "-m", "benchmarks.network", folder),
            cwd=ROOT,
            env=os.environ | environment,
            preexec_fn=die_with_parent,
        )

    def command(self, number: int, *command: str) -> list[str]:
        """`command` prefixed to run on a machine. Machines share no cores if there are enough."""
        cores = sorted(os.sched_getaffinity(0))
        own = ",".join(map(str, cores[number::MACHINES] or cores))
        namespace = f"--net=/proc/{self._machines[number].pid}/ns/net"
        return ["taskset", "--cpu-list", own, "nsenter", namespace, *command]

    def _run_in(self, number: int, *command: str) -> None:
        _run(self.command(number, *command))

    def remove(self) -> None:
        """Remove the machines and the link. No process may be running on them."""
        for machine in self._machines:
            machine.kill()
            machine.communicate()
        self._machines.clear()


def put_network_first() -> None:
    """In a rank, after its network threads have started: let them preempt the compute thread. They
    share a core here and would otherwise wait up to 4 ms each time, until the next kernel tick.
    Network cards, and NCCL on a GPU, do not wait."""
    for entry in Path("/proc/self/task").iterdir():
        thread = int(entry.name)
        if thread != os.getpid():  # the main thread
            _schedule(thread, os.SCHED_FIFO, 1)


def _schedule(thread: int, policy: int, priority: int) -> None:
    os.sched_setscheduler(thread, policy, os.sched_param(priority))


def address(number: int) -> str:
    """IP address of a machine on the link."""
    return f"10.0.0.{number + 1}"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NetworkError(f"{' '.join(command)}: {done.stderr.strip()}")


def _any_runs(ranks: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Whether a rank is still running. Raises NetworkError if one has failed."""
    states = [rank.poll() for rank in ranks]
    for number, status in enumerate(states):
        if status:
            raise NetworkError(f"rank {number} ended with status {status}")
    return None in states


def main() -> None:
    """Run as a rank."""
    folder = Path(sys.argv[1])
    function, arguments = pickle.loads((folder / "call").read_bytes())
    returned = start_ranks(function, MACHINES, *arguments)
    if os.environ["RANK"] == "0":
        (folder / "returned").write_bytes(pickle.dumps(returned))


if __name__ == "__main__":
    main()
