"""Loading images: requests of indices and seeds go in, batches come out."""

from typing import Literal

import torch

from qsr.data.batch import Batch, Loader, Request
from qsr.data.datasets import (
    ImageFolder,
    open_image_folders,
    open_validation_folder,
    try_some,
)
from qsr.data.torchvision import TorchvisionLoader
from qsr.data.transforms import EvalTransform, TrainTransform
from qsr.errors import DataError

__all__ = [
    "Batch",
    "DataError",
    "EvalTransform",
    "ImageFolder",
    "Loader",
    "Request",
    "TrainTransform",
    "make_loader",
    "open_image_folders",
    "open_validation_folder",
    "try_some",
    "uses_dali",
]


def make_loader(
    kind: Literal["auto", "dali", "torchvision"],
    dataset: ImageFolder,
    transform: TrainTransform | EvalTransform,
    *,
    batch_size: int,
    device: torch.device,
    threads: int,
    prefetch: int = 2,
    decode: Literal["auto", "cpu", "gpu"] = "auto",
) -> Loader:
    """The loader named by `kind`; "auto" is DALI where it is installed, else torchvision.

    Args:
        batch_size: the largest batch that will be requested.
        device: where the batches shall be.
        threads: decoding threads of this process.
        prefetch: batches in work while the caller uses the last one.
        decode: where DALI decodes, "auto": on `device`; torchvision decodes on the CPU.

    Raises:
        DataError: DALI is asked for and not installed, or decode="gpu" cannot be had.
    """
    if uses_dali(kind):
        from qsr.data.dali import DaliLoader  # an optional dependency

        if decode == "auto":
            decode = "gpu" if device.type == "cuda" else "cpu"
        return DaliLoader(
            dataset,
            transform,
            batch_size=batch_size,
            device=device,
            threads=threads,
            prefetch=prefetch,
            decode=decode,
        )
    if decode == "gpu":
        raise DataError("decode=gpu needs loader=dali with NVIDIA DALI installed: take decode=cpu")
    return TorchvisionLoader(
        dataset,
        transform,
        batch_size=batch_size,
        device=device,
        threads=threads,
        prefetch=prefetch,
    )


def uses_dali(kind: Literal["auto", "dali", "torchvision"]) -> bool:
    """Whether `make_loader` will take DALI. Raises DataError if it is asked for and cannot be
    imported."""
    if kind == "torchvision":
        return False
    try:
        import nvidia.dali  # noqa: F401  (an optional dependency)
    except ImportError as error:
        if kind == "dali":
            raise DataError(
                f"data.loader=dali needs NVIDIA DALI ({error}): "
                "pip install nvidia-dali-cuda130, or take data.loader=torchvision"
            ) from error
        return False
    return True
