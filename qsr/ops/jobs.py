"""The Slurm job of a run: checks before submission, and its record job.json."""

import os
import re
from collections.abc import Sequence
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


def check_submissions(configs: Sequence[Config]) -> list[RunFolder]:
    """The runs' folders, without changing them. Raises ConfigError for errors that the jobs would
    hit (except those that need the data, which may be visible only on the nodes), and if the last
    job of a run is still in the queue."""
    folders = []
    for config in configs:
        check_network(config)
        folders.append(check_run_folder(config, {}))
    records = {folder: record for folder in folders if (record := read_job(folder)) is not None}
    try:
        states = query([record["job"] for record in records.values()])
    except SlurmError:
        return folders  # no Slurm here: nothing will be submitted
    for folder, record in records.items():
        state, job = states.get(record["job"]), record["job"]
        if state is None or job == own_job():  # this job was requeued
            continue
        same = record.get("title", state.title) == state.title
        if same and state.name in IN_QUEUE:
            raise ConfigError(
                f"{folder.path} already has job {job} ({state.name}), which will run by itself; to "
                f"submit it again, run scancel {job} first"
            )
    return folders


def write_job(
    config: Config, job: str, title: str, snapshot: Path, steps: int | None, log: str
) -> None:
    """Write job.json. `title` is the job's name, stored because job numbers may be reused."""
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
    """The record of the run's last job; None if it was never submitted. Raises ConfigError if
    job.json is invalid."""
    try:
        record = parse_object(read_small(folder.job))
        if _is_number(record.get("job")):
            return record
        reason = "not a job number"
    except ValueError as error:
        if not os.path.lexists(folder.job):
            return None
        reason = str(error)
    raise ConfigError(
        f"{folder.job} cannot be read ({reason}): make sure that no job of the run is queued, then "
        f"delete this file"
    )


def _is_number(job: object) -> bool:
    """Whether Slurm's commands would accept it as the number of a single job."""
    return isinstance(job, str) and re.fullmatch(r"[0-9]+(_[0-9]+)?", job) is not None
