"""Command line -> plain dictionaries: what Hydra does, with one line for whatever it refuses."""

import difflib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

CONFIG_DIR = Path(__file__).parents[2] / "configs"

GIVEN = "given on the command line"
"""The source of a cluster's constant that an override replaced."""


class ConfigError(Exception):
    """One line: the setting, what is wrong with it, what would be right."""


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Overrides, understood one by one. Raises ConfigError."""
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{text!r} is not of the form setting=value ({reason})") from None
    return parsed


def expand_sweeps(overrides: Sequence[str]) -> list[list[str]]:
    """Overrides without lists of values, one list of them for each combination; the last list
    changes fastest. Raises ConfigError."""
    choices = []
    for override in parse_overrides(overrides):
        if not override.is_sweep_override():
            choices.append([override.input_line or ""])
        elif override.is_discrete_sweep():
            name = override.get_key_element()
            choices.append([f"{name}={value}" for value in override.sweep_string_iterator()])
        else:
            raise ConfigError(f"{override.input_line!r}: list the values, as in seed=1,2,3")
    return [list(combination) for combination in itertools.product(*choices)]


def compose_settings(
    parsed: Sequence[Override], config_dir: Path, primary: str = "train"
) -> dict[str, Any]:
    """Nested dictionaries of all settings: configs/train.yaml, or another `primary` file, the files
    that it and the overrides choose, and the overrides. Raises ConfigError."""
    groups = _config_groups(config_dir)
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
            composed = compose(primary, arguments)
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            experiment = (
                ", or choose an experiment, for example experiment=demo/quadratic; "
                "configs/experiment/ has all"
            )
            hint = experiment if primary == "train" else ""
            raise ConfigError(f"{missing[0]} has no value: set it{hint}")
        return cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=True))
    except YAMLError as error:
        raise ConfigError(" ".join(str(error).split())) from None
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
                    f"{suggest(str(value), options)}"
                )
    return " ".join(str(error).split())


def compose_defaults(config_dir: Path) -> Any:
    """What configs/train.yaml gives by itself; settings without a value are "???"."""
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        return OmegaConf.to_container(compose("train"))


def mark_given_speed(settings: dict[str, Any], parsed: Iterable[Override]) -> None:
    """What a cluster's profile says of its sources does not hold for constants of the command
    line."""
    speed = settings["cluster"].get("speed")
    if not isinstance(speed, dict) or "sources" not in speed:
        return  # refused later
    given = set()
    for override in parsed:
        group, _, name = override.key_or_group.rpartition(".")
        if group != "cluster.speed":
            continue
        given.add(name)
        value = override.value()
        for constant in value if isinstance(value, dict) else [name]:
            speed["sources"][str(constant)] = GIVEN
    link = {"link_gbit_per_second", "latency_seconds"}
    if given & link:
        speed["allreduce"] = None  # measured times would hide them
    if given & (link | {"seconds_per_image"}) and "data_parallel" not in given:
        speed["data_parallel"] = {}


def _config_groups(config_dir: Path) -> frozenset[str]:
    return frozenset(path.name for path in config_dir.iterdir() if path.is_dir())


def _options(config_dir: Path, group: str) -> list[str]:
    folder = config_dir / group
    names = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml"))
    return sorted(name.as_posix() for name in names)


def suggest(word: str, valid: Sequence[str]) -> str:
    """The nearest of the valid words, or all of them."""
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"there are: {', '.join(valid)}"
