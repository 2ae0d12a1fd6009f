"""The benchmarks' two machines and their slow link: its rate, and that nothing is left of them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.network import MACHINES, Network, NetworkError, missing_reason
from qsr.cluster.group import join_process_group
from qsr.cluster.place import find_place
from qsr.sync.topology import Topology
from tests.cli import ENVIRONMENT, ROOT

BYTES = 2_000_000
RATE = 40e6
"""In bits per second: an all-reduce takes 0.4 s."""


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    reason = missing_reason()
    if reason is not None:
        pytest.skip(reason)


def reduce_slowly() -> tuple[list[str], float, float]:
    """In a rank: the network namespaces of all, a sum over them, and the seconds that it took."""
    place = find_place()
    here = Topology(place.rank, MACHINES, place.local_rank, MACHINES)
    communicator = join_process_group(here, torch.device("cpu"), timeout_seconds=60.0)
    namespaces = communicator.gather_texts(namespace(os.getpid()))
    tensor = torch.full((BYTES // 4,), 1.0 + place.rank)
    communicator.barrier()
    communicator.sum_(tensor)
    return namespaces, float(tensor.mean()), communicator.seconds()


def fail_on_the_second() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("on purpose")
    time.sleep(600)


def namespace(pid: int) -> str:
    return str(Path(f"/proc/{pid}/ns/net").readlink())


def processes_in(namespaces: set[str]) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if namespace(int(process.name)) in namespaces:
                found.append(int(process.name))
        except OSError:  # it has just ended
            continue
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_all_reduces_take_as_long_as_the_rate_says_and_nothing_is_left() -> None:
    with Network() as network:
        network.limit(RATE)
        namespaces, total, seconds = network.call(reduce_slowly)
        assert len({*namespaces, namespace(os.getpid())}) == MACHINES + 1
        assert total == 3.0
        assert 0.1 < 8 * BYTES / seconds / RATE < 1.1  # no faster; slower if the machine is busy
        with pytest.raises(NetworkError, match="rank 1 ended with status 1"):
            network.call(fail_on_the_second)
        assert len(processes_in(set(namespaces))) == MACHINES  # what holds the namespaces
    assert processes_in(set(namespaces)) == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_program_that_is_ended(how: signal.Signals) -> None:
    text = "import time; from benchmarks.network import Network\n"
    text += "with Network() as network: network.call(time.sleep, 600)"
    program = subprocess.Popen(
        [sys.executable, "-c", text], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children")
    wait_until(lambda: len(children.read_text().split()) == 2 * MACHINES)
    started = [int(child) for child in children.read_text().split()]
    own = namespace(os.getpid())
    wait_until(lambda: all(namespace(pid) != own for pid in started))
    namespaces = {namespace(pid) for pid in started}
    assert len(namespaces) == MACHINES
    program.send_signal(how)
    program.wait(30)
    wait_until(lambda: processes_in(namespaces) == [])
