"""What stands beside the settings on a command line: the options of people who know Hydra, and the
help that lists experiments, groups and options."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qsr.cli.usage import OPTIONS, show_help
from qsr.config.load import CONFIG_DIR, load_config, load_configs, run_folder, to_dict
from qsr.config.overrides import expand_sweeps, suggest
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
_ELSEWHERE = {
    "--config-name": "choose a file of settings with experiment=NAME, your own with --config-dir",
    "--config-path": "give a folder of your own with --config-dir DIR",
    "--experimental-rerun": "run the same command again: it resumes the run",
    "--hydra-help": "--help lists experiments, groups and options",
    "--info": "--cfg job prints a run's settings; --help lists experiments, groups and options",
    "--shell-completion": 'bash completes after: eval "$(qsr --completion bash)"',
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

    def swept(self) -> list[dict[str, str]]:
        """For each run, in the order of `configs`, its swept settings as they are typed; an empty
        dictionary if nothing is swept."""
        return [
            dict(
                new.split("=", 1)
                for new, old in zip(choice, self.settings, strict=True)
                if new != old
            )
            for choice in expand_sweeps(self.settings, (CONFIG_DIR, *self.folders))
        ]

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
        print_help(text, line.folders, own)
        return 0
    if "--cfg" in line.given:
        print_settings(line, {str(run_folder(config)): config for config in line.configs()})
        return 0
    return None


def print_settings(line: CommandLine, found: Mapping[str, Any]) -> None:
    """Print settings (dataclasses of a schema), each under its title, as YAML documents. Raises
    ConfigError if --package names none."""
    package = line.given.get("--package")
    texts = [f"# {title}\n{_yaml(settings, package)}" for title, settings in found.items()]
    print("---\n".join(texts), end="")


def _yaml(settings: Any, package: str | None) -> str:
    tree: Any = to_dict(settings)
    for part in package.split(".") if package else ():
        if not isinstance(tree, dict) or part not in tree:
            known = list(tree) if isinstance(tree, dict) else []
            raise ConfigError(f"--package {package}: no such settings; {suggest(part, known)}")
        tree = tree[part]
    if isinstance(tree, dict):
        return yaml.safe_dump(tree, sort_keys=False)
    return f"{json.dumps(tree)}\n"


def print_help(
    text: str | None,
    more: Sequence[Path],
    own: Mapping[str, str] | None = None,
    *,
    base: Path = CONFIG_DIR,
    only: Sequence[str] = (),
) -> None:
    """Print a command's help, its `own` options and those of all commands, and the experiments and
    groups in `base` and the folders in `more`; or the groups in `only`."""
    folders = (base, *more)
    shown = [group for group in only or groups(folders) if group != "recipe"]
    show_help(text)
    print("\nOptions:", *_columns({**(own or {}), **OPTIONS}), sep="\n")
    if "experiment" in shown:
        found = group_files(folders, "experiment")
        about = {name: _about(paths[0]) for name, paths in found.items()}
        print("\nExperiments (experiment=NAME):", *_columns(about), sep="\n")
    names = {g: ", ".join(group_files(folders, g)) for g in shown if g != "experiment"}
    if names:
        example = ", for example sync=power; sync.h_base=8 sets a single value"
        print(f"\nGroups (GROUP=NAME{'' if only else example}):", *_columns(names), sep="\n")
    yours = {
        f"{group}={name}": str(paths[0])
        for group in shown
        for name, paths in group_files(more, group).items()
    }
    place = f"\nYour files (in {user_folder()}, laid out as configs/, or in DIR):"
    print(place, *_columns(yours or {"none": ""}), sep="\n")


def _columns(rows: Mapping[str, str]) -> Iterator[str]:
    width = max(map(len, rows))
    return (f"  {name:<{width}}  {text}".rstrip() for name, text in rows.items())


def _about(path: Path) -> str:
    """The first comment of a file, but for the line that Hydra reads."""
    comments = (line[1:].strip() for line in path.read_text().splitlines() if line[:1] == "#")
    return next((text for text in comments if not text.startswith("@package")), "")
