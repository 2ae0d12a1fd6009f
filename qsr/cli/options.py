"""What stands beside the settings on a command line: the options of people who know Hydra, and the
help that lists experiments, groups and options."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qsr.cli.usage import show_help
from qsr.config.load import CONFIG_DIR, load_config, load_configs, run_folder, to_dict
from qsr.config.overrides import suggest
from qsr.config.places import group_files, groups, own_folders, user_folder
from qsr.config.schema import Config
from qsr.errors import ConfigError

_SHORT = {
    "-c": "--cfg",
    "-cd": "--config-dir",
    "-cn": "--config-name",
    "-cp": "--config-path",
    "-h": "--help",
    "-i": "--info",
    "-m": "--multirun",
    "-p": "--package",
    "-r": "--run",
    "-sc": "--shell-completion",
}
_WITH_VALUE = ("--cfg", "--package", "--config-dir")
_ALONE = ("--help", "--multirun", "--resolve", "--run")
_HELP = {
    "--cfg job": "print all settings of the run, or of each run of a sweep; start nothing",
    "--package NAME": "with --cfg job: only the settings below NAME, for example sync",
    "--config-dir DIR": "also take experiments and files of groups from DIR, laid out as configs/",
    "-m, --multirun": "allowed, and not needed: a list, as in seed=1,2,3, makes a run per value",
    "-h, --help": "this text",
}
_ELSEWHERE = {
    "--config-name": "choose a file of settings with experiment=NAME, your own with --config-dir",
    "--config-path": "give a folder of your own with --config-dir DIR",
    "--experimental-rerun": "run the same command again: it resumes the run",
    "--hydra-help": "--help lists experiments, groups and options",
    "--info": "--cfg job prints a run's settings; --help lists experiments, groups and options",
    "--shell-completion": "there is none; --help lists experiments, groups and options",
    "--version": "pip show qsr-sync prints it",
}
"""Options of Hydra that are refused, and what does the same here."""


@dataclass(frozen=True)
class CommandLine:
    """The words of a command line, sorted."""

    settings: list[str]
    """Overrides, as in seed=2."""
    own: list[str]
    """Options of the command itself, with their values."""
    given: dict[str, str] = field(default_factory=dict)
    """Hydra's options, by their long names, with their values."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders of settings besides the project's, the first to be searched first."""
        given = () if self.config_dir is None else (self.config_dir,)
        return (*given, *own_folders())

    @property
    def config_dir(self) -> Path | None:
        """The folder given with --config-dir."""
        return Path(self.given["--config-dir"]) if "--config-dir" in self.given else None

    @property
    def words(self) -> list[str]:
        """What gives another command the same settings."""
        given = [] if self.config_dir is None else [f"--config-dir={self.config_dir}"]
        return [*given, *self.settings]

    def configs(self) -> list[Config]:
        """The runs that it asks for."""
        return load_configs(self.settings, more=self.folders)

    def config(self) -> Config:
        """The one run that it asks for."""
        return load_config(self.settings, more=self.folders)


def read(arguments: Sequence[str], own: Mapping[str, bool] | None = None) -> CommandLine:
    """Sort the words of a command line. `own`: the options of the command itself, and whether a
    value follows. Raises ConfigError for any other option."""
    own = own or {}
    line = CommandLine([], [])
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        name = _SHORT.get(name, name)
        if not word.startswith("-"):
            line.settings.append(word)
        elif name in own:
            line.own.append(word)
            if own[name] and not equals:
                line.own.append(_next(words, name))
        elif name in _WITH_VALUE:
            line.given[name] = value if equals else _next(words, name)
        elif name in _ALONE and not equals:
            line.given[name] = ""
        elif word != "--":
            raise ConfigError(_refusal(word, [*own, *_ALONE, *_WITH_VALUE]))
    _check(line)
    return line


def _next(words: Iterator[str], name: str) -> str:
    value = next(words, None)
    if value is None:
        raise ConfigError(f"{name}: a value must follow it")
    return value


def _refusal(word: str, known: Sequence[str]) -> str:
    name, equals, _ = word.partition("=")
    name = _SHORT.get(name, name)
    if name in _ELSEWHERE:
        return f"{word}: {_ELSEWHERE[name]}"
    if equals:
        return f"{word}: settings are written without dashes: {word.lstrip('-')}"
    return f"unknown option {word}; {suggest(word, known)}; settings are written NAME=VALUE"


def _check(line: CommandLine) -> None:
    shown = line.given.get("--cfg")
    if shown not in (None, "job"):
        raise ConfigError(f"--cfg {shown}: only the run's settings can be shown: --cfg job")
    for name in ("--resolve", "--package"):
        if name in line.given and shown is None:
            raise ConfigError(f"{name} belongs to --cfg job: add that")
    if line.config_dir is not None and not line.config_dir.is_dir():
        raise ConfigError(f"--config-dir {line.config_dir}: no such folder")


def answer(line: CommandLine, text: str | None, own: Mapping[str, str] | None = None) -> int | None:
    """Print what was asked for instead of a run, and return the exit status: the help (`text`, and
    the command's `own` options) or the settings. None: a run was asked for."""
    if "--help" in line.given or not (line.settings or line.own or line.given):
        show_help(text)
        print("\n".join(_lists(line.folders, own or {})))
        return 0
    if "--cfg" in line.given:
        package = line.given.get("--package")
        print("---\n".join(_shown(config, package) for config in line.configs()), end="")
        return 0
    return None


def _shown(config: Config, package: str | None) -> str:
    tree: Any = to_dict(config)
    for part in package.split(".") if package else ():
        if not isinstance(tree, dict) or part not in tree:
            known = list(tree) if isinstance(tree, dict) else []
            raise ConfigError(f"--package {package}: no such settings; {suggest(part, known)}")
        tree = tree[part]
    text = (
        yaml.safe_dump(tree, sort_keys=False) if isinstance(tree, dict) else f"{json.dumps(tree)}\n"
    )
    return f"# {run_folder(config)}\n{text}"


def _lists(more: Sequence[Path], own: Mapping[str, str]) -> Iterator[str]:
    folders = (CONFIG_DIR, *more)
    yield "\nOptions:"
    yield from _columns({**own, **_HELP})
    yield "\nExperiments (experiment=NAME):"
    experiments = group_files(folders, "experiment")
    yield from _columns({name: _about(paths[0]) for name, paths in experiments.items()})
    yield "\nGroups (GROUP=NAME, for example sync=power; sync.h_base=8 sets a single value):"
    names = {group: ", ".join(group_files(folders, group)) for group in groups(folders)}
    yield from _columns({g: text for g, text in names.items() if g not in ("experiment", "recipe")})
    yield f"\nYour files (in {user_folder()}, laid out as configs/, or in DIR):"
    own_files = {
        f"{group}={name}": str(paths[0])
        for group in groups(folders)
        for name, paths in group_files(more, group).items()
    }
    yield from _columns(own_files or {"none": ""})


def _columns(rows: Mapping[str, str]) -> Iterator[str]:
    width = max(map(len, rows))
    return (f"  {name:<{width}}  {text}".rstrip() for name, text in rows.items())


def _about(path: Path) -> str:
    """The first comment of a file, but for the line that Hydra reads."""
    comments = (line[1:].strip() for line in path.read_text().splitlines() if line[:1] == "#")
    return next((text for text in comments if not text.startswith("@package")), "")
