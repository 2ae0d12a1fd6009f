#!/usr/bin/env python
"""Show the status of runs, one line each.

    python scripts/status.py runs
    python scripts/status.py runs/vit_b16_b4096 runs/demo/quadratic/seed_1

Reads the run folders at and below these paths, and squeue for submitted runs. Exit status: 0, or 2
if there are no runs.
"""

from pathlib import Path

from qsr.cluster.slurm import query
from qsr.errors import SlurmError
from qsr.ops.status import find_runs, job_of, read_status, status_table
from qsr.output import printer, warn


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    folders = find_runs(map(Path, arguments))
    if not folders:
        warn(f"refused: no runs in {', '.join(arguments)}")
        return 2
    numbers = {job for folder in folders if (job := job_of(folder)) is not None}
    try:
        jobs = query(sorted(numbers))
    except SlurmError as error:
        warn(f"cannot query Slurm: {error}")
        jobs = None
    print(status_table([read_status(folder, jobs) for folder in folders]))
    return 0


if __name__ == "__main__":
    printer(main)
