"""RandAugment: random choice of operations and strengths, as in three libraries.

The paper uses composer's. The others are here because other papers use them, and because
"severity 9" means something different in each. The caller's numpy generator makes all draws;
`randaugment_pillow` and `randaugment_torch` apply them.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

COMPOSER_OPS = (
    "autocontrast",
    "equalize",
    "posterize",
    "rotate",
    "solarize",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "color",
    "contrast",
    "brightness",
    "sharpness",
)
"""composer 0.15.1's augmentation set "all". All operations are equally likely; there is no
identity."""

TORCHVISION_OPS = ("identity", *COMPOSER_OPS)

TIMM_OPS = ("invert", "solarize_add", *COMPOSER_OPS)
"""timm's "increasing" set. Each operation is skipped half of the time."""

OPS = ("identity", *TIMM_OPS)
"""All operations; `RandAugmentDraws.ops` holds positions in this tuple."""

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
"""The operations that move pixels; they need a resampling filter and a fill colour."""

NEAREST, BILINEAR, BICUBIC = 0, 2, 3
"""Resampling filters of the geometric operations, with Pillow's numbers."""

Fill = tuple[int, int, int]
"""RGB colour of pixels from outside the image."""


class RandAugmentDraws(NamedTuple):
    """The operations on each image of a batch, in order. All fields are [b, depth]."""

    ops: NDArray[np.int32]
    """Positions in `OPS`."""
    values: NDArray[np.float64]
    """Each operation's argument: degrees (rotate), input columns per row or rows per column
    (shear), pixels (translate), a factor (color, contrast, brightness, sharpness), bits kept
    (posterize), a threshold (solarize), what is added below 128 (solarize_add); otherwise 0."""
    filters: NDArray[np.int32]
    """NEAREST, BILINEAR or BICUBIC, for geometric operations."""


@dataclass(frozen=True)
class RandAugment:
    """`depth` operations per image, as in one of the libraries. `severity` has that library's unit
    and range.

    composer: version 0.15.1, severity 0 to 10 (the paper: depth 2, severity 10). Each strength is
        drawn uniformly from 0.1 to `severity`. Bilinear, black fill.
    torchvision: `transforms.v2.RandAugment(depth, severity)`, severity an integer from 0 to 30.
        Nearest pixel, black fill.
    timm: "rand-m{severity}-n{depth}-mstd0.5-inc1", severity 0 to 10. Bilinear or bicubic at
        random, filled with the data set's mean colour.
    """

    kind: Literal["composer", "torchvision", "timm"]
    depth: int
    severity: float

    def fill(self, mean: tuple[float, float, float]) -> Fill:
        """The fill colour; `mean` is the data set's, on the scale 0 to 1."""
        if self.kind != "timm":
            return (0, 0, 0)
        red, green, blue = (min(255, round(255 * value)) for value in mean)
        return (red, green, blue)

    def draw(self, random: np.random.Generator, batch: int, size: int) -> RandAugmentDraws:
        """Draw operations for `batch` square images with sides of `size` pixels."""
        shape = (batch, self.depth)
        names = {"composer": COMPOSER_OPS, "torchvision": TORCHVISION_OPS, "timm": TIMM_OPS}
        table = np.array([OPS.index(name) for name in names[self.kind]], dtype=np.int32)
        ops = table[random.integers(len(table), size=shape)]
        sign = random.choice([-1.0, 1.0], shape)
        match self.kind:
            case "composer":
                uniform = random.random(shape)
                values = _composer_values(uniform, sign, self.severity, size)
                filters = np.full(shape, BILINEAR, np.int32)
            case "torchvision":
                values = _torchvision_values(sign, int(self.severity), size)
                filters = np.full(shape, NEAREST, np.int32)
            case "timm":
                level = np.clip(random.normal(self.severity, 0.5, shape), 0, 10)
                values = _timm_values(level, sign, size)
                filters = random.choice(np.array([BILINEAR, BICUBIC], np.int32), shape)
                ops = np.where(random.random(shape) > 0.5, OPS.index("identity"), ops)
        return RandAugmentDraws(ops.astype(np.int32), _pick(ops, values), filters)


_Values = dict[str, NDArray[np.float64]]
"""Operation -> its argument wherever it is drawn, [b, depth]."""


def _composer_values(
    uniform: NDArray[np.float64], sign: NDArray[np.float64], severity: float, size: int
) -> _Values:
    """composer.algorithms.utils.augmentation_primitives: strength u ~ U(0.1, severity), truncated
    to integers. A factor is at random above 1, up to `severity`, or below, down to
    1 - 0.09 severity."""
    u = 0.1 + (severity - 0.1) * uniform
    factor = np.where(sign > 0, 1 + (severity - 1) * uniform, 1 - 0.09 * severity * (1 - uniform))
    translate = sign * np.trunc(u * (size / 3) / 10)
    return {
        "posterize": 4 - np.trunc(u * 4 / 10),
        "rotate": sign * np.trunc(u * 30 / 10),
        "solarize": 256 - np.trunc(u * 256 / 10),
        "shear_x": sign * u * 0.3 / 10,
        "shear_y": sign * u * 0.3 / 10,
        "translate_x": translate,
        "translate_y": translate,
        "color": factor,
        "contrast": factor,
        "brightness": np.where(factor > 1, 0.75 * factor, factor),
        "sharpness": factor,
    }


def _torchvision_values(sign: NDArray[np.float64], severity: int, size: int) -> _Values:
    """torchvision.transforms.v2.RandAugment with its 31 magnitudes, in single precision."""

    def signed(highest: float) -> NDArray[np.float64]:
        return sign * float(torch.linspace(0.0, highest, 31)[severity])

    factor = 1 + signed(0.9)
    translate = np.trunc(signed(150 / 331 * size))
    return {
        "posterize": np.full(sign.shape, 8 - np.round(4 * severity / 30)),
        "rotate": signed(30.0),
        "solarize": np.full(sign.shape, 255 * float(torch.linspace(1.0, 0.0, 31)[severity])),
        "shear_x": signed(0.3),
        "shear_y": signed(0.3),
        "translate_x": translate,
        "translate_y": translate,
        "color": factor,
        "contrast": factor,
        "brightness": factor,
        "sharpness": factor,
    }


def _timm_values(level: NDArray[np.float64], sign: NDArray[np.float64], size: int) -> _Values:
    """timm.data.auto_augment, the "increasing" operations; `level` is 0 to 10."""
    factor = np.maximum(0.1, 1 + sign * 0.9 * level / 10)
    translate = sign * 0.45 * level / 10 * size
    return {
        "posterize": 4 - np.trunc(level / 10 * 4),
        "rotate": sign * 30 * level / 10,
        "solarize": 256 - np.trunc(level / 10 * 256),
        "solarize_add": np.trunc(level / 10 * 110),
        "shear_x": sign * 0.3 * level / 10,
        "shear_y": sign * 0.3 * level / 10,
        "translate_x": translate,
        "translate_y": translate,
        "color": factor,
        "contrast": factor,
        "brightness": factor,
        "sharpness": factor,
    }


def _pick(ops: NDArray[np.int32], by_name: _Values) -> NDArray[np.float64]:
    """The value of each drawn operation."""
    values = np.zeros(ops.shape)
    for name, of_name in by_name.items():
        values = np.where(ops == OPS.index(name), of_name, values)
    return values


def affine_coefficients(name: str, values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """[n, 6]: (a, b, c, d, e, f) of `Image.transform(..., AFFINE, ...)`: output pixel (x, y) comes
    from (a x + b y + c, d x + e y + f). Rotations are about the centre."""
    one, zero = np.ones_like(values), np.zeros_like(values)
    rows: list[NDArray[Any]]
    match name:
        case "shear_x":
            rows = [one, values, zero, zero, one, zero]
        case "shear_y":
            rows = [one, zero, zero, values, one, zero]
        case "translate_x":
            rows = [one, zero, values, zero, one, zero]
        case "translate_y":
            rows = [one, zero, zero, zero, one, values]
        case "rotate":
            angle = -np.deg2rad(values)
            cos, sin = np.round(np.cos(angle), 15), np.round(np.sin(angle), 15)
            centre = size / 2
            c, f = centre * (1 - cos - sin), centre * (1 + sin - cos)
            rows = [cos, sin, c, -sin, cos, f]
        case _:
            raise ValueError(f"{name} is not a geometric operation")
    return np.stack(rows, axis=-1)
