"""Loading with Pillow and torchvision: the fallback if DALI is not installed."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from qsr.data.batch import Batch, Request, check_request
from qsr.data.datasets import ImageFolder, unreadable_files
from qsr.data.decoding import UndecodableError, read_image, to_rgb
from qsr.data.randaugment_pillow import augment_image
from qsr.data.transforms import EvalTransform, TrainDraws, TrainTransform, crop_box, draw


class TorchvisionLoader:
    """A `Loader` that decodes with Pillow and transforms with torchvision.

    Threads, not processes, decode the samples: Pillow mostly runs without the GIL, each thread
    writes its pixels straight into the batch, and no worker process can outlive a killed run.

    Args:
        threads: decoding threads; at least one is used.
        prefetch: batches in flight while the caller uses the last one.
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
        self._normalise = Normalisation(transform, device)
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
        image = read_image(self._dataset.path(index))
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
            except UndecodableError as error:
                reasons[index] = str(error)
        if reasons:
            raise unreadable_files(self._dataset, reasons)
        pixels = batch.pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        labels = self._labels[list(batch.request.indices)]
        return Batch(self._normalise(pixels), labels.to(self._device))


class Normalisation:
    """Normalises uint8 [..., 3, h, w] to contiguous float32 of the same shape."""

    def __init__(self, transform: TrainTransform | EvalTransform, device: torch.device) -> None:
        self._mean = 255 * torch.tensor(transform.mean, device=device).view(3, 1, 1)
        self._std = 255 * torch.tensor(transform.std, device=device).view(3, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        images = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return images.sub_(self._mean).div_(self._std)


def validation_input(image: Image.Image, transform: EvalTransform) -> Tensor:
    """One image of any size as validation sees it: float32 [3, size, size]. Raises ValueError if
    its pixels have no defined range (floating point, 32 bits)."""
    pixels = np.array(_transform_eval(to_rgb(image), transform))
    normalise = Normalisation(transform, torch.device("cpu"))
    return normalise(torch.from_numpy(pixels).permute(2, 0, 1))


class _BatchInWork(NamedTuple):
    request: Request
    pixels: Tensor
    """uint8 [b, size, size, 3], filled in by the tasks."""
    tasks: list[Future[None]]
    """One per sample."""


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
    if draws.randaugment is not None:
        assert transform.randaugment is not None
        fill = transform.randaugment.fill(transform.mean)
        image = augment_image(image, draws.randaugment, row, fill)
    return image
