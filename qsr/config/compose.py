"""Command line -> plain dictionaries, by Hydra, with one-line errors."""

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

GIVEN = "given on the command line"
"""Source of a cluster constant that an override replaced."""


PATHS = ("data.root", "runs_dir", "weights")
"""Settings whose values are taken literally, whatever characters they contain."""

MOST_RUNS = 10_000
"""Most runs of one command line."""


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Parse the overrides one by one. Raises ConfigError."""
    parser = OverridesParser.create()
    return [_parse_override(parser, text) for text in overrides]


def _parse_override(parser: OverridesParser, text: str) -> Override:
    key, _, value = text.partition("=")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{key}={os.fsencode(value)!r} is not UTF-8: use a symbolic link with a UTF-8 name"
        ) from None
    is_path = key.lstrip("+") in PATHS and value != "null"
    if is_path and value.startswith("~"):
        raise ConfigError(
            f"{text}: neither the shell nor qsr expands ~ here: write "
            f"{key}={Path(value).expanduser()}, or, if the path really begins with ~, "
            f"{_quoted(key, value)}"
        )
    quoted = re.fullmatch(r"""(['"]).*\1""", value, re.DOTALL)
    try:
        return parser.parse_override(
            f"{key}={_in_quotes(value)}" if is_path and not quoted else text
        )
    except HydraException as error:
        reason = str(error).splitlines()[0]
        fix = f"; quote a value with special characters: {_quoted(key, value)}" * bool(value)
        raise ConfigError(f"{text!r} is not of the form setting=value ({reason}){fix}") from None


def _in_quotes(value: str) -> str:
    return str(QuotedString(value, Quote.double).with_quotes())


def _quoted(key: str, value: str) -> str:
    """The override as typed in a shell."""
    return shlex.quote(f"{key}={_in_quotes(value)}")


def expand_sweeps(overrides: Sequence[str]) -> list[list[str]]:
    """One list of overrides for each combination of listed values; the last list of values changes
    fastest. Raises ConfigError."""
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
        raise ConfigError(f"these lists give more than {MOST_RUNS:,} runs: ask for fewer at a time")
    return [list(combination) for combination in itertools.product(*choices)]


def compose_settings(
    parsed: Sequence[Override], config_dir: Path, primary: str = "train"
) -> dict[str, Any]:
    """Nested dictionaries of all settings: from configs/train.yaml (or another `primary` file), the
    files that it and the overrides select, and the overrides. Raises ConfigError."""
    groups = _config_groups(config_dir)
    arguments = []
    for override in parsed:
        text = override.input_line or ""
        if override.key_or_group in groups and not override.is_delete():
            _check_choice(override, config_dir)
        if override.is_add() and override.key_or_group in groups:
            text = text.lstrip("+")
        elif override.key_or_group not in groups and not override.is_delete():
            # "++", so that the schema refuses an unknown name: Hydra's own message suggests to add
            # it with "+", which Hydra would then accept
            text = "++" + text.lstrip("+")
        arguments.append(text)
    try:
        with initialize_config_dir(str(config_dir), version_base="1.3"):
            composed = compose(primary, arguments)
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            experiment = (
                ", or choose an experiment, for example experiment=demo/quadratic; "
                "configs/experiment/ lists them"
            )
            hint = experiment if primary == "train" else ""
            raise ConfigError(f"{missing[0]} has no value: set it{hint}")
        return cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=True))
    except YAMLError as error:
        raise ConfigError(" ".join(str(error).split())) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(str(error).split())) from None


def _check_choice(override: Override, config_dir: Path) -> None:
    """Raise ConfigError unless the choice is a file of its group. Hydra would accept any path, and
    it would become part of the run folder's name."""
    group, value = override.key_or_group, override.value()
    options = _options(config_dir, group)
    if override.package is not None:
        raise ConfigError(f"{override.input_line}: write {group}=NAME")
    if value is None:
        raise ConfigError(f"{group}=null: leave it out, or choose one from configs/{group}/")
    if value not in options:
        raise ConfigError(
            f"{group}={value}: no such file in configs; {suggest(str(value), options)}"
        )


def compose_defaults(config_dir: Path) -> dict[str, Any]:
    """The settings of configs/train.yaml alone; settings without a value are "???"."""
    return copy.deepcopy(_defaults(config_dir))


@functools.cache
def _defaults(config_dir: Path) -> dict[str, Any]:
    """Cached, because status and tables need it for many runs."""
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        return cast("dict[str, Any]", OmegaConf.to_container(compose("train")))


def mark_given_speed(settings: dict[str, Any], parsed: Iterable[Override]) -> None:
    """Change the sources in a cluster's profile for constants given on the command line, and drop
    measurements that no longer apply."""
    cluster = settings.get("cluster")
    speed = cluster.get("speed") if isinstance(cluster, dict) else None
    if not isinstance(speed, dict) or not isinstance(speed.get("sources"), dict):
        return  # the schema refuses it later
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
        speed["allreduce"] = None  # measured times would take precedence
    if given & (link | {"seconds_per_image"}) and "data_parallel" not in given:
        speed["data_parallel"] = {}


def _config_groups(config_dir: Path) -> frozenset[str]:
    return frozenset(path.name for path in config_dir.iterdir() if path.is_dir())


def _options(config_dir: Path, group: str) -> list[str]:
    folder = config_dir / group
    names = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml"))
    return sorted(name.as_posix() for name in names)


def suggest(word: str, valid: Sequence[str]) -> str:
    """A hint: the valid word closest to `word`, or all valid words."""
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"choose from: {', '.join(valid)}"
