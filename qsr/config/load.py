"""Command line -> Config: composed by Hydra, parsed and checked once.

Any error raises ConfigError with one line that names the setting and says how to fix it, before any
process group, GPU or folder is used.
"""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsr.config.batch_script import check_batch_script
from qsr.config.compose import (
    GIVEN,
    choose_files,
    compose_defaults,
    compose_settings,
    mark_given_speed,
)
from qsr.config.naming import RunNames
from qsr.config.overrides import expand_sweeps, parse_overrides
from qsr.config.parsing import flatten, parse
from qsr.config.places import CONFIG_DIR
from qsr.config.planning import make_plan
from qsr.config.rehearsal import Rehearsal, for_rehearsal, rehearse, take_evaluation
from qsr.config.schema import (
    AugmentationConfig,
    Config,
    DataConfig,
    ModelConfig,
    SlurmCluster,
    SyncConfig,
)
from qsr.errors import ConfigError

__all__ = [
    "CONFIG_DIR",
    "EXECUTION",
    "GIVEN",
    "ConfigError",
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
    "parse_config",
    "parse_identity",
    "run_folder",
    "settings_hash",
    "to_dict",
    "without_execution",
]

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
    "stop_after_steps",
    "tracking",
)
"""Settings that say how a run is executed and not what it computes. They are not part of a run's
identity, its folder's name or its hash, and they may change when it resumes."""

LATER = {
    "sync.delay_steps": 0,
    "schedule.final_lr": 0.0,
    "fp16_overflow": "skip",
    "ranks_per_worker": 1,
    "compile": "none",
    "cuda_graphs": False,
    "data.label_noise": 0.0,
}
"""Settings added after the first runs, each with the value that matches what those runs did. With
that value a setting is not part of a run's identity, so that older runs keep their identity."""

_SBATCH_ELSEWHERE = {
    "account": "set cluster.account",
    "array": "list seeds, as in seed=1,2,3: each gets a job",
    "constraint": "set cluster.constraint",
    "cpus-per-task": "set cluster.cpus_per_task",
    "error": "logs are written to slurm/ in the run folder",
    "gpus-per-node": "set cluster.gpus_per_node",
    "job-name": "jobs are named after their run",
    "mem": "set cluster.memory_gb",
    "no-requeue": "set cluster.requeue",
    "nodes": "set cluster.nodes",
    "ntasks": "set cluster.nodes and cluster.ranks_per_node",
    "ntasks-per-node": "set cluster.ranks_per_node",
    "open-mode": "a restarted job appends to its logs",
    "output": "logs are written to slurm/ in the run folder",
    "partition": "set cluster.partition",
    "qos": "set cluster.qos",
    "requeue": "set cluster.requeue",
    "reservation": "set cluster.reservation",
    "signal": "set cluster.signal and cluster.signal_lead_seconds",
    "time": "set cluster.time_limit_minutes",
}
"""Options of sbatch that cluster.sbatch must not hold, and what to do instead."""


def load_configs(
    overrides: Sequence[str], config_dir: Path = CONFIG_DIR, more: Sequence[Path] = ()
) -> list[Config]:
    """The runs that these command-line overrides ask for. An override with a list of values, as in
    seed=1,2,3, gives a run for each value; several lists give every combination. `more`: folders
    with further experiments and files of groups."""
    folders = (config_dir, *more)
    names = RunNames(folders, _is_execution)
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
    name = names.name(choices, [override.key_or_group for override in parsed], raw)
    mark_given_speed(raw, parsed)
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
        for name, value in LATER.items():
            *path, leaf = name.split(".")
            _inner(settings, path).setdefault(leaf, value)
    except (TypeError, LookupError, AttributeError):
        raise ConfigError("settings are missing") from None
    return parse_config(settings)


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


def check(config: Config) -> None:
    """Checks across several settings. Raises ConfigError."""
    shards = _shards(config)
    if config.global_batch % config.shards:
        raise ConfigError(f"global_batch={config.global_batch} is not divisible by {shards}")
    if config.shard_size % config.micro_batch_size:
        raise ConfigError(
            f"micro_batch={config.micro_batch} does not divide the local batch {config.shard_size} "
            f"(global_batch={config.global_batch} / {shards.replace(' x ', ' / ')})"
        )
    ranks = config.cluster.ranks
    if ranks is not None and config.ranks_per_worker > 1 and ranks != config.shards:
        raise ConfigError(
            f"cluster.ranks={ranks}, but {shards} needs {config.shards} ranks: leave out "
            f"cluster.ranks"
        )
    if ranks is not None and config.ranks_per_worker == 1 and config.workers % ranks:
        raise ConfigError(
            f"cluster.ranks={ranks} does not divide workers={config.workers}: every rank holds the "
            f"same number of workers; try cluster.ranks={_divisors(config.workers)}"
        )
    if isinstance(config.cluster, SlurmCluster):
        _check_slurm(config.cluster, config)
        check_batch_script(config.cluster, config.experiment, run_folder(config))
        if config.cluster.signal not in config.checkpoint.stop_signals:
            raise ConfigError(
                f"cluster.signal={config.cluster.signal} is not in checkpoint.stop_signals: add "
                f"it, or the run would end without a checkpoint"
            )
    check_model_name(config.model)
    if config.schedule.warmup_steps is not None and config.schedule.warmup_epochs is not None:
        raise ConfigError("give schedule.warmup_steps or schedule.warmup_epochs, not both")
    if config.schedule.final_lr > config.schedule.peak_lr:
        raise ConfigError(
            f"schedule.final_lr={config.schedule.final_lr:g} exceeds "
            f"schedule.peak_lr={config.schedule.peak_lr:g}"
        )
    if config.data.augmentation.min_area > config.data.augmentation.max_area:
        raise ConfigError("data.augmentation.min_area exceeds max_area")
    if config.data.augmentation.min_aspect > config.data.augmentation.max_aspect:
        raise ConfigError("data.augmentation.min_aspect exceeds max_aspect")
    _check_randaugment(config.data.augmentation)
    if config.cuda_graphs and config.cluster.device == "cpu":
        raise ConfigError("cuda_graphs=true needs a GPU, but cluster.device=cpu: set one of them")
    check_reading(config.data, config.cluster.device)
    if getattr(config.optimizer, "nesterov", False) and not getattr(
        config.optimizer, "momentum", 0
    ):
        raise ConfigError("optimizer.nesterov=true needs optimizer.momentum above 0")
    if config.sync.average_second_moment and config.optimizer.name == "sgd":
        raise ConfigError("sync.average_second_moment=true: sgd has no second moment")
    if config.sync.average_momentum and getattr(config.optimizer, "momentum", 1.0) == 0.0:
        raise ConfigError(
            "sync.average_momentum=true, but optimizer.momentum=0: there is no momentum to average"
        )
    if config.sync.delay_steps:
        _check_delay(config.sync)
    if config.profile.steps is not None:
        _check_profile(*config.profile.steps)
    if config.data.train_images is not None:
        check_plan(config, config.data.train_images)


_MOST_PROFILED_STEPS = 100
"""More would fill the host's memory, and no viewer opens their trace."""


def _check_profile(first: int, last: int) -> None:
    steps = f"profile.steps=[{first},{last}]"
    if first > last:
        raise ConfigError(f"{steps}: the first step comes first, as in [{last},{first}]")
    if last - first >= _MOST_PROFILED_STEPS:
        raise ConfigError(
            f"{steps}: record at most {_MOST_PROFILED_STEPS} steps, as in "
            f"[{first},{first + _MOST_PROFILED_STEPS - 1}]"
        )


def check_model_name(model: ModelConfig) -> None:
    """Raise ConfigError unless model.timm_name is set exactly if model.name is timm."""
    if (model.timm_name is None) == (model.name == "timm"):
        raise ConfigError("model.timm_name must be set if model.name=timm, and only then")


def check_reading(data: DataConfig, device: str) -> None:
    """Checks of the settings for reading images. Raises ConfigError."""
    if min(data.std) <= 0:
        raise ConfigError(f"data.std must be positive, got {list(data.std)}")
    if data.decode == "gpu" and device == "cpu":
        raise ConfigError("data.decode=gpu needs a GPU: use data.decode=auto")
    if data.decode == "gpu" and data.loader in ("torchvision", "memory"):
        raise ConfigError("data.decode=gpu needs DALI: use data.loader=dali")
    if data.loader == "memory" and data.augmentation != _NO_AUGMENTATION:
        raise ConfigError(
            "data.loader=memory keeps every image as it is, without data.augmentation: use "
            "data.loader=auto, or set min_area, max_area, min_aspect and max_aspect to 1, "
            "flip_probability to 0 and randaugment to none, as in configs/data/glyphs.yaml"
        )


_NO_AUGMENTATION = AugmentationConfig(
    min_area=1.0,
    max_area=1.0,
    min_aspect=1.0,
    max_aspect=1.0,
    flip_probability=0.0,
    randaugment="none",
    randaugment_depth=None,
    randaugment_severity=None,
)
"""Every image as it is, if it is square."""


_RANDAUGMENT_SEVERITY = {"composer": 10, "torchvision": 30, "timm": 10}
"""The highest data.augmentation.randaugment_severity of each library."""


def _check_randaugment(settings: AugmentationConfig) -> None:
    kind = f"data.augmentation.randaugment={settings.randaugment}"
    depth, severity = settings.randaugment_depth, settings.randaugment_severity
    if settings.randaugment == "none":
        if depth is not None or severity is not None:
            raise ConfigError(
                f"{kind}: set randaugment_depth and randaugment_severity to null, or choose "
                f"composer (the paper's), torchvision or timm"
            )
        return
    highest = _RANDAUGMENT_SEVERITY[settings.randaugment]
    if depth is None or severity is None:
        raise ConfigError(
            f"{kind} needs data.augmentation.randaugment_depth (usually 2) and "
            f"randaugment_severity (0 to {highest})"
        )
    if severity > highest or (settings.randaugment == "torchvision" and severity % 1):
        whole = " and a whole number" if settings.randaugment == "torchvision" else ""
        raise ConfigError(
            f"data.augmentation.randaugment_severity={severity:g}: {settings.randaugment}'s must "
            f"be between 0 and {highest}{whole}"
        )


def _check_delay(sync: SyncConfig) -> None:
    delay, smallest = f"sync.delay_steps={sync.delay_steps}", sync.smallest_h
    if smallest is None:
        raise ConfigError(f"{delay}: sync=swap averages once, at the end of the run: set it to 0")
    if sync.delay_steps >= smallest:
        raise ConfigError(
            f"{delay}: must be less than the smallest H, {smallest}, because an average must be "
            f"applied before the next round ends"
        )
    if sync.average_momentum or sync.average_second_moment:
        raise ConfigError(f"{delay}: only parameters, not moments, can be averaged with a delay")


def _check_slurm(cluster: SlurmCluster, config: Config) -> None:
    each, ranks, several = cluster.tasks_per_node, cluster.job_ranks, config.ranks_per_worker
    if not each:
        raise ConfigError("cluster.gpus_per_node=0 needs cluster.ranks_per_node: set it")
    if cluster.device != "cpu" and 0 < cluster.gpus_per_node < each:
        raise ConfigError(
            f"cluster.ranks_per_node={each} exceeds cluster.gpus_per_node={cluster.gpus_per_node}: "
            f"every rank needs a GPU of its own"
        )
    if several > 1 and ranks != config.shards:
        raise ConfigError(
            f"cluster.nodes={cluster.nodes} x {each} ranks per node = {ranks} ranks, but "
            f"{_shards(config)} needs {config.shards}: change one of them"
        )
    if several > 1 and several % each and each % several:
        raise ConfigError(
            f"ranks_per_worker={several} and {each} ranks per node: the ranks of a worker would "
            f"lie on different nodes; let one number divide the other"
        )
    if several == 1 and config.workers % ranks:
        raise ConfigError(
            f"cluster.nodes={cluster.nodes} x {each} ranks per node = {ranks} ranks do not divide "
            f"workers={config.workers}: every rank holds the same number of workers; try "
            f"{_divisors(config.workers)} ranks"
        )
    if cluster.ranks not in (None, ranks):
        raise ConfigError(
            f"cluster.ranks={cluster.ranks}, but cluster.nodes x ranks per node = {ranks}: leave "
            f"out cluster.ranks"
        )
    if cluster.signal_lead_seconds >= 60 * cluster.time_limit_minutes:
        raise ConfigError(
            f"cluster.signal_lead_seconds={cluster.signal_lead_seconds} is not shorter than "
            f"cluster.time_limit_minutes={cluster.time_limit_minutes}: the job would be told to "
            f"stop as soon as it starts"
        )
    for option in cluster.sbatch:
        fix = _SBATCH_ELSEWHERE.get(option.replace("_", "-"))
        if fix is not None:
            raise ConfigError(f"cluster.sbatch.{option}: {fix}")


def _shards(config: Config) -> str:
    """The settings that say how a step's samples are divided."""
    several = f" x ranks_per_worker={config.ranks_per_worker}"
    return f"workers={config.workers}{several if config.ranks_per_worker > 1 else ''}"


def check_plan(config: Config, train_images: int) -> None:
    """Check the plan, which depends on the size of the training set. Raises ConfigError."""
    try:
        plan = make_plan(config, train_images)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    switch_epoch = getattr(config.sync, "switch_epoch", 0)
    if switch_epoch > config.epochs:
        raise ConfigError(
            f"sync.switch_epoch={switch_epoch} lies after the last epoch, epochs={config.epochs}"
        )
    if config.stop_after_steps is not None and config.stop_after_steps > plan.total_steps:
        raise ConfigError(
            f"stop_after_steps={config.stop_after_steps} exceeds the run's {plan.total_steps} steps"
        )
    profiled = config.profile.steps
    if profiled is not None and profiled[1] > plan.total_steps:
        raise ConfigError(
            f"profile.steps=[{profiled[0]},{profiled[1]}] exceeds the run's {plan.total_steps} "
            f"steps: choose earlier ones"
        )


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dictionaries, as config.yaml holds them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[no-any-return]


def identity(config: Config) -> dict[str, Any]:
    """The settings that decide what a run computes, by dotted name."""
    return _identity(to_dict(config))


def _identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in flatten(settings)
        if key != "experiment" and not _is_execution(key) and (key, value) not in LATER.items()
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


def _is_execution(key: str) -> bool:
    return any(key == name or key.startswith(name + ".") for name in EXECUTION)


def _divisors(number: int) -> str:
    return " or ".join(str(d) for d in range(1, number + 1) if number % d == 0)
