"""The results of a run, whose disk space is reserved when it starts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from qsr.run.checkpoint_files import pack_tensors, packed_size
from qsr.run.durable import partial_name, replace_file, reserve
from qsr.run.folder import RunFolder, write_json

_SUMMARY_BYTES = 2**20
"""Reserved for summary.json; the rest is for rows of metrics.jsonl delayed by a full disk."""
_DIGITS_BYTES = 2**12
"""Reserved for metadata of the model file that is known only at the end of the run."""


def reserve_results(
    folder: RunFolder,
    model: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    averages: Sequence[str] = (),
) -> None:
    """Reserve the disk space that `write_results` will need, so that results are not lost if the
    disk fills up during training. `averages`: names of the averages over time. Raises OSError."""
    for path, size in _room(folder, model, metadata, averages).items():
        reserve(path, size)


def missing_room(
    folder: RunFolder,
    model: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    averages: Sequence[str] = (),
) -> int:
    """Bytes that `reserve_results` still has to reserve after earlier sessions."""
    missing = 0
    for path, size in _room(folder, model, metadata, averages).items():
        reserved = partial_name(path)
        missing += max(0, size - (reserved.stat().st_size if reserved.exists() else 0))
    return missing


def _room(
    folder: RunFolder,
    model: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    averages: Sequence[str],
) -> dict[Path, int]:
    """Disk space for each file of the results, in bytes."""
    size = packed_size(model, metadata) + _DIGITS_BYTES
    models = (folder.model, *map(folder.averaged_model, averages))
    return dict.fromkeys(models, size) | {folder.summary: _SUMMARY_BYTES}


class ModelFile(NamedTuple):
    """The contents of a model file."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def write_results(
    folder: RunFolder,
    model: ModelFile,
    summary: Mapping[str, Any],
    averages: Mapping[str, ModelFile],
) -> None:
    """Write model.safetensors, the `averages` over time, and then summary.json, which marks the run
    as finished, each into its reserved disk space. Raises OSError."""
    files = {folder.averaged_model(name): average for name, average in averages.items()}
    for path, file in {folder.model: model, **files}.items():
        replace_file(path, pack_tensors(file.tensors, file.metadata))
    write_json(folder.summary, summary)
