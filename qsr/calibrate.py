"""How fast these machines are, measured: a step on all ranks at once, and all-reduces."""

import os
import statistics
import time
from collections.abc import Callable

import torch

from qsr.build import join, make_workers
from qsr.config.costs import parameter_bytes, speed_key
from qsr.config.planning import make_plan, make_sampler
from qsr.config.profiles import Measurement
from qsr.config.schema import Config
from qsr.data import Batch
from qsr.distributed import Communicator
from qsr.losses import TrainingLoss
from qsr.monitor import Monitor
from qsr.precision import Precision
from qsr.runfolder import environment
from qsr.step import Stepper

WARMUP = 3
"""Repetitions before those that count: kernels are chosen, buffers made, loss scales found."""
REPETITIONS = 30
"""Of which the median counts: a few say little where anything else happens on the machine."""
ALLREDUCE_REPETITIONS = 50
"""Of an all-reduce, which is short, so that one of them says little on a busy machine."""


def measure(config: Config, num_classes: int, train_images: int, command: str) -> Measurement:
    """Collective: time steps of the run on images in memory, on all ranks at once, and all-reduces
    up to the size of its parameters. `command` is named as the source. Raises ClusterError if the
    run does not fit the ranks."""
    communicator = join(config)
    place, device = communicator.topology, communicator.device
    workers = make_workers(config, num_classes, communicator)
    sampler, plan = make_sampler(config, train_images), make_plan(config, train_images)
    precision = Precision(config.precision, device)
    stepper = Stepper(
        loss=TrainingLoss(config.loss),
        micro_batch=config.micro_batch_size,
        clip_norm=config.optimizer.clip_norm,
        precision=precision,
        monitor=Monitor(plan, sampler, communicator, precision, ""),
        gradients=None,
        seed=config.seed,
    )
    batch = _synthetic_batch(config, num_classes, device)

    def step() -> None:
        for worker in workers:
            stepper.forward_backward(worker, batch, 0, data_parallel=False)
        for worker in workers:
            stepper.update(worker, lr=0.0)  # the same work, and no loss that grows

    seconds = _slowest_median(communicator, lambda: _time(step, device))
    parameters = sum(p.numel() for p in workers[0].model.module.parameters())
    sizes = _sizes(parameter_bytes(parameters)) if place.ranks > 1 else []
    found = environment(place, str(device))
    ranks_per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Measurement(
        key=speed_key(config),
        machines=place.ranks // ranks_per_machine,
        ranks_per_machine=ranks_per_machine,
        seconds_per_image=seconds / (len(workers) * config.local_batch),
        sizes_bytes=tuple(sizes),
        allreduce_seconds=tuple(_allreduce_seconds(communicator, size) for size in sizes),
        how=(
            f"measured by {command} on {found['gpu'] or found['cpu']}, torch "
            f"{found['packages']['torch']}: median of {REPETITIONS}, slowest of {place.ranks} ranks"
        ),
    )


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

    return _slowest_median(communicator, timed, ALLREDUCE_REPETITIONS)


def _slowest_median(
    communicator: Communicator, timed: Callable[[], float], repetitions: int = REPETITIONS
) -> float:
    """Collective: the median of what `timed` returns, on the rank where it is largest. All ranks
    begin each repetition together."""
    seconds = []
    for _ in range(WARMUP + repetitions):
        communicator.barrier()
        seconds.append(timed())
    medians = communicator.gather_floats([statistics.median(seconds[WARMUP:])])
    return max(median for (median,) in medians)


def _time(work: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
