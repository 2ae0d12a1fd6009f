"""Loading speed per core: qsr's DALI pipelines compared with common alternatives.

    python scripts/bench.py loaders

The same JPEGs become the same float32 batches at 224 pixels, with qsr's loader (one DALI thread),
torchvision's v2 transforms on Pillow images and on uint8 tensors from torchvision.io, and timm's
create_transform: for training (crop, flip), with RandAugment of two operations at a third of their
range, and for validation (256, crop 224); also decoding alone. Images per second of CPU time, over
all threads; ratios are within the same round. One difference: RandAugment's warps use the nearest
pixel in qsr and torchvision, and interpolate in timm.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from benchmarks.measure import alternate, ratio, record, summary
from benchmarks.photos import SIZE, write_photos
from qsr.config.load import load_config
from qsr.data import EvalTransform, ImageFolder, Request, TrainTransform, make_loader
from qsr.data.dali_graph import read_files

Read = Callable[[str], Any]
Load = Callable[[int], object]
"""Loads the given number of images, starting with the first."""

EXPERIMENT = "experiment=resnet152_b4096/parallel"  # crop and flip of 224 x 224 pixels
RANDAUGMENT = (  # of 30
    "data.augmentation.randaugment=torchvision",
    "data.augmentation.randaugment_depth=2",
    "data.augmentation.randaugment_severity=10",
)
DATA = load_config([EXPERIMENT]).data
PIXELS = DATA.image_size
BATCH = 64
IMAGES = 320
REPETITIONS = 7
QSR, PIL, TENSORS, TIMM = "qsr", "torchvision on PIL images", "torchvision on tensors", "timm"
REFERENCE = PIL


def read_pil(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def read_tensor(path: str) -> Tensor:
    image: Tensor = decode_jpeg(read_file(path), ImageReadMode.RGB)
    return image


def read_all(photos: ImageFolder, read: Read, images: int) -> None:
    for index in range(images):
        read(photos.path(index))


def load_one_by_one(photos: ImageFolder, read: Read, transform: Any, images: int) -> None:
    """As torch's DataLoader does: transform each image, then stack a batch."""
    for first in range(0, images, BATCH):
        batch = [transform(read(photos.path(i))) for i in range(first, min(first + BATCH, images))]
        torch.stack(batch)


def with_qsr(photos: ImageFolder, transform: TrainTransform | EvalTransform) -> Load:
    loader = make_loader(
        "dali", photos, transform, batch_size=BATCH, device=torch.device("cpu"), threads=1
    )

    def load(images: int) -> None:
        requests = [
            Request(range(first, min(first + BATCH, images)), seed=first)
            for first in range(0, images, BATCH)
        ]
        for _ in loader.batches(requests):
            pass

    return load


def with_torchvision(photos: ImageFolder, read: Read, steps: Sequence[Any]) -> Load:
    to_tensor = [] if read is read_tensor else [v2.PILToTensor()]
    normalise = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(DATA.mean, DATA.std)]
    transform = v2.Compose([*steps, *to_tensor, *normalise])
    return partial(load_one_by_one, photos, read, transform)


def with_timm(photos: ImageFolder, **options: Any) -> Load:
    transform: Any = create_transform(PIXELS, interpolation="bilinear", **options)
    return partial(load_one_by_one, photos, read_pil, transform)


def training(photos: ImageFolder, *, randaugment: bool) -> dict[str, Load]:
    steps = [v2.RandomResizedCrop(PIXELS, antialias=True), v2.RandomHorizontalFlip()]
    data, policy = DATA, None
    if randaugment:
        steps.append(v2.RandAugment(num_ops=2, magnitude=10))  # of 30
        data = load_config([EXPERIMENT, *RANDAUGMENT]).data
        policy = "rand-m3-n2"  # of 10
    return {
        QSR: with_qsr(photos, TrainTransform.of(data)),
        PIL: with_torchvision(photos, read_pil, steps),
        TENSORS: with_torchvision(photos, read_tensor, steps),
        TIMM: with_timm(photos, is_training=True, color_jitter=None, auto_augment=policy),
    }


def validation(photos: ImageFolder) -> dict[str, Load]:
    steps = [v2.Resize(256, antialias=True), v2.CenterCrop(PIXELS)]
    return {
        QSR: with_qsr(photos, EvalTransform.of(DATA)),
        PIL: with_torchvision(photos, read_pil, steps),
        TENSORS: with_torchvision(photos, read_tensor, steps),
        TIMM: with_timm(photos, crop_pct=0.875),
    }


def decoding(photos: ImageFolder) -> dict[str, Load]:
    return {
        "DALI": with_dali_decoder(photos),
        PIL: partial(read_all, photos, read_pil),
        TENSORS: partial(read_all, photos, read_tensor),
    }


def with_dali_decoder(photos: ImageFolder) -> Load:
    pipeline: Any = Pipeline(  # type: ignore[no-untyped-call]
        BATCH, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True
    )
    with pipeline:
        pipeline.set_outputs(fn.decoders.image(read_files()))
    pipeline.build()

    def load(images: int) -> None:
        for first in range(0, images, BATCH):
            paths = [photos.path(i).encode() for i in range(first, min(first + BATCH, images))]
            pipeline.feed_input("paths", [np.frombuffer(path, dtype=np.uint8) for path in paths])
            pipeline.run()

    return load


def images_per_cpu_second(load: Load, images: int) -> float:
    started = time.process_time()
    load(images)
    return images / (time.process_time() - started)


def measure(photos: ImageFolder, images: int, repetitions: int) -> dict[str, Any]:
    """Measure all loaders, with `images` images in each repetition."""
    parts = {
        "training: crop, flip": training(photos, randaugment=False),
        "training: crop, flip, RandAugment": training(photos, randaugment=True),
        "validation": validation(photos),
        "decoding alone": decoding(photos),
    }
    rates = alternate(
        {
            (part, name): partial(images_per_cpu_second, load, images)
            for part, loads in parts.items()
            for name, load in loads.items()
        },
        repetitions,
    )
    return {
        part: {
            name: {
                "images_per_cpu_second": summary(rates[part, name]),
                "ratio_to_torchvision_on_pil": ratio(rates[part, name], rates[part, REFERENCE]),
            }
            for name in loads
        }
        for part, loads in parts.items()
    }


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        photos, _ = write_photos(Path(folder), IMAGES)
        size = sum(Path(photos.path(i)).stat().st_size for i in range(len(photos))) / len(photos)
        found = measure(photos, IMAGES, REPETITIONS)
    for part, loads in found.items():
        for name, about in loads.items():
            rate, times = about["images_per_cpu_second"], about["ratio_to_torchvision_on_pil"]
            print(
                f"{part:36} {name:28} {rate['median']:6.0f} images/CPU-s  {times['median']:5.2f} x"
                f"  ({times['quartiles'][0]:.2f} to {times['quartiles'][1]:.2f})"
            )
    about = {"photos": len(photos), "mean_bytes": round(size), "width_height": list(SIZE)}
    print(record("loaders", {"data": about, "parts": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
