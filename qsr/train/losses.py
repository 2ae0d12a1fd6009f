"""The training loss: cross entropy with label smoothing and mixup."""

import random

import torch
from torch import Tensor, nn
from torch.nn import functional

from qsr.config.schema import LossConfig


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
        if self._mixup_alpha == 0.0:
            return self._cross_entropy(model(images), labels)
        keep, order = draw_mixup(len(labels), self._mixup_alpha, seed)
        partner = order.to(images.device, non_blocking=True)
        logits = model(images.lerp(images[partner], 1.0 - keep))
        return keep * self._cross_entropy(logits, labels) + (1.0 - keep) * self._cross_entropy(
            logits, labels[partner]
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
