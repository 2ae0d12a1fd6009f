"""The paper's tables: reference values and their sources (results/paper/README.md)."""

import csv
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from qsr.errors import ReportError

Tag = Literal["A", "C", "O", "D", "R"]
"""Source of a value: the abstract, a caption, the authors' code, arithmetic on those, or recalled
and not checked against the paper."""

_READ = ConfigDict(extra="forbid")
_PositiveInt = Annotated[int, Field(ge=1)]

# the two columns of a value in tables.csv, by field of ReferenceRow
_VALUES = {
    "top1": ("top1", "source_top1"),
    "volume_percent": ("comm_percent", "source_comm"),
    "total_hours": ("total_hours", "source_hours"),
    "comm_hours": ("comm_hours", "source_comm_hours"),
}


@dataclass(frozen=True, config=_READ)
class Reference:
    """A published value and where it comes from."""

    value: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    tag: Tag

    @property
    def verified(self) -> bool:
        """Whether the value was checked against the paper or its code. Others are shown as
        unverified, and tests never compare with them."""
        return self.tag != "R"


@dataclass(frozen=True, config=_READ)
class ReferenceRow:
    """One row of a table of the paper, with the experiment that reproduces it. Unknown values are
    None."""

    table: str
    experiment: str
    model: Literal["resnet152", "vit_b16"]
    optimizer: Literal["sgd", "adamw"]
    global_batch: _PositiveInt
    gpus: _PositiveInt
    schedule: Literal["cosine", "linear", "step"]
    rule: Literal["parallel", "constant", "quadratic"]
    h_base: _PositiveInt
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    top1: Reference | None
    """Percent of the validation images."""
    volume_percent: Reference | None
    """Rounds / steps, in percent."""
    total_hours: Reference | None
    comm_hours: Reference | None
    """The part of total_hours that is communication."""

    @property
    def method(self) -> str:
        """Algorithm and rule in words, without alpha."""
        match self.rule:
            case "parallel":
                return "data parallel"
            case "constant":
                optimizer = {"sgd": "SGD", "adamw": "AdamW"}[self.optimizer]
                return f"Local {optimizer}, H = {self.h_base}"
            case "quadratic":
                return f"QSR, H_base = {self.h_base}"


_ROW = TypeAdapter(ReferenceRow)
_PLAIN = [name for name in ReferenceRow.__dataclass_fields__ if name not in _VALUES]
_COLUMNS = {*_PLAIN, *(column for pair in _VALUES.values() for column in pair)}


def reference_text(reference: Reference | None, digits: str) -> str:
    """The value with its tag ("unverified" for R), or a dash for None. `digits` is a format such as
    ".1f"."""
    if reference is None:
        return "-"
    source = f"[{reference.tag}]" if reference.verified else "(unverified)"
    return f"{reference.value:{digits}} {source}"


def read_reference(path: Path) -> tuple[ReferenceRow, ...]:
    """The rows of a tables.csv, in order. Raises ReportError with one line that names the file, the
    line and the column."""
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = set(reader.fieldnames or ())
            if columns != _COLUMNS:
                raise ReportError(f"{path}: {_describe_columns(columns)}")
            rows = tuple(_parse(path, reader.line_num, line) for line in reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ReportError(f"{path} cannot be read as a CSV file: {error}") from None
    names = [row.experiment for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ReportError(f"{path}: two rows have the experiment {', '.join(twice)}")
    return rows


def _parse(path: Path, number: int, line: dict[str, str]) -> ReferenceRow:
    if None in line or None in line.values():
        raise ReportError(f"{path}, line {number}: the number of cells differs from the header's")
    raw: dict[str, Any] = {name: line[name] or None for name in _PLAIN}
    for field, (value, source) in _VALUES.items():
        given = {"value": line[value], "tag": line[source]}
        raw[field] = given if line[value] or line[source] else None
    try:
        row = _ROW.validate_python(raw)
    except ValidationError as error:
        raise ReportError(f"{path}, line {number}: {_describe(error)}") from None
    if (row.alpha is None) != (row.rule != "quadratic"):
        raise ReportError(
            f"{path}, line {number}: alpha must be set if rule=quadratic, and only then"
        )
    return row


def _describe(error: ValidationError) -> str:
    """The first error, with the name of its column."""
    first = error.errors(include_url=False)[0]
    field, *part = (str(word) for word in first["loc"])
    column = _VALUES[field][part == ["tag"]] if field in _VALUES else field
    message = first["msg"]
    return f"{column}={first['input'] or ''}: {message[:1].lower()}{message[1:]}"


def _describe_columns(columns: set[str]) -> str:
    missing, unknown = sorted(_COLUMNS - columns), sorted(columns - _COLUMNS)
    return "; ".join(
        f"{what}: {', '.join(names)}"
        for what, names in (("missing columns", missing), ("unknown columns", unknown))
        if names
    )
