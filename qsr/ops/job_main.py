"""What every rank of a submitted job does. Light to import, so that signals find a handler soon."""

import sys
from collections.abc import Mapping
from typing import Any

from qsr.cluster.slurm import leave_when_signalled
from qsr.config.load import parse_config
from qsr.errors import ClusterError
from qsr.output import guard, warn


def run_job(settings: Mapping[str, Any]) -> None:
    """Carry out the run that these settings describe (`to_dict` of a Config), or what is left of
    it, as the rank that srun says. Exits with another status than 0 if it is not done then."""
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
