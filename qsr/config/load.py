"""Command line -> Config: composed by Hydra, parsed and checked once.

Any error raises ConfigError with one line that names the setting and says how to fix it, before any
process group, GPU or folder is used.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsr.config.checks import check, check_model_name, check_plan, check_reading
from qsr.config.compose import (
    GIVEN,
    choose_files,
    compose_defaults,
    compose_settings,
    mark_given_speed,
)
from qsr.config.identity import (
    EXECUTION,
    LATER,
    config_hash,
    differences,
    identity,
    is_execution,
    run_folder,
    settings_hash,
    to_dict,
)
from qsr.config.naming import RunNames
from qsr.config.overrides import expand_sweeps, parse_overrides
from qsr.config.own import copies, source_hashes
from qsr.config.parsing import KINDS, drop_settings_of_others, parse
from qsr.config.places import CONFIG_DIR
from qsr.config.rehearsal import Rehearsal, for_rehearsal, rehearse, take_evaluation
from qsr.config.replay import rounds_of
from qsr.config.schema import Config, DataConfig, OwnPart
from qsr.errors import ConfigError

__all__ = [
    "CONFIG_DIR",
    "EXECUTION",
    "GIVEN",
    "LATER",
    "ConfigError",
    "add_sources",
    "check",
    "check_model_name",
    "check_plan",
    "check_reading",
    "config_hash",
    "differences",
    "expand_sweeps",
    "identity",
    "load_config",
    "load_configs",
    "own_files",
    "parse_config",
    "parse_identity",
    "run_folder",
    "settings_hash",
    "to_dict",
    "without_execution",
]


def load_configs(
    overrides: Sequence[str], config_dir: Path = CONFIG_DIR, more: Sequence[Path] = ()
) -> list[Config]:
    """The runs that these command-line overrides ask for. An override with a list of values, as in
    seed=1,2,3, gives a run for each value; several lists give every combination. `more`: folders
    with further experiments and files of groups."""
    folders = (config_dir, *more)
    names = RunNames(folders, is_execution)
    return [_load(choice, folders, names) for choice in expand_sweeps(overrides, folders)]


def load_config(
    overrides: Sequence[str], config_dir: Path = CONFIG_DIR, more: Sequence[Path] = ()
) -> Config:
    """The one run that these overrides ask for, for example
    ["experiment=demo/quadratic", "seed=2", "sync.alpha=0.5"]."""
    configs = load_configs(overrides, config_dir, more)
    if len(configs) > 1:
        raise ConfigError(f"these settings ask for {len(configs)} runs: ask for one")
    return configs[0]


def _load(overrides: Sequence[str], folders: Sequence[Path], names: RunNames) -> Config:
    parsed = parse_overrides(overrides)
    choices = choose_files(parsed, folders)
    if choices.get("rehearsal") is not None:
        parsed = parse_overrides(for_rehearsal(parsed, keep=choices.get("experiment") is None))
        choices = choose_files(parsed, folders)
    raw = compose_settings(parsed, folders)
    given = [override.key_or_group for override in parsed]
    name = names.name(choices, given, raw)
    for group in choices.keys() & KINDS.keys():
        # an experiment's settings for the member of the group that this one replaces
        drop_settings_of_others(Config, group, raw[group], keep=given)
    mark_given_speed(raw, parsed)
    add_sources(raw)
    if raw.get("rehearsal") is not None:
        take_evaluation(raw, parsed)
    rehearsal = raw.pop("rehearsal", None)
    config = parse_config({**raw, "experiment": name})
    if rehearsal is None:
        return config
    settings = parse(Rehearsal, rehearsal, prefix="rehearsal.")
    data = parse_overrides([f"data={settings.data}"])
    small = compose_settings([*parsed, *data], folders)["data"]
    try:
        config = rehearse(config, settings, parse(DataConfig, small, prefix="data."))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    check(config)
    return config


def add_sources(settings: dict[str, Any]) -> None:
    """Fill in the hashes of the parts that the user wrote, and the rounds in a file of theirs.
    Raises ConfigError."""
    sync = settings.get("sync")
    if isinstance(sync, dict) and sync.get("rule") == "replay":
        if "rounds" in sync:
            raise ConfigError("sync.rounds is filled in by qsr from sync.file: leave it out")
        file = sync.get("file")  # the schema refuses it if it is no text
        sync["rounds"] = rounds_of(file) if isinstance(file, str) else ""
    for group, kind in (("model", "name"), ("schedule", "name"), ("sync", "rule")):
        part = settings.get(group)
        if not isinstance(part, dict) or part.get(kind) != "custom":
            continue
        if "source" in part:
            raise ConfigError(f"{group}.source is filled in by qsr: leave it out")
        target = part.get("target")  # the schema refuses it if it is no text
        part["source"] = source_hashes(group, target) if isinstance(target, str) else {}


def own_files(configs: Sequence[Config]) -> dict[str, Path]:
    """The user's files that these runs need, by their paths in a copy of the project. Raises
    ConfigError."""
    found: dict[str, Path] = {}
    for config in configs:
        parts = {"model": config.model, "schedule": config.schedule, "sync": config.sync}
        found |= copies({g: part.target for g, part in parts.items() if isinstance(part, OwnPart)})
    return found


def parse_config(raw: Mapping[str, Any]) -> Config:
    """Parse and check nested dictionaries, as config.yaml of a run folder holds them."""
    config = parse(Config, raw)
    check(config)
    return config


def parse_identity(raw: Mapping[str, Any], config_dir: Path = CONFIG_DIR) -> Config:
    """Parse config.yaml of a run folder, with the execution settings of train.yaml instead of its
    own: its own may be from another version, and a report does not need them."""
    settings = without_execution(raw, config_dir)
    try:
        _translate_first_version(settings)
        settings.setdefault("ema", {})
        for name, value in LATER.items():
            *path, leaf = name.split(".")
            _inner(settings, path).setdefault(leaf, value)
    except (TypeError, LookupError, AttributeError):
        raise ConfigError("settings are missing") from None
    config = parse(Config, settings)
    check(config, run_code=False)  # it may be gone
    return config


def without_execution(raw: Mapping[str, Any], config_dir: Path = CONFIG_DIR) -> dict[str, Any]:
    """The settings from config.yaml of a run folder, with the execution settings of train.yaml
    instead of its own. Raises ConfigError if `raw` does not have the structure of settings."""
    defaults = compose_defaults(config_dir)
    settings = copy.deepcopy(dict(raw))
    for name in EXECUTION:
        *path, leaf = name.split(".")
        _inner(settings, path)[leaf] = _inner(defaults, path)[leaf]
    return settings


def _inner(settings: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    for part in path:
        settings = settings.get(part)  # type: ignore[assignment]
        if not isinstance(settings, dict):
            raise ConfigError(f"{part} is missing")
    return settings


def _translate_first_version(settings: dict[str, Any]) -> None:
    """Update settings of the first version. Raises ConfigError if it trained differently."""
    if settings["model"]["name"] in ("vit_b16", "small_vit") and "fp16_overflow" not in settings:
        raise ConfigError(
            "an earlier version made it, whose vit_b16 and small_vit were not the paper's networks"
        )
    augmentation = settings["data"]["augmentation"]
    if "randaugment_strength" not in augmentation:
        return
    if augmentation["randaugment_depth"]:
        raise ConfigError(
            "an earlier version made it, whose RandAugment was weaker than the paper's"
        )
    for name in ("randaugment_strength", "randaugment_uniform"):
        del augmentation[name]
    augmentation |= {"randaugment": "none", "randaugment_depth": None, "randaugment_severity": None}
