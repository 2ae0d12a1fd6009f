"""Save and restore the full state of a run, collectively on all its ranks.

Checkpoints are folders named step_NNNNNNNNN; checkpoint_files.py describes their contents. A
checkpoint is written under a temporary name, renamed once all of it is on disk, and used only if
its checksums match. docs/reliability.md gives the order of the file operations and the reasons.
"""

import contextlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qsr.errors import CheckpointError, FolderMovedError
from qsr.run.checkpoint_files import (
    SHARED,
    STATE,
    DamageError,
    folder_name,
    read_tensors,
    read_values,
    tensors_of,
    values_of,
    verify,
    verify_sizes,
    write_manifest,
    write_tensors,
    write_values,
)
from qsr.run.durable import Written, remove_folder, rename_folder, sync_folder
from qsr.sync.communicator import Communicator, first_text

_LEFTOVER = re.compile(r"step_\d+(\.[0-9a-f]{8})?\.partial")
"""Temporary names used by `save` and `remove_folder`; only a killed session leaves them behind."""


@dataclass(frozen=True)
class WorkerState:
    """One worker's part of a checkpoint."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


class Checkpointer:
    """Keeps the newest `keep` checkpoints of a run in `folder`, which all ranks can reach and no
    other session writes to. `locate`, called on rank 0, returns the current path of the run folder
    (the parent of `folder`), or "" if it is gone."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        communicator: Communicator,
        locate: Callable[[], str] | None = None,
    ) -> None:
        self._folder = folder
        self._locate = locate or (lambda: str(folder.parent))
        self._keep = keep
        self._communicator = communicator
        self._is_main = communicator.topology.is_main
        self._newest: int | None = None  # last step that this session resumed from or saved
        self._damaged: set[int] = set()  # steps rejected by `latest`

    def save(
        self,
        step: int,
        run: Mapping[str, Any],
        shared: Mapping[str, Tensor],
        workers: Mapping[int, WorkerState],
    ) -> None:
        """Collective: write the checkpoint after `step` steps, then remove old ones.

        `run` and `shared` are taken from rank 0; `workers` holds the workers of this rank. Raises
        CheckpointError on every rank if any rank's files could not be written; earlier checkpoints
        are then untouched. A step that this session has already saved or resumed from is not
        written again, because its state is bitwise the same. Raises FolderMovedError on every rank
        if the run folder is no longer at its path; if it can still be reached, the checkpoint is
        written there first.
        """
        folder, here = self._folder, self._whereabouts()
        if here == folder.parent:
            self._save(step, run, shared, workers)
            return
        self._folder = here / folder.name
        outcome = f"the checkpoint after step {step} was saved there"
        try:
            self._save(step, run, shared, workers)
        except CheckpointError as error:
            outcome = str(error)
        raise FolderMovedError(
            f"{folder.parent} was moved to {here} during training; {outcome}; move it back and run "
            f"the same command to resume"
        )

    def _whereabouts(self) -> Path:
        """Collective: the current path of the run folder. Raises FolderMovedError on every rank if
        it is gone."""
        here = self._communicator.gather_texts(self._locate() if self._is_main else "")[0]
        if not here:
            raise FolderMovedError(
                f"{self._folder.parent} was deleted or replaced during training, so nothing more "
                f"can be saved there; put the folder back and run the same command to resume, or "
                f"run it without the folder to start over"
            )
        return Path(here)

    def _save(
        self,
        step: int,
        run: Mapping[str, Any],
        shared: Mapping[str, Tensor],
        workers: Mapping[int, WorkerState],
    ) -> None:
        if step == self._newest:
            return
        # a unique name, so that a rank left over from an earlier session cannot write into it
        token = self._communicator.gather_texts(secrets.token_hex(4) if self._is_main else "")[0]
        partial = self._folder / f"{folder_name(step)}.{token}.partial"
        everywhere, main = self._communicator.try_on_all, self._is_main
        written: dict[str, Written] = {}
        files: dict[str, Written] = {}
        try:
            everywhere(lambda: self._make_empty(partial) if main else None)
            everywhere(lambda: written.update(_write_workers(partial, step, workers)))
            for text in self._communicator.gather_texts(json.dumps(written)):
                files |= {name: Written(*about) for name, about in json.loads(text).items()}
            everywhere(lambda: self._commit(partial, step, run, shared, files) if main else None)
        except OSError as error:
            if main:  # an incomplete checkpoint takes space that the next one needs
                shutil.rmtree(partial, ignore_errors=True)
            there = "no earlier checkpoint exists"
            if self._newest is not None:
                there = f"the newest checkpoint is from step {self._newest}"
            raise CheckpointError(
                f"the checkpoint after step {step} could not be written to {self._folder} "
                f"({error}); {there}"
            ) from None
        self._newest = step
        self._damaged.discard(step)
        if main:
            self._remove_old(step)

    def latest(self) -> int | None:
        """Collective: the step of the newest checkpoint that verifies; None if there are no
        checkpoints.

        Every rank reads in full the files it will use (those of its workers and the shared ones),
        and all ranks agree on the result. Skipped checkpoints are reported on stderr with the
        reason. Raises CheckpointError on every rank if there are checkpoints but none verifies.
        """
        seen = json.dumps(self._steps()) if self._is_main else ""
        steps: list[int] = json.loads(self._communicator.gather_texts(seen)[0])
        problems: dict[int, str] = {}
        for step in reversed(steps):
            problem = self._problem(step)
            if problem is None:
                for name, reason in problems.items():
                    self._communicator.warn(
                        f"{self._folder / folder_name(name)} was skipped ({reason}); the run "
                        f"resumes from step {step}"
                    )
                self._newest, self._damaged = step, set(problems)
                return step
            problems[step] = problem
        if problems:
            named = "; ".join(f"{folder_name(step)}: {why}" for step, why in problems.items())
            raise CheckpointError(
                f"every checkpoint in {self._folder} is damaged ({named}); restore one from a "
                f"copy, or delete this folder to train from the first step"
            )
        return None

    def read_run(self, step: int) -> dict[str, Any]:
        """The `run` values that were passed to `save`. Raises CheckpointError."""
        try:
            return read_values(self._folder / folder_name(step), STATE)
        except DamageError as error:
            raise self._unreadable(step, error) from None

    def read_worker(self, step: int, worker: int) -> WorkerState:
        """The state of one worker, including the shared tensors. Raises CheckpointError."""
        folder = self._folder / folder_name(step)
        try:
            tensors = read_tensors(folder, SHARED) | read_tensors(folder, tensors_of(worker))
            return WorkerState(tensors, read_values(folder, values_of(worker)))
        except DamageError as error:
            raise self._unreadable(step, error) from None

    def check_space(self, checkpoint_bytes: int, more_bytes: int) -> None:
        """Collective: check the free disk space with room_for_checkpoints. Raises CheckpointError
        on every rank."""
        problem = ""
        try:
            room_for_checkpoints(self._folder, self._keep, checkpoint_bytes, more_bytes)
        except CheckpointError as error:
            problem = str(error)
        reason = first_text(self._communicator.gather_texts(problem))
        if reason:
            raise CheckpointError(reason)

    def _problem(self, step: int) -> str | None:
        """Collective: why a checkpoint cannot be used; None if it can."""
        problem = ""
        try:
            workers = self._communicator.topology.workers
            verify(self._folder / folder_name(step), step, workers)
        except DamageError as error:
            problem = str(error)
        return first_text(self._communicator.gather_texts(problem))

    def _steps(self) -> list[int]:
        names = {path.name for path in self._folder.glob("step_*")}
        numbers = (name.removeprefix("step_") for name in names)
        steps = {int(number) for number in numbers if number.isdecimal()}
        return sorted(step for step in steps if folder_name(step) in names)

    def _make_empty(self, partial: Path) -> None:
        if not self._folder.exists():
            self._folder.mkdir()
            sync_folder(self._folder.parent)
        for left in self._folder.glob("*.partial"):
            if _LEFTOVER.fullmatch(left.name):
                with contextlib.suppress(OSError):  # it does no harm
                    remove_folder(left)
        partial.mkdir()

    def _commit(
        self,
        partial: Path,
        step: int,
        run: Mapping[str, Any],
        shared: Mapping[str, Tensor],
        workers: Mapping[str, Written],
    ) -> None:
        files = dict(workers)
        files[SHARED] = write_tensors(partial, SHARED, step, shared)
        files[STATE] = write_values(partial, STATE, step, run)
        write_manifest(partial, step, self._communicator.topology.num_workers, files)
        sync_folder(partial)
        try:
            verify_sizes(partial, step)  # including other ranks' files, as this rank sees them
        except DamageError as error:
            raise OSError(str(error)) from None
        final = self._folder / folder_name(step)
        if os.path.lexists(final):  # it did not verify, or `latest` would have chosen it
            remove_folder(final)
        rename_folder(partial, final)

    def _remove_old(self, newest: int) -> None:
        """Also removes steps after `newest`: the run fell back to an earlier checkpoint since."""
        steps = self._steps()
        whole = [step for step in steps if step <= newest and step not in self._damaged]
        for step in set(steps) - set(whole[-self._keep :]):
            with contextlib.suppress(OSError):  # it does no harm; the next save tries again
                remove_folder(self._folder / folder_name(step))

    def _unreadable(self, step: int, error: DamageError) -> CheckpointError:
        return CheckpointError(
            f"{self._folder / folder_name(step)} cannot be read ({error}); run the same command to "
            f"resume from the previous checkpoint"
        )


def room_for_checkpoints(
    folder: Path, keep: int, checkpoint_bytes: int, more_bytes: int
) -> tuple[int, float]:
    """Bytes still needed on disk for `keep` checkpoints of this size, the next one and
    `more_bytes`, and bytes free there. Space already used by checkpoints in `folder` counts as
    available, except for the next one. Raises CheckpointError if the free space is too small."""
    wanted = max(checkpoint_bytes, (keep + 1) * checkpoint_bytes - _present(folder)) + more_bytes
    there = next(parent for parent in folder.absolute().parents if parent.exists())
    free = _free(there)
    if free < wanted:
        raise CheckpointError(
            f"{folder.parent}: not enough disk space: {readable(free)} free, {readable(wanted)} "
            f"needed for checkpoints of up to {readable(checkpoint_bytes)} each "
            f"(checkpoint.keep={keep} plus the one being written) and the results; lower "
            f"checkpoint.keep, or choose a runs_dir with more space"
        )
    return wanted, free


def _free(folder: Path) -> float:
    """Free bytes; infinity if the file system does not report them."""
    try:
        total, _, free = shutil.disk_usage(folder)
    except OSError:
        return math.inf
    return free if total > 0 else math.inf


def _present(folder: Path) -> int:
    """Total bytes of the files in a folder; files may disappear while they are counted."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += Path(parent, name).stat().st_size
    return size


def _write_workers(
    folder: Path, step: int, workers: Mapping[int, WorkerState]
) -> dict[str, Written]:
    files = {}
    for index, state in workers.items():
        name, more = tensors_of(index), values_of(index)
        files[name] = write_tensors(folder, name, step, state.tensors)
        files[more] = write_values(folder, more, step, state.values)
    return files


def readable(size: float) -> str:
    """A number of bytes with its unit, such as "1.5 GB"."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"
