"""Speed profiles that a calibration writes: FOLDER/speed/NAME.yaml."""

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from qsr.config.load import CONFIG_DIR
from qsr.config.schema import (
    AllReduceTimes,
    DataParallelSteps,
    SpeedConfig,
)
from qsr.core.cost import Link, fit_link
from qsr.errors import ConfigError

_BEGINNING = "# Written by `"
MARK = f"{_BEGINNING}qsr plan calibrate`, which renews it; edit a copy."


@dataclass(frozen=True)
class Measurement:
    """Result of a calibration."""

    key: str
    """Key in speed.seconds_per_image."""
    machines: int
    ranks_per_machine: int
    seconds_per_image: float
    """Time of the slowest rank, while all ranks compute and none waits."""
    sizes_bytes: tuple[int, ...]
    """Sizes of the all-reduces, rising to the model's size; empty for one rank."""
    allreduce_seconds: tuple[float, ...]
    """Times of the slowest rank."""
    inside_seconds: tuple[float, ...]
    """The same among the ranks of each machine; empty for one machine, or one rank on each."""
    data_parallel: DataParallelSteps | None
    """Data parallel steps; None for one rank."""
    how: str
    """The hardware and the command."""

    @property
    def ranks(self) -> int:
        """Total number of ranks."""
        return self.machines * self.ranks_per_machine


def profile_path(name: str, folder: Path) -> Path:
    """Where a calibration writes its profile: in the group speed of a `folder` of settings. Raises
    ConfigError if the name is not valid or taken by a profile of the project's, the folder cannot
    be written, or the file exists and was not written by a calibration."""
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise ConfigError(f"name={name}: use only letters, digits and underscores")
    path = folder.absolute() / "speed" / f"{name}.yaml"
    taken = CONFIG_DIR / "speed" / path.name
    if taken.exists():
        raise ConfigError(f"name={name} is {taken}: choose another name")
    if path.exists() and not path.read_text().startswith(_BEGINNING):
        raise ConfigError(f"{path} was not written by a calibration: choose another name")
    there = next(parent for parent in path.parents if parent.exists())
    wrong = "is not a folder" if not there.is_dir() else "cannot be written"
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ConfigError(f"{there} {wrong}: choose a folder with --config-dir DIR")
    return path


def read_profile(path: Path) -> SpeedConfig:
    """Read a profile. Raises ConfigError if this version cannot read it."""
    try:
        raw = json.dumps(yaml.safe_load(path.read_text()))
        return TypeAdapter(SpeedConfig).validate_json(raw)
    except (ValidationError, yaml.YAMLError):
        raise ConfigError(f"{path} is not a profile of this version: delete it") from None


def profile_text(speed: SpeedConfig) -> str:
    """The contents of a profile's file."""
    return MARK + "\n" + yaml.safe_dump(dataclasses.asdict(speed), sort_keys=False, width=100)


def updated_profile(name: str, before: SpeedConfig | None, found: Measurement) -> SpeedConfig:
    """The speeds that a calibration `found`, and those of other networks from the profile of an
    earlier one.

    Raises ConfigError if that one used other ranks, or if no link fits the all-reduces.
    """
    if before is not None and (before.machines, before.ranks_per_machine) != (
        found.machines,
        found.ranks_per_machine,
    ):
        raise ConfigError(
            f"speed={name} was measured on {before.machines} x {before.ranks_per_machine} ranks, "
            f"not {found.machines} x {found.ranks_per_machine}: choose another name"
        )
    link, latency, measured, inside = None, 0.0, None, None
    sources = {**(before.sources if before else {}), found.key: found.how}
    if found.ranks > 1:
        fit, residual = _fit(found.ranks, found.machines, found, found.allreduce_seconds)
        link, latency = _rounded(fit.bytes_per_second * 8 / 1e9), _rounded(fit.latency_seconds)
        measured = AllReduceTimes(found.ranks, found.sizes_bytes, found.allreduce_seconds)
        text = f"fitted to all-reduces of {len(found.sizes_bytes)} sizes, to within "
        text += f"{100 * residual:.0f} % (root mean square); {found.how}"
        sources |= {
            "link_gbit_per_second": text,
            "latency_seconds": "fitted with the link",
            "allreduce": found.how,
        }
    if found.inside_seconds:
        fit, residual = _fit(found.ranks_per_machine, 1, found, found.inside_seconds)
        inside = _rounded(fit.bytes_per_second * 8 / 1e9)
        text = f"fitted like the link, to within {100 * residual:.0f} %"
        sources["inside_gbit_per_second"] = text
    return SpeedConfig(
        name=name,
        machines=found.machines,
        ranks_per_machine=found.ranks_per_machine,
        link_gbit_per_second=link,
        latency_seconds=latency,
        allreduce=measured,
        seconds_per_image={
            **(before.seconds_per_image if before else {}),
            found.key: _rounded(found.seconds_per_image),
        },
        data_parallel={
            **(before.data_parallel if before else {}),
            **({found.key: found.data_parallel} if found.data_parallel else {}),
        },
        price_per_gpu_hour=before.price_per_gpu_hour if before else None,
        fitted_to=(),
        sources=sources,
        inside_gbit_per_second=inside,
    )


def _fit(
    ranks: int, machines: int, found: Measurement, seconds: Sequence[float]
) -> tuple[Link, float]:
    try:
        return fit_link(ranks, machines, found.sizes_bytes, seconds)
    except ValueError as error:
        raise ConfigError(f"{error}: measure again on idle machines") from None


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
