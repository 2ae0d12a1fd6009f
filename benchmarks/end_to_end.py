"""The trainer with the paper's recipes: from JPEG files, and from images in memory.

Part end_to_end of benchmarks/gpu.py. One worker on one GPU takes a few steps of 1,024 images with
the recipe's micro-batches, precision, augmentation and mixup: eager, and with the settings that
make steps faster. Both ways go through the whole program; from memory, only the loaders differ:
every batch is the same one, already on the device.
The rows of metrics.jsonl tell the speed; those of the first steps, which warm up, are left out.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.measure import ratio, summary
from benchmarks.photos import SIZE, write_photos
from qsr import build
from qsr.config.load import load_config
from qsr.config.schema import Config
from qsr.data import Batch, ImageFolder, Loader, Request, open_loader
from qsr.run.folder import read_rows

RECIPES = {
    "vit_b16": "experiment=vit_b16_b4096/quadratic_h4",
    "resnet152": "experiment=resnet152_b4096/quadratic_h2",
}
SETTINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "vit_b16": {"eager": (), "compiled": ("compile=default",)},
    "resnet152": {
        "eager": (),
        "CUDA graphs": ("cuda_graphs=true",),
        "compiled, CUDA graphs": ("compile=default", "cuda_graphs=true"),
    },
}
"""By network; a rehearsal on the CPU makes all of them eager."""

FILES, MEMORY = "from JPEG files", "from memory"
STEPS, WARM_UP = 9, 3
PHOTOS, COPIES = 512, 5
"""Different photos, and hard links to each: loaders read and decode all of them."""

SMALL = {"vit_b16": "small_vit", "resnet152": "small_resnet"}


def measure_end_to_end(rehearsal: bool) -> dict[str, Any]:
    """images/s of both networks under each setting, both ways; files compared with memory, and each
    setting with eager steps."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        photos, copies = (8, 2) if rehearsal else (PHOTOS, COPIES)
        write_photos(root / "photos", photos, (64, 48) if rehearsal else SIZE)
        for path in sorted((root / "photos" / "train").rglob("*.jpg")):
            for number in range(1, copies):
                os.link(path, path.with_name(f"{path.stem}_{number}.jpg"))
        for name, recipe in RECIPES.items():
            found[name] = {
                setting: measure_recipe(name, recipe, setting, words, root, rehearsal)
                for setting, words in SETTINGS[name].items()
            }
    return found


def measure_recipe(
    name: str, recipe: str, setting: str, words: tuple[str, ...], root: Path, rehearsal: bool
) -> dict[str, Any]:
    config = recipe_config(name, recipe, () if rehearsal else words, root, rehearsal)
    runs = root / name / setting
    rates = {
        MEMORY: images_per_second(config, runs / "memory", memory_loader),
        FILES: images_per_second(config, runs / "files", open_loader),
    }
    for way, values in rates.items():
        rate = summary(values)["median"]
        print(f"{name}, {setting}, {way}: {rate:.0f} images/s", flush=True)
    return {
        "images_per_step": config.global_batch,
        "micro_batch": config.micro_batch_size,
        "precision": config.precision,
        "images_per_second": {way: summary(values) for way, values in rates.items()},
        "files_to_memory": ratio(rates[FILES], rates[MEMORY]),
    }


def recipe_config(
    name: str, recipe: str, words: tuple[str, ...], root: Path, rehearsal: bool
) -> Config:
    """A short session of the recipe on the photos, by one worker; `words`: more overrides."""
    size = ["global_batch=1024"]
    if rehearsal:
        size = ["global_batch=8", "micro_batch=4", "data.image_size=16", "cluster.device=cpu"]
        size += [f"model={SMALL[name]}", "data.loader_threads=1"]
    return load_config(
        [
            *(recipe, *size, *words, "workers=1", "epochs=100"),
            *("schedule.warmup_epochs=null", "schedule.warmup_steps=20"),
            "fp16_overflow=skip",  # as in most steps of a run, the host does not wait
            *("data.classes=null", "data.train_images=null", "data.val_images=null"),
            *("evaluation.every_epochs=100", "checkpoint.every_steps=null"),
            *("tracking.log_every_steps=1", "tracking.progress=false", "tracking.wandb=none"),
            *(f"data.root={root / 'photos'}", f"stop_after_steps={STEPS}"),
        ]
    )


def images_per_second(config: Config, runs: Path, loader: Callable[..., Loader]) -> list[float]:
    """The speed of each step after the warm-up."""
    with patch("qsr.build.open_loader", loader):
        build.run(replace(config, runs_dir=str(runs)))
    (metrics,) = runs.rglob("metrics.jsonl")
    rows, _ = read_rows(metrics)
    return [row["images_per_second"] for row in rows[WARM_UP:]]


class MemoryLoader:
    """Returns one batch, already on the device, for every request."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self._batch = Batch(images, labels)

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        for request in requests:
            count = len(request.indices)
            yield Batch(self._batch.images[:count], self._batch.labels[:count])

    def close(self) -> None:
        pass


def memory_loader(
    _: object,
    data: ImageFolder,
    transform: Any,
    *,
    batch_size: int,
    device: torch.device,
    **options: Any,
) -> Loader:
    """Has the arguments of open_loader."""
    images = torch.randn(batch_size, 3, transform.size, transform.size, device=device)
    labels = torch.randint(len(data.classes), (batch_size,), device=device)
    return MemoryLoader(images, labels)
