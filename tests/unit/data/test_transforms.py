"""The random choices: reproducible, in range, and distributed as torchvision's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from qsr.data.randaugment import RandAugment
from qsr.data.transforms import (
    CROP_ATTEMPTS,
    crop_box,
    draw,
)
from tests.transforms import eval_transform, train_transform

RANDAUGMENT = train_transform(224, randaugment=RandAugment("composer", depth=2, severity=10))


def test_equal_seeds_draw_equal_choices() -> None:
    first, second = (draw(RANDAUGMENT, seed=5, batch=4) for _ in range(2))
    other = draw(RANDAUGMENT, seed=6, batch=4)
    assert first.randaugment is not None
    assert second.randaugment is not None
    for name in ("windows", "flips"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
    for name in first.randaugment._fields:
        assert np.array_equal(getattr(first.randaugment, name), getattr(second.randaugment, name))
    assert not np.array_equal(first.windows, other.windows)


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_every_64_bit_seed_is_a_seed(seed: int) -> None:
    assert draw(RANDAUGMENT, seed, 1).windows.shape == (1, CROP_ATTEMPTS, 4)


def test_shapes() -> None:
    draws = draw(RANDAUGMENT, seed=0, batch=7)
    assert draws.windows.shape == (7, CROP_ATTEMPTS, 4)
    assert draws.flips.shape == (7,)
    assert draws.randaugment is not None
    assert {field.shape for field in draws.randaugment} == {(7, 2)}
    assert draw(train_transform(224), seed=0, batch=7).randaugment is None


@given(seed=st.integers(0, 2**64 - 1), height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_crop_lies_inside_the_image(seed: int, height: int, width: int) -> None:
    transform = train_transform(32)
    top, left, crop_height, crop_width = crop_box(
        transform, draw(transform, seed, 1).windows[0], height, width
    )
    assert crop_height >= 1
    assert crop_width >= 1
    assert 0 <= top <= height - crop_height
    assert 0 <= left <= width - crop_width


def test_crops_are_distributed_as_random_resized_crop() -> None:
    height, width, samples = 375, 500, 4000
    transform = train_transform(224)
    draws = draw(transform, 1, samples)
    ours = np.array([crop_box(transform, row, height, width) for row in draws.windows])
    torch.manual_seed(1)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(samples)]
    )
    for column in range(4):
        quantiles = np.quantile(ours[:, column], np.linspace(0, 1, 21))
        expected = np.quantile(theirs[:, column], np.linspace(0, 1, 21))
        assert np.abs(quantiles - expected).max() < 20  # pixels; sampling alone gives up to 15
    aspect = ours[:, 3] / ours[:, 2]
    assert 0.73 < aspect.min() < 0.77  # rounding to pixels may leave 3/4 to 4/3 by a little
    assert 1.30 < aspect.max() < 1.37
    area = ours[:, 2] * ours[:, 3] / (height * width)
    assert 0.075 < area.min() < 0.1
    assert 0.95 < area.max() <= 1


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (10, 1000, (0, 493, 10, 13)),  # 13 = round(10 * 4/3)
        (1000, 10, (493, 0, 13, 10)),
        (1, 1000, (0, 499, 1, 1)),
    ],
)
def test_no_window_fits_a_strip(height: int, width: int, box: tuple[int, ...]) -> None:
    transform = train_transform(32, min_area=0.9)
    assert crop_box(transform, draw(transform, 0, 1).windows[0], height, width) == box


def test_first_window_that_fits_is_taken() -> None:
    windows = np.array([[2.0, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.999], [1.0, 1.0, 0.0, 0.0]])
    # sqrt(area) is 100: the first is 200 high, the second 50 x 50 with 51 places across.
    assert crop_box(train_transform(32), windows, 100, 100) == (0, 50, 50, 50)


def test_flip_probability() -> None:
    for probability in (0.0, 0.3, 1.0):
        flips = draw(train_transform(32, flip_probability=probability), 0, 4000).flips
        assert abs(flips.mean() - probability) < 0.03


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (28, 32), (32, 37)])
def test_eval_resize(size: int, resize: int) -> None:
    assert eval_transform(size).resize == resize
