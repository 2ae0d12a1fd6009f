"""What the launcher told this process: which rank of how many it is. Standard library only."""

import os
from dataclasses import dataclass

from qsr.slurm import SlurmTask, current_task


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


def find_place() -> Place:
    """From the environment variables of torchrun (ours sets the same) or, if they are not there, of
    srun. What srun starts as a single task may start ranks of its own: it counts as not launched.
    """
    environment, available = os.environ, len(os.sched_getaffinity(0))
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Place(
            rank=int(environment["RANK"]),
            ranks=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            cores=max(1, available // int(environment.get("LOCAL_WORLD_SIZE", "1"))),
            attempt=environment.get("TORCHELASTIC_RUN_ID", "none"),
            launched=True,
            slurm=None,
        )
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
