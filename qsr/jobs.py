"""The job that a run was submitted as: what is checked before, and what is written down."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qsr.config.load import ConfigError, run_folder
from qsr.config.schema import Config
from qsr.models import check_network
from qsr.runfolder import RunFolder, check_run_folder, write_json
from qsr.slurm import IN_QUEUE, SlurmError, query


def check_submission(config: Config) -> RunFolder:
    """The run's folder, untouched. Raises ConfigError for what would be refused in the job, as far
    as it can be known without the data, which the nodes alone may see; and if the run's last job is
    still in the queue."""
    check_network(config)
    folder = check_run_folder(config, {})
    job = read_job(folder)
    if job is None or job["job"] == os.environ.get("SLURM_JOB_ID"):  # begun before in this job
        return folder
    try:
        state = query([job["job"]]).get(job["job"])
    except SlurmError:
        return folder  # no Slurm here: nothing is going to be submitted
    if state is not None and state.name in IN_QUEUE:
        raise ConfigError(
            f"{folder.path} is job {job['job']}, {state.name}: it goes on by itself; to start it "
            f"anew, scancel {job['job']}"
        )
    return folder


def write_job(config: Config, job: str, snapshot: Path, steps: int | None, log: str) -> None:
    """Write job.json."""
    record = {
        "job": job,
        "submitted": datetime.now(UTC).isoformat(timespec="seconds"),
        "snapshot": str(snapshot),
        "steps": steps,
        "log": log,
    }
    write_json(RunFolder(run_folder(config)).job, record)


def read_job(folder: RunFolder) -> dict[str, Any] | None:
    """The job that the run was submitted as, the last one; None if it was not."""
    if not folder.job.exists():
        return None
    record: dict[str, Any] = json.loads(folder.job.read_text())
    return record
