"""Plain dictionaries -> settings of the schema, with one-line errors."""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_origin

from pydantic import TypeAdapter, ValidationError

from qsr.config.overrides import suggest
from qsr.errors import ConfigError

T = TypeVar("T")

_KINDS = {
    "cluster": "launcher",
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
        if len(location) > 1 and location[0] in _KINDS:
            word = location.pop(1)
            kind = f" of {location[0]}.{_KINDS[location[0]]}={word}"
        name = ".".join(location)
        match item["type"]:
            case "unexpected_keyword_argument" | "dataclass_exact_type":
                yield f"{name} is not a setting{kind}; {_nearest_setting(location, raw, root)}"
            case "missing":
                yield f"{name} is missing{kind}"
            case "union_tag_not_found":
                yield (
                    f"{name}.{_KINDS[name]} is missing: choose {name}=NAME; a file of your own "
                    f"begins with defaults: [NAME, _self_]"
                )
            case "union_tag_invalid":
                yield f"{name}.{_KINDS[location[0]]}: {_lower(item['msg'])}"
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
        word = chosen.get(_KINDS.get(part)) if isinstance(chosen, Mapping) else None
        node = next((c for c in candidates if _kind_of(c, part) == word), candidates[0])
    return [field.name for field in dataclasses.fields(node)]


def _dataclasses_of(hint: Any) -> list[Any]:
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [found for part in getattr(hint, "__args__", ()) for found in _dataclasses_of(part)]


def _kind_of(cls: Any, setting: str) -> str | None:
    for field in dataclasses.fields(cls):
        if field.name == _KINDS.get(setting):
            return next(iter(getattr(field.type, "__args__", ())), None)
    return None


def _nearest_setting(location: Sequence[str], raw: Mapping[str, Any], root: type) -> str:
    """A hint: the closest name of a setting there, or a setting of that name elsewhere."""
    *path, word = location
    wrong = ".".join(location)
    elsewhere = [n for n, _ in flatten(raw) if n.rpartition(".")[2] == word and n != wrong]
    names = _field_names(path, raw, root)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
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
