"""How fast these machines are, measured: steps on all ranks at once, and all-reduces."""

import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from qsr.cluster.group import join
from qsr.config.planning import make_plan, make_sampler
from qsr.config.schema import Config, DataParallelSteps
from qsr.core.rules import ConstantRule, EveryStepRule, Rule
from qsr.data import Batch
from qsr.planner.cost_model import parameter_bytes, speed_key
from qsr.planner.profiles import Measurement
from qsr.run.environment import environment
from qsr.sync.communicator import Communicator
from qsr.sync.synchronizer import Synchronizer, SyncOptions
from qsr.train.losses import TrainingLoss
from qsr.train.monitor import Monitor
from qsr.train.precision import Precision
from qsr.train.step import Stepper
from qsr.train.worker import make_workers

WARMUP = 3
"""Repetitions before those that count: kernels are chosen, buffers made, loss scales found."""
BLOCKS, STEPS = 3, 10
"""Of each kind of steps, so many blocks of so many steps; the kinds take turns. Their mean counts,
not the median: a run takes the sum of its steps, slow ones included."""
ALLREDUCE_REPETITIONS = 30
"""Of an all-reduce, which is short, so that one of them says little on a busy machine."""


def measure(config: Config, num_classes: int, train_images: int, command: str) -> Measurement:
    """Collective: time steps of the run on images in memory, on all ranks at once, alone and with
    data parallel training's all-reduces, and all-reduces up to the size of its parameters.
    `command` is named as the source. Raises ClusterError if the run does not fit the ranks."""
    calibration = Calibration(config, num_classes, train_images)
    for _ in range(BLOCKS):
        calibration.time_steps()
    calibration.time_allreduces()
    return calibration.measurement(command, BLOCKS)


class Calibration:
    """What `measure` does, in pieces, for who does other things between them. All is collective."""

    def __init__(self, config: Config, num_classes: int, train_images: int) -> None:
        self._config = config
        self._communicator = join(config)
        place = self._communicator.topology
        # the rule, and DDP's buckets
        kinds: dict[str, tuple[Rule, float | None]] = {"alone": (ConstantRule(1), None)}
        if place.ranks > 1:
            kinds["blocking"] = EveryStepRule(), None
            if len(place.workers) == 1:
                kinds["overlapped"] = EveryStepRule(), config.cluster.bucket_mib
        self._kinds = {
            kind: _Steps(config, num_classes, train_images, self._communicator, rule, bucket_mib)
            for kind, (rule, bucket_mib) in kinds.items()
        }
        self._seconds: dict[str, list[float]] = {kind: [] for kind in self._kinds}
        self._allreduce_seconds: dict[int, float] = {}
        for steps in self._kinds.values():
            steps.take(WARMUP)
            steps.settle()

    def time_steps(self) -> None:
        """One block of each kind of steps."""
        for kind, steps in self._kinds.items():
            self._communicator.barrier()
            work = partial(steps.take, STEPS)
            self._seconds[kind].append(_time(work, self._communicator.device) / STEPS)
            steps.settle()

    def time_allreduces(self) -> None:
        """All sizes; what was measured before is forgotten."""
        if self._communicator.topology.ranks > 1:
            self._allreduce_seconds = {
                size: _allreduce_seconds(self._communicator, size)
                for size in _sizes(self._kinds["alone"].parameter_bytes)
            }

    def measurement(self, command: str, blocks: int) -> Measurement:
        """What the last `blocks` of steps and the all-reduces have shown."""
        config, communicator = self._config, self._communicator
        place = communicator.topology
        images = config.local_batch * len(place.workers)
        means = [statistics.fmean(seconds[-blocks:]) for seconds in self._seconds.values()]
        slowest = map(max, zip(*communicator.gather_floats(means), strict=True))
        seconds = dict(zip(self._kinds, slowest, strict=True))
        found = environment(place, str(communicator.device))
        ranks_per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        data_parallel = None
        if "blocking" in seconds:
            data_parallel = DataParallelSteps(
                ranks=place.ranks,
                images=images,
                micro_batches=images // config.micro_batch_size,
                blocking_seconds=seconds["blocking"],
                overlapped_seconds=seconds.get("overlapped"),
                bucket_mib=config.cluster.bucket_mib,
            )
        return Measurement(
            key=speed_key(config),
            machines=place.ranks // ranks_per_machine,
            ranks_per_machine=ranks_per_machine,
            seconds_per_image=seconds["alone"] / images,
            sizes_bytes=tuple(self._allreduce_seconds),
            allreduce_seconds=tuple(self._allreduce_seconds.values()),
            data_parallel=data_parallel,
            how=(
                f"measured by {command} on {found['gpu'] or found['cpu']}, torch "
                f"{found['packages']['torch']}: {blocks} x {STEPS} steps, slowest of "
                f"{place.ranks} ranks"
            ),
        )


class _Steps:
    """Steps of this rank's workers on one batch of images in memory."""

    def __init__(
        self,
        config: Config,
        num_classes: int,
        train_images: int,
        communicator: Communicator,
        rule: Rule,
        bucket_mib: float | None,
    ) -> None:
        """Collective."""
        precision, sampler = (
            Precision(config.precision, communicator.device),
            make_sampler(config, train_images),
        )
        plan = replace(make_plan(config, train_images), rule=rule)
        # as when the loss scale is settled, which it is in most steps of a run
        self._workers = make_workers(
            replace(config, fp16_overflow="skip"), num_classes, communicator
        )
        self._batch = _synthetic_batch(config, num_classes, communicator.device)
        self._round = plan.round_at(0)
        self._synchronizer = Synchronizer(
            plan,
            [worker.model for worker in self._workers],
            [worker.optimizer for worker in self._workers],
            communicator,
            sampler=sampler,
            config_hash="",
            options=SyncOptions(bucket_mib=bucket_mib),
        )
        self._synchronizer.settle(self._batch.images[: config.micro_batch_size])
        self._stepper = Stepper(
            self._workers,
            self._synchronizer,
            Monitor(plan, sampler, communicator, precision),
            loss=TrainingLoss(config.loss),
            micro_batch=config.micro_batch_size,
            clip_norm=config.optimizer.clip_norm,
            precision=precision,
            seed=config.seed,
        )

    @property
    def parameter_bytes(self) -> int:
        """Size of one worker's parameters."""
        parameters = self._workers[0].model.module.parameters()
        return parameter_bytes(sum(p.numel() for p in parameters))

    def take(self, steps: int) -> None:
        """Collective: as the trainer takes them, with the questions that ranks ask each other, for
        whose answers local steps do not wait; but no average of parameters."""
        average = self._round.averages == "gradients"
        for _ in range(steps):
            self._synchronizer.begin_step(self._round, 0)
            for group in [self._workers] if average else [[worker] for worker in self._workers]:
                batches = itertools.repeat(self._batch)
                self._stepper.find_gradients(group, batches, 0, average=average)
            for worker in self._workers:
                self._stepper.update(worker, lr=0.0)  # the same work, and no loss that grows
            self._synchronizer.stop_agreed(wait=average)

    def settle(self) -> None:
        """Collective: after the last step that is timed."""
        self._synchronizer.stop_agreed(wait=True)


def _synthetic_batch(config: Config, num_classes: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.local_batch, 3, config.data.image_size, config.data.image_size)
    images = torch.randn(shape, generator=generator)
    labels = torch.randint(num_classes, shape[:1], generator=generator)
    return Batch(images.to(device), labels.to(device))


def _sizes(largest: int) -> list[int]:
    """The largest, and quarters of it down to 4 KiB; at least three, for a fit."""
    sizes = [largest]
    while sizes[-1] >= 4 * 4096 or len(sizes) < 3:
        sizes.append(sizes[-1] // 16 * 4)  # whole float32
    return sizes[::-1]


def _allreduce_seconds(communicator: Communicator, num_bytes: int) -> float:
    buffer = torch.zeros(num_bytes // 4, device=communicator.device)

    def timed() -> float:
        before = communicator.seconds()
        communicator.sum_(buffer)
        return communicator.seconds() - before

    seconds = []
    for _ in range(WARMUP + ALLREDUCE_REPETITIONS):
        communicator.barrier()  # all begin together
        seconds.append(timed())
    medians = communicator.gather_floats([statistics.median(seconds[WARMUP:])])
    return max(median for (median,) in medians)


def _time(work: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
