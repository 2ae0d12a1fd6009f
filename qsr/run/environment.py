"""Records what runs and where: versions, revision, hardware, and the code of earlier sessions."""

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from qsr.config.load import to_dict
from qsr.config.schema import Config
from qsr.errors import ConfigError
from qsr.run.folder import RunFolder, read_record, write_json, write_text
from qsr.run.snapshot import git_revision, running_code
from qsr.sync.topology import Topology

_COMPUTING = ("torch", "torchvision", "nvidia-dali-cuda130", "timm")
PACKAGES = (*_COMPUTING, "hydra-core", "safetensors")


def write_records(
    folder: RunFolder,
    config: Config,
    data: Mapping[str, Any],
    topology: Topology,
    device: str,
    decoder: str | None = None,
) -> None:
    """Write config.yaml, data.json and environment.json; remove an earlier failure.json.
    `decoder`: what decodes JPEGs on the GPU, if something was to."""
    earlier = _earlier_code(folder)
    write_json(folder.data, data)
    write_text(folder.config, yaml.safe_dump(to_dict(config), sort_keys=False))
    found = environment(topology, device) | {"decoder": decoder, "earlier_code": earlier}
    write_json(folder.environment, found)
    folder.failure.unlink(missing_ok=True)


def other_code(folder: RunFolder) -> str | None:
    """A one-line warning if earlier sessions of the run used different code, otherwise None."""
    earlier = _earlier_code(folder)
    if not earlier:
        return None
    return (
        f"{folder.path} was started with different code (hash of qsr/ was {earlier[-1]}, is now "
        f"{running_code()}): the run resumes, but its result may differ"
    )


def _earlier_code(folder: RunFolder) -> list[str]:
    """Code hashes of earlier sessions, except the current one."""
    if not folder.environment.exists():
        return []
    try:
        stored = read_record(folder.environment)
    except ConfigError:  # only a record: the run does not depend on it
        stored = {}
    earlier = stored.get("earlier_code", [])
    codes = [*(earlier if isinstance(earlier, list) else []), stored.get("code", "unknown")]
    texts = dict.fromkeys(code for code in codes if isinstance(code, str))
    return [code for code in texts if code != running_code()]


def code_that_runs() -> dict[str, str | None]:
    """Versions that, besides settings and data, determine what this process computes; they must be
    the same on all ranks."""
    python = ".".join(platform.python_version_tuple()[:2])
    packages = {name: _version(name) for name in _COMPUTING}
    return {"qsr": running_code(), "python": python, **packages}


def environment(topology: Topology, device: str) -> dict[str, Any]:
    """The contents of environment.json, except earlier_code: versions, revision and hardware."""
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
        "ranks_per_worker": topology.ranks_per_worker,
        "threads_per_rank": torch.get_num_threads(),
    }


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
