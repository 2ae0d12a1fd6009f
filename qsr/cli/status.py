"""Show the status of runs, one line each.

    qsr status runs
    qsr status runs/vit_b16_b4096 runs/demo/quadratic/seed_1

Reads the run folders at and below these paths, and squeue for submitted runs. Exit status: 0, or 2
if there are no runs.
"""

from pathlib import Path
from typing import NoReturn

from qsr.cli.usage import show_help
from qsr.cluster.slurm import query
from qsr.errors import SlurmError
from qsr.ops.status import job_of, read_status, status_table
from qsr.output import printer, warn
from qsr.report.collect import find_runs


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        return show_help(__doc__)
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


def run() -> NoReturn:
    """Run it with the command line's arguments; exits."""
    printer(main)
