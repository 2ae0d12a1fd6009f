"""Which run lives in a folder: a run goes on only in its own, and never overwrites another."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsr.config.load import differences, parse_identity, run_folder
from qsr.config.schema import Config
from qsr.errors import ConfigError
from qsr.run.durable import partial_name
from qsr.run.folder import RunFolder, parse_yaml, read_record, read_small
from qsr.run.folder_trial import refusing, try_folder


def check_run_folder(config: Config, data: Mapping[str, Any]) -> RunFolder:
    """The run's folder, untouched. Raises ConfigError if another run lives there: one with other
    settings, or on other `data` (what the caller knows of the data set and how it is read)."""
    folder = RunFolder(run_folder(config))
    _check_links(folder, Path(config.runs_dir))
    _check_files(folder)
    if folder.config.exists():
        before = read_config(folder.config)
        changed = differences(config, before)
        if changed:
            workers = (
                f"; a run keeps its workers: to go on with fewer processes, set cluster.ranks to a "
                f"divisor of {before.workers}"
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
                f"{folder.path} holds a run on other data ({'; '.join(changed)}): delete it, or "
                f"choose another runs_dir"
            )
    return folder


def _check_links(folder: RunFolder, runs: Path) -> None:
    """Raises ConfigError if a link that somebody else has laid leads from `runs` elsewhere: who may
    write to a shared folder could have a run write to another."""
    for path in (folder.checkpoints, *folder.checkpoints.parents):
        if path == runs:
            return
        if path.is_symlink() and path.lstat().st_uid not in (os.geteuid(), 0):
            raise ConfigError(f"{path} is a symbolic link of another user's: have it removed")


def _check_files(folder: RunFolder) -> None:
    """Raises ConfigError if something else is where a file of the run belongs, or it cannot be
    read."""
    own = (
        *(folder.config, folder.data, folder.environment, folder.metrics, folder.failure),
        *(folder.summary, folder.model, folder.lock, folder.wandb_id),
    )
    for path in (*own, *map(partial_name, own)):
        try:
            regular = stat.S_ISREG(path.stat().st_mode)
        except OSError:  # nothing there, or nothing that is not replaced
            continue
        if not regular:
            raise ConfigError(f"{path} cannot be read (it is no file): move it away")
        if path in own and not os.access(path, os.R_OK):
            raise ConfigError(f"{path} cannot be read (Permission denied): ask its owner for it")
    if os.path.lexists(folder.checkpoints) and not folder.checkpoints.is_dir():
        raise ConfigError(f"{folder.checkpoints} is no folder: move it away")


def make_run_folder(folder: RunFolder) -> None:
    """See that this rank can do there what a run does, and make the folder if need be. Raises
    ConfigError."""
    try_folder(folder.path)  # permissions alone do not tell
    with refusing(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)


def read_config(path: Path) -> Config:
    """A run's config.yaml. Raises ConfigError if it is not one that this version reads."""
    try:
        return parse_identity(parse_yaml(read_small(path)))
    except (ConfigError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())
    raise ConfigError(
        f"{path} cannot be read by this version ({reason}): delete {path.parent}, or use the "
        f"version that made it"
    )
