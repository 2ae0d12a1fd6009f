"""RandAugment of a batch with torch on any device, with Pillow's arithmetic for every pixel.

Images that drew the same operation are processed together.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsr.data.randaugment import (
    BILINEAR,
    GEOMETRIC,
    NEAREST,
    OPS,
    Fill,
    RandAugmentDraws,
    affine_coefficients,
)


def augment_batch(images: Tensor, draws: RandAugmentDraws, fill: Fill) -> Tensor:
    """Apply the drawn operations to square `images`, uint8 [b, size, size, 3]; returns a new
    tensor. The host does not wait for the device."""
    for k in range(draws.ops.shape[1]):
        ops, filters, values = draws.ops[:, k], draws.filters[:, k], draws.values[:, k]
        order = np.lexsort((filters, ops))
        rows = _to_device(order, images.device)
        groups = images[rows]
        for group in _equal_runs(ops[order], filters[order]):
            name, resample = OPS[ops[order[group.start]]], int(filters[order[group.start]])
            groups[group] = apply_op(groups[group], name, values[order[group]], resample, fill)
        images = torch.empty_like(images)
        images[rows] = groups
    return images


def _equal_runs(*keys: NDArray[np.int32]) -> Iterator[slice]:
    """Slices over which all of the sorted keys are constant."""
    changes = np.any([np.diff(key) != 0 for key in keys], axis=0)
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), len(keys[0])]
    for start, end in itertools.pairwise(edges):
        yield slice(start, end)


def _to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def apply_op(
    images: Tensor, name: str, values: NDArray[np.float64], resample: int, fill: Fill
) -> Tensor:
    """Apply one operation to all `images`, uint8 [n, size, size, 3]; `values` [n] as in
    `RandAugmentDraws.values`."""
    if name in GEOMETRIC:
        coefficients = affine_coefficients(name, values, images.shape[1])
        return _warp(images, _to_device(coefficients, images.device), resample, fill)
    value = _to_device(values, images.device).view(-1, 1, 1, 1)
    match name:
        case "identity":
            return images
        case "invert":
            return 255 - images
        case "posterize":
            kept = images.int() >> (8 - value.int())
            return (kept << (8 - value.int())).to(torch.uint8)
        case "solarize":
            return torch.where(images < value, images, 255 - images)
        case "solarize_add":
            raised = (images + value.int()).clamp(max=255).to(torch.uint8)
            return torch.where(images < 128, raised, images)
        case "autocontrast":
            return _look_up(images, _autocontrast_table(_histogram(images)))
        case "equalize":
            return _look_up(images, _equalize_table(_histogram(images)))
        case "brightness":
            return _blend(torch.zeros_like(images), images, value)
        case "color":
            return _blend(_grey(images), images, value)
        case "contrast":
            mean = _grey(images).double().mean(dim=(1, 2, 3), keepdim=True)
            return _blend((mean + 0.5).floor(), images, value)
        case "sharpness":
            return _blend(_smooth(images), images, value)
    raise ValueError(f"{name} is not a RandAugment operation")


def _blend(plain: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Image.blend: plain + factor (image - plain), truncated to integers."""
    plain = plain.float()
    mixed = plain + factor.float() * (images.float() - plain)
    return mixed.clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """convert("L"), int32 [n, h, w, 1]: ITU-R 601-2 luma in integers."""
    red, green, blue = images.int().split(1, dim=-1)
    grey: Tensor = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return grey


def _smooth(images: Tensor) -> Tensor:
    """ImageFilter.SMOOTH: 3 x 3 with weight 5 at the centre; the border is unchanged."""
    wide = images.int()
    rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * wide[:, 1:-1, 1:-1]
    smooth = wide.clone()
    smooth[:, 1:-1, 1:-1] = (2 * total + 13) // 26  # total / 13, rounded; there are no ties
    return smooth


def _histogram(images: Tensor) -> Tensor:
    """Number of pixels with each level in each channel, int64 [n, 3, 256]."""
    n = len(images)
    channel = torch.arange(3 * n, device=images.device).view(n, 1, 1, 3)
    flat = (channel * 256 + images).flatten()
    counts = torch.zeros(n * 3 * 256, dtype=torch.int64, device=images.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat)).view(n, 3, 256)


def _look_up(images: Tensor, table: Tensor) -> Tensor:
    """Map each level through `table` [n, 3, 256], which has a row per image and channel."""
    n, height, width, _ = images.shape
    levels = images.permute(0, 3, 1, 2).reshape(n, 3, -1).long()
    found = table.gather(2, levels).view(n, 3, height, width)
    return found.permute(0, 2, 3, 1).to(torch.uint8)


def _autocontrast_table(histogram: Tensor) -> Tensor:
    """ImageOps.autocontrast: stretch the occurring levels to 0 ... 255."""
    levels = torch.arange(256, device=histogram.device)
    there = histogram > 0
    low = torch.where(there, levels, 255).amin(dim=2, keepdim=True)
    high = torch.where(there, levels, 0).amax(dim=2, keepdim=True)
    width = (high - low).clamp(min=1).double()
    scale = torch.full_like(width, 255.0) / width  # 255.0 / width would round twice
    stretched = (levels * scale - low * scale).clamp(0, 255).long()
    return torch.where(high > low, stretched, levels)


def _equalize_table(histogram: Tensor) -> Tensor:
    """ImageOps.equalize: map each level by the number of pixels below it."""
    levels = torch.arange(256, device=histogram.device).expand_as(histogram)
    there = histogram > 0
    last = torch.where(there, levels, 0).amax(dim=2, keepdim=True)
    step = (histogram.sum(dim=2, keepdim=True) - histogram.gather(2, last)) // 255
    below = histogram.cumsum(dim=2) - histogram
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table, levels)


def _warp(images: Tensor, coefficients: Tensor, resample: int, fill: Fill) -> Tensor:
    """Image.transform(AFFINE); `coefficients` [n, 6]. In double precision, because results are
    truncated: an error in the last bit could change a level by one."""
    n, size = len(images), images.shape[1]
    pixels = images.view(n, -1, 3)

    def at(row: Tensor, column: Tensor) -> Tensor:
        place = row.clamp(0, size - 1) * size + column.clamp(0, size - 1)
        index = place.view(n, -1, 1).expand(-1, -1, 3)
        return pixels.gather(1, index).view(n, size, size, 3)

    places = torch.arange(size, device=images.device)
    y, x = places[:, None], places[None, :]
    a, b, c, d, e, f = coefficients.view(n, 6, 1, 1).unbind(dim=1)
    if resample == NEAREST:  # fixed point, in 65,536ths of a pixel
        a, b, c, d, e, f = (
            (value * 65536 + 0.5).floor().long()
            for value in (a, b, c + 0.5 * a + 0.5 * b, d, e, f + 0.5 * d + 0.5 * e)
        )
        column, row = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16
        inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
        warped = at(row, column)
    else:
        x_in = a * (x + 0.5) + b * (y + 0.5) + c
        y_in = d * (x + 0.5) + e * (y + 0.5) + f
        inside = (x_in >= 0) & (x_in < size) & (y_in >= 0) & (y_in < size)
        left, top = (x_in - 0.5).floor(), (y_in - 0.5).floor()
        dx, dy = (x_in - 0.5 - left)[..., None], (y_in - 0.5 - top)[..., None]
        curve, neighbours = (_line, (0, 1)) if resample == BILINEAR else (_cubic, (-1, 0, 1, 2))
        column, row = left.long(), top.long()
        lines = [
            curve(dx, *(at(row + j, column + i).double() for i in neighbours)) for j in neighbours
        ]
        warped = curve(dy, *lines).clamp(0, 255).to(torch.uint8)
    return torch.where(
        inside[..., None], warped, _to_device(np.array(fill, np.uint8), images.device)
    )


def _line(at: Tensor, v1: Tensor, v2: Tensor) -> Tensor:
    return v1 + (v2 - v1) * at


def _cubic(at: Tensor, v1: Tensor, v2: Tensor, v3: Tensor, v4: Tensor) -> Tensor:
    """Pillow's cubic through four neighbours; `at` is the position between the second and third."""
    third, fourth = 2 * (v1 - v2) + v3 - v4, -v1 + v2 - v3 + v4
    return v2 + at * (-v1 + v3 + at * (third + at * fourth))
