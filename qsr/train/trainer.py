"""Algorithm 1 (Gu et al. 2024): rounds of local steps, each ended by one average."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from qsr.core.open_plan import OpenPlan
from qsr.core.plan import Round
from qsr.core.sampling import Sampler
from qsr.core.seeds import seed_for
from qsr.data import Batch, Loader, Request
from qsr.errors import CheckpointError, TrainingError
from qsr.run.tracking import Tracker
from qsr.sync.agreement import StopRequestedError
from qsr.sync.synchronizer import Synchronizer
from qsr.train.evaluation import Evaluation, Evaluator
from qsr.train.monitor import Progress
from qsr.train.profile import StepProfiler
from qsr.train.state import RunState
from qsr.train.step import Stepper
from qsr.train.worker import Worker


@dataclass(frozen=True)
class Due:
    """When something other than training is due, in steps; None: only at the end."""

    log_every: int
    evaluate_every: int
    checkpoint_every: int | None
    stop_after: int | None
    """End the session after this step."""


@dataclass(frozen=True)
class TrainingData:
    """The batches of this rank's workers: the sampler, and the loader that reads its samples."""

    loader: Loader
    sampler: Sampler

    def batches(self, workers: Sequence[Worker], first: int, stop: int) -> Iterator[Batch]:
        """One batch per worker for each of the steps `first` to `stop` - 1."""
        return iter(self.loader.batches(self._requests(workers, first, stop)))

    def _requests(self, workers: Sequence[Worker], first: int, stop: int) -> Iterator[Request]:
        for step in range(first, stop):
            for worker in workers:
                indices = self.sampler.indices(step, worker.shard)
                seed = seed_for(self.sampler.seed, "augment", worker=worker.shard, step=step)
                yield Request(indices, seed)


class Trainer:
    """Trains the workers of this rank through the rounds of a plan.

    Every rank builds one with the same arguments, except for the workers of the stepper, and calls
    `train`. A resumed run calls `restore` first.
    """

    def __init__(
        self,
        data: TrainingData,
        stepper: Stepper,
        synchronizer: Synchronizer,
        evaluator: Evaluator,
        state: RunState,
        tracker: Tracker,
        due: Due,
        profiler: StepProfiler | None = None,
    ) -> None:
        self.evaluation: Evaluation | None = None
        """The last evaluation."""
        self.stopping = False
        """Whether the ranks agreed to stop because of a signal."""
        self.checkpoint_failure: str | None = None
        """Why the last checkpoint that was due is missing; None if it was written. Training
        continues without it; the caller decides at the end."""
        self._data = data
        self._stepper = stepper
        self._synchronizer = synchronizer
        self._evaluator = evaluator
        self.state = state
        self._tracker = tracker
        self._due = due
        self._profiler = profiler
        self._plan = synchronizer.plan
        self._workers = stepper.workers
        self._monitor = stepper.monitor

    @property
    def progress(self) -> Progress:
        """Progress and measurements of the run."""
        return self._monitor.progress

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the network."""
        return sum(p.numel() for p in self._workers[0].model.module.parameters())

    @property
    def measures_communication(self) -> bool:
        """Whether `progress.communication_seconds` includes all averages."""
        return self._synchronizer.measures_communication

    @property
    def finished(self) -> bool:
        """Whether the plan's last step is done and evaluated."""
        return self._at_the_end and not self.progress.evaluation_due

    @property
    def _at_the_end(self) -> bool:
        return self.progress.step == self._plan.total_steps

    def restore(self) -> bool:
        """Collective: resume from the run's newest intact checkpoint; False if there is no
        checkpoint. Raises CheckpointError or TrainingError if it cannot be resumed from."""
        resumed = self.state.restore()
        # later rows are from a session that was killed; their steps are done again
        self._tracker.rewind(0 if resumed is None else resumed.progress.step)
        if resumed is None:
            return False
        self._monitor.start(resumed.progress)
        self.evaluation = resumed.evaluation
        if self.finished:  # killed after the last checkpoint: the evaluator has no model yet
            self.evaluation = self._validate(averaged=True)
        return True

    def train(self) -> None:
        """Collective: train to the end of the plan, to the step where the session must stop, or
        until the ranks agree to stop because of a signal. Saves a checkpoint in every case."""
        first, total = self.progress.step, self._plan.total_steps
        stop = min(self._due.stop_after or total, total)
        if first == 0:
            self._synchronizer.check_equal_start()
        loaded = self._settled(self._data.batches(self._workers, first, stop))
        batches = self._monitor.timed(loaded)
        self._monitor.start(self.progress)
        self._make_up_evaluation()
        for round_ in self._plan.rounds(from_step=first):
            for step in self._steps(round_, first, stop):
                if self.stopping:
                    break
                with self._recorded(step):
                    self._train_step(round_, step, batches)
                    if step + 1 == round_.end:
                        self._end_round(round_)
                self.progress.step = step + 1
                self._do_what_is_due(round_, stop)
            if self.stopping or round_.end >= stop:
                break
        self._synchronizer.stop_agreed(wait=True)

    def _steps(self, round_: Round, first: int, stop: int) -> Iterable[int]:
        """The steps of a round that lie between `first` and `stop` - 1."""
        return range(max(round_.start, first), min(round_.end, stop))

    def _recorded(self, step: int) -> AbstractContextManager[None]:
        if self._profiler is None:
            return nullcontext()
        return self._profiler.step(step + 1, lambda: self._synchronizer.stop_agreed(wait=True))

    def _train_step(self, round_: Round, step: int, batches: Iterator[Batch]) -> None:
        """Forward and backward passes and the update of each worker; in a data parallel round the
        workers average their gradients before the update."""
        self._synchronizer.begin_step(round_, step)
        if round_.averages == "gradients":
            self.progress.averaged_bytes += self._stepper.find_gradients(
                self._workers, batches, step
            )
            self.progress.averages += 1
        else:
            for worker in self._workers:
                self._stepper.find_gradients([worker], batches, step)
        for worker in self._workers:
            self._stepper.update(worker, self._plan.schedule(step))
        self._synchronizer.end_step(step)

    def _end_round(self, round_: Round) -> None:
        """Average the parameters of the workers, and all models over time."""
        if round_.averages == "parameters":
            self.progress.averaged_bytes += self._synchronizer.end_round(round_)
            self.progress.averages += 1
        self.state.averages.update(round_)
        if isinstance(self._plan, OpenPlan):  # nothing else records its rounds
            self._tracker.log(self._round_row(round_, self._plan.losses[-1]))

    def _round_row(self, round_: Round, loss: float) -> dict[str, Any]:
        return {
            "kind": "round",
            "step": round_.end,
            "epoch": round_.end / self._data.sampler.steps_per_epoch,
            "round": round_.index,
            "h": round_.length,
            "lr": round_.lr,
            "loss": loss,
        }

    def _do_what_is_due(self, round_: Round, stop: int) -> None:
        """Log, evaluate and save what is due, in this order, and notice an agreed stop."""
        due, step = self._due, self.progress.step
        final = self._at_the_end
        log = final or step % due.log_every == 0
        evaluate = final or step % due.evaluate_every == 0
        every = due.checkpoint_every
        checkpoint = step == stop or (every is not None and step % every == 0)
        is_due = log or evaluate or checkpoint
        self.stopping = self._synchronizer.stop_agreed(wait=is_due or step == round_.end)
        if not (is_due or self.stopping):
            return
        self._synchronizer.stop_agreed(wait=True)
        # first check that the run is healthy: a state that is not finite, or that mixes ranks which
        # disagree, must be neither evaluated nor saved
        self._synchronizer.check()
        self._monitor.read(round_)
        self._monitor.lap("train_seconds")
        if log:
            row = self._monitor.train_row(round_, with_communication=self.measures_communication)
            self._tracker.log(row)
        if evaluate:
            self.stopping = self.stopping or not self._evaluate(round_)
            self.progress.evaluation_due = self.stopping
            self._monitor.lap("evaluation_seconds")
        if checkpoint or self.stopping:
            self._save(round_)
            self._monitor.lap("checkpoint_seconds")

    def _settled(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; images of the first one are used to settle the synchronizer."""
        first = list(itertools.islice(batches, 1)) if self._synchronizer.needs_images else []
        for batch in first:
            self._synchronizer.settle(batch.images[: self._stepper.micro_batch])
        return itertools.chain(first, batches)

    def _make_up_evaluation(self) -> None:
        """Do the evaluation that a stop prevented in the previous session."""
        if self.progress.evaluation_due:
            self.stopping = not self._evaluate(self._plan.round_at(self.progress.step - 1))
            self.progress.evaluation_due = self.stopping
            self._monitor.lap("evaluation_seconds")

    def _evaluate(self, round_: Round) -> bool:
        """Collective: validate the workers' mean; False if it was cut short by an agreed stop."""
        step = self.progress.step
        averaged = self._synchronizer.parameters_are_equal(round_, step)
        between = self._synchronizer.checks_between(round_, step)
        started = time.perf_counter()
        try:
            result = self._validate(averaged=averaged, between=between)
        except StopRequestedError:
            return False
        results = (result, *self.state.averages.evaluations.values())
        wrong = [found.loss for found in results if not math.isfinite(found.loss)]
        if wrong:
            raise TrainingError(
                f"the validation loss is {wrong[0]} at step {step}, lr "
                f"{self._plan.schedule(step - 1):.3g}; earlier checkpoints are untouched; try a "
                f"lower schedule.peak_lr or optimizer.clip_norm"
            )
        self.evaluation = result
        self.progress.best_top1 = max(result.top1, self.progress.best_top1 or 0.0)
        self._tracker.log(self._evaluation_row(result, time.perf_counter() - started))
        return True

    def _validate(
        self, *, averaged: bool, between: Callable[[], None] = lambda: None
    ) -> Evaluation:
        """Collective: validate the averages over time and then, so that it is the evaluator's
        model, the workers' mean."""
        step = self.progress.step
        keep = self._at_the_end and self._synchronizer.communicator.topology.is_main
        self.state.averages.evaluate(self._evaluator, step, between, keep=keep)
        replicas = [worker.model.flat for worker in self._workers]
        return self._evaluator.evaluate(replicas, step, averaged=averaged, between=between)

    def _evaluation_row(self, result: Evaluation, seconds: float) -> dict[str, Any]:
        step = self.progress.step
        row: dict[str, Any] = {
            "kind": "eval",
            "step": step,
            "epoch": step / self._data.sampler.steps_per_epoch,
            "loss": result.loss,
            "top1": result.top1,
            "images": result.images,
            "shadow": result.shadow,
            "seconds": seconds,
            **self.state.averages.measured(),
        }
        return row if result.top5 is None else {**row, "top5": result.top5}

    def _save(self, round_: Round) -> None:
        self._tracker.sync()  # a checkpoint relies on the rows before it
        try:
            self.state.save(self.progress, round_, self.evaluation)
            self.checkpoint_failure = None
        except CheckpointError as error:  # on all ranks alike
            self.checkpoint_failure = str(error)
            self._synchronizer.communicator.warn(f"{error}; training continues without it")
