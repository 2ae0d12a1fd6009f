"""Plain dictionaries -> settings of the schema, with one-line errors."""

import dataclasses
import difflib
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_origin

from pydantic import TypeAdapter, ValidationError

from qsr.config.overrides import suggest
from qsr.errors import ConfigError

T = TypeVar("T")

KINDS = {
    "cluster": "launcher",
    "model": "name",
    "optimizer": "name",
    "problem": "kind",
    "schedule": "name",
    "sync": "rule",
}
"""The settings that have several kinds, and the field that names the kind."""


def parse(kind: type[T], raw: Mapping[str, Any], prefix: str = "") -> T:
    """A dataclass of the schema from parsed YAML. Raises ConfigError, with `prefix` before setting
    names."""
    try:
        # as JSON, because strict parsing of Python objects refuses a dictionary for a dataclass
        return TypeAdapter(kind).validate_json(json.dumps(raw))
    except ValidationError as error:
        lines = (prefix + line for line in _describe(error, raw, kind))
        raise ConfigError("; ".join(lines)) from None


def _describe(error: ValidationError, raw: Mapping[str, Any], root: type) -> Iterable[str]:
    """One line for each error that pydantic found."""
    for item in error.errors(include_url=False, include_context=False):
        # the location of a kind's field includes the kind: ("sync", "quadratic", "alpha")
        location = [str(part) for part in item["loc"]]
        kind = ""
        if len(location) > 1 and location[0] in KINDS:
            word = location.pop(1)
            kind = f" of {location[0]}.{KINDS[location[0]]}={word}"
        name = ".".join(location)
        match item["type"]:
            case "unexpected_keyword_argument" | "dataclass_exact_type":
                yield f"{name} is not a setting{kind}; {_nearest_setting(location, raw, root)}"
            case "missing":
                yield f"{name} is missing{kind}"
            case "union_tag_not_found":
                yield (
                    f"{name}.{KINDS[name]} is missing: choose {name}=NAME; a file of your own "
                    f"begins with defaults: [NAME, _self_]"
                )
            case "union_tag_invalid":
                yield f"{name}.{KINDS[location[0]]}: {_lower(item['msg'])}"
            case _ if location[:2] == ["cluster", "environment"]:  # it may contain secrets
                yield f"{name}: {_lower(item['msg'])}"
            case _:
                yield f"{name}={item['input']!r}: {_lower(item['msg'])}"


def _field_names(path: Sequence[str], raw: Mapping[str, Any], root: type) -> list[str]:
    """The names of the fields at `path`, for the kind chosen there."""
    node: Any = root
    parts = iter(path)
    for part in parts:
        hint = {field.name: field.type for field in dataclasses.fields(node)}[part]
        if get_origin(hint) is dict:
            next(parts, None)  # a key, not a field
        candidates = list(_dataclasses_of(hint))
        chosen = raw.get(part)
        word = chosen.get(KINDS.get(part)) if isinstance(chosen, Mapping) else None
        node = next((c for c in candidates if word in _words_of(c, part)), candidates[0])
    return [field.name for field in dataclasses.fields(node)]


def _dataclasses_of(hint: Any) -> list[Any]:
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [found for part in getattr(hint, "__args__", ()) for found in _dataclasses_of(part)]


def _words_of(cls: Any, setting: str) -> tuple[str, ...]:
    """The words that choose this kind."""
    hints = [f.type for f in dataclasses.fields(cls) if f.name == KINDS.get(setting)]
    return tuple(getattr(hints[0], "__args__", ())) if hints else ()


def drop_settings_of_others(
    root: type, group: str, part: dict[str, Any], keep: Container[str]
) -> None:
    """Remove from a group's settings those that only other kinds than the chosen one have, but for
    those named in `keep`."""
    hint = {field.name: field.type for field in dataclasses.fields(root)}[group]
    word = part.get(KINDS[group])
    own, others = set[str](), set[str]()
    for kind in _dataclasses_of(hint):
        chosen = word in _words_of(kind, group)
        (own if chosen else others).update(field.name for field in dataclasses.fields(kind))
    for name in others - own:
        if own and f"{group}.{name}" not in keep:
            part.pop(name, None)


def _kinds_with(name: str, path: Sequence[str], root: type) -> list[str]:
    """The kinds of a group that have this setting."""
    hints = {field.name: field.type for field in dataclasses.fields(root)}
    if len(path) != 1 or path[0] not in KINDS:
        return []
    kinds = _dataclasses_of(hints[path[0]])
    having = [kind for kind in kinds if name in {field.name for field in dataclasses.fields(kind)}]
    return [word for kind in having for word in _words_of(kind, path[0])]


def _nearest_setting(location: Sequence[str], raw: Mapping[str, Any], root: type) -> str:
    """A hint: the closest name of a setting there, or a setting of that name elsewhere."""
    *path, word = location
    wrong = ".".join(location)
    elsewhere = [n for n, _ in flatten(raw) if n.rpartition(".")[2] == word and n != wrong]
    names = _field_names(path, raw, root)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    having = _kinds_with(word, path, root)
    if having:
        return f"{' or '.join(f'{path[0]}={kind}' for kind in having)} has it"
    if close or not elsewhere:
        return suggest(wrong, [".".join([*path, name]) for name in close or names])
    return suggest(wrong, elsewhere[:1])


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The leaves of nested dictionaries, as (dotted name, value)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
