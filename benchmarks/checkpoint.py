#!/usr/bin/env python
"""The cost of checkpoints on this machine and disk.

    python scripts/bench.py checkpoint
    python -m benchmarks.checkpoint [--folder FOLDER] [--megabytes 1000]

Measures the checksums of Python's standard library in memory and, for one worker of this size in
FOLDER (on the disk used for runs; default: runs/), the time to write a checkpoint, to write the
same bytes with fsync, to verify before resuming, and to load. Each is the best of three. The files
were just written, so reads come from the page cache; after a restart the disk's read speed is the
limit.
"""

import argparse
import hashlib
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.measure import ROOT, record
from qsr.run.checkpoint import Checkpointer, WorkerState
from qsr.run.checkpoint_files import folder_name, verify
from qsr.run.durable import write_file
from qsr.sync.communicator import Communicator
from qsr.sync.topology import Topology

CHECKSUMS: dict[str, Callable[[bytes], object]] = {
    "sha256": lambda data: hashlib.sha256(data).digest(),
    "sha1": lambda data: hashlib.sha1(data).digest(),
    "blake2b": lambda data: hashlib.blake2b(data).digest(),
    "crc32": zlib.crc32,
}


def best_seconds(action: Callable[[int], object]) -> float:
    """The fastest of `action(0)`, `action(1)` and `action(2)`, in seconds."""
    seconds = []
    for number in range(3):
        started = time.perf_counter()
        action(number)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def measure_checksums() -> dict[str, float]:
    """Speed of each checksum in memory, in GB/s."""
    data = os.urandom(2**28)

    def speed(checksum: Callable[[bytes], object]) -> float:
        return len(data) / 1e9 / best_seconds(lambda _: checksum(data))

    return {name: speed(checksum) for name, checksum in CHECKSUMS.items()}


def measure_checkpoint(folder: Path, size: int) -> dict[str, float]:
    """Seconds per operation, for one worker with `size` bytes of tensors."""
    alone = Communicator(Topology(0, 1, 0, 1), torch.device("cpu"), 60.0)
    checkpointer = Checkpointer(folder / "checkpoints", 1, alone)
    parts = {f"tensor_{i}": torch.rand(size // 400) for i in range(100)}
    content = os.urandom(size)

    def save(number: int) -> None:
        checkpointer.save(number, {}, {}, {0: WorkerState(parts, {})})

    seconds = {
        "save": best_seconds(save),
        "plain_write": best_seconds(lambda _: _plain_write(folder / "plain", content)),
        "write_with_checksum": best_seconds(lambda _: write_file(folder / "plain", [content])),
    }
    newest = folder / "checkpoints" / folder_name(2)
    seconds["verify"] = best_seconds(lambda _: verify(newest, 2, [0]))
    seconds["load"] = best_seconds(lambda _: _load(checkpointer))
    return seconds


def _load(checkpointer: Checkpointer) -> None:
    for tensor in checkpointer.read_worker(2, 0).tensors.values():
        tensor.clone()  # the file is memory-mapped: this reads it


def _plain_write(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "runs")
    parser.add_argument("--megabytes", type=int, default=1000)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        seconds = measure_checkpoint(Path(folder), arguments.megabytes * 10**6)
    checksums = measure_checksums()
    print("  ".join(f"{name} {speed:.2f} GB/s" for name, speed in checksums.items()))
    print(f"{arguments.megabytes} MB:", "  ".join(f"{k} {v:.2f} s" for k, v in seconds.items()))
    results = {
        "megabytes": arguments.megabytes,
        "checksum_gb_per_second": {name: round(v, 2) for name, v in checksums.items()},
        "seconds": {name: round(v, 2) for name, v in seconds.items()},
    }
    print(record("checkpoint", results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
