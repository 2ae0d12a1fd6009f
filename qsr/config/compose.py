"""Command line -> plain dictionaries, by Hydra, with one-line errors."""

import contextlib
import copy
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qsr.config.overrides import in_quotes, suggest, text_of
from qsr.config.places import group_files, groups
from qsr.config.sites import site
from qsr.errors import ConfigError

# Hydra 1.3 warns without it, 1.4 with it
_VERSION_BASE = {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}

GIVEN = "given on the command line"
"""Source of a speed profile's constant that an override replaced."""


def compose_settings(
    parsed: Sequence[Override], folders: Sequence[Path], primary: str = "train"
) -> dict[str, Any]:
    """Nested dictionaries of all settings: from train.yaml (or another `primary` file) of the first
    folder, the files in any of the folders that it and the overrides select, and the overrides.
    Raises ConfigError."""
    choices = choose_files(parsed, folders, primary)
    values = [_value_argument(o, folders) for o in parsed if o.key_or_group not in choices]
    settings = compose_files(choices, folders, primary, values)
    missing = sorted(_missing(settings))
    if missing:
        _refuse_unknown(parsed, folders, primary)
        # of a group at once, because they belong to the file that was chosen
        group = [name for name in missing if name.partition(".")[0] == missing[0].partition(".")[0]]
        several = len(group) > 1
        experiment = (
            ", or choose an experiment, for example experiment=demo/quadratic; "
            "configs/experiment/ lists them"
        )
        hint = experiment if primary == "train" and choices.get("experiment") is None else ""
        raise ConfigError(
            f"{' and '.join(group)} {'have' if several else 'has'} no value: "
            f"set {'them' if several else 'it'}{hint}"
        )
    return settings


def _refuse_unknown(parsed: Iterable[Override], folders: Sequence[Path], primary: str) -> None:
    """Raise ConfigError for a misspelt word, as in experiments=NAME."""
    known = [*compose_files({}, folders[:1], primary), *groups(folders)]
    for override in parsed:
        word = override.key_or_group.partition(".")[0]
        if word not in known:
            raise ConfigError(f"{word} is not a setting; {suggest(word, known)}")


def _missing(settings: dict[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _missing(value, f"{prefix}{key}.")
        elif value == "???":
            yield f"{prefix}{key}"


def _value_argument(override: Override, folders: Sequence[Path]) -> str:
    text, key = override.input_line or "", override.key_or_group
    if "/" in key or (folders[0] / key).is_dir():
        raise ConfigError(
            f"{text}: choose a file with GROUP=NAME, where GROUP is one of "
            f"{', '.join(groups(folders))}; a setting in it has a dot, as in sync.alpha=0.5"
        )
    if override.is_delete():
        return text
    # "++", so that the schema refuses an unknown name: Hydra's own message suggests to add it with
    # "+", which Hydra would then accept
    return "++" + text.lstrip("+")


def choose_files(
    parsed: Iterable[Override], folders: Sequence[Path], primary: str = "train"
) -> dict[str, str | None]:
    """The file that the overrides choose of each group, the last choice of each; None: no file.
    Raises ConfigError."""
    found: dict[str, str | None] = {}
    known = groups(folders)
    defaults = _default_choices(folders[0] / f"{primary}.yaml")
    for override in parsed:
        group = override.key_or_group
        if group not in known:
            continue
        if override.is_delete() or override.value() is None:
            if defaults.get(group, "") is not None:
                raise ConfigError(
                    f"{override.input_line}: it cannot be left out: choose one with {group}=NAME: "
                    f"{', '.join(group_files(folders, group))}"
                )
            found[group] = None
        else:
            found[group] = _choice(override, folders)
    return found


@functools.cache
def _default_choices(primary: Path) -> dict[str, str | None]:
    """The file of each group that a primary file chooses."""
    listed = yaml.safe_load(primary.read_text())["defaults"]
    return {group: name for item in listed if item != "_self_" for group, name in item.items()}


_MISTAKEN = {"cluster": "speed", "speed": "cluster"}
"""A site and how fast it is: groups whose files have the same names."""


def _choice(override: Override, folders: Sequence[Path]) -> str:
    """The name of the chosen file. Hydra would accept any path, and it would become part of the run
    folder's name."""
    group, files = override.key_or_group, group_files(folders, override.key_or_group)
    if override.package is not None:
        raise ConfigError(f"{override.input_line}: write {group}=NAME")
    value = str(override.value()).removesuffix(".yaml")
    if value not in files:
        other = _MISTAKEN.get(group)
        if other is not None and value in group_files(folders, other):
            raise ConfigError(f"{group}={value}: write {other}={value}")
        raise ConfigError(
            f"{group}={value}: no such file in {_places(folders)}; {suggest(value, list(files))}"
        )
    if len(files[value]) > 1 and files[value][0].is_relative_to(folders[0]):
        raise ConfigError(
            f"{group}={value} is both {' and '.join(map(str, files[value]))}: rename yours"
        )
    if group == "experiment" and "# @package _global_" not in files[value][0].read_text():
        raise ConfigError(f"{files[value][0]}: it must begin with the line '# @package _global_'")
    return value


def _places(folders: Sequence[Path]) -> str:
    return " or ".join(["configs", *map(str, folders[1:])])


def compose_files(
    choices: Mapping[str, str | None],
    folders: Sequence[Path],
    primary: str = "train",
    values: Sequence[str] = (),
) -> dict[str, Any]:
    """The settings of these files, and `values` as given to Hydra; settings without a value are
    "???". Raises ConfigError."""
    with _errors_of_hydra():
        composed = _composed(choices, folders, primary, values)
        return cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=True))


def chosen_files(choices: Mapping[str, str | None], folders: Sequence[Path]) -> dict[str, Any]:
    """The file of each group, if these are chosen and they choose others; None: no file. Raises
    ConfigError."""
    with _errors_of_hydra():
        composed = _composed(choices, folders, "train", hydra_too=True)
        return cast("dict[str, Any]", OmegaConf.to_container(composed.hydra.runtime.choices))


@contextlib.contextmanager
def _errors_of_hydra() -> Iterator[None]:
    """Raises them as ConfigError, in one line."""
    try:
        yield
    except (yaml.YAMLError, HydraException, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(str(error).split())) from None


def _composed(
    choices: Mapping[str, str | None],
    folders: Sequence[Path],
    primary: str,
    values: Sequence[str] = (),
    *,
    hydra_too: bool = False,
) -> DictConfig:
    files = {group: name for group, name in choices.items() if name is not None}
    if "cluster" in files:
        files["cluster"] = site(files["cluster"], folders)
    chosen = tuple(f"{group}={text_of(name)}" for group, name in files.items())
    absolute = tuple(folder.absolute() for folder in folders)
    return _by_hydra(primary, (*chosen, *values), absolute, hydra_too, _last_change(absolute))


@functools.lru_cache(32)
def _by_hydra(
    primary: str,
    arguments: tuple[str, ...],
    folders: tuple[Path, ...],
    hydra_too: bool,
    _changed: tuple[tuple[int, int], ...],
) -> DictConfig:
    """Remembered, because it takes a tenth of a second, and naming a run or listing many composes
    the same files again; a quarter of a megabyte each. Not to be changed by the caller."""
    own = [in_quotes(f"file://{folder}") for folder in folders[1:]]
    search = [f"hydra.searchpath=[{','.join(own)}]"] if own else []
    with initialize_config_dir(str(folders[0]), **_VERSION_BASE):
        return compose(primary, [*arguments, *search], return_hydra_config=hydra_too)


def _last_change(folders: Iterable[Path]) -> tuple[tuple[int, int], ...]:
    """Of each folder: when one of its files last changed, and how many there are."""
    found = []
    for folder in folders:
        times = [path.stat().st_mtime_ns for path in folder.rglob("*.yaml")]
        found.append((max(times, default=0), len(times)))
    return tuple(found)


def compose_defaults(config_dir: Path) -> dict[str, Any]:
    """The settings of configs/train.yaml alone; settings without a value are "???"."""
    return copy.deepcopy(_defaults(config_dir))


@functools.cache
def _defaults(config_dir: Path) -> dict[str, Any]:
    """Cached, because status and tables need it for many runs."""
    return compose_files({}, [config_dir])


def mark_given_speed(settings: dict[str, Any], parsed: Sequence[Override]) -> None:
    """Change the sources in a speed profile for constants given on the command line, and drop
    measurements that no longer apply. Raises ConfigError if there are only such constants."""
    speed = settings.get("speed")
    names = {override.key_or_group for override in parsed}
    if speed and isinstance(speed, dict) and {f"speed.{name}" for name in speed} <= names:
        raise ConfigError(
            f"speed.{next(iter(speed))}: choose a profile first, with speed=NAME; --help lists them"
        )
    if not isinstance(speed, dict) or not isinstance(speed.get("sources"), dict):
        return  # the schema refuses it later
    given = set()
    for override in parsed:
        group, _, name = override.key_or_group.rpartition(".")
        if group != "speed":
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
