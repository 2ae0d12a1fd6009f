"""Entry point of each rank of a submitted job. Fast to import, to install signal handlers early.

python -m qsr.ops.job_main FILE      a rank of an element of a job array
"""

import itertools
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsr.cluster.slurm import leave_when_signalled
from qsr.config.load import parse_config
from qsr.errors import ClusterError
from qsr.output import guard, warn


def run_job(settings: Mapping[str, Any]) -> None:
    """Start or resume the run with these settings (`to_dict` of a Config) as the rank assigned by
    srun. Exits with a nonzero status if the run is not finished."""
    guard()
    try:
        leave_when_signalled()
    except ClusterError as error:
        warn(f"refused: {error}")
        sys.exit(2)
    from qsr.session import carry_out

    status = carry_out([parse_config(settings)])
    if status:
        sys.exit(status)


def run_element(path: Path) -> None:
    """`run_job` for an element of a job array, whose settings are in the line of this file that has
    the element's number (from 0)."""
    number = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    try:
        with path.open() as file:
            settings = json.loads(next(itertools.islice(file, int(number), None), ""))
    except (OSError, ValueError) as error:
        warn(f"refused: {path} has no settings of element {number!r} ({error}): submit again")
        sys.exit(2)
    run_job(settings)


if __name__ == "__main__":
    run_element(Path(sys.argv[1]))
