"""Measures how fast these machines are: steps on all ranks at once, and all-reduces."""

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from qsr.cluster.group import join
from qsr.cluster.place import find_place
from qsr.config.planning import make_plan, make_sampler
from qsr.config.schema import Config, DataParallelSteps
from qsr.core.rules import ConstantRule, EveryStepRule, Rule
from qsr.data import Batch
from qsr.planner.cost_model import parameter_bytes, speed_key
from qsr.planner.profiles import Measurement
from qsr.run.environment import environment
from qsr.sync.communicator import Communicator
from qsr.sync.synchronizer import Synchronizer, SyncOptions
from qsr.sync.topology import Topology
from qsr.train.losses import TrainingLoss
from qsr.train.monitor import Monitor
from qsr.train.precision import Precision
from qsr.train.step import Stepper
from qsr.train.worker import make_workers

WARMUP = 3
"""Repetitions before timing: kernels are selected, buffers allocated, loss scales found."""
BLOCKS, STEPS = 3, 10
"""Number of blocks, and steps per block, for each kind of steps; the kinds alternate. The mean is
used, not the median, because a run takes the sum of its steps, slow ones included."""
ALLREDUCE_REPETITIONS = 30
"""Repetitions of an all-reduce: many, because a single one is too short to be reliable."""


def measure(config: Config, num_classes: int, train_images: int, command: str) -> Measurement:
    """Collective: time steps of the run on images in memory, on all ranks at once, without and with
    the all-reduces of data parallel training, and all-reduces up to the size of its parameters.
    `command` is recorded as the source. Raises ClusterError if the run does not fit the ranks."""
    calibration = Calibration(config, num_classes, train_images)
    for _ in range(BLOCKS):
        calibration.time_steps()
    calibration.time_allreduces()
    return calibration.measurement(command, BLOCKS)


class Calibration:
    """The parts of `measure`, for callers that interleave other work. All are collective."""

    def __init__(self, config: Config, num_classes: int, train_images: int) -> None:
        # speeds are those of ranks: each counts as a worker here
        config = replace(config, workers=config.shards, ranks_per_worker=1)
        self._config = config
        self._communicator = join(config)
        self._inside = _within_machine(self._communicator)
        place = self._communicator.topology
        # rule and bucket size
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
        self._inside_seconds: dict[int, float] = {}
        for steps in self._kinds.values():
            steps.take(WARMUP)
            steps.settle()

    def time_steps(self) -> None:
        """Time one block of each kind of steps."""
        for kind, steps in self._kinds.items():
            self._communicator.barrier()
            work = partial(steps.take, STEPS)
            self._seconds[kind].append(_time(work, self._communicator.device) / STEPS)
            steps.settle()

    def time_allreduces(self) -> None:
        """Time all-reduces of all sizes; replaces earlier measurements."""
        if self._communicator.topology.ranks > 1:
            sizes = _sizes(self._kinds["alone"].parameter_bytes)
            everyone, inside = self._communicator, self._inside
            self._allreduce_seconds = {s: _allreduce_seconds(everyone, everyone, s) for s in sizes}
            if inside is not None:
                self._inside_seconds = {s: _allreduce_seconds(inside, everyone, s) for s in sizes}

    def measurement(self, command: str, blocks: int) -> Measurement:
        """The result from the last `blocks` blocks of steps and the all-reduces."""
        config, communicator = self._config, self._communicator
        place = communicator.topology
        images = config.local_batch * len(place.workers)
        means = [statistics.fmean(seconds[-blocks:]) for seconds in self._seconds.values()]
        slowest = map(max, zip(*communicator.gather_floats(means), strict=True))
        seconds = dict(zip(self._kinds, slowest, strict=True))
        found = environment(place, str(communicator.device))
        ranks_per_machine = _ranks_per_machine()
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
            inside_seconds=tuple(self._inside_seconds.values()),
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
        # no repeated batches, as in most steps of a run
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
            cuda_graphs=config.cuda_graphs,
        )

    @property
    def parameter_bytes(self) -> int:
        """Size of one worker's parameters."""
        parameters = self._workers[0].model.module.parameters()
        return parameter_bytes(sum(p.numel() for p in parameters))

    def take(self, steps: int) -> None:
        """Collective: take steps like the trainer, with the agreement checks between ranks (for
        which local steps do not wait), but without averaging parameters."""
        average = self._round.averages == "gradients"
        for _ in range(steps):
            self._synchronizer.begin_step(self._round, 0)
            for group in [self._workers] if average else [[worker] for worker in self._workers]:
                batches = itertools.repeat(self._batch)
                self._stepper.find_gradients(group, batches, 0)
            for worker in self._workers:
                self._stepper.update(worker, lr=0.0)  # the same work, but the loss cannot grow
            self._synchronizer.stop_agreed(wait=average)

    def settle(self) -> None:
        """Collective: call after the last timed step."""
        self._synchronizer.stop_agreed(wait=True)


def _synthetic_batch(config: Config, num_classes: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.local_batch, 3, config.data.image_size, config.data.image_size)
    images = torch.randn(shape, generator=generator)
    labels = torch.randint(num_classes, shape[:1], generator=generator)
    return Batch(images.to(device), labels.to(device))


def _sizes(largest: int) -> list[int]:
    """The largest size, divided by 4 repeatedly down to 4 KiB; at least three sizes, for a fit."""
    sizes = [largest]
    while sizes[-1] >= 4 * 4096 or len(sizes) < 3:
        sizes.append(sizes[-1] // 16 * 4)  # whole float32
    return sizes[::-1]


def _ranks_per_machine() -> int:
    task = find_place().slurm
    return task.local_ranks if task is not None else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _within_machine(everyone: Communicator) -> Communicator | None:
    """Collective: the collectives among the ranks of this machine; None if that is one rank, or if
    all are on one machine."""
    each, place = _ranks_per_machine(), everyone.topology
    if not 1 < each < place.ranks:
        return None
    machines = [list(range(first, first + each)) for first in range(0, place.ranks, each)]
    group, _ = dist.new_subgroups_by_enumeration(machines)
    assert isinstance(group, dist.ProcessGroup)  # this rank is a member
    own = Topology(place.rank % each, each, place.local_rank, each)
    return Communicator(own, everyone.device, math.inf, group=group)


def _allreduce_seconds(communicator: Communicator, everyone: Communicator, num_bytes: int) -> float:
    """The time on the slowest rank of everyone."""
    buffer = torch.zeros(num_bytes // 4, device=communicator.device)

    def timed() -> float:
        before = communicator.seconds()
        communicator.sum_(buffer)
        return communicator.seconds() - before

    seconds = []
    for _ in range(WARMUP + ALLREDUCE_REPETITIONS):
        everyone.barrier()  # all begin at the same time
        seconds.append(timed())
    medians = everyone.gather_floats([statistics.median(seconds[WARMUP:])])
    return max(median for (median,) in medians)


def _time(work: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
