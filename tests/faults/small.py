"""A checkpoint of two workers in a few kilobytes, whose contents tell its step."""

import hashlib
import json
from pathlib import Path

import torch

from qsr.run.checkpoint import Checkpointer, WorkerState
from qsr.sync.communicator import Communicator
from qsr.sync.topology import Topology
from tests.support import CPU

PAIR = Communicator(Topology(0, 1, 0, 2), CPU, 10.0)


def checkpointer(folder: Path, keep: int = 2) -> Checkpointer:
    return Checkpointer(folder, keep, PAIR)


def save(to: Checkpointer, step: int) -> None:
    own = {
        index: WorkerState({"own": torch.full((40,), step + index / 2)}, {"scaler": {"at": step}})
        for index in (0, 1)
    }
    to.save(step, {"progress": {"step": step}}, {"shared": torch.full((30,), -float(step))}, own)


def holds(reader: Checkpointer, step: int) -> bool:
    """Whether a checkpoint's contents are what `save` was given."""
    workers = [reader.read_worker(step, index) for index in (0, 1)]
    return reader.read_run(step) == {"progress": {"step": step}} and all(
        worker.tensors.keys() == {"own", "shared"}
        and bool((worker.tensors["own"] == step + index / 2).all())
        and bool((worker.tensors["shared"] == -step).all())
        and worker.values == {"scaler": {"at": step}}
        for index, worker in enumerate(workers)
    )


def steps_in(folder: Path) -> list[int]:
    """The steps that have a checkpoint; fails if there is anything else."""
    return sorted(int(path.name.removeprefix("step_")) for path in folder.iterdir())


def flip_byte(path: Path, position: int, bit: int = 4) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def rewrite_manifest(checkpoint: Path) -> None:
    """Take over the sizes and checksums of the files that are there."""
    path = checkpoint / "manifest.json"
    body = json.loads(path.read_text())
    del body["sha256"]
    for name in body["files"]:
        content = (checkpoint / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        body["files"][name] = {"bytes": len(content), "sha256": digest}
    text = json.dumps(body, indent=1) + "\n"
    whole = body | {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    path.write_text(json.dumps(whole, indent=1) + "\n")
