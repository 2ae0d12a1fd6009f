"""composer 0.15.1's RandAugment, restated for tests: its draws and its Pillow calls, by operation.

composer itself cannot be a dependency: it wants torch 2.0. Level means `severity` here.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Draw = Callable[[np.random.RandomState, float, int], float]
"""From a generator, the severity and the image's side: what the operation is told."""

Apply = Callable[[Image.Image, float], Image.Image]

BILINEAR = Image.Resampling.BILINEAR


class Operation(NamedTuple):
    """One of the thirteen."""

    draw: Draw
    apply: Apply


def strength(random: np.random.RandomState, severity: float) -> float:
    return float(random.uniform(low=0.1, high=severity))


def signed(random: np.random.RandomState, value: float) -> float:
    return -value if random.uniform() > 0.5 else value


def factor(random: np.random.RandomState, severity: float, side: int) -> float:
    """Half of the time a weaker property, half of the time a stronger one."""
    if random.uniform() > 0.5:
        return float(random.uniform(1, severity))
    return float(random.uniform(1 - 0.09 * severity, 1))


def brightness(random: np.random.RandomState, severity: float, side: int) -> float:
    drawn = factor(random, severity, side)
    return 0.75 * drawn if drawn > 1 else drawn


def shear(random: np.random.RandomState, severity: float, side: int) -> float:
    return signed(random, strength(random, severity) * 0.3 / 10)


def translate(random: np.random.RandomState, severity: float, side: int) -> float:
    return signed(random, int(strength(random, severity) * (side / 3) / 10))


def nothing(random: np.random.RandomState, severity: float, side: int) -> float:
    return 0.0


def affine(image: Image.Image, *coefficients: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, BILINEAR)


OPERATIONS = {
    "autocontrast": Operation(nothing, lambda image, _: ImageOps.autocontrast(image)),
    "equalize": Operation(nothing, lambda image, _: ImageOps.equalize(image)),
    "posterize": Operation(
        lambda random, severity, _: 4 - int(strength(random, severity) * 4 / 10),
        lambda image, bits: ImageOps.posterize(image, int(bits)),
    ),
    "rotate": Operation(
        lambda random, severity, _: signed(random, int(strength(random, severity) * 30 / 10)),
        lambda image, degrees: image.rotate(degrees, resample=BILINEAR),
    ),
    "solarize": Operation(
        lambda random, severity, _: 256 - int(strength(random, severity) * 256 / 10),
        lambda image, threshold: ImageOps.solarize(image, int(threshold)),
    ),
    "shear_x": Operation(shear, lambda image, value: affine(image, 1, value, 0, 0, 1, 0)),
    "shear_y": Operation(shear, lambda image, value: affine(image, 1, 0, 0, value, 1, 0)),
    "translate_x": Operation(translate, lambda image, value: affine(image, 1, 0, value, 0, 1, 0)),
    "translate_y": Operation(translate, lambda image, value: affine(image, 1, 0, 0, 0, 1, value)),
    "color": Operation(factor, lambda image, value: ImageEnhance.Color(image).enhance(value)),
    "contrast": Operation(factor, lambda image, value: ImageEnhance.Contrast(image).enhance(value)),
    "brightness": Operation(
        brightness, lambda image, value: ImageEnhance.Brightness(image).enhance(value)
    ),
    "sharpness": Operation(
        factor, lambda image, value: ImageEnhance.Sharpness(image).enhance(value)
    ),
}
