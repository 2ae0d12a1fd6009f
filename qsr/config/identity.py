"""What a run is: the settings that decide what it computes, its hash and its folder."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsr.config.parsing import flatten
from qsr.config.schema import Config

EXECUTION = (
    "checkpoint",
    "cluster",
    "data.loader_threads",
    "data.prefetch_batches",
    "data.root",
    "evaluation.batch",
    "evaluation.every_epochs",
    "profile",
    "runs_dir",
    "speed",
    "stop_after_steps",
    "tracking",
)
"""Settings that say how a run is executed and not what it computes. They are not part of a run's
identity, its folder's name or its hash, and they may change when it resumes."""

LATER = {
    "sync.delay_steps": 0,
    "sync.h_max": None,
    "sync.outer_lr": 1.0,
    "sync.outer_momentum": 0.0,
    "sync.outer_nesterov": False,
    "sync.outer_rate_correction": False,
    "schedule.final_lr": 0.0,
    "fp16_overflow": "skip",
    "ranks_per_worker": 1,
    "compile": "none",
    "cuda_graphs": False,
    "data.label_noise": 0.0,
    "ema.decay": None,
    "ema.uniform_fraction": None,
}
"""Settings added after the first runs, each with the value that matches what those runs did. With
that value a setting is not part of a run's identity, so that older runs keep their identity."""


def to_dict(settings: Any) -> dict[str, Any]:
    """Nested dictionaries of a Config, as config.yaml holds them, or of other settings."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))  # type: ignore[no-any-return]


def identity(config: Config) -> dict[str, Any]:
    """The settings that decide what a run computes, by dotted name."""
    return _identity(to_dict(config))


def _identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in flatten(settings)
        if key != "experiment" and not is_execution(key) and (key, value) not in LATER.items()
    }


def config_hash(config: Config) -> str:
    """16 hex digits, equal for runs that compute the same."""
    return settings_hash(to_dict(config))


def settings_hash(settings: Mapping[str, Any]) -> str:
    """The hash for settings from a config.yaml, also one of an earlier version."""
    text = json.dumps(_identity(settings), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(config: Config, stored: Config) -> list[str]:
    """How two runs differ, as "name: stored -> now" lines; empty if they are the same."""
    now, before = LATER | identity(config), LATER | identity(stored)
    return [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key)
    ]


def run_folder(config: Config) -> Path:
    """The folder of a run. It depends only on the experiment and the seed, so that the same command
    finds the same run."""
    return Path(config.runs_dir) / config.experiment / f"seed_{config.seed}"


def is_execution(key: str) -> bool:
    return any(key == name or key.startswith(name + ".") for name in EXECUTION)
