"""Command line -> Config: composed by Hydra, parsed and checked once.

Whatever is wrong raises ConfigError with one line that names the setting and the mend, before any
process group, GPU or folder is touched.
"""

import dataclasses
import difflib
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from qsr.config.planning import make_plan
from qsr.config.schema import Config

CONFIG_DIR = Path(__file__).parents[2] / "configs"

EXECUTION = (
    "checkpoint",
    "cluster",
    "data.loader_threads",
    "data.prefetch_batches",
    "data.root",
    "evaluation.batch",
    "evaluation.every_epochs",
    "runs_dir",
    "stop_after_steps",
    "tracking",
)
"""Settings that say how a run is carried out and not what it computes. They are no part of a
run's identity: not of its folder's name, not of its hash, and they may change at a resumption."""

GIVEN = "given on the command line"
"""The source of a cluster's constant that an override replaced."""

_ADAPTER = TypeAdapter(Config)


class ConfigError(Exception):
    """One line: the setting, what is wrong with it, what would be right."""


def load_config(overrides: Sequence[str], config_dir: Path = CONFIG_DIR) -> Config:
    """The run that these command-line overrides ask for, for example
    ["experiment=demo/quadratic", "seed=2", "sync.alpha=0.02"]."""
    parsed = _parse_overrides(overrides)
    groups = _config_groups(config_dir)
    raw = _compose(parsed, groups, config_dir)
    _mark_given_speed(raw, parsed)
    return parse_config({**raw, "experiment": _experiment_name(parsed)})


def load_configs(overrides: Sequence[str], config_dir: Path = CONFIG_DIR) -> list[Config]:
    """The runs that these overrides ask for: a sweep in Hydra's syntax, as in
    "sync.alpha=0.01,0.0175", gives a run for each of its values, several sweeps all
    combinations."""
    return [load_config(choice, config_dir) for choice in expand_sweeps(overrides)]


def expand_sweeps(overrides: Sequence[str]) -> list[list[str]]:
    """Overrides without sweeps, one list for each combination of the values of all sweeps; the
    last sweep changes fastest."""
    parser = OverridesParser.create()
    choices = []
    for text in overrides:
        override = _parse_override(parser, text)
        if not override.is_sweep_override():
            choices.append([text])
        elif override.is_discrete_sweep():
            name = text.partition("=")[0]
            choices.append([f"{name}={value}" for value in override.sweep_string_iterator()])
        else:
            raise ConfigError(f"{text!r}: name the values, separated by commas")
    return [list(combination) for combination in itertools.product(*choices)]


def parse_config(raw: Mapping[str, Any]) -> Config:
    """Parse and check plain nested dictionaries (what config.yaml of a run folder holds)."""
    try:
        # as JSON, because strict parsing of Python objects takes no dictionary for a dataclass
        config = _ADAPTER.validate_json(json.dumps(raw))
    except ValidationError as error:
        raise ConfigError("; ".join(_describe(error, raw))) from None
    check(config)
    return config


def check(config: Config) -> None:
    """Checks that need more than one setting. Raises ConfigError."""
    local, remainder = divmod(config.global_batch, config.workers)
    if remainder:
        raise ConfigError(
            f"global_batch={config.global_batch} does not divide by workers={config.workers}"
        )
    if local % config.micro_batch_size:
        raise ConfigError(
            f"micro_batch={config.micro_batch} does not divide the local batch {local} "
            f"(global_batch={config.global_batch} / workers={config.workers})"
        )
    ranks = config.cluster.ranks
    if ranks is not None and config.workers % ranks:
        raise ConfigError(
            f"cluster.ranks={ranks} does not divide workers={config.workers}: every rank holds "
            f"workers / ranks of them; try cluster.ranks={_divisors(config.workers)}"
        )
    if (config.model.timm_name is None) == (config.model.name == "timm"):
        raise ConfigError("model.timm_name goes with model.name=timm, and only with it")
    if config.schedule.warmup_steps is not None and config.schedule.warmup_epochs is not None:
        raise ConfigError("give schedule.warmup_steps or schedule.warmup_epochs, not both")
    if config.data.augmentation.min_area > config.data.augmentation.max_area:
        raise ConfigError("data.augmentation.min_area exceeds max_area")
    if config.data.augmentation.min_aspect > config.data.augmentation.max_aspect:
        raise ConfigError("data.augmentation.min_aspect exceeds max_aspect")
    if min(config.data.std) <= 0:
        raise ConfigError(f"data.std must be positive, got {list(config.data.std)}")
    if getattr(config.optimizer, "nesterov", False) and not getattr(
        config.optimizer, "momentum", 0
    ):
        raise ConfigError("optimizer.nesterov=true needs optimizer.momentum above 0")
    if config.sync.average_second_moment and config.optimizer.name == "sgd":
        raise ConfigError("sync.average_second_moment=true: sgd has no second moment")
    if config.sync.average_momentum and getattr(config.optimizer, "momentum", 1.0) == 0.0:
        raise ConfigError(
            "sync.average_momentum=true, but optimizer.momentum=0: there is no momentum"
        )
    if config.data.decode == "gpu" and config.cluster.device == "cpu":
        raise ConfigError("data.decode=gpu goes with a GPU: take data.decode=auto")
    if config.data.decode == "gpu" and config.data.loader == "torchvision":
        raise ConfigError("data.decode=gpu goes with DALI: take data.loader=dali")
    if config.data.train_images is not None:
        check_plan(config, config.data.train_images)


def check_plan(config: Config, train_images: int) -> None:
    """Checks that need the size of the training set: the plan must exist. Raises ConfigError."""
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


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionaries, as config.yaml holds them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[no-any-return]


def identity(config: Config) -> dict[str, Any]:
    """The settings that decide what a run computes, by dotted name."""
    return {
        key: value
        for key, value in _flatten(to_dict(config))
        if key != "experiment" and not _is_execution(key)
    }


def config_hash(config: Config) -> str:
    """16 hex digits that are equal for runs that compute the same."""
    text = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(config: Config, stored: Config) -> list[str]:
    """What distinguishes two runs, as "name: stored -> now" lines; empty if they are the same."""
    now, before = identity(config), identity(stored)
    return [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key)
    ]


def run_folder(config: Config) -> Path:
    """Where a run lives: a function of the experiment and the seed, without a timestamp, so that
    the same command finds the same run."""
    return Path(config.runs_dir) / config.experiment / f"seed_{config.seed}"


def _parse_overrides(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        override = _parse_override(parser, text)
        if override.is_sweep_override():
            raise ConfigError(f"{text!r}: this command makes one run; give one value")
        parsed.append(override)
    return parsed


def _parse_override(parser: OverridesParser, text: str) -> Override:
    try:
        return parser.parse_override(text)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{text!r} is not of the form setting=value ({reason})") from None


def _mark_given_speed(raw: dict[str, Any], parsed: Iterable[Override]) -> None:
    """What a profile says of its sources does not hold for constants of the command line."""
    speed = raw["cluster"].get("speed")
    if not isinstance(speed, dict) or "sources" not in speed:
        return  # refused below
    for override in parsed:
        group, _, name = override.key_or_group.rpartition(".")
        if group != "cluster.speed":
            continue
        value = override.value()
        for constant in value if isinstance(value, dict) else [name]:
            speed["sources"][str(constant)] = GIVEN
        if name in ("link_gbit_per_second", "latency_seconds"):
            speed["allreduce"] = None  # measured times would hide them


def _compose(parsed: Sequence[Override], groups: frozenset[str], config_dir: Path) -> Any:
    arguments = []
    for override in parsed:
        text = override.input_line or ""
        if override.is_add() and override.key_or_group in groups:
            text = text.lstrip("+")
        elif override.key_or_group not in groups and not override.is_delete():
            # forced, so that an unknown name reaches the schema: Hydra's own message for it would
            # advise to append it with "+", and would then take it
            text = "++" + text.lstrip("+")
        arguments.append(text)
    try:
        with initialize_config_dir(str(config_dir), version_base="1.3"):
            composed = compose("train", arguments)
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(
                f"{missing[0]} has no value: choose an experiment "
                f"({', '.join(_options(config_dir, 'experiment'))}) or set it"
            )
        return OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_describe_hydra(error, parsed, groups, config_dir)) from None


def _describe_hydra(
    error: Exception, parsed: Sequence[Override], groups: frozenset[str], config_dir: Path
) -> str:
    for override in parsed:
        if override.key_or_group in groups:
            options = _options(config_dir, override.key_or_group)
            value = override.value()
            if value is not None and value not in options:
                return (
                    f"{override.key_or_group}={value}: no such file in configs; "
                    f"{_suggest(str(value), options)}"
                )
    return " ".join(str(error).split())


def _experiment_name(parsed: Iterable[Override]) -> str:
    """The experiment's file name and, sorted, the overrides that change what it computes."""
    experiment, changes = "custom", []
    for override in parsed:
        key = override.key_or_group
        if key == "experiment":
            experiment = str(override.value())
        elif key != "seed" and not _is_execution(key):
            value = override.get_value_element_as_str() if not override.is_delete() else ""
            changes.append(f"{key}={value}".replace("/", "_"))
    if not changes:
        return experiment
    text = ",".join(sorted(changes))
    if len(text) > 120:  # folders' names end at 255 bytes, tables' columns before
        text = text[:100] + "," + hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{experiment}/{text}"


def _is_execution(key: str) -> bool:
    return any(key == name or key.startswith(name + ".") for name in EXECUTION)


def _config_groups(config_dir: Path) -> frozenset[str]:
    return frozenset(path.name for path in config_dir.iterdir() if path.is_dir())


def _options(config_dir: Path, group: str) -> list[str]:
    folder = config_dir / group
    names = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml"))
    return sorted(name.as_posix() for name in names)


def _describe(error: ValidationError, raw: Mapping[str, Any]) -> Iterable[str]:
    """One line for each thing that pydantic refused."""
    for item in error.errors(include_url=False, include_context=False):
        # a kind's own word stands in the location of its fields: ("sync", "quadratic", "alpha")
        kinds = {"optimizer": "name", "schedule": "name", "sync": "rule"}
        location = [str(part) for part in item["loc"]]
        kind = ""
        if len(location) > 1 and location[0] in kinds:
            word = location.pop(1)
            kind = f" of {location[0]}.{kinds[location[0]]}={word}"
        name = ".".join(location)
        match item["type"]:
            case "unexpected_keyword_argument" | "dataclass_exact_type":
                yield f"{name} is not a setting{kind}; {_suggest_setting(location, raw)}"
            case "missing":
                yield f"{name} is missing{kind}"
            case "union_tag_invalid" | "union_tag_not_found":
                yield f"{name}.{kinds[location[0]]}: {_lower(item['msg'])}"
            case _:
                yield f"{name}={item['input']!r}: {_lower(item['msg'])}"


def _field_names(path: Sequence[str], raw: Mapping[str, Any]) -> list[str]:
    """The fields that exist at `path`, for the kind chosen there."""
    node: Any = Config
    for part in path:
        hint = {field.name: field.type for field in dataclasses.fields(node)}[part]
        candidates = list(_dataclasses_of(hint))
        chosen = raw.get(part)
        word = chosen.get("name", chosen.get("rule")) if isinstance(chosen, Mapping) else None
        node = next((c for c in candidates if _kind_of(c) == word), candidates[0])
    return [field.name for field in dataclasses.fields(node)]


def _dataclasses_of(hint: Any) -> list[Any]:
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [found for part in getattr(hint, "__args__", ()) for found in _dataclasses_of(part)]


def _kind_of(cls: Any) -> str | None:
    for field in dataclasses.fields(cls):
        if field.name in ("name", "rule"):
            return next(iter(getattr(field.type, "__args__", ())), None)
    return None


def _suggest_setting(location: Sequence[str], raw: Mapping[str, Any]) -> str:
    """The nearest setting beside the wrong one, or one of that name elsewhere."""
    *path, word = location
    wrong = ".".join(location)
    elsewhere = [n for n, _ in _flatten(raw) if n.rpartition(".")[2] == word and n != wrong]
    names = _field_names(path, raw)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close or not elsewhere:
        return _suggest(wrong, [".".join([*path, name]) for name in close or names])
    return _suggest(wrong, elsewhere[:1])


def _suggest(word: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"there are: {', '.join(valid)}"


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _divisors(number: int) -> str:
    return " or ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
