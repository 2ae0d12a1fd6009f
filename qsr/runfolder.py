"""The folder of a run, and the record of where it ran."""

import json
import os
import platform
import stat
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from qsr.checkpoint_files import pack_tensors, packed_size
from qsr.config.files import parse_object, parse_yaml, read_small
from qsr.config.load import ConfigError, differences, parse_identity, run_folder, to_dict
from qsr.config.schema import Config
from qsr.distributed import Topology
from qsr.durable import partial_name, replace_file, reserve
from qsr.folder_trial import refusing, try_folder
from qsr.model_file import MODEL_NAME, Description
from qsr.snapshot import git_revision, running_code

_COMPUTING = ("torch", "torchvision", "nvidia-dali-cuda130", "timm")
PACKAGES = (*_COMPUTING, "hydra-core", "safetensors")

_SUMMARY_BYTES = 2**20
"""For summary.json, and what it leaves for rows of metrics.jsonl that a full disk has held up."""
_DIGITS_BYTES = 2**12
"""For the digits of what the model file says of the run's end."""
_IN_A_SUMMARY = ("steps", "averages", "volume", "top1", "planned")


class RunFolder:
    """Paths of a run: config.yaml, data.json, environment.json, metrics.jsonl, summary.json,
    run.lock, checkpoints/ and model.safetensors, the averaged model at the end. Of a run that was
    submitted: job.json, and slurm/ with the jobs' files. Of one that failed: failure.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.data = path / "data.json"
        self.environment = path / "environment.json"
        self.job = path / "job.json"
        self.jobs = path / "slurm"
        self.failure = path / "failure.json"
        self.summary = path / "summary.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.model = path / MODEL_NAME
        self.lock = path / "run.lock"
        self.wandb_id = path / "wandb_id"

    def summary_if_finished(self) -> dict[str, Any] | None:
        """The summary, if this run has come to its end. Raises ConfigError."""
        if not self.summary.exists():
            return None
        summary = _read_json(self.summary)
        for name in _IN_A_SUMMARY:
            if name not in summary:
                raise _unreadable(self.summary, f"it has no {name}")
        return summary


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
        stored = _read_json(folder.data)
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


def write_records(
    folder: RunFolder, config: Config, data: Mapping[str, Any], topology: Topology, device: str
) -> None:
    """Write config.yaml, data.json, environment.json; remove what an earlier failure left."""
    earlier = _earlier_code(folder)
    write_json(folder.data, data)
    write_text(folder.config, yaml.safe_dump(to_dict(config), sort_keys=False))
    write_json(folder.environment, environment(topology, device) | {"earlier_code": earlier})
    folder.failure.unlink(missing_ok=True)


def other_code(folder: RunFolder) -> str | None:
    """A warning, in one line, if sessions of the run before this one had other code than this."""
    earlier = _earlier_code(folder)
    if not earlier:
        return None
    return (
        f"{folder.path} was begun with other code (qsr/ had the hash {earlier[-1]}, and has "
        f"{running_code()}): going on, but it may not end as it would have"
    )


def _earlier_code(folder: RunFolder) -> list[str]:
    """The hashes of the code of earlier sessions, without that of this one."""
    if not folder.environment.exists():
        return []
    try:
        stored = _read_json(folder.environment)
    except ConfigError:  # a record, of which the run does not depend
        stored = {}
    earlier = stored.get("earlier_code", [])
    codes = [*(earlier if isinstance(earlier, list) else []), stored.get("code", "unknown")]
    texts = dict.fromkeys(code for code in codes if isinstance(code, str))
    return [code for code in texts if code != running_code()]


def code_that_runs() -> dict[str, str | None]:
    """What decides, beside settings and data, what this process computes: it must be the same on
    all ranks."""
    python = ".".join(platform.python_version_tuple()[:2])
    packages = {name: _version(name) for name in _COMPUTING}
    return {"qsr": running_code(), "python": python, **packages}


def environment(topology: Topology, device: str) -> dict[str, Any]:
    """Versions, revision and hardware."""
    return {
        "code": running_code(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES if _version(name)},
        "git": git_revision(),
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "device": device,
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "ranks": topology.ranks,
        "workers_per_rank": len(topology.workers),
        "threads_per_rank": torch.get_num_threads(),
    }


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` such that a reader finds the old file or the new one."""
    replace_file(path, [text.encode()])


def reserve_results(folder: RunFolder, model: Mapping[str, Tensor], about: Description) -> None:
    """Take the room on the disk that `write_results` will need, so that a disk that fills up while
    the run trains does not cost its results. Raises OSError."""
    for path, size in _room(folder, model, about).items():
        reserve(path, size)


def missing_room(folder: RunFolder, model: Mapping[str, Tensor], about: Description) -> int:
    """Bytes of the disk that `reserve_results` will take; an earlier session may have done so."""
    missing = 0
    for path, size in _room(folder, model, about).items():
        reserved = partial_name(path)
        missing += max(0, size - (reserved.stat().st_size if reserved.exists() else 0))
    return missing


def _room(folder: RunFolder, model: Mapping[str, Tensor], about: Description) -> dict[Path, int]:
    """Of the disk, for each file of the results, in bytes."""
    size = packed_size(model, about.metadata()) + _DIGITS_BYTES
    return {folder.model: size, folder.summary: _SUMMARY_BYTES}


def write_results(
    folder: RunFolder,
    model: Mapping[str, Tensor],
    about: Description,
    summary: Mapping[str, Any],
) -> None:
    """Write model.safetensors and then summary.json, which says that the run is finished, each over
    the room that was taken for it. Raises OSError."""
    replace_file(folder.model, pack_tensors(model, about.metadata()))
    write_json(folder.summary, summary)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_object(read_small(path))
    except ValueError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, why: object) -> ConfigError:
    return ConfigError(
        f"{path} cannot be read ({why}): bring it back, or remove this file alone, and the same "
        f"command writes it anew"
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((ln.partition(":")[2].strip() for ln in lines if ln.startswith("model name")), "")
