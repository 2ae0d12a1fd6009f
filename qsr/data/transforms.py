"""Image transforms and their random draws.

numpy draws all random choices of a batch here, from one integer seed. The loaders only apply them,
so all loaders make the same crops, flips and RandAugment operations, and none has random state.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qsr.data.randaugment import RandAugment, RandAugmentDraws

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CROP_ATTEMPTS = 10
"""Random windows tried per sample before falling back to the central one, as in torchvision."""


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, horizontal flip, RandAugment, normalisation.

    The crop is torchvision's `RandomResizedCrop`, resized with antialiased linear filtering.
    RandAugment, if enabled, is applied to the flipped crop as uint8.
    """

    size: int
    """Side of the square output, in pixels."""
    min_area: float = 0.08
    max_area: float = 1.0
    """Range of the crop's share of the image area."""
    min_aspect: float = 3 / 4
    max_aspect: float = 4 / 3
    """Range of the crop's width / height."""
    flip_probability: float = 0.5
    randaugment: RandAugment | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    """Per channel, of pixels on the scale 0 to 1."""

    def __post_init__(self) -> None:
        _require(self.size >= 1, "size must be positive", self.size)
        _require(
            0 < self.min_area <= self.max_area <= 1,
            "need 0 < min_area <= max_area <= 1",
            (self.min_area, self.max_area),
        )
        _require(
            0 < self.min_aspect <= self.max_aspect,
            "need 0 < min_aspect <= max_aspect",
            (self.min_aspect, self.max_aspect),
        )
        _require(
            0 <= self.flip_probability <= 1,
            "flip_probability must be in [0, 1]",
            self.flip_probability,
        )


@dataclass(frozen=True)
class EvalTransform:
    """Resize the short side to `resize`, crop the centre, normalise.

    Geometry and antialiased linear filter are those of torchvision's `Resize` and `CenterCrop`.
    """

    size: int
    """Side of the square output, in pixels."""
    crop_fraction: float = 224 / 256
    """The crop's share of the resized short side."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    """Per channel, of pixels on the scale 0 to 1."""

    def __post_init__(self) -> None:
        _require(self.size >= 1, "size must be positive", self.size)
        _require(0 < self.crop_fraction <= 1, "crop_fraction must be in (0, 1]", self.crop_fraction)

    @property
    def resize(self) -> int:
        """Short side before the crop, in pixels."""
        return round(self.size / self.crop_fraction)


class TrainDraws(NamedTuple):
    """The random choices for a batch of b samples."""

    windows: NDArray[np.float64]
    """[b, CROP_ATTEMPTS, 4]: height and width in units of sqrt(image area), then the top and left
    position as a fraction of the possible range, in [0, 1)."""
    flips: NDArray[np.int32]
    """[b], 1 where the sample is mirrored."""
    randaugment: RandAugmentDraws | None
    """None without RandAugment."""


def _require(condition: bool, message: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{message}, got {value}")


def draw(transform: TrainTransform, seed: int, batch: int) -> TrainDraws:
    """Draw every random choice for `batch` samples; equal arguments give equal draws."""
    random = np.random.Generator(np.random.Philox(key=seed))
    area = random.uniform(transform.min_area, transform.max_area, (batch, CROP_ATTEMPTS))
    # Log-uniform: an aspect and its inverse are equally likely.
    aspect = np.exp(
        random.uniform(
            np.log(transform.min_aspect), np.log(transform.max_aspect), (batch, CROP_ATTEMPTS)
        )
    )
    position = random.random((batch, CROP_ATTEMPTS, 2))
    sides = np.stack([np.sqrt(area / aspect), np.sqrt(area * aspect)], axis=-1)
    flips = random.random(batch) < transform.flip_probability
    windows = np.concatenate([sides, position], axis=-1)
    randaugment = None
    if transform.randaugment is not None:
        randaugment = transform.randaugment.draw(random, batch, transform.size)
    return TrainDraws(windows, flips.astype(np.int32), randaugment)


def crop_box(
    transform: TrainTransform, windows: NDArray[np.float64], height: int, width: int
) -> tuple[int, int, int, int]:
    """The crop of one sample: (top, left, height, width) in pixels.

    `windows` is one row of `TrainDraws.windows`. The first window that fits into the image is used;
    if none fits, the largest central one whose aspect is in range.
    """
    side = np.sqrt(np.float64(height * width))
    heights = np.floor(side * windows[:, 0] + 0.5)
    widths = np.floor(side * windows[:, 1] + 0.5)
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    if not fits.any():
        crop_height = max(1, min(height, int(width / transform.min_aspect + 0.5)))
        crop_width = max(1, min(width, int(height * transform.max_aspect + 0.5)))
        return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width
    first = int(fits.argmax())
    crop_height, crop_width = int(heights[first]), int(widths[first])
    top = int(windows[first, 2] * (height - crop_height + 1))
    left = int(windows[first, 3] * (width - crop_width + 1))
    return top, left, crop_height, crop_width
