"""The algorithm: rounds of local steps, each ended by one average."""

import hashlib
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qsr.averaging import Averager, MomentBuffers
from qsr.checkpoint import Checkpointer, CheckpointError, WorkerState
from qsr.checkpoint_files import checkpoint_size
from qsr.core.plan import Plan, Round
from qsr.core.sampling import Sampler
from qsr.core.seeds import seed_for
from qsr.data import Batch, Loader, Request
from qsr.delayed import PREFIX, DelayedAverage
from qsr.distributed import Communicator
from qsr.evaluation import Evaluation, Evaluator
from qsr.gradients import GradientAverager
from qsr.losses import TrainingLoss
from qsr.monitor import Monitor, Progress, TrainingError
from qsr.precision import Precision
from qsr.step import Stepper
from qsr.stopping import MAX_PENDING, Agreement, StopFlag, StopRequestedError
from qsr.tracking import Tracker
from qsr.worker import Worker


@dataclass(frozen=True)
class Due:
    """When something besides training happens, in steps; None: only at the end."""

    log_every: int
    evaluate_every: int
    checkpoint_every: int | None
    stop_after: int | None
    """End the session after this step."""


def checkpoint_bytes(plan: Plan, worker: Worker, num_workers: int, *, delayed: bool) -> int:
    """The most that a checkpoint of a run takes of the disk. `worker`: any of its workers, of which
    names and shapes count alone; one on the meta device will do. `delayed`: whether averages are
    applied with a delay."""
    tensors = worker.expected_tensors()
    if delayed:
        tensors |= {PREFIX + name: tensor for name, tensor in worker.parameters().items()}
    if plan.gradient_rounds == plan.num_rounds:
        shared = {k: t for k, t in tensors.items() if not k.startswith("buffers/")}
    else:  # within a round every worker has all its own
        shared = {}
    own = {k: t for k, t in tensors.items() if k not in shared}
    return checkpoint_size(shared, own, num_workers)


class Trainer:
    """Trains the workers of this rank through the rounds of a plan.

    Every rank builds one with the same arguments, but for `workers`, its own, and calls `train`.
    A resumed run calls `restore` first.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        sampler: Sampler,
        workers: Sequence[Worker],
        moments: MomentBuffers,
        loader: Loader,
        loss: TrainingLoss,
        micro_batch: int,
        clip_norm: float | None,
        precision: Precision,
        communicator: Communicator,
        evaluator: Evaluator,
        checkpointer: Checkpointer,
        tracker: Tracker,
        due: Due,
        config_hash: str,
        stop: StopFlag,
        bucket_mib: float | None,
        delay_steps: int,
    ) -> None:
        self.evaluation: Evaluation | None = None
        self.stopping = False
        """Whether the ranks agreed to stop because of a signal."""
        self.checkpoint_failure: str | None = None
        """Why the checkpoint that was due last is missing; None if it is there. The run goes on
        without it: its end decides what to make of this."""
        self._plan = plan
        self._sampler = sampler
        self._workers = workers
        self._moments = moments
        self._loader = loader
        self._micro_batch = micro_batch
        self._communicator = communicator
        self._evaluator = evaluator
        self._checkpointer = checkpointer
        self._tracker = tracker
        self._due = due
        self._config_hash = config_hash
        self._agreement = Agreement(communicator, stop)
        self._averager = Averager(communicator, communicator.topology.num_workers)
        self._delay_steps = delay_steps
        self._delayed = DelayedAverage(self._averager, workers) if delay_steps else None
        self._gradients = (
            GradientAverager(workers, communicator, bucket_mib) if plan.gradient_rounds else None
        )
        self._monitor = Monitor(plan, sampler, communicator, precision, config_hash)
        self._stepper = Stepper(
            loss=loss,
            micro_batch=micro_batch,
            clip_norm=clip_norm,
            precision=precision,
            monitor=self._monitor,
            gradients=self._gradients,
            seed=sampler.seed,
        )

    @property
    def progress(self) -> Progress:
        """Where the run stands, and what it has measured."""
        return self._monitor.progress

    @property
    def num_parameters(self) -> int:
        """Of the network."""
        return sum(p.numel() for p in self._workers[0].model.module.parameters())

    @property
    def measures_communication(self) -> bool:
        """Whether all averages are timed: not where DDP overlaps them with the backward pass."""
        return self._gradients is None or not self._gradients.overlaps

    @property
    def finished(self) -> bool:
        """Whether the plan's last step is done, and evaluated."""
        return self._at_the_end and not self.progress.evaluation_due

    @property
    def _at_the_end(self) -> bool:
        return self.progress.step == self._plan.total_steps

    # What happens in which order

    def train(self) -> None:
        """Collective: run to the end of the plan, or to the step where the session is to stop, or
        until the ranks agree that a signal asks for it; what is done is saved then."""
        total = self._plan.total_steps
        stop = min(self._due.stop_after or total, total)
        self._check_equal_start()
        batches = iter(self._loader.batches(self._requests(self.progress.step, stop)))
        if self._gradients is not None and self.progress.step < stop:
            batch = next(batches)
            self._gradients.settle(batch.images[: self._micro_batch])
            batches = itertools.chain([batch], batches)
        self._monitor.start(self.progress)
        if self.progress.evaluation_due:
            self._make_up_evaluation()
        for round_, step in self._steps(self.progress.step, stop):
            if self.stopping:
                break
            self._train_step(round_, step, batches)
            if self._delayed is not None and self._delayed.due == step + 1:
                self._delayed.apply_()
            if step + 1 == round_.end:
                self._end_round(round_)
            self.progress.step = step + 1
            self._do_what_is_due(round_, stop)
        self._agreement.settle()

    def _steps(self, first: int, stop: int) -> Iterator[tuple[Round, int]]:
        """The steps of this session, each with its round."""
        for round_ in self._plan.rounds(from_step=first):
            for step in range(max(round_.start, first), min(round_.end, stop)):
                yield round_, step
            if round_.end >= stop:
                return

    def _make_up_evaluation(self) -> None:
        """The evaluation that a stop kept the session before from."""
        round_ = self._plan.round_at(self.progress.step - 1)
        self.stopping = not self._evaluate(round_)
        self.progress.evaluation_due = self.stopping
        self._monitor.lap("evaluation_seconds")

    def _do_what_is_due(self, round_: Round, stop: int) -> None:
        due, step = self._due, self.progress.step
        final = self._at_the_end
        log = final or step % due.log_every == 0
        evaluate = final or step % due.evaluate_every == 0
        every = due.checkpoint_every
        checkpoint = step == stop or (every is not None and step % every == 0)
        is_due = log or evaluate or checkpoint
        within_round = step < round_.end
        self.stopping = self._agreement.settle(MAX_PENDING if within_round and not is_due else 0)
        if not (is_due or self.stopping):
            return
        self._agreement.settle()
        # first see that the run is healthy: a state that is not finite, or mixed from ranks that
        # disagree, is neither evaluated nor saved
        self._averager.check()
        self._monitor.read(round_)
        self._monitor.lap("train_seconds")
        if log:
            measured = self.measures_communication
            self._tracker.log(self._monitor.train_row(round_, with_communication=measured))
        if evaluate:
            self.stopping = self.stopping or not self._evaluate(round_)
            self.progress.evaluation_due = self.stopping
            self._monitor.lap("evaluation_seconds")
        if checkpoint or self.stopping:
            self._save(round_)
            self._monitor.lap("checkpoint_seconds")

    # One step

    def _requests(self, first: int, stop: int) -> Iterator[Request]:
        """What the loader reads for this rank: at each step one batch for each of its workers."""
        for step in range(first, stop):
            for worker in self._workers:
                indices = self._sampler.indices(step, worker.index)
                seed = seed_for(self._sampler.seed, "augment", worker=worker.index, step=step)
                yield Request(indices, seed)

    def _train_step(self, round_: Round, step: int, batches: Iterator[Batch]) -> None:
        mark = self._monitor.fingerprint(round_, step + 1)
        self._agreement.begin(mark)
        if round_.averages == "gradients":
            tries = self._stepper.find_gradients(self._workers, batches, step, data_parallel=True)
            self.progress.averages += 1
            self.progress.averaged_bytes += tries * self._workers[0].model.flat.bytes
        else:
            for worker in self._workers:
                self._stepper.find_gradients([worker], batches, step, data_parallel=False)
        for worker in self._workers:
            self._stepper.update(worker, mark.lr)

    def _end_round(self, round_: Round) -> None:
        if round_.averages == "gradients":
            return
        self._agreement.settle()  # ranks that disagree would mix, or wait for each other
        replicas = [worker.model.flat for worker in self._workers]
        mark = self._monitor.fingerprint(round_, round_.end)
        if self._delayed is not None and round_.end < self._plan.total_steps:
            following = self._plan.round_at(round_.end).length
            self._delayed.begin(mark, due=round_.end + min(self._delay_steps, following))
        else:  # the paper's; and the last one, which nothing follows
            self._averager.average_(replicas, mark)
        self.progress.averages += 1
        self.progress.averaged_bytes += replicas[0].bytes
        moments = self._moments.buffers()
        if moments:
            self._averager.average_(moments, None)
            self.progress.averaged_bytes += moments[0].bytes

    # What is due now and then

    def _evaluate(self, round_: Round) -> bool:
        """Collective: False if a stop was agreed before the evaluation's end."""
        step = self.progress.step
        averaged = self._parameters_are_equal(round_)
        replicas = [worker.model.flat for worker in self._workers]
        mark = self._monitor.fingerprint(round_, step)
        self._agreement.begin(mark)
        started = time.perf_counter()
        try:
            result = self._evaluator.evaluate(
                replicas, step, averaged=averaged, between=lambda: self._agreement.check(mark)
            )
        except StopRequestedError:
            return False
        if not math.isfinite(result.loss):
            raise TrainingError(
                f"the validation loss is {result.loss} at step {step}, lr "
                f"{self._plan.schedule(step - 1):.3g}; the checkpoints before are untouched; try a "
                f"lower schedule.peak_lr or optimizer.clip_norm"
            )
        self.evaluation = result
        self.progress.best_top1 = max(result.top1, self.progress.best_top1 or 0.0)
        row: dict[str, Any] = {
            "kind": "eval",
            "step": step,
            "epoch": step / self._sampler.steps_per_epoch,
            "loss": result.loss,
            "top1": result.top1,
            "images": result.images,
            "shadow": result.shadow,
            "seconds": time.perf_counter() - started,
        }
        if result.top5 is not None:
            row["top5"] = result.top5
        self._tracker.log(row)
        return True

    def _save(self, round_: Round) -> None:
        delayed = self._delayed
        corrections = delayed.corrections() if delayed else [{}] * len(self._workers)
        tensors = [
            worker.tensors() | correction
            for worker, correction in zip(self._workers, corrections, strict=True)
        ]
        finite = all(
            bool(tensor.isfinite().all())
            for of_worker in tensors
            for name, tensor in of_worker.items()
            if not name.startswith("buffers/")
        )
        progress = self.progress
        if self._communicator.any(not finite):
            raise TrainingError(
                f"parameters or optimizer states are not finite at step {progress.step}; nothing "
                f"was saved, the checkpoints before are untouched; try a lower schedule.peak_lr, a "
                f"longer warm-up or optimizer.clip_norm"
            )
        first = self._workers[0]
        shared: dict[str, Tensor] = {}
        if self._parameters_are_equal(round_):
            shared |= first.parameters()
        if round_.averages == "gradients":  # the same updates of the same weights so far
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
            "correction_due": delayed.due if delayed else None,
            "workers": self._communicator.topology.num_workers,
            "config_hash": self._config_hash,
            "evaluation": None if self.evaluation is None else asdict(self.evaluation),
        }
        self._tracker.sync()  # no row is lost that a checkpoint counts on
        try:
            self._checkpointer.save(progress.step, run, shared, own)
            self.checkpoint_failure = None
        except CheckpointError as error:  # on all ranks alike
            self.checkpoint_failure = str(error)
            self._communicator.say(f"{error}; the run goes on without it")

    def _parameters_are_equal(self, round_: Round) -> bool:
        """Whether all workers have the same parameters now, in this round or at its end."""
        if round_.averages == "gradients":
            return True
        under_way = self._delayed is not None and self._delayed.due is not None
        return self.progress.step == round_.end and not under_way

    def check_space(self, more_bytes: int) -> None:
        """Collective: see that the disk has room for the run's checkpoints and for `more_bytes`.
        Raises CheckpointError."""
        size = checkpoint_bytes(
            self._plan,
            self._workers[0],
            self._communicator.topology.num_workers,
            delayed=self._delayed is not None,
        )
        self._checkpointer.check_space(size, more_bytes)

    def restore(self) -> bool:
        """Collective: take up the run's newest checkpoint that is whole; False if there is none at
        all. Raises CheckpointError, TrainingError: it cannot be taken up."""
        step = self._checkpointer.latest()
        if step is None:
            self._tracker.rewind(0)  # rows of a session that was killed before its first
            return False
        run = self._checkpointer.read_run(step)
        absent = {"progress", "evaluation", "workers", "config_hash", "correction_due"} - run.keys()
        if absent:
            raise TrainingError(
                f"the checkpoint after step {step} does not say its {min(absent)}: another program "
                f"has written it; remove its folder to go on from the one before"
            )
        workers = self._communicator.topology.num_workers
        if run["workers"] != workers:
            raise TrainingError(
                f"the checkpoint after step {step} is of {run['workers']} workers, and this run "
                f"has {workers}: a run keeps its workers; to go on with fewer processes, set "
                f"cluster.ranks to a divisor of {run['workers']}"
            )
        if run["config_hash"] != self._config_hash:
            raise TrainingError(
                f"the checkpoint after step {step} was made by a run with other settings, or by a "
                f"version of qsr that has fewer: take another runs_dir"
            )
        self._monitor.start(Progress(**run["progress"]))
        if run["evaluation"] is not None:
            self.evaluation = Evaluation(**run["evaluation"])
        corrections = []
        for worker in self._workers:
            state = self._checkpointer.read_worker(step, worker.index)
            correction = {k: t for k, t in state.tensors.items() if k.startswith(PREFIX)}
            own = {k: t for k, t in state.tensors.items() if k not in correction}
            worker.load(own, state.values)
            corrections.append(correction)
        if self._delayed is not None and run["correction_due"] is not None:
            self._delayed.load(corrections, run["correction_due"])
        self._tracker.rewind(step)
        if self.finished:  # killed after the last checkpoint: the evaluator has no model yet
            replicas = [worker.model.flat for worker in self._workers]
            self.evaluation = self._evaluator.evaluate(replicas, step, averaged=True)
        return True

    def _check_equal_start(self) -> None:
        """Collective: all workers begin with the same weights, by construction; see that it is so,
        because no later average would tell."""
        if self.progress.step > 0:
            return
        digests = set()
        for worker in self._workers:
            digest = hashlib.blake2b(digest_size=6)
            for buffer in worker.model.flat.buffers.values():
                digest.update(buffer.cpu().view(torch.uint8).numpy().data)
            digests.add(float(int.from_bytes(digest.digest(), "big")))
        rows = self._communicator.gather_floats([min(digests), max(digests)])
        if len({value for row in rows for value in row}) > 1:
            raise TrainingError("the workers' initial weights differ: the same seed gave others")
