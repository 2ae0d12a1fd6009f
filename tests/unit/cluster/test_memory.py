"""Freed memory stays with the process."""

import platform
import subprocess
import sys

import pytest

MIB = 2**20
PROGRAM = """
import ctypes
import sys
from pathlib import Path
import torch
from qsr.cluster.group import join

from qsr.config.load import load_config
from qsr.cluster.memory import keep_freed_memory

def resident_bytes():
    # counted now: statm and status add up counters that lag by a hundred KiB on each core
    (line,) = (l for l in Path("/proc/self/smaps_rollup").open() if l.startswith("Anonymous:"))
    return 1024 * int(line.split()[1])

torch.ones(1)
if sys.argv[1] == "keep":
    keep_freed_memory()
elif sys.argv[1] == "join":
    join(load_config(["experiment=demo/quadratic", "workers=1", "cluster.device=cpu"]))
ctypes.CDLL(None).malloc_trim(0)  # or the tensor would use free pages that are held already
before = resident_bytes()
torch.ones(6, 2**20)  # 24 MiB, freed at once
print(resident_bytes() - before)
"""


def bytes_after_a_tensor(how: str) -> int:
    """What a process holds more after a tensor of 24 MiB has come and gone."""
    command = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc only")
def test_freed_memory_is_kept() -> None:
    assert bytes_after_a_tensor("keep") >= 24 * MIB
    assert bytes_after_a_tensor("default") < 4 * MIB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc only")
def test_ranks_on_the_cpu_keep_it() -> None:
    assert bytes_after_a_tensor("join") >= 24 * MIB
