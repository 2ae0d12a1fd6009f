"""The job that a run was submitted as: what is checked before, and what is written down."""

import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qsr.cluster.slurm import IN_QUEUE, own_job, query
from qsr.config.load import run_folder
from qsr.config.schema import Config
from qsr.errors import ConfigError, SlurmError
from qsr.run.folder import RunFolder, parse_object, read_small, write_json
from qsr.run.identity import check_run_folder
from qsr.train.models import check_network


def check_submission(config: Config) -> RunFolder:
    """The run's folder, untouched. Raises ConfigError for what would be refused in the job, as far
    as it can be known without the data, which the nodes alone may see; and if the run's last job is
    still in the queue."""
    check_network(config)
    folder = check_run_folder(config, {})
    record = read_job(folder)
    if record is None or record["job"] == own_job():  # begun before in this job
        return folder
    job = record["job"]
    try:
        state = query([job]).get(job)
    except SlurmError:
        return folder  # no Slurm here: nothing is going to be submitted
    same = state is not None and record.get("title", state.title) == state.title
    if same and state is not None and state.name in IN_QUEUE:
        raise ConfigError(
            f"{folder.path} is job {job}, {state.name}: it goes on by itself; to start it anew, "
            f"scancel {job}"
        )
    return folder


def write_job(
    config: Config, job: str, title: str, snapshot: Path, steps: int | None, log: str
) -> None:
    """Write job.json. `title`: the job's name; job numbers come again."""
    record = {
        "job": job,
        "title": title,
        "submitted": datetime.now(UTC).isoformat(timespec="seconds"),
        "snapshot": str(snapshot),
        "steps": steps,
        "log": log,
    }
    write_json(RunFolder(run_folder(config)).job, record)


def read_job(folder: RunFolder) -> dict[str, Any] | None:
    """The job that the run was submitted as, the last one; None if it was not. Raises ConfigError
    if job.json is not what `write_job` wrote."""
    try:
        record = parse_object(read_small(folder.job))
        if _is_number(record.get("job")):
            return record
        reason = "no number of a job"
    except ValueError as error:
        if not os.path.lexists(folder.job):
            return None
        reason = str(error)
    raise ConfigError(
        f"{folder.job} cannot be read ({reason}): see that no job of the run is queued, and delete "
        f"it"
    )


def _is_number(job: object) -> bool:
    """Whether it is what Slurm's commands take for one job."""
    return isinstance(job, str) and re.fullmatch(r"[0-9]+(_[0-9]+)?", job) is not None
