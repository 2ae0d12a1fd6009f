"""Entry point of each rank of a submitted job. Fast to import, to install signal handlers early."""

import sys
from collections.abc import Mapping
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
