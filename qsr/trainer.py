"""The algorithm: rounds of local steps, each ended by one average."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qsr.averaging import Averager, Fingerprint, MomentBuffers
from qsr.checkpoint import Checkpointer, WorkerState
from qsr.core.plan import Plan, Round
from qsr.core.sampling import Sampler
from qsr.core.seeds import seed_for
from qsr.data import Batch, Loader, Request
from qsr.distributed import Communicator
from qsr.evaluation import Evaluation, Evaluator
from qsr.gradients import GradientAverager
from qsr.losses import TrainingLoss
from qsr.optim import set_lr
from qsr.precision import Precision
from qsr.tracking import Tracker
from qsr.worker import Worker


class TrainingError(RuntimeError):
    """The run cannot go on; every rank raises it in the same step."""


@dataclass(frozen=True)
class Due:
    """When something besides training happens, in steps; None: only at the end."""

    log_every: int
    evaluate_every: int
    checkpoint_every: int | None
    stop_after: int | None
    """End the session after this step."""


@dataclass
class Progress:
    """Where a run stands, and what it has measured. All of it is in every checkpoint."""

    step: int = 0
    """Steps done."""
    averages: int = 0
    """Averages over the workers made, of parameters or of gradients."""
    averaged_bytes: int = 0
    """Size of what one worker gave to them."""
    skipped_updates: int = 0
    """Updates that workers skipped because fp16 gradients overflowed."""
    train_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    communication_seconds: float = 0.0
    """Part of train_seconds; without averages that overlap with the backward pass."""
    loss_sum: float = 0.0
    """Finite losses since the last row of training metrics, over all workers."""
    loss_weight: float = 0.0
    """How many losses that sum holds."""
    best_top1: float | None = None
    """Percent, over the evaluations so far."""


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
    ) -> None:
        self.progress = Progress()
        self.evaluation: Evaluation | None = None
        self._plan = plan
        self._sampler = sampler
        self._workers = workers
        self._moments = moments
        self._loader = loader
        self._loss = loss
        self._micro_batch = micro_batch
        self._clip_norm = clip_norm
        self._precision = precision
        self._communicator = communicator
        self._evaluator = evaluator
        self._checkpointer = checkpointer
        self._tracker = tracker
        self._due = due
        self._config_hash = config_hash
        self._averager = Averager(communicator, communicator.topology.num_workers)
        self._gradients = GradientAverager(workers, communicator) if plan.gradient_rounds else None
        self._averaged_bytes = workers[0].model.flat.bytes
        # on the device and read when something is due: sum and number of the finite losses,
        # number of the others, skipped updates
        self._sums = torch.zeros(4, dtype=torch.float64, device=communicator.device)
        self._communication_before = 0.0  # of earlier sessions
        self._lap_start = 0.0
        self._logged = (0, 0.0)  # step and train_seconds of the last row of training metrics

    @property
    def measures_communication(self) -> bool:
        """Whether all averages are timed: not where DDP overlaps them with the backward pass."""
        return self._gradients is None or not self._gradients.overlaps

    @property
    def finished(self) -> bool:
        """Whether the plan's last step is done."""
        return self.progress.step == self._plan.total_steps

    # What happens in which order

    def train(self) -> None:
        """Collective: run to the end of the plan, or to the step where the session is to stop."""
        total = self._plan.total_steps
        stop = min(self._due.stop_after or total, total)
        self._check_equal_start()
        batches = self._loader.batches(self._requests(self.progress.step, stop))
        self._lap_start = time.perf_counter()
        self._logged = (self.progress.step, self.progress.train_seconds)
        for round_ in self._plan.rounds(from_step=self.progress.step):
            first, last = max(round_.start, self.progress.step), min(round_.end, stop)
            for step in range(first, last):
                self._train_step(round_, step, batches)
                if step + 1 == round_.end:
                    self._end_round(round_)
                self.progress.step = step + 1
                self._do_what_is_due(round_, stop)
            if self.progress.step == stop:
                break

    def _do_what_is_due(self, round_: Round, stop: int) -> None:
        due, step = self._due, self.progress.step
        final = step == self._plan.total_steps
        log = final or step % due.log_every == 0
        evaluate = final or step % due.evaluate_every == 0
        every = due.checkpoint_every
        checkpoint = step == stop or (every is not None and step % every == 0)
        if not (log or evaluate or checkpoint):
            return
        # reading the sums also tells whether the run is healthy: a state that is not finite, or
        # mixed from ranks that disagree, is neither evaluated nor saved
        self._read_sums(round_)
        self._lap("train_seconds")
        if log:
            self._log(round_)
        if evaluate:
            self._evaluate(round_)
            self._lap("evaluation_seconds")
        if checkpoint:
            self._save(round_)
            self._lap("checkpoint_seconds")

    def _lap(self, name: str) -> None:
        """Book the time since the last lap under a field of the progress."""
        now = time.perf_counter()
        setattr(self.progress, name, getattr(self.progress, name) + now - self._lap_start)
        self._lap_start = now

    # One step

    def _requests(self, first: int, stop: int) -> Iterator[Request]:
        """What the loader reads for this rank: at each step one batch for each of its workers."""
        for step in range(first, stop):
            for worker in self._workers:
                indices = self._sampler.indices(step, worker.index)
                yield Request(indices, self._seed("augment", worker, step))

    def _seed(self, name: str, worker: Worker, step: int) -> int:
        return seed_for(self._sampler.seed, name, worker=worker.index, step=step)

    def _train_step(self, round_: Round, step: int, batches: Iterator[Batch]) -> None:
        lr = self._plan.schedule(step)
        data_parallel = round_.averages == "gradients"
        for worker in self._workers:
            self._forward_backward(worker, next(batches), step, data_parallel)
        if data_parallel and self._gradients is not None:
            self._gradients.finish()
            self.progress.averages += 1
            self.progress.averaged_bytes += self._averaged_bytes
        for worker in self._workers:
            self._update(worker, lr)

    def _forward_backward(
        self, worker: Worker, batch: Batch, step: int, data_parallel: bool
    ) -> None:
        # a fresh seed a step: dropout draws the same in a resumed run, and whether a worker has
        # a process of its own or not
        torch.manual_seed(self._seed("model", worker, step))
        worker.zero_gradients()
        images = batch.images.split(self._micro_batch)
        labels = batch.labels.split(self._micro_batch)
        for number, (x, y) in enumerate(zip(images, labels, strict=True)):
            last = number + 1 == len(images)
            with self._gradient_context(last=last and data_parallel):
                seed = seed_for(self._seed("mixup", worker, step), "micro_batch", number=number)
                with self._precision.autocast():
                    loss = self._loss(worker.forward, x, y, seed)
                worker.scaler.scale(loss / len(images)).backward()
            self._count_loss(loss.detach())

    def _gradient_context(self, *, last: bool) -> Any:
        if self._gradients is None:
            return torch.enable_grad()
        return self._gradients.backward_context(last=last)

    def _count_loss(self, loss: Tensor) -> None:
        finite = loss.isfinite()
        self._sums[:3] += torch.stack((torch.where(finite, loss, 0.0), finite, ~finite))

    def _update(self, worker: Worker, lr: float) -> None:
        set_lr(worker.optimizer, lr)
        if worker.scaler.is_enabled():
            worker.scaler.unscale_(worker.optimizer)
            self._count_skipped(worker)
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(worker.model.module.parameters(), self._clip_norm)
        worker.scaler.step(worker.optimizer)
        worker.scaler.update()

    def _count_skipped(self, worker: Worker) -> None:
        # the scaler's own verdict, read before `update` resets it; the public way, get_scale(),
        # would make the host wait
        found = worker.scaler._found_inf_per_device(worker.optimizer)
        self._sums[3] += torch.stack([flag.sum() for flag in found.values()]).sum().clamp(max=1.0)

    def _end_round(self, round_: Round) -> None:
        if round_.averages == "gradients":
            return
        replicas = [worker.model.flat for worker in self._workers]
        self._averager.average_(replicas, self._fingerprint(round_, round_.end))
        self.progress.averages += 1
        self.progress.averaged_bytes += replicas[0].bytes
        moments = self._moments.buffers()
        if moments:
            self._averager.average_(moments, None)
            self.progress.averaged_bytes += moments[0].bytes

    def _fingerprint(self, round_: Round, step: int) -> Fingerprint:
        return Fingerprint(step, round_.index, round_.length, self._config_hash)

    # What is due now and then

    def _read_sums(self, round_: Round) -> None:
        """Collective: bring the sums of all ranks to the host and see that the run is healthy."""
        progress = self.progress
        own = self._sums.tolist()  # the host waits for the device here
        self._sums.zero_()
        self._averager.check()
        mark = self._fingerprint(round_, progress.step).encode()
        rows = self._communicator.gather_floats([*own, *mark])
        if any(row[len(own) :] != rows[0][len(own) :] for row in rows):
            raise TrainingError(
                f"the ranks disagree on step, round, H or config; rank "
                f"{self._communicator.topology.rank} stands at step {progress.step}, round "
                f"{round_.index}, H={round_.length}, config {self._config_hash}"
            )
        losses, weight, overflowed, skipped = (
            sum(column) for column in list(zip(*rows, strict=False))[:4]
        )
        progress.loss_sum += losses
        progress.loss_weight += weight
        progress.skipped_updates += round(skipped)
        if overflowed and (self._precision.name != "fp16" or weight == 0.0):
            raise TrainingError(
                f"the loss is not finite at or before step {progress.step} (round {round_.index}, "
                f"lr {self._plan.schedule(progress.step - 1):.3g}); the checkpoints before are "
                f"untouched; try a lower schedule.peak_lr, a longer warm-up or "
                f"optimizer.clip_norm"
            )

    def _log(self, round_: Round) -> None:
        progress = self.progress
        progress.communication_seconds = self._communication_before + self._communicator.seconds()
        row: dict[str, Any] = {
            "kind": "train",
            "step": progress.step,
            "epoch": progress.step / self._sampler.steps_per_epoch,
            "round": round_.index,
            "h": round_.length,
            "lr": self._plan.schedule(progress.step - 1),
            "averages": progress.averages,
            "train_seconds": progress.train_seconds,
        }
        if progress.loss_weight:
            row["loss"] = progress.loss_sum / progress.loss_weight
        images = (progress.step - self._logged[0]) * self._sampler.global_batch
        row["images_per_second"] = images / (progress.train_seconds - self._logged[1])
        self._logged = (progress.step, progress.train_seconds)
        if self.measures_communication:
            row["communication_seconds"] = progress.communication_seconds
        if self._precision.name == "fp16":
            row["skipped_updates"] = progress.skipped_updates
        progress.loss_sum = progress.loss_weight = 0.0
        self._tracker.log(row)

    def _evaluate(self, round_: Round) -> None:
        step = self.progress.step
        averaged = step == round_.end or round_.averages == "gradients"
        replicas = [worker.model.flat for worker in self._workers]
        started = time.perf_counter()
        result = self._evaluator.evaluate(replicas, step, averaged=averaged)
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

    def _save(self, round_: Round) -> None:
        finite = all(
            bool(buffer.isfinite().all())
            for worker in self._workers
            for buffer in worker.model.flat.buffers.values()
        )
        progress = self.progress
        if self._communicator.any(not finite):
            raise TrainingError(
                f"parameters are not finite at step {progress.step}; nothing was saved, the "
                f"checkpoints before are untouched"
            )
        progress.communication_seconds = self._communication_before + self._communicator.seconds()
        first = self._workers[0]
        shared: dict[str, Tensor] = {}
        if progress.step == round_.end:
            shared |= first.parameters()
        if round_.averages == "gradients":  # the same updates of the same weights so far
            shared |= first.optimizer_state()
        own = {
            worker.index: WorkerState(
                {name: t for name, t in worker.tensors().items() if name not in shared},
                worker.values(),
            )
            for worker in self._workers
        }
        run = {
            "progress": asdict(progress),
            "round": round_._asdict(),
            "workers": self._communicator.topology.num_workers,
            "config_hash": self._config_hash,
            "evaluation": None if self.evaluation is None else asdict(self.evaluation),
        }
        self._checkpointer.save(progress.step, run, shared, own)

    def restore(self) -> bool:
        """Collective: take up the run's newest checkpoint; False if there is none."""
        step = self._checkpointer.latest()
        if step is None:
            return False
        run = self._checkpointer.read_run(step)
        if run["config_hash"] != self._config_hash:
            raise TrainingError(
                f"the checkpoint after step {step} was made by a run with other settings"
            )
        self.progress = Progress(**run["progress"])
        self._communication_before = self.progress.communication_seconds
        if run["evaluation"] is not None:
            self.evaluation = Evaluation(**run["evaluation"])
        for worker in self._workers:
            state = self._checkpointer.read_worker(step, worker.index)
            worker.load(state.tensors, state.values)
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
