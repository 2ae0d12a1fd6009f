"""A broken file stops the stream with an error that names it; it never hangs or shifts samples."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qsr.data import (
    DataError,
    EvalTransform,
    ImageFolder,
    Loader,
    Request,
    TrainTransform,
    open_image_folders,
)

Load = Callable[..., Loader]

EVAL = EvalTransform(32)
TRAIN = TrainTransform(32, min_area=1.0)  # crops of the whole image touch every byte
BAD = 4


def truncate(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "one byte": lambda path: path.write_bytes(b"\xff"),
    "header": lambda path: truncate(path, 0.02),
    "half": lambda path: truncate(path, 0.5),
    "nine tenths": lambda path: truncate(path, 0.9),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 8),
    "text": lambda path: path.write_text("not found"),
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "deleted": Path.unlink,
}


@pytest.fixture(params=DAMAGE)
def damaged(request: pytest.FixtureRequest, own_photos: Path) -> ImageFolder:
    """A data set whose file BAD broke after it was listed."""
    train, _ = open_image_folders(own_photos)
    DAMAGE[request.param](Path(train.path(BAD)))
    return train


@pytest.mark.timeout(60)
@pytest.mark.parametrize("transform", [TRAIN, EVAL], ids=["train", "eval"])
def test_bad_file_is_named(
    kind: str, new_loader: Load, damaged: ImageFolder, transform: TrainTransform | EvalTransform
) -> None:
    loader = new_loader(kind, damaged, transform)
    good, bad = Request([0, 1, 2], 0), Request([5, BAD, 7], 1)
    batches = loader.batches([good, good, bad, good])
    delivered = [next(batches), next(batches)]
    with pytest.raises(DataError) as caught:
        next(batches)
    assert damaged.path(BAD) in str(caught.value)
    assert f"index {BAD} of train" in str(caught.value)
    assert damaged.path(5) not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [batch.labels.tolist() for batch in delivered] == [[0, 0, 0]] * 2


def test_work_goes_on_in_a_new_loader(kind: str, new_loader: Load, own_photos: Path) -> None:
    train, _ = open_image_folders(own_photos)
    before = next(new_loader(kind, train, EVAL).batches([Request([0, 1], 0)]))
    Path(train.path(BAD)).write_bytes(b"")
    loader = new_loader(kind, train, EVAL)
    with pytest.raises(DataError):
        next(loader.batches([Request([BAD], 0)]))
    loader.close()
    after = next(new_loader(kind, train, EVAL).batches([Request([0, 1], 0)]))
    assert torch.equal(before.images, after.images)


def test_every_bad_file_is_counted(kind: str, new_loader: Load, own_photos: Path) -> None:
    train, _ = open_image_folders(own_photos)
    for index in (1, 3, 4, 5, 8):
        Path(train.path(index)).write_bytes(b"")
    with pytest.raises(DataError, match=", 2 more") as caught:
        next(new_loader(kind, train, EVAL).batches([Request(range(12), 0)]))
    for index in (1, 3, 4):
        assert train.path(index) in str(caught.value)


def test_bad_file_of_an_abandoned_stream_is_nobodys_error(
    kind: str, new_loader: Load, own_photos: Path
) -> None:
    train, _ = open_image_folders(own_photos)
    Path(train.path(BAD)).write_bytes(b"")
    loader = new_loader(kind, train, EVAL)
    abandoned = loader.batches([Request([0], 0), Request([BAD], 0), Request([1], 0)])
    next(abandoned)
    batch = next(loader.batches([Request([7], 0)]))
    assert batch.labels.tolist() == [train.labels[7]]
