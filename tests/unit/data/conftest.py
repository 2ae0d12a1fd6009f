"""Small trees of real image files, and loaders over them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from qsr.data import ImageFolder, Loader, Request, open_image_folders
from qsr.data.transforms import EvalTransform, TrainTransform
from tests.image_trees import textured_image, write_tree
from tests.imagenet_archives import Archives


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageFolder, ImageFolder]:
    """3 classes with 8 training and 4 validation images each."""
    root = tmp_path_factory.mktemp("photos")
    write_tree(root, classes=3, train=8, val=4)
    return open_image_folders(root)


@pytest.fixture
def archives(tmp_path: Path) -> Archives:
    """3 classes with 4 training images each, and 6 validation images."""
    made = Archives(tmp_path)
    made.write()
    return made


@pytest.fixture(scope="session")
def textured() -> Callable[..., Image.Image]:
    """Makes an RGB image from width, height and seed."""
    return textured_image


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
