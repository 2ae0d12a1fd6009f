"""What a DALI pipeline leaves to others on the CPU: torch resizes, in a fraction of DALI's time,
and Pillow carries out RandAugment, whose operations are defined by it."""

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
    """Resizes batches of images with antialiased linear filtering, as Pillow does (to within one
    level), and cuts out squares of `side` pixels. The `crew` works on a batch. `fill` is what
    RandAugment moves in from outside."""

    def __init__(self, side: int, crew: Crew, fill: Fill = (0, 0, 0)) -> None:
        self._side = side
        self._fill = fill
        self._crew = crew

    def whole(self, images: Sequence[Pixels]) -> list[Pixels]:
        """Each image as a square."""
        return self._crew.each(lambda image: _resize(image, (self._side, self._side)), images)

    def augmented(
        self, images: Sequence[Pixels], flips: Sequence[Any], *draws: Sequence[Any]
    ) -> list[Pixels]:
        """Each image as a square, mirrored where `flips` says so, and changed as `draws` say: the
        fields of `RandAugmentDraws`, each a row for an image."""

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
        """A square of each image at its size [2], from the given corner [2] on."""

        def resize_and_cut(image: Pixels, size: Any, corner: Any) -> Pixels:
            top, left = corner.tolist()
            resized = _resize(image, tuple(size.tolist()))
            return resized[top : top + self._side, left : left + self._side]

        return self._crew.each(resize_and_cut, images, sizes, corners)


def _resize(image: Pixels, size: tuple[int, int]) -> Pixels:
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # channels last, the fast kernel's
    resized = functional.interpolate(pixels, size, mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()
