"""The loader that keeps all images in memory gives what the one that reads them gives."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qsr.config.load import load_config
from qsr.data import EvalTransform, ImageFolder, Loader, Request, TrainTransform
from qsr.errors import ConfigError
from tests.transforms import eval_transform, train_transform

Photos = tuple[ImageFolder, ImageFolder]
Load = Callable[..., Loader]

AS_IT_IS = train_transform(32, min_area=1.0, min_aspect=1.0, max_aspect=1.0, flip_probability=0.0)
REQUESTS = [Request([3, 1, 2], 10), Request(range(16), 11), Request([23, 23, 0], 12)]


@pytest.mark.parametrize("transform", [AS_IT_IS, eval_transform(32)])
def test_batches_equal_those_of_torchvision(
    new_loader: Load, photos: Photos, transform: TrainTransform | EvalTransform
) -> None:
    memory, reading = (new_loader(kind, photos[0], transform) for kind in ("memory", "torchvision"))
    pairs = zip(memory.batches(REQUESTS), reading.batches(REQUESTS), strict=True)
    for kept, read in pairs:
        assert torch.equal(kept.images, read.images)
        assert torch.equal(kept.labels, read.labels)


def test_labels_are_the_data_sets_own_also_for_images_read_before(
    new_loader: Load, photos: Photos
) -> None:
    train = photos[0]
    new_loader("memory", train, AS_IT_IS)
    noisy = replace(train, labels=tuple(2 - label for label in train.labels))
    (batch,) = new_loader("memory", noisy, AS_IT_IS).batches([Request(range(16), 0)])
    assert batch.labels.tolist() == list(noisy.labels[:16])


def test_batches_own_their_memory(new_loader: Load, photos: Photos) -> None:
    loader = new_loader("memory", photos[0], AS_IT_IS)
    first, second = loader.batches([Request([5], 0)] * 2)
    first.images.zero_()
    assert second.images.any()


@pytest.mark.parametrize("request_", [Request([], 0), Request(range(17), 0), Request([24], 0)])
def test_impossible_requests_are_refused(
    new_loader: Load, photos: Photos, request_: Request
) -> None:
    loader = new_loader("memory", photos[0], AS_IT_IS)
    with pytest.raises(ValueError, match="request"):
        next(loader.batches([request_]))


def test_augmentation_is_refused() -> None:
    run = ["experiment=demo/quadratic", "data.loader=memory"]
    with pytest.raises(ConfigError, match=r"data.loader=memory keeps every image as it is"):
        load_config(run)
    assert load_config([*run, "data=glyphs"]).data.loader == "memory"
