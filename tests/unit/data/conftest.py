"""Small trees of real image files, and loaders over them."""

import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qsr.data import ImageFolder, Loader, Request, make_loader, open_image_folders
from qsr.data.transforms import EvalTransform, TrainTransform
from tests.imagenet_archives import Archives
from tests.killing import SCRIPT

CPU = torch.device("cpu")


def textured_image(width: int, height: int, seed: int) -> Image.Image:
    """An RGB image with structure on every scale, as photographs have."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth) + random.normal(0, 8, (height, width, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def write_tree(root: Path, classes: int, train: int, val: int) -> None:
    """Images of many sizes in `root/{train,val}/cN/`, `train` and `val` per class."""
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"c{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                seed = 10_000 * (split == "val") + 100 * label + i
                width, height = np.random.default_rng(seed).integers(60, 180, 2).tolist()
                textured_image(width, height, seed).save(folder / f"{i:03d}.jpg", quality=90)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageFolder, ImageFolder]:
    """3 classes with 8 training and 4 validation images each."""
    root = tmp_path_factory.mktemp("photos")
    write_tree(root, classes=3, train=8, val=4)
    return open_image_folders(root)


@pytest.fixture
def own_photos(tmp_path: Path) -> Path:
    """Root of a tree that the test may damage."""
    write_tree(tmp_path / "photos", classes=2, train=6, val=2)
    return tmp_path / "photos"


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs scripts/prepare.py in this process; returns its exit status."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert isinstance(exit_.value.code, int)
        return exit_.value.code

    return run


@pytest.fixture
def archives(tmp_path: Path) -> Archives:
    """3 classes with 4 training images each, and 6 validation images."""
    made = Archives(tmp_path)
    made.write()
    return made


@pytest.fixture(params=["dali", "torchvision"])
def kind(request: pytest.FixtureRequest) -> str:
    """Both loaders, one after the other."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return str(request.param)


@pytest.fixture(scope="session")
def textured() -> Callable[..., Image.Image]:
    """Makes an RGB image from width, height and seed."""
    return textured_image


@pytest.fixture(scope="session")
def new_loader() -> Iterator[Callable[..., Loader]]:
    """Makes loaders for 16 images a batch that live to the end of the tests."""
    made: list[Loader] = []

    def make(
        kind: Any, dataset: ImageFolder, transform: TrainTransform | EvalTransform, **options: Any
    ) -> Loader:
        settings: dict[str, Any] = {"batch_size": 16, "device": CPU, "threads": 2, **options}
        made.append(make_loader(kind, dataset, transform, **settings))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


@pytest.fixture(scope="session")
def load(new_loader: Callable[..., Loader]) -> Callable[..., Loader]:
    """Like `new_loader`, but the same arguments give the same loader: a loader has no state that
    one test could pass on to the next, and a DALI pipeline takes a while to build."""
    made: dict[Any, Loader] = {}

    def make(
        kind: str,
        dataset: ImageFolder,
        transform: TrainTransform | EvalTransform,
        **options: Any,
    ) -> Loader:
        key = (kind, dataset.root, dataset.split, transform, tuple(sorted(options.items())))
        if key not in made:
            made[key] = new_loader(kind, dataset, transform, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def grey_levels() -> Callable[..., torch.Tensor]:
    """Loads one request and undoes the normalisation: float [b, 3, size, size], 0 to 255."""

    def levels(
        loader: Loader, transform: TrainTransform | EvalTransform, request: Request
    ) -> torch.Tensor:
        images = next(loader.batches([request])).images
        mean = torch.tensor(transform.mean).view(3, 1, 1)
        std = torch.tensor(transform.std).view(3, 1, 1)
        return 255 * (images * std + mean)

    return levels
