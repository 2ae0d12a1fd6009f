"""Save and restore the whole state of a run.

A checkpoint is a folder step_NNNNNNNNN of safetensors and JSON files: `state.json` (the run),
`worker_NNN.safetensors` and `.json` (what is a worker's own), `shared.safetensors` (what all
workers hold alike at that step, once), `manifest.json` (every file with its size). It is written
under another name and renamed when complete, so that a folder of this name is whole. Nothing that
is opened here can run code.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from qsr.distributed import Communicator

_PREFIX = "step_"


class CheckpointError(RuntimeError):
    """One line: what could not be written or read, and the mend."""


@dataclass(frozen=True)
class WorkerState:
    """A worker's part of a checkpoint."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


class Checkpointer:
    """Keeps the newest `keep` checkpoints of a run in `folder`, which all ranks can reach."""

    def __init__(self, folder: Path, keep: int, communicator: Communicator) -> None:
        self._folder = folder
        self._keep = keep
        self._communicator = communicator

    def save(
        self,
        step: int,
        run: Mapping[str, Any],
        shared: Mapping[str, Tensor],
        workers: Mapping[int, WorkerState],
    ) -> None:
        """Collective: write the checkpoint after `step` steps.

        `run` and `shared` are rank 0's; `workers` holds those of this rank. Raises CheckpointError
        on every rank if any of them could not write; earlier checkpoints are still there then.
        """
        final = self._folder / f"{_PREFIX}{step:09d}"
        partial = final.with_suffix(".partial")
        main = self._communicator.topology.is_main
        self._try_on_all(lambda: _make_empty(partial) if main else None)
        self._try_on_all(lambda: _write_workers(partial, workers))
        self._try_on_all(lambda: self._commit(partial, final, run, shared) if main else None)

    def latest(self) -> int | None:
        """Collective: the step of the newest checkpoint, as rank 0 sees it; None without one."""
        steps = self._steps() if self._communicator.topology.is_main else []
        newest = self._communicator.gather_floats([float(max(steps, default=-1))])[0][0]
        return None if newest < 0 else int(newest)

    def read_run(self, step: int) -> dict[str, Any]:
        """What `save` was given as `run`."""
        return _read_json(self._folder / f"{_PREFIX}{step:09d}" / "state.json")

    def read_worker(self, step: int, worker: int) -> WorkerState:
        """What belongs to one worker, the shared tensors included."""
        folder = self._folder / f"{_PREFIX}{step:09d}"
        try:
            tensors = load_file(folder / "shared.safetensors")
            tensors |= load_file(folder / f"worker_{worker:03d}.safetensors")
        except Exception as error:  # safetensors raises its own type beside OSError
            raise CheckpointError(
                f"{folder} cannot be read ({error}); delete this folder to resume from the one "
                f"before"
            ) from None
        return WorkerState(tensors, _read_json(folder / f"worker_{worker:03d}.json"))

    def _steps(self) -> list[int]:
        names = (path.name.removeprefix(_PREFIX) for path in self._folder.glob(f"{_PREFIX}*"))
        return sorted(int(name) for name in names if name.isdigit())

    def _try_on_all(self, action: Callable[[], None]) -> None:
        """Collective: do `action`; if it fails on any rank, raise on every rank."""
        problem: Exception | None = None
        try:
            action()
        except Exception as error:  # not OSError alone: safetensors wraps a full disk
            problem = error
        if self._communicator.any(problem is not None):
            reason = str(problem) if problem else "another rank failed to write"
            raise CheckpointError(
                f"no checkpoint could be written to {self._folder}: {reason}; the ones before are "
                f"untouched"
            ) from problem

    def _commit(
        self, partial: Path, final: Path, run: Mapping[str, Any], shared: Mapping[str, Tensor]
    ) -> None:
        _save_tensors(partial / "shared.safetensors", shared)
        _write_json(partial / "state.json", run)
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        _write_json(partial / "manifest.json", {"bytes": files})
        _sync(partial)
        if final.exists():  # the same step again: its state is the same, bit for bit
            shutil.rmtree(partial)
        else:
            partial.rename(final)
        _sync(self._folder)
        for step in self._steps()[: -self._keep]:
            shutil.rmtree(self._folder / f"{_PREFIX}{step:09d}")


def _make_empty(folder: Path) -> None:
    for left in folder.parent.glob("*.partial"):  # by a run that was killed, or met a full disk
        shutil.rmtree(left)
    folder.mkdir(parents=True)


def _write_workers(folder: Path, workers: Mapping[int, WorkerState]) -> None:
    for index, state in workers.items():
        _save_tensors(folder / f"worker_{index:03d}.safetensors", state.tensors)
        _write_json(folder / f"worker_{index:03d}.json", state.values)


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # clones, because safetensors refuses the views of one flat buffer
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path)
    _sync(path)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    _sync(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete its folder") from None
    return value


def _sync(path: Path) -> None:
    """Have the kernel put a file, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
