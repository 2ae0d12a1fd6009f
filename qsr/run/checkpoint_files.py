"""The files of one checkpoint, and how their integrity is verified.

    state.json              the run: progress, round, evaluation
    shared.safetensors      tensors that are equal on all workers at that step, stored once
    worker_000.safetensors  a worker's own tensors
    worker_000.json         the rest of its own state
    manifest.json           size and SHA-256 of every other file; its own SHA-256; written last

Each file also contains its own name and step, so that a file from another checkpoint is recognized
even if the manifest was rewritten to match it. No file format used here can execute code.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from qsr.run.durable import Written, read_file, write_file
from qsr.run.folder import parse_object

STATE = "state.json"
SHARED = "shared.safetensors"
_MANIFEST = "manifest.json"
_IDENTITY = "file"
_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class DamageError(Exception):
    """What is wrong with a checkpoint; the caller adds the checkpoint's path."""


def tensors_of(worker: int) -> str:
    """File name of a worker's tensors."""
    return f"worker_{worker:03d}.safetensors"


def values_of(worker: int) -> str:
    """File name of the rest of a worker's state."""
    return f"worker_{worker:03d}.json"


def pack_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The contents of a safetensors file, in chunks.

    The safetensors library builds the whole file in memory, twice for views of one buffer, so it is
    only used for reading. Here a tensor is copied only if it is on a GPU or not contiguous.
    """
    names, header = _header(tensors, metadata)
    yield header
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def packed_size(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Size of that file in bytes, computed from names and shapes only (meta tensors work)."""
    _, header = _header(tensors, metadata)
    return len(header) + sum(_bytes(tensor) for tensor in tensors.values())


def _header(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None
) -> tuple[list[str], bytes]:
    """The names in file order, and the bytes before the first tensor: the length of the JSON header
    and the header itself. Tensors with wide elements come first, so that all are aligned."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        start, end = end, end + _bytes(tensors[name])
        header[name] = {
            "dtype": _TYPE_NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return names, struct.pack("<Q", len(text)) + text


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def write_tensors(folder: Path, name: str, step: int, tensors: Mapping[str, Tensor]) -> Written:
    """Write tensors to a safetensors file. Raises OSError."""
    return write_file(folder / name, pack_tensors(tensors, _metadata(step, name)))


def write_values(folder: Path, name: str, step: int, values: Mapping[str, Any]) -> Written:
    """Write `values`, which must be JSON-serializable. Raises OSError."""
    return write_file(folder / name, [_json({_IDENTITY: _identity(step, name), **values})])


def write_manifest(folder: Path, step: int, workers: int, files: Mapping[str, Written]) -> None:
    """Write the manifest; call it when all other files are on disk. Raises OSError."""
    body = {
        _IDENTITY: _identity(step, _MANIFEST),
        "workers": workers,
        "files": {name: files[name]._asdict() for name in sorted(files)},
    }
    write_file(folder / _MANIFEST, [_with_digest(body)])


def verify(folder: Path, step: int, workers: Iterable[int]) -> None:
    """Read in full the manifest, the shared files and those of these workers (where the checkpoint
    has them), and compare them with the manifest. Raises DamageError."""
    files = read_manifest(folder, step)
    own = [name for worker in workers for name in (tensors_of(worker), values_of(worker))]
    for name in [STATE, SHARED, *(name for name in own if name in files)]:
        expected = files[name]
        try:
            found = read_file(folder / name)
        except OSError as error:
            raise DamageError(f"{name}: {error.strerror}") from None
        if found.bytes != expected.bytes:
            raise DamageError(f"{name} has {found.bytes:,} bytes, not {expected.bytes:,}")
        if found.sha256 != expected.sha256:
            raise DamageError(f"{name} has the wrong checksum")
        if _stored_identity(folder / name) != _identity(step, name):
            raise DamageError(f"{name} belongs to another step or worker")


def verify_sizes(folder: Path, step: int) -> None:
    """Quick check before older checkpoints are removed: the manifest is readable and every file has
    its full length. Raises DamageError."""
    for name, expected in read_manifest(folder, step).items():
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            raise DamageError(f"{name}: {error.strerror}") from None
        if found != expected.bytes:
            raise DamageError(f"{name} has {found:,} bytes, not {expected.bytes:,}")


def read_manifest(folder: Path, step: int) -> dict[str, Written]:
    """Size and checksum of every other file. Raises DamageError."""
    try:
        text = (folder / _MANIFEST).read_bytes()
    except OSError as error:
        raise DamageError(f"{_MANIFEST}: {error.strerror}") from None
    try:
        body = parse_object(text)
        del body["sha256"]
        if text != _with_digest(body):
            raise DamageError(f"{_MANIFEST} has the wrong checksum")
        number, identity = int(body["workers"]), str(body[_IDENTITY])
        files = {name: Written(**about) for name, about in body["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DamageError(f"{_MANIFEST} cannot be parsed") from None
    if identity != _identity(step, _MANIFEST):
        raise DamageError(f"{_MANIFEST} belongs to {identity.partition('/')[0]}")
    workers = range(min(number, len(files)))  # a damaged manifest may claim any number
    if files.keys() != {STATE, SHARED, *map(tensors_of, workers), *map(values_of, workers)}:
        raise DamageError(f"{_MANIFEST} does not list every file")
    return files


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a file of the checkpoint. Raises DamageError."""
    path = folder / name
    try:
        try:
            return dict(safetensors.torch.load_file(path))
        except (OSError, SafetensorError):  # some file systems do not support mmap
            return dict(safetensors.torch.load(path.read_bytes()))
    except (OSError, SafetensorError) as error:
        raise DamageError(f"{name}: {error}") from None


def read_values(folder: Path, name: str) -> dict[str, Any]:
    """The values of a JSON file of the checkpoint. Raises DamageError."""
    try:
        values = parse_object((folder / name).read_bytes())
        del values[_IDENTITY]
    except (OSError, ValueError, KeyError) as error:
        raise DamageError(f"{name}: {error}") from None
    return values


def folder_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step_{step:09d}"


def _identity(step: int, name: str) -> str:
    return f"{folder_name(step)}/{name}"


def _metadata(step: int, name: str) -> dict[str, str]:
    return {_IDENTITY: _identity(step, name)}


def _stored_identity(path: Path) -> object:
    try:
        if path.suffix == ".json":
            return parse_object(path.read_bytes()).get(_IDENTITY)
        with path.open("rb") as file:  # the library would mmap the file
            (size,) = struct.unpack("<Q", file.read(8))
            header = parse_object(file.read(min(size, path.stat().st_size)))
        return header.get("__metadata__", {}).get(_IDENTITY)
    except (OSError, ValueError, AttributeError, struct.error):
        return None


def _with_digest(body: Mapping[str, Any]) -> bytes:
    return _json({**body, "sha256": hashlib.sha256(_json(body)).hexdigest()})


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
