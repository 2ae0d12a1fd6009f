"""Loading images: a loader turns requests (indices and a seed) into batches."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from qsr.data.batch import Batch, Loader, Request
from qsr.data.datasets import (
    ImageFolder,
    open_image_folders,
    open_validation_folder,
    try_some,
)
from qsr.data.decoder import decoders_at_work, fallback_note, resolve_decode
from qsr.data.label_noise import with_label_noise
from qsr.data.memory import MemoryLoader
from qsr.data.sizing import loader_size
from qsr.data.torchvision import TorchvisionLoader
from qsr.data.transforms import EvalTransform, TrainTransform
from qsr.errors import DataError

if TYPE_CHECKING:  # reading a model file does not need the settings' libraries
    from qsr.config.schema import DataConfig

LoaderKind = Literal["auto", "dali", "torchvision", "memory"]

__all__ = [
    "Batch",
    "DataError",
    "EvalTransform",
    "ImageFolder",
    "Loader",
    "Request",
    "TrainTransform",
    "decoders_at_work",
    "fallback_note",
    "make_loader",
    "open_data",
    "open_image_folders",
    "open_loader",
    "open_validation_folder",
    "resolve_decode",
    "try_some",
    "uses_dali",
    "with_label_noise",
]


_HOW_TO_MAKE = {
    "digits": "qsr prepare digits --root {root}",
    "few_digits": "qsr prepare few_digits",
    "few_digits_tuning": "qsr prepare few_digits",
    "imagenet": "qsr prepare imagenet, as in docs/data.md",
}
"""The commands that write the data sets of configs/data/."""


def open_data(config: "DataConfig") -> tuple[ImageFolder, ImageFolder]:
    """The training and validation images that the settings name, with as many as they say; see
    `open_image_folders`. Raises DataError, also if there are none: then it says how to get them."""
    root = Path(config.root)
    missing = [folder for folder in (root, root / "train", root / "val") if not folder.is_dir()]
    if missing:
        command = _HOW_TO_MAKE.get(config.name) if missing[0] == root else None
        make = command and ", or make it: " + command.format(root=shlex.quote(config.root))
        raise DataError(
            f"no folder {missing[0].absolute()}: set data.root=PATH to a folder with train/CLASS/* "
            f"and val/CLASS/*{make or ''}"
        )
    return open_image_folders(
        root,
        expected_train=config.train_images,
        expected_val=config.val_images,
        expected_classes=config.classes,
    )


def open_loader(
    config: "DataConfig",
    dataset: ImageFolder,
    transform: TrainTransform | EvalTransform,
    *,
    batch_size: int,
    device: torch.device,
    cores: int,
) -> Loader:
    """The loader that the settings ask for, in a rank that has so many CPU cores; see
    `make_loader`."""
    size = loader_size(config, cores, batch_size)
    return make_loader(
        config.loader,
        dataset,
        transform,
        batch_size=batch_size,
        device=device,
        threads=size.threads,
        prefetch=size.prefetch,
        decode=config.decode,
    )


def make_loader(
    kind: LoaderKind,
    dataset: ImageFolder,
    transform: TrainTransform | EvalTransform,
    *,
    batch_size: int,
    device: torch.device,
    threads: int,
    prefetch: int = 2,
    decode: Literal["auto", "cpu", "gpu"] = "auto",
) -> Loader:
    """The loader named by `kind`; "auto" is DALI if it is installed, otherwise torchvision.

    Args:
        batch_size: the largest batch that will be requested.
        device: the device that batches are put on.
        threads: decoding threads of this process.
        prefetch: batches in flight while the caller uses the last one.
        decode: where DALI decodes; "auto" is `device`. The others always decode on the CPU.

    Raises:
        DataError: DALI is requested but not installed, or decode="gpu" is not possible.
    """
    if uses_dali(kind):
        from qsr.data.dali import DaliLoader  # an optional dependency

        return DaliLoader(
            dataset,
            transform,
            batch_size=batch_size,
            device=device,
            threads=threads,
            prefetch=prefetch,
            decode=resolve_decode(decode, device),
        )
    if decode == "gpu":
        raise DataError("decode=gpu needs loader=dali with NVIDIA DALI installed: use decode=cpu")
    if kind == "memory":
        return MemoryLoader(
            dataset, transform, batch_size=batch_size, device=device, threads=threads
        )
    return TorchvisionLoader(
        dataset,
        transform,
        batch_size=batch_size,
        device=device,
        threads=threads,
        prefetch=prefetch,
    )


def uses_dali(kind: LoaderKind) -> bool:
    """Whether `make_loader` will use DALI. Raises DataError if it is requested and cannot be
    imported."""
    if kind in ("torchvision", "memory"):
        return False
    try:
        import nvidia.dali  # noqa: F401  (an optional dependency)
    except ImportError as error:
        if kind == "dali":
            raise DataError(
                "data.loader=dali needs NVIDIA DALI: pip install nvidia-dali-cuda130, or use "
                f"data.loader=torchvision ({error})"
            ) from error
        return False
    return True
