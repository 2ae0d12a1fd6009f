"""The training loss: cross entropy with label smoothing and mixup."""

import random
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from qsr.config.schema import LossConfig


class Mixing(NamedTuple):
    """One draw of mixup for a micro-batch."""

    weights: Tensor
    """[2]: of an image, and of its partner."""
    partner: Tensor
    """[b]: the index of each image's partner."""


class TrainingLoss:
    """Mean loss of a micro-batch.

    With mixup (Zhang et al. 2018) every image is blended with another image of the micro-batch, and
    so are the losses for their labels. One coefficient is drawn for the whole micro-batch.
    """

    def __init__(self, settings: LossConfig) -> None:
        self._label_smoothing = settings.label_smoothing
        self._mixup_alpha = settings.mixup_alpha

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        """Loss of `model` on `images` [b, 3, h, w] with `labels` [b]; `seed` is for mixup."""
        return self.of(model, images, labels, self.draw(images, seed))

    def draw(self, images: Tensor, seed: int) -> Mixing | None:
        """Mixup's draw for these images, on their device; None without mixup."""
        if self._mixup_alpha == 0.0:
            return None
        keep, order = draw_mixup(len(images), self._mixup_alpha, seed)
        weights = torch.tensor([keep, 1.0 - keep], dtype=images.dtype)
        return Mixing(
            weights.to(images.device, non_blocking=True),
            order.to(images.device, non_blocking=True),
        )

    def of(self, model: nn.Module, images: Tensor, labels: Tensor, mixing: Mixing | None) -> Tensor:
        """The loss with this draw of mixup, of which only tensors differ between micro-batches."""
        if mixing is None:
            return self._cross_entropy(model(images), labels)
        keep, mixed_in = mixing.weights.unbind()
        logits = model(images.lerp(images[mixing.partner], mixed_in))
        return keep * self._cross_entropy(logits, labels) + mixed_in * self._cross_entropy(
            logits, labels[mixing.partner]
        )

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        # in fp32: under fp16 autocast the exponentials of large logits would overflow
        return functional.cross_entropy(
            logits.float(), labels, label_smoothing=self._label_smoothing
        )


def draw_mixup(samples: int, alpha: float, seed: int) -> tuple[float, Tensor]:
    """(weight of the original image, index of the partner of each of the `samples` images).

    The weight is max(z, 1 - z) with z ~ Beta(alpha, alpha), as composer 0.15.1 draws it for the
    released code, so it is at least one half."""
    z = random.Random(seed).betavariate(alpha, alpha)
    generator = torch.Generator().manual_seed(seed)
    return max(z, 1.0 - z), torch.randperm(samples, generator=generator)
