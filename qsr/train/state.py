"""What a checkpoint holds, and how a run resumes from one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from torch import Tensor, nn

from qsr.config.schema import EmaConfig, OptimizerConfig, SyncConfig
from qsr.core.open_plan import AnyPlan
from qsr.core.plan import Round
from qsr.errors import TrainingError
from qsr.run.checkpoint import Checkpointer, WorkerState
from qsr.sync.synchronizer import Synchronizer
from qsr.train.evaluation import Evaluation
from qsr.train.monitor import Progress
from qsr.train.optim import states_per_parameter
from qsr.train.weight_average import WeightAverages
from qsr.train.worker import Worker


def checkpoint_bytes(
    model: nn.Module,
    optimizer: OptimizerConfig,
    plan: AnyPlan,
    num_workers: int,
    sync: SyncConfig,
    ema: EmaConfig,
) -> int:
    """Upper bound of a checkpoint's size in bytes. `model` may be on the meta device."""
    copies = 1 + states_per_parameter(optimizer) + (sync.delay_steps > 0)

    def size(tensors: Iterable[tuple[str, Tensor]], copies: int) -> int:
        """With 200 bytes and the name for each entry of the file's header."""
        return sum(copies * t.nbytes + (copies + 1) * (200 + len(name)) for name, t in tensors)

    learned, buffers = size(model.named_parameters(), copies), size(model.named_buffers(), 1)
    outer = 0 if sync.outer.ends_at_mean else size(model.named_parameters(), 2)
    over_time = len(ema.names) * size(model.named_parameters(), 1)
    small_files = (2 + num_workers) * 4096  # JSON: one disk block each
    if not plan.averages_parameters:  # workers share all but their buffers
        return learned + num_workers * buffers + over_time + small_files
    return num_workers * (learned + buffers) + outer + over_time + small_files


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
        averages: WeightAverages,
    ) -> None:
        self.averages = averages
        """Averages of the model over time."""
        self._workers = workers
        self._synchronizer = synchronizer
        self._communicator = synchronizer.communicator
        self._checkpointer = checkpointer

    def save(self, progress: Progress, round_: Round, evaluation: Evaluation | None) -> None:
        """Collective: write the checkpoint after `progress.step` steps, within `round_` or at its
        end. Raises TrainingError if a value is not finite, CheckpointError if the files could not
        be written, on all ranks; earlier checkpoints are then untouched."""
        synchronizing = self._synchronizer.state()
        tensors = [
            worker.tensors() | more
            for worker, more in zip(self._workers, synchronizing.own, strict=True)
        ]
        over_time = self.averages.tensors()
        self._check_finite([*tensors, over_time], progress.step)
        first = self._workers[0]
        shared = synchronizing.shared | over_time
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
            if self._communicator.topology.part == 0  # the ranks of a worker have the same state
        }
        run = {
            "progress": asdict(progress),
            "round": round_._asdict(),
            **synchronizing.values,
            **self.averages.values(),
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
        others = []  # what belongs to no worker
        for worker in self._workers:
            state = self._checkpointer.read_worker(step, worker.index)
            more = {
                k: t
                for k, t in state.tensors.items()
                if Synchronizer.is_state(k) or WeightAverages.is_state(k)
            }
            own = {k: t for k, t in state.tensors.items() if k not in more}
            worker.load(own, state.values)
            others.append(more)
        self._synchronizer.load_state(others, run)
        self.averages.load(others[0], run)
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
