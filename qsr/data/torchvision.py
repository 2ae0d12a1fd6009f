"""Loading with Pillow and torchvision: the fallback where DALI is not installed."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import atan, degrees
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from qsr.data.batch import Batch, Request, check_request
from qsr.data.datasets import ImageFolder, unreadable_files
from qsr.data.transforms import (
    RANDAUGMENT_FILL,
    RANDAUGMENT_OPS,
    EvalTransform,
    TrainDraws,
    TrainTransform,
    crop_box,
    draw,
)


class TorchvisionLoader:
    """A `Loader` that decodes with Pillow and transforms with torchvision.

    Samples are decoded by threads, not by processes: Pillow holds Python's lock for little of
    its work, each thread writes its pixels straight into the batch, and no worker process can
    outlive a run that was killed.

    Args:
        threads: decoding threads; at least one is used.
        prefetch: batches in work while the caller uses the last one.
    """

    def __init__(
        self,
        dataset: ImageFolder,
        transform: TrainTransform | EvalTransform,
        *,
        batch_size: int,
        device: torch.device,
        threads: int,
        prefetch: int = 2,
    ) -> None:
        self._dataset = dataset
        self._transform = transform
        self._batch_size = batch_size
        self._device = device
        self._prefetch = prefetch
        self._labels = torch.tensor(dataset.labels)
        self._mean = 255 * torch.tensor(transform.mean, device=device).view(3, 1, 1)
        self._std = 255 * torch.tensor(transform.std, device=device).view(3, 1, 1)
        self._executor = ThreadPoolExecutor(max(1, threads), thread_name_prefix="decode")

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """See `Loader.batches`."""
        in_work: deque[_BatchInWork] = deque()
        try:
            for request in requests:
                in_work.append(self._start(request))
                if len(in_work) > self._prefetch:
                    yield self._finish(in_work.popleft())
            while in_work:
                yield self._finish(in_work.popleft())
        finally:
            for batch in in_work:
                for task in batch.tasks:
                    task.cancel()

    def close(self) -> None:
        """See `Loader.close`."""
        self._executor.shutdown(cancel_futures=True)

    def _start(self, request: Request) -> "_BatchInWork":
        check_request(request, self._batch_size, len(self._dataset))
        size = self._transform.size
        pixels = torch.empty(
            (len(request.indices), size, size, 3),
            dtype=torch.uint8,
            pin_memory=self._device.type == "cuda",
        )
        draws = None
        if isinstance(self._transform, TrainTransform):
            draws = draw(self._transform, request.seed, len(request.indices))
        tasks = [
            self._executor.submit(self._load, index, draws, row, pixels[row])
            for row, index in enumerate(request.indices)
        ]
        return _BatchInWork(request, pixels, tasks)

    def _load(self, index: int, draws: TrainDraws | None, row: int, pixels: Tensor) -> None:
        """Decode and transform one sample into `pixels` [size, size, 3]."""
        image = _decode(self._dataset.path(index))
        if isinstance(self._transform, EvalTransform):
            image = _transform_eval(image, self._transform)
        else:
            assert draws is not None
            image = _transform_train(image, self._transform, draws, row)
        pixels.numpy()[:] = np.asarray(image)

    def _finish(self, batch: "_BatchInWork") -> Batch:
        reasons = {}
        for index, task in zip(batch.request.indices, batch.tasks, strict=True):
            try:
                task.result()
            except _UndecodableError as error:
                reasons[index] = str(error)
        if reasons:
            raise unreadable_files(self._dataset, reasons)
        pixels = batch.pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        images = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        labels = self._labels[list(batch.request.indices)]
        return Batch(images.sub_(self._mean).div_(self._std), labels.to(self._device))


class _BatchInWork(NamedTuple):
    request: Request
    pixels: Tensor
    """uint8 [b, size, size, 3], filled in by the tasks."""
    tasks: list[Future[None]]
    """One per sample."""


class _UndecodableError(Exception):
    """Why Pillow refused a file."""


def _decode(path: str) -> Image.Image:
    """RGB pixels as stored: an EXIF orientation is ignored."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many types on a broken file
        raise _UndecodableError(f"{type(error).__name__}: {error}") from error


def _transform_eval(image: Image.Image, transform: EvalTransform) -> Image.Image:
    image = functional.resize(image, [transform.resize], InterpolationMode.BILINEAR)
    cropped: Image.Image = functional.center_crop(image, [transform.size])
    return cropped


def _transform_train(
    image: Image.Image, transform: TrainTransform, draws: TrainDraws, row: int
) -> Image.Image:
    """Apply the choices in row `row` of `draws`."""
    top, left, height, width = crop_box(transform, draws.windows[row], image.height, image.width)
    size = [transform.size, transform.size]
    image = functional.resized_crop(
        image, top, left, height, width, size, InterpolationMode.BILINEAR
    )
    if draws.flips[row]:
        image = functional.horizontal_flip(image)
    for op, value in zip(draws.ops[row], draws.values[row], strict=True):
        image = _augment(image, RANDAUGMENT_OPS[op], float(value))
    return image


def _augment(image: Image.Image, name: str, value: float) -> Image.Image:
    """One RandAugment operation; `value` as in `TrainDraws.values`."""
    match name:
        case "shear_x":
            image = _warp(image, shear=[degrees(atan(-value)), 0.0], center=[0.0, 0.0])
        case "shear_y":
            image = _warp(image, shear=[0.0, degrees(atan(-value))], center=[0.0, 0.0])
        case "translate_x":
            image = _warp(image, translate=[value, 0.0])
        case "translate_y":
            image = _warp(image, translate=[0.0, value])
        case "rotate":
            image = _warp(image, angle=-value)
        case "brightness":
            image = functional.adjust_brightness(image, value)
        case "contrast":
            image = functional.adjust_contrast(image, value)
        case "color":
            image = functional.adjust_saturation(image, value)
        case "sharpness":
            image = functional.adjust_sharpness(image, value)
        case "posterize":
            image = functional.posterize(image, int(value))
        case "solarize":
            image = functional.solarize(image, value)
        case "equalize":
            image = functional.equalize(image)
        case "autocontrast":
            image = functional.autocontrast(image)
        case "identity":
            pass
        case _:
            raise ValueError(f"no RandAugment operation {name}")
    return image


def _warp(
    image: Image.Image,
    *,
    angle: float = 0.0,
    translate: list[float] | None = None,
    shear: list[float] | None = None,
    center: list[float] | None = None,
) -> Image.Image:
    warped: Image.Image = functional.affine(
        image,
        angle=angle,
        translate=translate or [0.0, 0.0],
        scale=1.0,
        shear=shear or [0.0, 0.0],
        interpolation=InterpolationMode.NEAREST,
        fill=[RANDAUGMENT_FILL] * 3,
        center=center,
    )
    return warped
