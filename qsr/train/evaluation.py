"""Validation of a run's averaged model, or of any other model; every image counts once."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from qsr.core.sampling import Sampler
from qsr.core.seeds import seed_for
from qsr.data import Loader, Request
from qsr.sync.batchnorm import batchnorm_layers, reestimate
from qsr.sync.communicator import Communicator
from qsr.sync.flat import FlatBuffers, FlatModule
from qsr.train.networks import evaluation_mode
from qsr.train.precision import Precision


@dataclass(frozen=True)
class Evaluation:
    """Result of one validation. `top5` is None if there are at most five classes."""

    loss: float
    top1: float
    """Percent."""
    top5: float | None
    """Percent."""
    images: int
    shadow: bool
    """True if the model was averaged for this evaluation only, in the middle of a round."""


@dataclass(frozen=True)
class BatchNormSource:
    """Training images for re-estimating BatchNorm statistics. It has its own loader and random
    draws, so that training is not affected."""

    loader: Loader
    sampler: Sampler
    micro_batch: int
    """Images per forward pass."""
    micro_batches: int
    """Forward passes over all shards: at least one each, at most what the data set provides."""

    def requests(self, step: int, shards: range) -> Iterator[Request]:
        """The batches that the replicas of these shards read in the evaluation after `step`
        steps."""
        num_shards, samples = self.sampler.num_shards, self.sampler.num_samples
        wanted = max(self.micro_batches, num_shards)
        count = max(1, min(wanted, samples // self.micro_batch))
        seed = seed_for(self.sampler.seed, "batchnorm", step=step)
        drawn = random.Random(seed).sample(range(samples), min(count * self.micro_batch, samples))
        for number in range(count):
            if number % num_shards in shards:
                indices = drawn[number * self.micro_batch : (number + 1) * self.micro_batch]
                yield Request(indices, seed_for(seed, "augment", batch=number))


class Evaluator:
    """Validates the mean of all workers in a separate model; training is not affected.

    `loader` reads the validation set of `num_images` images, in batches of at most `batch`.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Loader,
        num_images: int,
        batch: int,
        batchnorm: BatchNormSource,
        communicator: Communicator,
        precision: Precision,
    ) -> None:
        self._shadow = FlatModule(model.requires_grad_(False), extra=0)
        self._loader = loader
        self._num_images = num_images
        self._batch = batch
        self._batchnorm = batchnorm
        self._communicator = communicator
        self._precision = precision

    @property
    def model(self) -> nn.Module:
        """The model of the last evaluation, with its BatchNorm statistics."""
        return self._shadow.module

    def evaluate(
        self,
        replicas: Sequence[FlatBuffers],
        step: int,
        *,
        averaged: bool,
        between: Callable[[], None] = lambda: None,
    ) -> Evaluation:
        """Collective: validate the mean of the workers' parameters after `step` steps.

        `replicas` are the buffers of this rank's workers. `averaged`: all workers already hold the
        mean. `between` is collective; all ranks call it equally often during the evaluation, and an
        exception from it ends the evaluation. Raises RuntimeError if not every image was counted.
        """
        self._take_mean(replicas, averaged)
        model, topology = self.model, self._communicator.topology
        if batchnorm_layers(model):
            requests = self._batchnorm.requests(step, topology.shards)
            images = (batch.images for batch in self._batchnorm.loader.batches(requests))
            between()
            with self._precision.autocast():
                reestimate(model, images, self._communicator)
        between()
        return validate(
            model,
            self._loader,
            self._num_images,
            self._batch,
            self._communicator,
            self._precision,
            shadow=not averaged,
            between=between,
        )

    def _take_mean(self, replicas: Sequence[FlatBuffers], averaged: bool) -> None:
        replicas_everywhere = self._communicator.topology.num_shards
        for dtype, mine in self._shadow.flat.buffers.items():
            parameters = [replica.buffers[dtype][: mine.numel()] for replica in replicas]
            mine.copy_(parameters[0])
            if not averaged:
                for other in parameters[1:]:
                    mine.add_(other)
                mine.copy_(self._communicator.total(mine))
                mine.div_(replicas_everywhere)


@torch.no_grad()
def validate(
    model: nn.Module,
    loader: Loader,
    num_images: int,
    batch: int,
    communicator: Communicator,
    precision: Precision,
    *,
    shadow: bool = False,
    between: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Collective: loss, top-1 and top-5 of `model`, in evaluation mode, on the `num_images` images
    of `loader`, each image on one rank, in batches of at most `batch`.

    `between` is collective; all ranks call it equally often during the validation, and an exception
    from it ends the validation. Raises RuntimeError if not every image was counted.
    """
    evaluation_mode(model)
    topology = communicator.topology
    own = range(topology.rank, num_images, topology.ranks)
    starts = range(0, len(own), batch)
    requests = (Request(own[start : start + batch], seed=0) for start in starts)
    # loss, top-1, top-5, images: kept on the device, read once at the end
    sums = torch.zeros(4, dtype=torch.float64, device=communicator.device)
    classes = 0
    common = num_images // topology.ranks // batch  # batches that every rank has
    for number, loaded in enumerate(loader.batches(requests)):
        if number < common:
            between()
        with precision.autocast():
            logits = model(loaded.images).float()
        classes = logits.shape[1]
        sums += _count(logits, loaded.labels)
    loss, top1, top5, images = communicator.total(sums).tolist()
    if images != num_images:
        raise RuntimeError(f"validated {images:.0f} images instead of {num_images}")
    return Evaluation(
        loss=loss / images,
        top1=100.0 * top1 / images,
        top5=100.0 * top5 / images if classes > 5 else None,
        images=int(images),
        shadow=shadow,
    )


def _count(logits: Tensor, labels: Tensor) -> Tensor:
    """[summed loss, top-1 hits, top-5 hits, images] of one batch."""
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == labels.unsqueeze(1)
    count = torch.full((), len(labels), device=logits.device)
    return torch.stack([loss, hits[:, 0].sum(), hits.sum(), count]).double()
