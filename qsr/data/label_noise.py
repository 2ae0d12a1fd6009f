"""Wrong labels on purpose: a share of the training images says another class."""

import random
from dataclasses import replace

from qsr.core.seeds import seed_for
from qsr.data.datasets import ImageFolder


def with_label_noise(dataset: ImageFolder, share: float, seed: int) -> ImageFolder:
    """The data set with another label, drawn evenly from the other classes, on `share` of its
    images. Equal arguments give equal labels; the run's `seed` draws which."""
    if share == 0.0:
        return dataset
    draws = random.Random(seed_for(seed, "label_noise"))
    labels = list(dataset.labels)
    for index in draws.sample(range(len(labels)), round(share * len(labels))):
        shift = draws.randrange(1, len(dataset.classes))
        labels[index] = (labels[index] + shift) % len(dataset.classes)
    return replace(dataset, labels=tuple(labels))
