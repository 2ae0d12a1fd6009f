"""Steps that DALI pipelines on the CPU leave to Python: torch resizes, because it takes a fraction
of DALI's time, and Pillow applies RandAugment, because it defines the operations."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from qsr.data.crew import Crew
from qsr.data.randaugment import Fill, RandAugmentDraws
from qsr.data.randaugment_pillow import augment_image

Pixels = NDArray[np.uint8]
"""[h, w, 3]."""


class Resizer:
    """Resizes and crops images to squares of `side` pixels, with antialiased linear filtering that
    agrees with Pillow's to within one level. `crew` shares the work on a batch. `fill` is
    RandAugment's fill colour."""

    def __init__(self, side: int, crew: Crew, fill: Fill = (0, 0, 0)) -> None:
        self._side = side
        self._fill = fill
        self._crew = crew

    def whole(self, images: Sequence[Pixels]) -> list[Pixels]:
        """Resize each image to the square."""
        return self._crew.each(lambda image: _resize(image, (self._side, self._side)), images)

    def augmented(
        self, images: Sequence[Pixels], flips: Sequence[Any], *draws: Sequence[Any]
    ) -> list[Pixels]:
        """Resize each image to the square, mirror it if its flip is set, and apply RandAugment.
        `draws` are the fields of `RandAugmentDraws`, with one row per image."""

        def augment(image: Pixels, flip: Any, *row: Any) -> Pixels:
            square = _resize(image, (self._side, self._side))
            if flip:
                square = square[:, ::-1]
            one = RandAugmentDraws(*(field[None] for field in row))
            return np.asarray(augment_image(Image.fromarray(square), one, 0, self._fill))

        return self._crew.each(augment, images, flips, *draws)

    def cut(
        self, images: Sequence[Pixels], sizes: Sequence[Any], corners: Sequence[Any]
    ) -> list[Pixels]:
        """Resize each image to its size [2], then crop the square at its top left corner [2]."""

        def resize_and_cut(image: Pixels, size: Any, corner: Any) -> Pixels:
            top, left = corner.tolist()
            resized = _resize(image, tuple(size.tolist()))
            return resized[top : top + self._side, left : left + self._side]

        return self._crew.each(resize_and_cut, images, sizes, corners)


def _resize(image: Pixels, size: tuple[int, int]) -> Pixels:
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # channels_last: the fast kernel
    resized = functional.interpolate(pixels, size, mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()
