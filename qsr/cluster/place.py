"""This process's rank and the number of ranks, as set by the launcher. Standard library only."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qsr.cluster.slurm import SlurmTask, current_task, whole_number
from qsr.errors import ClusterError

_FIX = "start the ranks with torchrun, or unset RANK and WORLD_SIZE"


OWN_RUN = "qsr-ranks-"
"""Prefix of the unique attempt names that qsr's own launcher uses."""


@dataclass(frozen=True)
class Place:
    """This process among the ranks."""

    rank: int
    ranks: int
    local_rank: int
    """Number of this rank on its machine."""
    cores: int
    """Number of CPU cores available to this rank alone."""
    attempt: str
    """Name of this launch of the ranks, the same on all of them."""
    launched: bool
    """Whether a launcher (torchrun, qsr's own, or srun) started this process as one of several
    ranks."""
    slurm: SlurmTask | None
    """This rank's Slurm task, if srun is the launcher."""
    since: float | None = None
    """Start time of this process, in seconds since 1970, if an earlier launch may have the same
    attempt name (as with torchrun); None if the name is unique."""


def find_place() -> Place:
    """Read the environment variables of torchrun (qsr's own launcher sets the same ones) or, if
    they are not set, those of srun. A single task of srun counts as not launched, because it may
    start its own ranks.

    Raises ClusterError if the variables are inconsistent.
    """
    available = len(os.sched_getaffinity(0))
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return _of_torchrun(os.environ, available)
    task = current_task()
    if task is not None and task.ranks > 1:
        return Place(
            rank=task.rank,
            ranks=task.ranks,
            local_rank=task.local_rank,
            cores=task.cpus or max(1, available // task.local_ranks),
            attempt=task.attempt,
            launched=True,
            slurm=task,
        )
    return Place(0, 1, 0, available, f"process {os.getpid()}", launched=False, slurm=None)


def _of_torchrun(environment: Mapping[str, str], available: int) -> Place:
    def number(name: str, default: int | None = None) -> int:
        return whole_number(environment, name, default, fix=_FIX)

    rank, ranks = number("RANK"), number("WORLD_SIZE")
    local_rank, local_ranks = number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", 1)
    if not rank < ranks:
        raise ClusterError(f"RANK={rank} is not below WORLD_SIZE={ranks}: {_FIX}")
    if not local_ranks:
        raise ClusterError(f"LOCAL_WORLD_SIZE is 0: {_FIX}")
    if ranks > 1:
        if not environment.get("MASTER_ADDR"):
            raise ClusterError(f"RANK is set, but MASTER_ADDR is not: {_FIX}")
        if not 0 < number("MASTER_PORT") < 2**16:
            port = environment["MASTER_PORT"]
            raise ClusterError(f"MASTER_PORT={port} is not a port number: {_FIX}")
    # without --rdzv-id torchrun's name is "none"; torchrun may also restart the ranks
    name = environment.get("TORCHELASTIC_RUN_ID", "none")
    restarts = environment.get("TORCHELASTIC_RESTART_COUNT")
    return Place(
        rank=rank,
        ranks=ranks,
        local_rank=local_rank,
        cores=max(1, available // local_ranks),
        attempt=name if restarts is None else f"{name}.{restarts}",
        launched=True,
        slurm=None,
        since=None if name.startswith(OWN_RUN) else _began(),
    )


def _began() -> float:
    """Start time of this process, in seconds since 1970."""
    try:
        # starttime, in clock ticks, is field 20 after the program's name (which may hold anything)
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except OSError:  # no /proc
        age = time.process_time()
    return time.time() - age
