"""What the launcher told this process: which rank of how many it is. Standard library only."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qsr.cluster.slurm import SlurmTask, current_task, whole_number
from qsr.errors import ClusterError

_MEND = "start the ranks with torchrun, or unset RANK and WORLD_SIZE"


OWN_RUN = "qsr-ranks-"
"""What the names begin with that our own launcher gives its starts, each another one."""


@dataclass(frozen=True)
class Place:
    """This process among the ranks."""

    rank: int
    ranks: int
    local_rank: int
    """Number of this rank on its machine."""
    cores: int
    """CPU cores that this rank may use for itself."""
    attempt: str
    """A name of this start of the ranks, the same on all of them."""
    launched: bool
    """Whether a launcher (torchrun, ours, or srun) started this process as one of several ranks."""
    slurm: SlurmTask | None
    """The task that this rank is, if srun is that launcher."""
    since: float | None = None
    """When this process began, in seconds since 1970, if an earlier start may have had the same
    name, as with torchrun; None: no other start has it."""


def find_place() -> Place:
    """From the environment variables of torchrun (ours sets the same) or, if they are not there, of
    srun. What srun starts as a single task may start ranks of its own: it counts as not launched.

    Raises ClusterError if the variables make no sense.
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
        return whole_number(environment, name, default, mend=_MEND)

    rank, ranks = number("RANK"), number("WORLD_SIZE")
    local_rank, local_ranks = number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", 1)
    if not rank < ranks:
        raise ClusterError(f"RANK={rank} is not below WORLD_SIZE={ranks}: {_MEND}")
    if not local_ranks:
        raise ClusterError(f"LOCAL_WORLD_SIZE is 0: {_MEND}")
    if ranks > 1:
        if not environment.get("MASTER_ADDR"):
            raise ClusterError(f"RANK is set, but MASTER_ADDR is not: {_MEND}")
        if not 0 < number("MASTER_PORT") < 2**16:
            raise ClusterError(f"MASTER_PORT={environment['MASTER_PORT']} is no port: {_MEND}")
    # torchrun's name is "none" if the user gives none; it starts ranks again within one start
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
    """When this process began."""
    try:
        # behind the program's name, which may hold anything, the 20th is a number of ticks
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except OSError:  # no /proc
        age = time.process_time()
    return time.time() - age
