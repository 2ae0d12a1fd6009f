"""What happens to the pixels, and the random numbers that decide it.

Every random choice of a batch is drawn here, by numpy, from one integer seed. The loaders only
carry the choices out, so all of them make the same crops, flips and RandAugment operations, and
none has random state of its own.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CROP_ATTEMPTS = 10
"""Random windows tried per sample before the central one is taken, as torchvision does."""

RANDAUGMENT_OPS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "contrast",
    "color",
    "sharpness",
    "posterize",
    "solarize",
    "equalize",
    "autocontrast",
)
"""RandAugment's operations; `TrainDraws.ops` holds positions in this tuple."""

RANDAUGMENT_FILL = 128
"""Grey value that shear, translate and rotate move in from outside the image."""


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, horizontal flip, RandAugment, normalisation.

    The crop is torchvision's `RandomResizedCrop`, resized with antialiased linear filtering.

    RandAugment applies `randaugment_depth` operations, drawn uniformly with replacement from
    `RANDAUGMENT_OPS`, to the flipped crop as uint8. `randaugment_strength` is a fraction of
    each operation's full range, *not* the "m" of a library, whose meaning differs threefold
    between libraries. Full range, with a random sign where "+-" stands: rotate +-30 degrees,
    shear +-0.3, translate +-1/3 of the size, brightness, contrast, color and sharpness 1 +- 0.9,
    posterize to 4 bits, solarize from threshold 0. Warps take the nearest pixel.
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
    randaugment_depth: int = 0
    """Operations per sample; 0 is no RandAugment."""
    randaugment_strength: float = 0.0
    """Fraction of the full range, 0 to 1."""
    randaugment_uniform: bool = False
    """Draw each magnitude uniformly from 0 to the strength (Composer) instead of fixing it there
    (the RandAugment paper, timm, torchvision, DALI)."""
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
        _require(
            self.randaugment_depth >= 0,
            "randaugment_depth must not be negative",
            self.randaugment_depth,
        )
        _require(
            0 <= self.randaugment_strength <= 1,
            "randaugment_strength is a fraction of the range, in [0, 1]",
            self.randaugment_strength,
        )


@dataclass(frozen=True)
class EvalTransform:
    """Resize the short side to `resize`, crop the centre, normalise.

    Geometry and antialiased linear filter are those of torchvision's `Resize` and
    `CenterCrop`.
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
    """[b, CROP_ATTEMPTS, 4]: height and width in units of sqrt(image area), then the top and
    left position among the possible ones, in [0, 1)."""
    flips: NDArray[np.int32]
    """[b], 1 where the sample is mirrored."""
    ops: NDArray[np.int32]
    """[b, depth], positions in RANDAUGMENT_OPS."""
    values: NDArray[np.float32]
    """[b, depth], what the operation is told: degrees for rotate, slope for shear, pixels for
    translate, a factor for brightness, contrast, color and sharpness, bits kept for posterize,
    a threshold for solarize, 0 for the others."""


def _require(condition: bool, message: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{message}, got {value}")


def draw(transform: TrainTransform, seed: int, batch: int) -> TrainDraws:
    """Draw every random choice for `batch` samples; equal arguments give equal draws."""
    random = np.random.Generator(np.random.Philox(key=seed))
    area = random.uniform(transform.min_area, transform.max_area, (batch, CROP_ATTEMPTS))
    # Uniform in the logarithm: an aspect and its inverse are equally likely.
    aspect = np.exp(
        random.uniform(
            np.log(transform.min_aspect), np.log(transform.max_aspect), (batch, CROP_ATTEMPTS)
        )
    )
    position = random.random((batch, CROP_ATTEMPTS, 2))
    sides = np.stack([np.sqrt(area / aspect), np.sqrt(area * aspect)], axis=-1)
    flips = random.random(batch) < transform.flip_probability
    windows = np.concatenate([sides, position], axis=-1)
    choices = (batch, transform.randaugment_depth)
    ops = random.integers(len(RANDAUGMENT_OPS), size=choices, dtype=np.int32)
    signs = random.choice([-1.0, 1.0], choices)
    fractions = random.random(choices) if transform.randaugment_uniform else np.ones(choices)
    values = _randaugment_values(transform, ops, fractions, signs)
    return TrainDraws(windows, flips.astype(np.int32), ops, values)


def crop_box(
    transform: TrainTransform, windows: NDArray[np.float64], height: int, width: int
) -> tuple[int, int, int, int]:
    """(top, left, height, width) in pixels of one sample's crop.

    `windows` is one row of `TrainDraws.windows`. The first window that fits into the image is
    taken; if none does, the largest central one whose aspect is in range.
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


def _randaugment_values(
    transform: TrainTransform,
    ops: NDArray[np.int32],
    fractions: NDArray[np.float64],
    signs: NDArray[np.float64],
) -> NDArray[np.float32]:
    """`TrainDraws.values`, from each magnitude's fraction of the strength and its sign."""
    magnitude = transform.randaugment_strength * fractions
    signed = magnitude * signs
    shear = 0.3 * signed
    # Whole pixels: half a pixel would fall to either side, depending on the library.
    translate = np.round(transform.size / 3 * signed)
    factor = 1 + 0.9 * signed
    values_by_name = {
        "shear_x": shear,
        "shear_y": shear,
        "translate_x": translate,
        "translate_y": translate,
        "rotate": 30 * signed,
        "brightness": factor,
        "contrast": factor,
        "color": factor,
        "sharpness": factor,
        "posterize": 8 - np.round(4 * magnitude),
        "solarize": 256 * (1 - magnitude),
    }
    values = np.zeros(ops.shape, dtype=np.float32)
    for op, name in enumerate(RANDAUGMENT_OPS):
        if name in values_by_name:
            values = np.where(ops == op, values_by_name[name], values)
    return values.astype(np.float32)
