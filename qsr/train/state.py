"""What a checkpoint holds, and how a run resumes from one."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from torch import Tensor

from qsr.core.plan import Plan, Round
from qsr.errors import TrainingError
from qsr.run.checkpoint import Checkpointer, WorkerState
from qsr.run.checkpoint_files import checkpoint_size
from qsr.sync.synchronizer import Synchronizer, SyncOptions, expected_state
from qsr.train.evaluation import Evaluation
from qsr.train.monitor import Progress
from qsr.train.worker import Worker


def checkpoint_bytes(plan: Plan, worker: Worker, num_workers: int, options: SyncOptions) -> int:
    """The most disk space that a checkpoint of a run takes, in bytes. `worker` is any worker of the
    run, on the meta device too: only its names and shapes matter."""
    tensors = worker.expected_tensors() | expected_state(worker.model, options)
    if plan.gradient_rounds == plan.num_rounds:
        shared = {k: t for k, t in tensors.items() if not k.startswith("buffers/")}
    else:  # within a round workers share nothing
        shared = {}
    own = {k: t for k, t in tensors.items() if k not in shared}
    return checkpoint_size(shared, own, num_workers)


class Resumed(NamedTuple):
    """State of a run at its newest checkpoint."""

    progress: Progress
    evaluation: Evaluation | None
    """The last evaluation before it."""


class RunState:
    """Saves and restores everything that decides how a run continues."""

    def __init__(
        self,
        workers: Sequence[Worker],
        synchronizer: Synchronizer,
        checkpointer: Checkpointer,
        options: SyncOptions,
    ) -> None:
        self._workers = workers
        self._synchronizer = synchronizer
        self._communicator = synchronizer.communicator
        self._checkpointer = checkpointer
        self._options = options

    def check_space(self, more_bytes: int) -> None:
        """Collective: check that the disk has space for the run's checkpoints and `more_bytes`
        more. Raises CheckpointError."""
        num_workers = self._communicator.topology.num_workers
        plan, worker = self._synchronizer.plan, self._workers[0]
        size = checkpoint_bytes(plan, worker, num_workers, self._options)
        self._checkpointer.check_space(size, more_bytes)

    def save(self, progress: Progress, round_: Round, evaluation: Evaluation | None) -> None:
        """Collective: write the checkpoint after `progress.step` steps, within `round_` or at its
        end. Raises TrainingError if a value is not finite, CheckpointError if the files could not
        be written, on all ranks; earlier checkpoints are then untouched."""
        in_flight, shared_values = self._synchronizer.state()
        tensors = [
            worker.tensors() | more for worker, more in zip(self._workers, in_flight, strict=True)
        ]
        self._check_finite(tensors, progress.step)
        first = self._workers[0]
        shared: dict[str, Tensor] = {}
        if self._synchronizer.parameters_are_equal(round_, progress.step):
            shared |= first.parameters()
        if round_.averages == "gradients":  # all workers have made the same updates so far
            shared |= first.optimizer_state()
        own = {
            worker.index: WorkerState(
                {name: t for name, t in of_worker.items() if name not in shared},
                worker.values(),
            )
            for worker, of_worker in zip(self._workers, tensors, strict=True)
        }
        run = {
            "progress": asdict(progress),
            "round": round_._asdict(),
            **shared_values,
            "workers": self._communicator.topology.num_workers,
            "config_hash": self._synchronizer.config_hash,
            "evaluation": None if evaluation is None else asdict(evaluation),
        }
        self._checkpointer.save(progress.step, run, shared, own)

    def _check_finite(self, tensors: Sequence[Mapping[str, Tensor]], step: int) -> None:
        finite = all(
            bool(tensor.isfinite().all())
            for of_worker in tensors
            for name, tensor in of_worker.items()
            if not name.startswith("buffers/")
        )
        if self._communicator.any(not finite):
            raise TrainingError(
                f"parameters or optimizer states are not finite at step {step}; nothing "
                f"was saved, earlier checkpoints are untouched; try a lower schedule.peak_lr, a "
                f"longer warm-up or optimizer.clip_norm"
            )

    def restore(self) -> Resumed | None:
        """Collective: load the run's newest intact checkpoint; None if there is no checkpoint.
        Raises CheckpointError or TrainingError if the run cannot be resumed from it."""
        step = self._checkpointer.latest()
        if step is None:
            return None
        run = self._checkpointer.read_run(step)
        self._check_same_run(run, step)
        in_flight = []
        for worker in self._workers:
            state = self._checkpointer.read_worker(step, worker.index)
            more = {k: t for k, t in state.tensors.items() if Synchronizer.is_state(k)}
            own = {k: t for k, t in state.tensors.items() if k not in more}
            worker.load(own, state.values)
            in_flight.append(more)
        self._synchronizer.load_state(in_flight, run)
        stored = run["evaluation"]
        evaluation = None if stored is None else Evaluation(**stored)
        return Resumed(Progress(**run["progress"]), evaluation)

    def _check_same_run(self, run: Mapping[str, Any], step: int) -> None:
        absent = {"progress", "evaluation", "workers", "config_hash", "correction_due"} - run.keys()
        if absent:
            raise TrainingError(
                f"the checkpoint after step {step} has no {min(absent)}: another program wrote it; "
                f"remove its folder to resume from the previous checkpoint"
            )
        workers = self._communicator.topology.num_workers
        if run["workers"] != workers:
            raise TrainingError(
                f"the checkpoint after step {step} has {run['workers']} workers, but this run has "
                f"{workers}: a run's number of workers cannot change; to use fewer processes, set "
                f"cluster.ranks to a divisor of {run['workers']}"
            )
        if run["config_hash"] != self._synchronizer.config_hash:
            raise TrainingError(
                f"the checkpoint after step {step} was made with other settings, or by a version "
                f"of qsr with fewer settings: choose another runs_dir"
            )
