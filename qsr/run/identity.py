"""Which run a folder holds: a run resumes only in its own folder, and never overwrites another."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsr.config.load import differences, parse_identity, run_folder
from qsr.config.schema import Config
from qsr.errors import ConfigError
from qsr.run.durable import partial_name
from qsr.run.folder import RunFolder, read_record, read_small
from qsr.run.folder_trial import refusing, try_folder
from qsr.run.yaml_file import parse_yaml


def check_run_folder(config: Config, data: Mapping[str, Any]) -> RunFolder:
    """The run's folder, without changing it. Raises ConfigError if it holds a different run: other
    settings, or other `data` (facts about the data set and how it is read)."""
    folder = RunFolder(run_folder(config))
    _check_disk(Path(config.runs_dir))
    _check_links(folder, Path(config.runs_dir))
    _check_files(folder)
    if folder.config.exists():
        before = read_config(folder.config)
        changed = differences(config, before)
        if changed:
            workers = (
                f"; the number of workers of a run is fixed: to resume with fewer processes, set "
                f"cluster.ranks to a divisor of {before.workers}"
            )
            raise ConfigError(
                f"{folder.path} holds a run with other settings ({'; '.join(changed)}): delete it, "
                f"or choose another runs_dir{workers if before.workers != config.workers else ''}"
            )
    if folder.data.exists():
        stored = read_record(folder.data)
        changed = [f"{k}: {stored.get(k)} -> {v}" for k, v in data.items() if stored.get(k) != v]
        if changed:
            raise ConfigError(
                f"{folder.path} holds a run with other data ({'; '.join(changed)}): delete it, or "
                f"choose another runs_dir"
            )
    return folder


def _check_disk(runs_dir: Path) -> None:
    """Raise ConfigError if runs_dir is on a disk that is not there: whoever may write to / would
    otherwise fill the disk of the system."""
    if runs_dir.is_absolute() and not Path(*runs_dir.parts[:2]).exists():
        raise ConfigError(
            f"runs_dir={runs_dir}: there is no {Path(*runs_dir.parts[:2])} here: mount or make "
            f"it, or choose another folder; all nodes of a cluster must see it"
        )


def _check_links(folder: RunFolder, runs: Path) -> None:
    """Raises ConfigError if a path below `runs` is a symbolic link owned by another user, because
    anybody who can write to a shared folder could redirect a run's files with one."""
    for path in (folder.checkpoints, *folder.checkpoints.parents):
        if path == runs:
            return
        if path.is_symlink() and path.lstat().st_uid not in (os.geteuid(), 0):
            raise ConfigError(
                f"{path} is a symbolic link owned by another user: ask them to remove it"
            )


def _check_files(folder: RunFolder) -> None:
    """Raises ConfigError if one of the run's files is not a regular file or cannot be read."""
    own = (
        *(folder.config, folder.data, folder.environment, folder.metrics, folder.failure),
        *(folder.summary, folder.model, folder.lock, folder.wandb_id),
        *map(folder.averaged_model, ("ema", "uniform")),
    )
    for path in (*own, *map(partial_name, own)):
        try:
            regular = stat.S_ISREG(path.stat().st_mode)
        except OSError:  # missing, or something that will be replaced
            continue
        if not regular:
            raise ConfigError(f"{path} cannot be read (not a regular file): move it away")
        if path in own and not os.access(path, os.R_OK):
            raise ConfigError(
                f"{path} cannot be read (Permission denied): ask its owner for access"
            )
    if os.path.lexists(folder.checkpoints) and not folder.checkpoints.is_dir():
        raise ConfigError(f"{folder.checkpoints} is not a folder: move it away")


def make_run_folder(folder: RunFolder) -> None:
    """Check that this rank can write there, and create the folder if it does not exist. Raises
    ConfigError."""
    try_folder(folder.path)  # permission bits alone are not enough
    with refusing(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)


def read_config(path: Path) -> Config:
    """A run's config.yaml. Raises ConfigError if this version cannot read it."""
    try:
        return parse_identity(parse_yaml(read_small(path)))
    except (ConfigError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())
    raise ConfigError(
        f"{path} cannot be read by this version of qsr ({reason}): delete {path.parent}, or use "
        f"the version that wrote it"
    )
