"""Image transforms and their random draws.

numpy draws all random choices of a batch here, from one integer seed. The loaders only apply them,
so all loaders make the same crops, flips and RandAugment operations, and none has random state.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from qsr.data.randaugment import RandAugment, RandAugmentDraws

if TYPE_CHECKING:  # reading a model file does not need the settings' libraries
    from qsr.config.schema import AugmentationConfig, DataConfig

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
    augmentation: "AugmentationConfig"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Per channel, of pixels on the scale 0 to 1."""

    @classmethod
    def of(cls, data: "DataConfig") -> Self:
        """The transform of a run's training images."""
        return cls(data.image_size, data.augmentation, data.mean, data.std)

    @property
    def randaugment(self) -> RandAugment | None:
        """The RandAugment of the augmentation, if it has one."""
        chosen = self.augmentation
        if chosen.randaugment == "none":
            return None
        assert chosen.randaugment_depth is not None  # config.load.check
        assert chosen.randaugment_severity is not None
        return RandAugment(
            chosen.randaugment, chosen.randaugment_depth, chosen.randaugment_severity
        )


@dataclass(frozen=True)
class EvalTransform:
    """Resize the short side to `resize`, crop the centre, normalise.

    Geometry and antialiased linear filter are those of torchvision's `Resize` and `CenterCrop`.
    """

    size: int
    """Side of the square output, in pixels."""
    crop_fraction: float
    """The crop's share of the resized short side."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Per channel, of pixels on the scale 0 to 1."""

    @classmethod
    def of(cls, data: "DataConfig") -> Self:
        """The transform of a run's validation images."""
        return cls(data.image_size, data.eval_crop_fraction, data.mean, data.std)

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


def draw(transform: TrainTransform, seed: int, batch: int) -> TrainDraws:
    """Draw every random choice for `batch` samples; equal arguments give equal draws."""
    random = np.random.Generator(np.random.Philox(key=seed))
    change, shape = transform.augmentation, (batch, CROP_ATTEMPTS)
    area = random.uniform(change.min_area, change.max_area, shape)
    # Log-uniform: an aspect and its inverse are equally likely.
    aspect = np.exp(random.uniform(np.log(change.min_aspect), np.log(change.max_aspect), shape))
    position = random.random((*shape, 2))
    sides = np.stack([np.sqrt(area / aspect), np.sqrt(area * aspect)], axis=-1)
    flips = random.random(batch) < change.flip_probability
    windows = np.concatenate([sides, position], axis=-1)
    randaugment = None
    if (operations := transform.randaugment) is not None:
        randaugment = operations.draw(random, batch, transform.size)
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
        crop_height = max(1, min(height, int(width / transform.augmentation.min_aspect + 0.5)))
        crop_width = max(1, min(width, int(height * transform.augmentation.max_aspect + 0.5)))
        return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width
    first = int(fits.argmax())
    crop_height, crop_width = int(heights[first]), int(widths[first])
    top = int(windows[first, 2] * (height - crop_height + 1))
    left = int(windows[first, 3] * (width - crop_width + 1))
    return top, left, crop_height, crop_width
