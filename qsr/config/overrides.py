"""Words of the command line -> overrides and sweeps, by Hydra's grammar, with one-line errors."""

import difflib
import itertools
import math
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, Quote, QuotedString
from hydra.errors import HydraException

from qsr.config.places import CONFIG_DIR, group_files
from qsr.errors import ConfigError

PATHS = ("data.root", "runs_dir", "sync.file", "weights")
"""Settings whose values are taken literally, whatever characters they contain."""

MOST_RUNS = 10_000
"""Most runs of one command line."""


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Parse the overrides one by one. Raises ConfigError."""
    parser = OverridesParser.create()
    return [_parse_override(parser, text) for text in overrides]


def _parse_override(parser: OverridesParser, text: str) -> Override:
    key, _, value = text.partition("=")
    _refuse_hydra(key.lstrip("+~"))
    if text.startswith("-"):
        raise ConfigError(
            f"{text}: unknown option; settings are written NAME=VALUE, without dashes"
        )
    if "=" not in text and text.removesuffix(".yaml") in group_files((CONFIG_DIR,), "experiment"):
        raise ConfigError(f"{text}: write experiment={text.removesuffix('.yaml')}")
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
            f"{key}={in_quotes(value)}" if is_path and not quoted else text
        )
    except HydraException as error:
        reason = str(error).splitlines()[0]
        fix = f"; quote a value with special characters: {_quoted(key, value)}" * bool(value)
        raise ConfigError(f"{text!r} is not of the form setting=value ({reason}){fix}") from None


_OF_HYDRA = {
    "hydra/launcher": "scripts/submit.py submits to Slurm, with cluster=slurm",
    "hydra.launcher": "scripts/submit.py submits to Slurm, with the settings of cluster=slurm",
    "hydra/sweeper": "list the values, as in seed=1,2,3",
    "hydra.sweeper": "list the values, as in seed=1,2,3",
    "hydra.mode": "a list of values, as in seed=1,2,3, makes a run for each",
    "hydra.run": "set runs_dir: a run is stored in RUNS_DIR/EXPERIMENT/seed_SEED",
    "hydra.sweep": "set runs_dir: a run is stored in RUNS_DIR/EXPERIMENT/seed_SEED",
    "hydra.output_subdir": "config.yaml of the run folder holds the settings",
    "hydra.searchpath": "give a folder of your own with --config-dir DIR",
    "hydra.job.name": "a run is named after its experiment and the settings that you change",
    "hydra.job.chdir": "paths are relative to the folder in which you start",
}
"""Settings of Hydra, and what does the same here."""


def _refuse_hydra(key: str) -> None:
    """Raise ConfigError for a setting of Hydra itself, which only composes the settings here."""
    if key.split(".")[0].split("/")[0] != "hydra":
        return
    named = (way for name, way in _OF_HYDRA.items() if key == name or key.startswith(name + "."))
    way = next(named, "leave it out; --help lists what there is")
    raise ConfigError(f"{key}: Hydra composes the settings and does no more here; {way}")


def in_quotes(value: str) -> str:
    """A text as Hydra takes it literally."""
    return str(QuotedString(value, Quote.double).with_quotes())


def _quoted(key: str, value: str) -> str:
    """The override as typed in a shell."""
    return shlex.quote(f"{key}={in_quotes(value)}")


def expand_sweeps(
    overrides: Sequence[str], folders: Sequence[Path] = (CONFIG_DIR,)
) -> list[list[str]]:
    """One list of overrides for each combination of listed values; the last list of values changes
    fastest. `folders`: where glob() finds the files of a group. Raises ConfigError."""
    choices = []
    for text, override in zip(overrides, parse_overrides(overrides), strict=True):
        if not override.is_sweep_override():
            choices.append([text])
            continue
        if not override.is_discrete_sweep():
            raise ConfigError(f"{text!r}: list the values, as in seed=1,2,3")
        pattern = override.value()
        if isinstance(pattern, Glob):
            values = _matching(override, pattern, folders)
        else:
            values = list(itertools.islice(override.sweep_string_iterator(), MOST_RUNS + 1))
        choices.append([f"{override.get_key_element()}={value}" for value in values])
    if math.prod(map(len, choices)) > MOST_RUNS:
        raise ConfigError(f"these lists give more than {MOST_RUNS:,} runs: ask for fewer at a time")
    return [list(combination) for combination in itertools.product(*choices)]


def _matching(override: Override, pattern: Glob, folders: Sequence[Path]) -> list[str]:
    """The names of the group's files that fit a glob()."""
    group = override.key_or_group
    names = list(group_files(folders, group))
    found: list[str] = pattern.filter(names)
    if not names:
        raise ConfigError(f"{override.input_line!r}: list the values, as in seed=1,2,3")
    if not found:
        raise ConfigError(f"{override.input_line!r}: no file of {group}/ fits")
    return found


def text_of(value: Any) -> str:
    """A value as one types it: the same text for all spellings of it."""
    match value:
        case None:
            return "null"
        case float() if value.is_integer() and abs(value) < 1e16:
            return str(int(value))
        case list():
            return f"[{','.join(text_of(inner) or in_quotes('') for inner in value)}]"
        case dict():
            return f"{{{','.join(f'{key}:{text_of(inner)}' for key, inner in value.items())}}}"
        case str():
            return _escaped(value) if _needs_no_quotes(value) else in_quotes(value)
        case _:
            return str(value)


def _escaped(value: str) -> str:
    return re.sub(r"[\\()\[\]{}=, \t]", r"\\\g<0>", value)


def _needs_no_quotes(value: str) -> bool:
    try:
        parsed = OverridesParser.create().parse_override(f"x={value}")
    except HydraException:
        return False
    return not parsed.is_sweep_override() and bool(parsed.value() == value)


def suggest(word: str, valid: Sequence[str]) -> str:
    """A hint: the valid word closest to `word`, or all valid words."""
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"choose from: {', '.join(valid)}"
