"""Command line -> plain dictionaries: what Hydra does, with one line for whatever it refuses."""

import copy
import difflib
import functools
import itertools
import math
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qsr.errors import ConfigError

CONFIG_DIR = Path(__file__).parents[2] / "configs"

GIVEN = "given on the command line"
"""The source of a cluster's constant that an override replaced."""


PATHS = ("data.root", "runs_dir", "weights")
"""Settings that are taken as they are written, whatever characters they have."""

MOST_RUNS = 10_000
"""Of one command line."""


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Overrides, understood one by one. Raises ConfigError."""
    parser = OverridesParser.create()
    return [_parse_override(parser, text) for text in overrides]


def _parse_override(parser: OverridesParser, text: str) -> Override:
    key, _, value = text.partition("=")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{key}={os.fsencode(value)!r} is not UTF-8: give a symbolic link to it, whose name is"
        ) from None
    is_path = key.lstrip("+") in PATHS and value != "null"
    if is_path and value.startswith("~"):
        raise ConfigError(
            f"{text}: the shell has not expanded ~, and nothing else does: write "
            f"{key}={Path(value).expanduser()}; or quote a path that begins so: "
            f"{_quoted(key, value)}"
        )
    quoted = re.fullmatch(r"""(['"]).*\1""", value, re.DOTALL)
    try:
        return parser.parse_override(
            f"{key}={_in_quotes(value)}" if is_path and not quoted else text
        )
    except HydraException as error:
        reason = str(error).splitlines()[0]
        mend = f"; a value with special characters is quoted: {_quoted(key, value)}" * bool(value)
        raise ConfigError(f"{text!r} is not of the form setting=value ({reason}){mend}") from None


def _in_quotes(value: str) -> str:
    return str(QuotedString(value, Quote.double).with_quotes())


def _quoted(key: str, value: str) -> str:
    """As it would be typed."""
    return shlex.quote(f"{key}={_in_quotes(value)}")


def expand_sweeps(overrides: Sequence[str]) -> list[list[str]]:
    """Overrides without lists of values, one list of them for each combination; the last list
    changes fastest. Raises ConfigError."""
    choices = []
    for text, override in zip(overrides, parse_overrides(overrides), strict=True):
        if not override.is_sweep_override():
            choices.append([text])
        elif override.is_discrete_sweep() and not isinstance(override.value(), Glob):
            name = override.get_key_element()
            values = itertools.islice(override.sweep_string_iterator(), MOST_RUNS + 1)
            choices.append([f"{name}={value}" for value in values])
        else:
            raise ConfigError(f"{text!r}: list the values, as in seed=1,2,3")
    if math.prod(map(len, choices)) > MOST_RUNS:
        raise ConfigError(f"these lists ask for more than {MOST_RUNS:,} runs: give fewer at a time")
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
        if override.key_or_group in groups and not override.is_delete():
            _check_choice(override, config_dir)
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
        raise ConfigError(" ".join(str(error).split())) from None


def _check_choice(override: Override, config_dir: Path) -> None:
    """Hydra would take any path that leads to a file, and the run folder has it in its name."""
    group, value = override.key_or_group, override.value()
    options = _options(config_dir, group)
    if override.package is not None:
        raise ConfigError(f"{override.input_line}: write {group}=NAME")
    if value is None:
        raise ConfigError(f"{group}=null: leave it out, or choose of configs/{group}/")
    if value not in options:
        raise ConfigError(
            f"{group}={value}: no such file in configs; {suggest(str(value), options)}"
        )


def compose_defaults(config_dir: Path) -> dict[str, Any]:
    """What configs/train.yaml gives by itself; settings without a value are "???"."""
    return copy.deepcopy(_defaults(config_dir))


@functools.cache
def _defaults(config_dir: Path) -> dict[str, Any]:
    """Once: status and tables need it for each of many runs."""
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        return cast("dict[str, Any]", OmegaConf.to_container(compose("train")))


def mark_given_speed(settings: dict[str, Any], parsed: Iterable[Override]) -> None:
    """What a cluster's profile says of its sources does not hold for constants of the command
    line."""
    cluster = settings.get("cluster")
    speed = cluster.get("speed") if isinstance(cluster, dict) else None
    if not isinstance(speed, dict) or not isinstance(speed.get("sources"), dict):
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
