"""A data set of small images as a whole in the device's memory."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from qsr.data.batch import Batch, Request, check_request
from qsr.data.datasets import ImageFolder
from qsr.data.torchvision import TorchvisionLoader
from qsr.data.transforms import EvalTransform, TrainTransform

READ_AT_ONCE = 1024
"""Images per batch while the data set is read."""


class MemoryLoader:
    """A `Loader` that reads all images at its start, and then only picks from them.

    Batches are those of `TorchvisionLoader`, for transforms without random choices. A process that
    opens the same images again, as the next run of a list does, does not read them again.
    """

    def __init__(
        self,
        dataset: ImageFolder,
        transform: TrainTransform | EvalTransform,
        *,
        batch_size: int,
        device: torch.device,
        threads: int,
    ) -> None:
        self._batch_size = batch_size
        self._device = device
        unlabelled = replace(dataset, labels=(0,) * len(dataset), notes=())
        self._images = _read(unlabelled, transform, device, threads)
        self._labels = torch.tensor(dataset.labels, device=device)

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """See `Loader.batches`."""
        for request in requests:
            check_request(request, self._batch_size, len(self._images))
            chosen = torch.tensor(request.indices).to(self._device, non_blocking=True)
            yield Batch(self._images[chosen], self._labels[chosen])

    def close(self) -> None:
        """See `Loader.close`; the images stay for this process's next run."""


@lru_cache(maxsize=2)  # the training images and the validation images
def _read(
    dataset: ImageFolder,
    transform: TrainTransform | EvalTransform,
    device: torch.device,
    threads: int,
) -> Tensor:
    """float32 [n, 3, size, size], normalised."""
    loader = TorchvisionLoader(
        dataset, transform, batch_size=READ_AT_ONCE, device=device, threads=threads
    )
    starts = range(0, len(dataset), READ_AT_ONCE)
    requests = (
        Request(range(start, min(start + READ_AT_ONCE, len(dataset))), seed=0) for start in starts
    )
    try:
        return torch.cat([batch.images for batch in loader.batches(requests)])
    finally:
        loader.close()
