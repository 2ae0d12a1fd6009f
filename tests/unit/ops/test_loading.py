"""Nine provoked stalls of the loader, three of each kind: the doctor's measurement names each.

The disk is slow because reading a file really takes that long; the step's time is given, so that
only the loader is measured.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest

from qsr.config.load import load_config
from qsr.config.schema import Config
from qsr.data import ImageFolder, decoding, open_image_folders
from qsr.ops import loading
from qsr.ops.loading import Feed, LoadingTrial
from qsr.ops.shortage import shortage, speeds
from tests.image_trees import textured_image, write_tree
from tests.support import CPU

FAST_STEP = 1e-5
"""Seconds per image, less than any loader takes."""


@dataclass
class SlowDisk:
    """Opens files as `open_plain` does, but takes its time."""

    seconds: float = 0.0
    """For each file; files that are opened at the same time wait at the same time."""
    bytes_per_second: float = float("inf")
    """Of all files together."""
    stall_every: int = 0
    """After so many files the disk is busy with something else for a while."""
    stall_seconds: float = 0.0
    opened: int = 0
    _plain: Callable[..., IO[bytes]] = decoding.open_plain
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, path: str | os.PathLike[str]) -> IO[bytes]:
        time.sleep(self.seconds)
        with self._lock:
            self.opened += 1
            time.sleep(Path(path).stat().st_size / self.bytes_per_second)
            if self.stall_every and self.opened % self.stall_every == 0:
                time.sleep(self.stall_seconds)
        return self._plain(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of about 120 x 120 pixels."""
    root = tmp_path_factory.mktemp("small")
    write_tree(root, classes=2, train=12, val=1)
    return root


def large_tree(root: Path, ending: str, **options: Any) -> Path:
    """Photos of 2 million pixels."""
    for split in ("train", "val"):
        for number, label in enumerate("ab"):
            (root / split / label).mkdir(parents=True)
            image = textured_image(1800, 1200, number)
            image.save(root / split / label / f"photo.{ending}", **options)
    return root


def settings(root: Path, loader: str, *more: str) -> Config:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    return load_config(
        [
            *("experiment=demo/quadratic", "data=folder", f"data.root={root}", "data.name=photos"),
            *("data.image_size=32", f"data.loader={loader}", "data.loader_threads=1", *more),
        ]
    )


def ask(config: Config, cores: int = 8, step: float = FAST_STEP) -> tuple[Feed, str]:
    """What a rank with so many cores measures, and what is said of it."""
    train, _ = open_image_folders(config.data.root)
    trial = LoadingTrial(config, train, CPU, cores)
    feed = trial.measure(step)
    return feed, shortage(feed, trial, config, CPU) if feed.parts else speeds(feed)


@pytest.fixture(autouse=True)
def _shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "TRIAL_SECONDS", 0.2)


MORE_AT_A_TIME = (
    ": raise data.loader_threads from 1 to 4, because more reads at a time are faster here"
)
FASTER_DISK = ": set data.root to a copy on a faster disk, or store smaller images"


@pytest.mark.parametrize(
    ("disk", "mend"),
    [
        (SlowDisk(seconds=0.03), MORE_AT_A_TIME),
        (SlowDisk(bytes_per_second=200_000), FASTER_DISK),
        (SlowDisk(stall_every=4, stall_seconds=0.1), FASTER_DISK),
    ],
    ids=["far away", "narrow", "busy now and then"],
)
def test_a_slow_disk(
    disk: SlowDisk, mend: str, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "open_plain", disk)
    feed, said = ask(settings(small, "torchvision"))
    assert feed.short_of == "disk"
    assert disk.opened > 0
    assert "short of the disk, which gives " in said
    assert said.endswith(mend)
    assert feed.waiting_percent > 99.0


@pytest.mark.parametrize(
    ("loader", "ending", "options", "cores", "mend"),
    [
        ("torchvision", "jpg", {"quality": 90}, 8, ": raise data.loader_threads from 1 to 7"),
        ("torchvision", "png", {}, 3, ": raise data.loader_threads from 1 to 2"),
        (
            *("dali", "jpg", {"quality": 90, "progressive": True}, 2),
            ": give each rank more than its 2 cores, or store smaller images",
        ),
    ],
    ids=["JPEG", "PNG", "progressive"],
)
def test_large_images_and_few_threads(
    loader: str, ending: str, options: dict[str, Any], cores: int, mend: str, tmp_path: Path
) -> None:
    config = settings(large_tree(tmp_path, ending, **options), loader)
    feed, said = ask(config, cores)
    assert feed.short_of == "decoding"
    assert "short of decoder threads: " in said
    assert said.endswith(mend)


@pytest.mark.parametrize(
    ("loader", "kind", "severity"),
    [("torchvision", "composer", 10), ("dali", "timm", 9), ("torchvision", "torchvision", 30)],
)
def test_expensive_randaugment(loader: str, kind: str, severity: int, small: Path) -> None:
    chosen = {"randaugment": kind, "randaugment_depth": 60, "randaugment_severity": severity}
    more = [f"data.augmentation.{name}={value}" for name, value in chosen.items()]
    feed, said = ask(settings(small, loader, "data.image_size=96", *more))
    assert feed.short_of == "RandAugment"
    assert "short of threads for RandAugment: " in said
    assert said.endswith(": raise data.loader_threads from 1 to 7")


def test_a_loader_that_keeps_up_is_not_taken_apart(small: Path) -> None:
    feed, said = ask(settings(small, "torchvision"), step=1.0)
    assert (feed.parts, feed.short_of, feed.waiting_percent) == ({}, None, 0.0)
    assert said == f"the loader gives {1 / feed.loader:,.0f} images/s, the step takes 1"


@pytest.mark.parametrize(
    ("shard", "asked", "mend"),
    [
        (1, "data.prefetch_batches=2", "raise data.prefetch_batches from 2 to 16"),
        (16, "data.prefetch_batches=2", "raise data.loader_threads from 16 to 20"),
    ],
)
def test_threads_that_lack_work(shard: int, asked: str, mend: str) -> None:
    """16 threads, of which few have an image to decode where 3 batches of 1 are in flight."""
    config = settings(
        Path("/nowhere"),
        "torchvision",
        asked,
        "data.loader_threads=16",
        f"global_batch={4 * shard}",
    )
    folder = ImageFolder(Path("/nowhere"), "train", ("a",), (), ())
    trial = LoadingTrial(config, folder, CPU, 64)
    feed = Feed(0.004, 0.005, {"disk": 0.001, "decoding": 0.004}, 0.001)
    assert feed.waiting_percent == pytest.approx(20.0)
    assert shortage(feed, trial, config, CPU) == (
        "the loader gives 200 images/s, the step takes 250: training will wait for data 20 % of "
        f"the time, short of decoder threads: {mend}"
    )
