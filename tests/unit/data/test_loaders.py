"""What both loaders promise: order, laziness, and no memory of what came before."""

import threading
from collections.abc import Callable, Iterator
from itertools import count, islice

import pytest
import torch

from qsr.data import EvalTransform, ImageFolder, Loader, Request, TrainTransform
from qsr.data.randaugment import RandAugment
from tests.transforms import eval_transform, train_transform

Photos = tuple[ImageFolder, ImageFolder]
Load = Callable[..., Loader]

TRAIN = train_transform(32, randaugment=RandAugment("composer", depth=2, severity=10))
REQUESTS = [
    Request([3, 1, 2], 10),
    Request(range(16), 11),
    Request([23], 12),
    Request([5, 5, 0, 22], 13),
    Request([9, 8], 14),
    Request([0, 12, 23, 7, 7, 1, 2], 15),
]


@pytest.mark.parametrize("prefetch", [0, 1, 3, 10])
def test_batches_come_as_requested(kind: str, load: Load, photos: Photos, prefetch: int) -> None:
    train, _ = photos
    batches = list(load(kind, train, TRAIN, prefetch=prefetch).batches(REQUESTS))
    assert len(batches) == len(REQUESTS)
    for request, batch in zip(REQUESTS, batches, strict=True):
        assert batch.images.shape == (len(request.indices), 3, 32, 32)
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous()
        assert batch.labels.dtype == torch.int64
        assert batch.labels.tolist() == [train.labels[index] for index in request.indices]


@pytest.mark.parametrize("transform", [TRAIN, eval_transform(32)])
def test_a_batch_depends_on_its_request_alone(
    kind: str,
    load: Load,
    new_loader: Load,
    photos: Photos,
    transform: TrainTransform | EvalTransform,
) -> None:
    stream = list(load(kind, photos[0], transform).batches(REQUESTS))
    alone = next(new_loader(kind, photos[0], transform, threads=1).batches([REQUESTS[5]]))
    assert torch.equal(stream[5].images, alone.images)


def test_seed_decides_the_pixels(kind: str, load: Load, photos: Photos) -> None:
    loader = load(kind, photos[0], TRAIN)
    first, same, other = loader.batches([Request([1, 2], s) for s in (7, 7, 8)])
    assert torch.equal(first.images, same.images)
    assert not torch.equal(first.images, other.images)


def test_validation_ignores_the_seed(kind: str, load: Load, photos: Photos) -> None:
    loader = load(kind, photos[1], eval_transform(32))
    first, second = loader.batches([Request([1, 2], 0), Request([1, 2], 1)])
    assert torch.equal(first.images, second.images)


def test_batches_own_their_memory(kind: str, load: Load, photos: Photos) -> None:
    loader = load(kind, photos[0], TRAIN)
    copies, kept = [], []
    for batch in loader.batches(REQUESTS * 3):
        kept.append(batch)
        copies.append(batch.images.clone())
    for batch, copy in zip(kept, copies, strict=True):
        assert torch.equal(batch.images, copy)


def test_requests_are_read_only_as_far_as_prefetched(kind: str, load: Load, photos: Photos) -> None:
    asked = count()
    requests: Iterator[Request] = (Request([next(asked) % 24], 0) for _ in count())
    loader = load(kind, photos[0], TRAIN, prefetch=2)
    batches = list(islice(loader.batches(requests), 10))
    assert len(batches) == 10
    assert next(asked) <= 10 + 2


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_new_stream_starts_clean(kind: str, load: Load, photos: Photos, taken: int) -> None:
    loader = load(kind, photos[0], TRAIN)
    abandoned = loader.batches(REQUESTS)
    for _ in range(taken):
        next(abandoned)
    batches = list(loader.batches(REQUESTS[2:]))
    expected = list(load(kind, photos[0], TRAIN).batches(REQUESTS))[2:]
    for batch, wanted in zip(batches, expected, strict=True):
        assert torch.equal(batch.images, wanted.images)
        assert torch.equal(batch.labels, wanted.labels)


def test_an_exhausted_loader_serves_again(kind: str, load: Load, photos: Photos) -> None:
    loader = load(kind, photos[0], TRAIN)
    first, second = (list(loader.batches(REQUESTS)) for _ in range(2))
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))
    assert list(loader.batches([])) == []


@pytest.mark.parametrize(
    ("indices", "message"),
    [([], "1 to 16 indices"), (range(17), "1 to 16"), ([24], "0 to 23"), ([0, -1], "0 to 23")],
)
def test_impossible_requests_are_refused(
    kind: str, load: Load, photos: Photos, indices: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        next(load(kind, photos[0], TRAIN).batches([Request(indices, 0)]))


def test_closing_ends_the_loader(kind: str, new_loader: Load, photos: Photos) -> None:
    before = threading.active_count()
    loader = new_loader(kind, photos[0], TRAIN)
    stream = loader.batches(REQUESTS)
    next(stream)
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError):
        next(loader.batches(REQUESTS))


def test_threads_do_not_change_a_pixel(kind: str, load: Load, photos: Photos) -> None:
    images = [
        next(load(kind, photos[0], TRAIN, threads=threads).batches(REQUESTS[1:])).images
        for threads in (0, 1, 4)
    ]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])
