"""The folder of a run, and the record of where it ran."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
import yaml

from qsr.config.load import ConfigError, differences, parse_identity, run_folder, to_dict
from qsr.config.schema import Config
from qsr.distributed import Topology

PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "timm", "hydra-core", "safetensors")


class RunFolder:
    """Paths of a run: config.yaml, environment.json, metrics.jsonl, summary.json, checkpoints/ and
    model.safetensors, the averaged model at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.data = path / "data.json"
        self.environment = path / "environment.json"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model.safetensors"

    def summary_if_finished(self) -> dict[str, Any] | None:
        """The summary, if this run has come to its end."""
        if not self.summary.exists():
            return None
        summary: dict[str, Any] = json.loads(self.summary.read_text())
        return summary


def check_run_folder(config: Config, data: Mapping[str, Any]) -> RunFolder:
    """The run's folder, untouched. Raises ConfigError if another run lives there: one with other
    settings, or on other `data` (what the caller knows of the data set and how it is read)."""
    folder = RunFolder(run_folder(config))
    if folder.config.exists():
        changed = differences(config, read_config(folder.config))
        if changed:
            raise ConfigError(
                f"{folder.path} holds a run with other settings ({'; '.join(changed)}): delete it, "
                f"or choose another runs_dir"
            )
    if folder.data.exists():
        stored = json.loads(folder.data.read_text())
        changed = [f"{k}: {stored.get(k)} -> {v}" for k, v in data.items() if stored.get(k) != v]
        if changed:
            raise ConfigError(
                f"{folder.path} holds a run on other data ({'; '.join(changed)}): delete it, or "
                f"choose another runs_dir"
            )
    return folder


def make_run_folder(folder: RunFolder) -> None:
    """Make the folder if need be, and see that this rank can write there. Raises ConfigError."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        # permissions alone do not tell: root may do all, and the disk may be full
        with TemporaryFile(dir=folder.path) as probe:
            probe.write(b"\0" * 65536)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise ConfigError(
            f"{folder.path} cannot be written ({error}): choose another runs_dir"
        ) from None


def read_config(path: Path) -> Config:
    """A run's config.yaml. Raises ConfigError if it is not one that this version reads."""
    try:
        return parse_identity(yaml.safe_load(path.read_text()))
    except (ConfigError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} cannot be read by this version ({error}): delete {path.parent}, or use the "
            f"version that made it"
        ) from None


def write_records(
    folder: RunFolder, config: Config, data: Mapping[str, Any], topology: Topology, device: str
) -> None:
    """Write config.yaml, data.json and environment.json."""
    write_json(folder.data, data)
    write_text(folder.config, yaml.safe_dump(to_dict(config), sort_keys=False))
    write_json(folder.environment, environment(topology, device))


def environment(topology: Topology, device: str) -> dict[str, Any]:
    """Versions, revision and hardware."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES if _version(name)},
        "git": _git_revision(),
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
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        return {
            "revision": git("rev-parse", "HEAD"),
            "modified": bool(git("status", "--porcelain")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None  # not run from a git checkout


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((ln.partition(":")[2].strip() for ln in lines if ln.startswith("model name")), "")
