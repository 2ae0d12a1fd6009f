"""Threads and batches ahead, where the settings leave them to the rank's cores."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qsr.config.load import load_config
from qsr.data import ImageFolder, Request, open_loader
from qsr.data.sizing import loader_size
from tests.support import CPU
from tests.transforms import eval_transform

FOLDER = load_config(
    [
        *("model=small_resnet", "sync=constant", "sync.h=2", "schedule.peak_lr=0.1"),
        *("schedule.warmup_epochs=0", "epochs=1", "global_batch=8", "workers=2"),
        *("data=folder", "data.root=/nowhere", "data.image_size=32"),
    ]
).data


@pytest.mark.parametrize(
    ("cores", "batch_size", "size"),
    [
        (1, 256, (1, 2)),
        (2, 256, (1, 2)),
        (16, 256, (15, 2)),  # two batches, however large
        (16, 8, (15, 8)),  # 60 images for 15 threads
        (16, 1, (15, 60)),
        (256, 1024, (32, 2)),
    ],
)
def test_what_suits_the_cores(cores: int, batch_size: int, size: tuple[int, int]) -> None:
    assert loader_size(FOLDER, cores, batch_size) == size


def test_what_the_settings_say_counts() -> None:
    asked = replace(FOLDER, loader_threads=3, prefetch_batches=5)
    assert loader_size(asked, 16, 1) == (3, 5)
    assert loader_size(replace(FOLDER, loader_threads=0), 16, 64).threads == 1


def test_a_loader_reads_as_far_ahead_as_that(
    kind: str, photos: tuple[ImageFolder, ImageFolder], tmp_path: Path
) -> None:
    read: list[int] = []

    def requests() -> Iterator[Request]:
        for number in range(40):
            read.append(number)
            yield Request([0], 0)

    config = replace(FOLDER, loader=kind)  # type: ignore[arg-type]
    loader = open_loader(config, photos[1], eval_transform(32), batch_size=1, device=CPU, cores=4)
    batches = loader.batches(requests())
    next(batches)
    loader.close()
    assert len(read) == 1 + loader_size(config, 4, 1).prefetch == 13
