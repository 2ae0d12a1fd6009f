"""What bash completes after `eval "$(qsr --completion bash)"`: commands, options, experiments,
groups, settings and their values. Standard library only, and the schema is read and not imported,
because a second is too long after a press of TAB."""

import ast
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from qsr import config
from qsr.cli.usage import COMMANDS, OPTIONS, OWN_OPTIONS
from qsr.config.places import CONFIG_DIR, PACKAGE, group_files, groups, own_folders

WITH_SETTINGS = ("train", "plan", "submit", "doctor", "evaluate")
"""The commands that take settings; for the others bash completes paths."""

_SCRIPT = r"""_qsr_complete() {
    local line="${COMP_LINE:0:COMP_POINT}"
    local word="${line##*[[:space:]]}"
    local rest="$word"
    [[ $COMP_WORDBREAKS == *=* ]] && rest="${rest##*=}"
    [[ $COMP_WORDBREAKS == *:* ]] && rest="${rest##*:}"
    local before="${word%"$rest"}"
    mapfile -t COMPREPLY < <(PYTHONPATH=FOLDER PROGRAM -P -m qsr.cli.complete "$line" 2> /dev/null)
    COMPREPLY=("${COMPREPLY[@]#"$before"}")
}
complete -o default -o nospace -F _qsr_complete qsr
complete -p python &> /dev/null || complete -o default -o nospace -F _qsr_complete python
"""


def script() -> str:
    """The lines for bash."""
    folder, python = shlex.quote(str(PACKAGE.parent)), shlex.quote(sys.executable)
    return _SCRIPT.replace("FOLDER", folder).replace("PROGRAM", python)


def completions(line: str) -> list[str]:
    """The words that the last word of `line` may become, each with a space if it is complete.
    Empty where bash completes paths."""
    *words, word = line.split(" ")
    words = [earlier for earlier in words if earlier]
    if words[:1] == ["python"] and len(words) > 1:
        script_of = re.fullmatch(r"(?:.*/)?scripts/(\w+)\.py", words[1])
        words[:2] = ["qsr", script_of[1]] if script_of else ["python"]
    if words[:1] != ["qsr"]:
        return []
    if len(words) == 1:
        return _fitting(word, [f"{name} " for name in COMMANDS])
    if words[1] not in WITH_SETTINGS:
        return []
    if word.startswith("-"):
        return _fitting(word, _options(words[1]))
    folders = [CONFIG_DIR, *_more_folders(words), *own_folders()]
    name, equals, value = word.partition("=")
    if not equals:
        return _fitting(word, _names(word, words, folders))
    # of a list, the last value
    *listed, _ = value.split(",")
    before = f"{name}={''.join(f'{one},' for one in listed)}"
    return _fitting(word, [f"{before}{one} " for one in _values(name, words, folders)])


def _fitting(word: str, candidates: Iterable[str]) -> list[str]:
    return sorted({candidate for candidate in candidates if candidate.startswith(word)})


def _options(command: str) -> Iterator[str]:
    texts = (*OPTIONS, *OWN_OPTIONS.get(command, ()))
    return (f"{name} " for text in texts for name in re.findall(r"-[-a-z]+", text))


def _more_folders(words: Sequence[str]) -> Iterator[Path]:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in ("--config-dir", "-cd") and Path(value if equals else following).is_dir():
            yield Path(value if equals else following)


def _names(word: str, words: Sequence[str], folders: Sequence[Path]) -> Iterator[str]:
    """Groups and settings, to the next dot."""
    yield from (f"{group}=" for group in groups(folders) if group != "recipe")
    for name in _settings(_choices(words, folders), folders):
        inner = name.find(".", len(word))
        yield f"{name}=" if inner < 0 else name[: inner + 1]


def _values(name: str, words: Sequence[str], folders: Sequence[Path]) -> list[str]:
    if name in groups(folders):
        return list(group_files(folders, name))
    return _settings(_choices(words, folders), folders).get(name, [])


def _choices(words: Iterable[str], folders: Sequence[Path]) -> dict[str, str]:
    """The file of each group: of train.yaml, of the experiment, of the command line."""
    found = dict(re.findall(r"^  - (\w+): (\S+)$", (CONFIG_DIR / "train.yaml").read_text(), re.M))
    given = dict(word.split("=", 1) for word in words if "=" in word)
    return found | _chosen_by("experiment", given.get("experiment", ""), folders) | given


def _chosen_by(group: str, name: str, folders: Sequence[Path]) -> dict[str, str]:
    """The files that an experiment chooses, or a recipe that it is made of."""
    found: dict[str, str] = {}
    for path in group_files(folders, group).get(name, ()):
        for line in re.findall(r"^ +- (?:override )?/?([\w/: ]+)$", path.read_text(), re.M):
            other, chooses, its = line.partition(": ")
            if not chooses:
                found |= _chosen_by(group, other, folders)
            elif other == "recipe":
                found |= _chosen_by(other, its, folders)
            else:
                found[other] = its
    return found


def _settings(choices: Mapping[str, str], folders: Sequence[Path]) -> dict[str, list[str]]:
    """All settings, with the words that their values may be; of a group with several kinds, those
    of the kind that is chosen."""
    kinds = {}
    for group, name in choices.items():
        for path in group_files(folders, group).get(name, ()):
            kind = re.search(r"^(?:name|rule|launcher): *(\w+)", path.read_text(), re.M)
            kinds[group] = kind[1] if kind else ""
    return dict(_Schema().settings("Config", "", kinds))


class _Schema:
    """The classes of config/schema.py, from its text."""

    def __init__(self) -> None:
        tree = ast.parse((Path(config.__file__).parent / "schema.py").read_text())
        self._classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        self._names = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }

    def settings(
        self, name: str, prefix: str, kinds: Mapping[str, str]
    ) -> Iterator[tuple[str, list[str]]]:
        """The settings of a class with the words of their values. `kinds`: by group."""
        for field, hint in self._fields(name).items():
            inner = self._inner(hint)
            chosen = [one for one in inner if kinds.get(field) in self._kind_words(one)]
            for one in chosen or inner:
                yield from self.settings(one, f"{prefix}{field}.", {})
            if not inner:
                yield f"{prefix}{field}", self._words(hint)

    def _fields(self, name: str) -> dict[str, ast.expr]:
        node = self._classes[name]
        found: dict[str, ast.expr] = {}
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in self._classes:
                found |= self._fields(base.id)
        own = (item for item in node.body if isinstance(item, ast.AnnAssign))
        return found | {i.target.id: i.annotation for i in own if isinstance(i.target, ast.Name)}

    def _kind_words(self, name: str) -> list[str]:
        fields = self._fields(name)
        return [word for key in ("name", "rule", "launcher") if key in fields
                for word in self._words(fields[key])]  # fmt: skip

    def _inner(self, hint: ast.expr) -> list[str]:
        """The classes of the schema that a setting may be."""
        return list(dict.fromkeys(
            node.id for node in self._alternatives(hint)
            if isinstance(node, ast.Name) and node.id in self._classes
        ))  # fmt: skip

    def _words(self, hint: ast.expr) -> list[str]:
        """The words that a setting may be."""
        found: list[str] = []
        for node in self._alternatives(hint):
            match node:
                case ast.Name(id="bool"):
                    found += ["true", "false"]
                case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
                    parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
                    found += [str(part.value) for part in parts if isinstance(part, ast.Constant)]
        return found

    def _alternatives(self, hint: ast.expr) -> Iterator[ast.expr]:
        match hint:
            case ast.BinOp(left=left, right=right):
                yield from self._alternatives(left)
                yield from self._alternatives(right)
            case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[first, *_])):
                yield from self._alternatives(first)
            case ast.Name(id=name) if name in self._names:
                yield from self._alternatives(self._names[name])
            case _:
                yield hint


if __name__ == "__main__":
    print("\n".join(completions(sys.argv[1])))
