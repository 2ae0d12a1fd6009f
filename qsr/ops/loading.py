"""Whether loading keeps up with training, each alone on this rank, and what it is short of.

The loader is measured whole, without RandAugment, and reading alone, with the run's threads: what
the time per image loses with each part is that part's share. The largest share is the shortage.
"""

import itertools
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import torch

from qsr.config.schema import Config
from qsr.data import ImageFolder, Loader, Request, TrainTransform, open_loader
from qsr.data.decoding import read_file
from qsr.data.sizing import loader_size
from qsr.run.tracking import WORTH_SAYING_PERCENT
from qsr.train.losses import TrainingLoss
from qsr.train.models import build_model
from qsr.train.precision import Precision

Part = Literal["disk", "decoding", "RandAugment", "copies to the GPU"]

TRIAL_SECONDS = 0.5
"""Of each measurement; the better of two counts, because other programs disturb."""

MORE_READERS = 4
"""So many times the loader's threads read, to see whether that is faster."""


@dataclass(frozen=True)
class Feed:
    """What was measured; all times are seconds per image."""

    step: float
    """The forward and backward pass."""
    loader: float
    """The loader, alone."""
    parts: dict[Part, float]
    """Shares of the loader's time; empty if it keeps up."""
    more_readers: float = 0.0
    """Reading alone, by MORE_READERS times the threads; 0 if the loader keeps up."""

    @property
    def waiting_percent(self) -> float:
        """Share of the training time in which training will wait for data."""
        return 100.0 * max(0.0, 1.0 - self.step / self.loader)

    @property
    def short_of(self) -> Part | None:
        """The part with the largest share; None if the loader keeps up."""
        return max(self.parts.items(), key=lambda item: item[1])[0] if self.parts else None


def trial_pass(config: Config, device: torch.device) -> Callable[[], float]:
    """A forward and backward pass of a micro-batch in the run's precision, from initial weights;
    each call makes one and returns its loss."""
    precision, size = Precision(config.precision, device), config.data.image_size
    torch.manual_seed(0)
    model = build_model(config.model, 2, size).to(device)
    images = torch.rand(config.micro_batch_size, 3, size, size, device=device)
    labels = torch.zeros(len(images), dtype=torch.int64, device=device)

    def call() -> float:
        with precision.autocast():
            loss = TrainingLoss(config.loss)(model, images, labels, 0)
        loss.backward()
        return loss.item()  # the host waits for the device here

    return call


def measure_step(config: Config, device: torch.device) -> float:
    """Seconds per image of forward and backward passes: the best of those that fit into twice
    TRIAL_SECONDS, after a first one."""
    call = trial_pass(config, device)
    call()
    best, deadline = float("inf"), time.perf_counter() + 2 * TRIAL_SECONDS
    while best == float("inf") or time.perf_counter() < deadline:
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best / config.micro_batch_size


class LoadingTrial:
    """Measures the loading of a run's training images by one rank with so many cores."""

    def __init__(
        self, config: Config, train: ImageFolder, device: torch.device, cores: int
    ) -> None:
        self.cores = cores
        self.threads, self.prefetch = loader_size(config.data, cores, config.shard_size)
        self._config = config
        self._train = train
        self._device = device
        self._random = random.Random(0)  # files anywhere in the data set, as in training

    def measure(self, step: float) -> Feed:
        """Compare with a step that takes `step` seconds per image. Only if the loader is slower,
        by more than a run would be told, its parts are measured too."""
        transform = TrainTransform.of(self._config.data)
        feed = Feed(step, self._loader(transform), {})
        if feed.waiting_percent <= WORTH_SAYING_PERCENT:
            return feed
        plain = feed.loader
        if transform.randaugment is not None:
            without = replace(
                transform.augmentation,
                randaugment="none",
                randaugment_depth=None,
                randaugment_severity=None,
            )
            plain = self._loader(replace(transform, augmentation=without))
        reading, copying = self._reading(self.threads), self._copying()
        parts: dict[Part, float] = {
            "disk": reading,
            "decoding": plain - reading - copying,
            "RandAugment": feed.loader - plain,
            "copies to the GPU": copying,
        }
        return replace(feed, parts=parts, more_readers=self._reading(MORE_READERS * self.threads))

    def _loader(self, transform: TrainTransform) -> float:
        config = self._config
        loader = open_loader(
            replace(config.data, loader_threads=self.threads, prefetch_batches=self.prefetch),
            self._train,
            transform,
            batch_size=config.micro_batch_size,
            device=self._device,
            cores=self.cores,
        )
        try:
            # the first images also wait for the loader's start, so they take longest
            few = min(config.micro_batch_size, max(4, self.threads))
            each = self._load(loader, few, 0.0)
            fitting = int(TRIAL_SECONDS / (self.prefetch + 1) / each)
            batch = min(config.micro_batch_size, max(few, fitting))
            return min(self._load(loader, batch, TRIAL_SECONDS) for _ in range(2))
        finally:
            loader.close()

    def _load(self, loader: Loader, batch: int, seconds: float) -> float:
        """Ask for batches for so long, at least for one, and wait for the last."""
        started, images = time.perf_counter(), 0

        def requests() -> Iterator[Request]:
            for number in itertools.count():
                yield Request(self._some(batch), seed=number)
                if time.perf_counter() - started >= seconds:
                    return

        for loaded in loader.batches(requests()):
            images += len(loaded.labels)
        self._wait_for_device()
        return (time.perf_counter() - started) / images

    def _some(self, number: int) -> list[int]:
        return [self._random.randrange(len(self._train)) for _ in range(number)]

    def _reading(self, threads: int) -> float:
        """By so many threads, of whole files, and nothing else."""

        def read(index: int) -> int:
            return len(read_file(self._train.path(index)))

        def once(pool: ThreadPoolExecutor) -> float:
            started, images = time.perf_counter(), 0
            while time.perf_counter() - started < TRIAL_SECONDS:
                images += len(list(pool.map(read, self._some(4 * threads))))
            return (time.perf_counter() - started) / images

        with ThreadPoolExecutor(threads) as pool:
            return min(once(pool) for _ in range(2))

    def _copying(self) -> float:
        """Of an image's pixels, from pinned memory."""
        if self._device.type == "cpu":
            return 0.0
        size, batch = self._config.data.image_size, self._config.micro_batch_size
        pixels = torch.zeros((batch, size, size, 3), dtype=torch.uint8, pin_memory=True)

        def once() -> float:
            self._wait_for_device()
            started = time.perf_counter()
            pixels.to(self._device, non_blocking=True)
            self._wait_for_device()
            return time.perf_counter() - started

        return min(once() for _ in range(5)) / batch

    def _wait_for_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
