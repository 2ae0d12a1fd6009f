"""The results of a run, whose disk space is reserved when it starts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qsr.run.checkpoint_files import pack_tensors, packed_size
from qsr.run.durable import partial_name, replace_file, reserve
from qsr.run.folder import RunFolder, write_json

_SUMMARY_BYTES = 2**20
"""For summary.json, and what it leaves for rows of metrics.jsonl that a full disk has held up."""
_DIGITS_BYTES = 2**12
"""For the digits of what the model file says of the run's end."""


def reserve_results(
    folder: RunFolder, model: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Take the room on the disk that `write_results` will need, so that a disk that fills up while
    the run trains does not cost its results. Raises OSError."""
    for path, size in _room(folder, model, metadata).items():
        reserve(path, size)


def missing_room(
    folder: RunFolder, model: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> int:
    """Bytes of the disk that `reserve_results` will take; an earlier session may have done so."""
    missing = 0
    for path, size in _room(folder, model, metadata).items():
        reserved = partial_name(path)
        missing += max(0, size - (reserved.stat().st_size if reserved.exists() else 0))
    return missing


def _room(
    folder: RunFolder, model: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[Path, int]:
    """Of the disk, for each file of the results, in bytes."""
    size = packed_size(model, metadata) + _DIGITS_BYTES
    return {folder.model: size, folder.summary: _SUMMARY_BYTES}


def write_results(
    folder: RunFolder,
    model: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    summary: Mapping[str, Any],
) -> None:
    """Write model.safetensors and then summary.json, which says that the run is finished, each over
    the room that was taken for it. Raises OSError."""
    replace_file(folder.model, pack_tensors(model, metadata))
    write_json(folder.summary, summary)
