"""RandAugment of one image on the CPU with Pillow, which all three libraries use."""

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from qsr.data.randaugment import GEOMETRIC, OPS, Fill, RandAugmentDraws, affine_coefficients


def augment_image(image: Image.Image, draws: RandAugmentDraws, row: int, fill: Fill) -> Image.Image:
    """Apply the operations in row `row` of `draws` to a square RGB image."""
    for op, value, resample in zip(
        draws.ops[row], draws.values[row], draws.filters[row], strict=True
    ):
        image = apply_op(image, OPS[op], float(value), int(resample), fill)
    return image


def apply_op(image: Image.Image, name: str, value: float, resample: int, fill: Fill) -> Image.Image:
    """Apply one operation; `value` as in `RandAugmentDraws.values`."""
    match name:
        case "identity":
            return image
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "invert":
            return ImageOps.invert(image)
        case "posterize":
            mask = 256 - 2 ** (8 - int(value))  # ImageOps.posterize does not accept 0 bits
            return image.point([level & mask for level in range(256)] * 3)
        case "solarize":
            return ImageOps.solarize(image, value)  # type: ignore[arg-type]  # only compared
        case "solarize_add":
            table = [level + int(value) * (level < 128) for level in range(256)]
            return image.point(table * 3)
        case "color":
            return ImageEnhance.Color(image).enhance(value)
        case "contrast":
            return ImageEnhance.Contrast(image).enhance(value)
        case "brightness":
            return ImageEnhance.Brightness(image).enhance(value)
        case "sharpness":
            return ImageEnhance.Sharpness(image).enhance(value)
        case "rotate":
            return image.rotate(value, Image.Resampling(resample), fillcolor=fill)
    if name not in GEOMETRIC:
        raise ValueError(f"{name} is not a RandAugment operation")
    coefficients = affine_coefficients(name, np.array([value]), image.width)[0].tolist()
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        coefficients,
        Image.Resampling(resample),
        fillcolor=fill,
    )
