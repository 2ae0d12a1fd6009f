"""The pixels: both loaders against each other and against torchvision's own transforms."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from qsr.data import EvalTransform, ImageFolder, Loader, Request, open_image_folders
from qsr.data.crew import Crew
from qsr.data.randaugment import COMPOSER_OPS, OPS, RandAugment
from qsr.data.randaugment_pillow import augment_image
from qsr.data.transforms import crop_box, draw
from tests.transforms import eval_transform, train_transform

Photos = tuple[ImageFolder, ImageFolder]
Load = Callable[..., Loader]
GreyLevels = Callable[..., torch.Tensor]

EVAL = eval_transform(56)


def reference(path: str, transform: EvalTransform) -> torch.Tensor:
    """Grey levels [3, size, size] of the published recipe, by torchvision on Pillow."""
    steps = Compose(
        [
            Resize(transform.resize, InterpolationMode.BILINEAR),
            CenterCrop(transform.size),
        ]
    )
    with Image.open(path) as image:
        return torch.from_numpy(np.array(steps(image.convert("RGB")))).permute(2, 0, 1).float()


def save_odd_files(folder: Path, textured: Image.Image) -> None:
    """Images that real data sets contain, each under the name .jpg."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    textured.save(folder / "exif.jpg", quality=95, exif=exif)
    textured.convert("L").save(folder / "grey.jpg", quality=95)
    textured.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    textured.save(folder / "progressive.jpg", quality=95, progressive=True)
    textured.save(folder / "png.jpg", format="PNG")
    textured.convert("RGBA").save(folder / "alpha.jpg", format="PNG")
    textured.convert("L").save(folder / "grey-png.jpg", format="PNG")
    textured.convert("P").save(folder / "palette.png")


SIZES = [
    (64, 64),
    (65, 64),
    (64, 65),
    (97, 131),
    (131, 97),
    (101, 101),
    (200, 67),
    (67, 200),
    (350, 61),
    (500, 375),
    (40, 30),
    (31, 55),
    (9, 7),
    (2, 3),
    (1, 1),
]


@pytest.fixture(scope="module")
def odd_images(
    tmp_path_factory: pytest.TempPathFactory, textured: Callable[..., Image.Image]
) -> ImageFolder:
    root = tmp_path_factory.mktemp("odd")
    for split in ("train", "val"):
        folder = root / split / "only"
        folder.mkdir(parents=True)
        for width, height in SIZES:
            textured(width, height, width * height).save(
                folder / f"{width}x{height}.jpg", quality=95
            )
        save_odd_files(folder, textured(90, 70, 0))
    return open_image_folders(root)[1]


@pytest.mark.parametrize("transform", [EVAL, eval_transform(33, crop_fraction=0.8)])
def test_validation_pixels_are_torchvisions(
    kind: str,
    load: Load,
    grey_levels: GreyLevels,
    odd_images: ImageFolder,
    transform: EvalTransform,
) -> None:
    indices = range(len(odd_images))
    loader = load(kind, odd_images, transform, batch_size=len(odd_images))
    images = grey_levels(loader, transform, Request(indices, 0))
    for index in indices:
        difference = (images[index] - reference(odd_images.path(index), transform)).abs().max()
        assert difference <= 1.001, odd_images.files[index]


def test_training_crops_are_pillows(
    kind: str, load: Load, grey_levels: GreyLevels, photos: Photos
) -> None:
    """Against crops made by hand from the drawn boxes."""
    train, _ = photos
    transform = train_transform(32)
    images = grey_levels(load(kind, train, transform), transform, Request(range(16), 3))
    draws = draw(transform, 3, 16)
    for row, image in enumerate(images):
        with Image.open(train.path(row)) as file:
            top, left, height, width = crop_box(
                transform, draws.windows[row], file.height, file.width
            )
            crop = file.convert("RGB").crop((left, top, left + width, top + height))
        expected = np.asarray(crop.resize((32, 32), Image.Resampling.BILINEAR)).astype(np.float32)
        if draws.flips[row]:
            expected = expected[:, ::-1]
        difference = np.abs(image.permute(1, 2, 0).numpy() - expected)
        # At the outermost pixels DALI repeats the edge where Pillow shortens its filter; where a
        # JPEG's colour is stored at half size, decoding only a part changes its edge as well.
        assert difference[2:-2, 2:-2].max() <= 2
        assert difference.mean() < 0.6


# By operation: the mean and the 99 % quantile of the difference, in grey levels; about twice what
# was measured. Both loaders give their crops to the same Pillow. The crops differ by rounding, at
# most by a level inside, which contrast, color and sharpness stretch up to tenfold, equalize and
# autocontrast a little less; posterize and solarize turn it into whole steps of single pixels.
TOLERANCES = {
    "shear_x": (0.4, 2),
    "shear_y": (0.4, 2),
    "translate_x": (0.4, 2),
    "translate_y": (0.4, 2),
    "rotate": (0.4, 2),
    "brightness": (1.0, 6),
    "contrast": (2.0, 10),
    "color": (2.0, 12),
    "sharpness": (2.0, 12),
    "posterize": (1.5, 64),
    "solarize": (0.5, 2),
    "equalize": (1.9, 10),
    "autocontrast": (1.1, 4),
}


@pytest.fixture(scope="module")
def differences_by_op(
    photos: Photos, new_loader: Load, grey_levels: GreyLevels
) -> dict[str, torch.Tensor]:
    """|DALI - torchvision| of every sample, by the operation of composer's that it drew."""
    pytest.importorskip("nvidia.dali")
    transform = train_transform(64, randaugment=RandAugment("composer", depth=1, severity=10))
    found: dict[str, list[torch.Tensor]] = {name: [] for name in COMPOSER_OPS}
    loaders = [new_loader(kind, photos[0], transform) for kind in ("dali", "torchvision")]
    for seed in range(16):
        request = Request(range(16), seed)
        first, second = (grey_levels(loader, transform, request) for loader in loaders)
        draws = draw(transform, seed, 16).randaugment
        assert draws is not None
        for row, op in enumerate(draws.ops[:, 0]):
            found[OPS[op]].append((first[row] - second[row]).abs())
    return {name: torch.stack(samples) for name, samples in found.items()}


@pytest.mark.parametrize("name", COMPOSER_OPS)
def test_loaders_agree_on_randaugment(
    differences_by_op: dict[str, torch.Tensor], name: str
) -> None:
    mean, quantile = TOLERANCES[name]
    differences = differences_by_op[name]
    print(name, differences.mean(), np.quantile(differences.numpy(), 0.99))
    assert differences.mean() < mean
    assert np.quantile(differences.numpy(), 0.99) <= quantile


@pytest.mark.parametrize("kind_of", ["composer", "torchvision", "timm"])
def test_a_loader_applies_what_was_drawn(
    kind: str, load: Load, grey_levels: GreyLevels, photos: Photos, kind_of: Any
) -> None:
    """Crop and flip, as without RandAugment, then the drawn operations by Pillow, in order."""
    augment = RandAugment(kind_of, depth=2, severity=9)
    plain, augmented = train_transform(32), train_transform(32, randaugment=augment)
    request = Request(range(16), 3)
    crops = grey_levels(load(kind, photos[0], plain), plain, request)
    images = grey_levels(load(kind, photos[0], augmented), augmented, request)
    draws = draw(augmented, 3, 16).randaugment
    assert draws is not None
    for row, (crop, image) in enumerate(zip(crops, images, strict=True)):
        pixels = crop.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        expected = augment_image(Image.fromarray(pixels), draws, row, augment.fill(augmented.mean))
        found = image.permute(1, 2, 0).numpy()
        np.testing.assert_allclose(found, np.asarray(expected), atol=1e-3)


def test_dali_computes_the_same_crop_boxes(odd_images: ImageFolder) -> None:
    """To the pixel, over every shape and over the fallback where no window fits."""
    dali: Any = pytest.importorskip("nvidia.dali")
    graph: Any = importlib.import_module("qsr.data.dali_graph")
    transform = train_transform(32, min_area=0.4)

    crew = Crew(1)

    def boxes() -> Any:
        return graph.crop_box(transform, graph.as_decoded_alike(graph.read_files(), crew)[1])

    samples = len(odd_images)
    make = dali.pipeline_def(enable_conditionals=True)(boxes)
    pipeline = make(batch_size=samples, num_threads=1, device_id=None, prefetch_queue_depth=1)
    pipeline.build()
    paths = [np.frombuffer(odd_images.path(i).encode(), dtype=np.uint8) for i in range(samples)]
    shapes = [Image.open(odd_images.path(i)).size for i in range(samples)]
    for seed in range(40):
        windows = draw(transform, seed, samples).windows
        pipeline.feed_input("paths", paths)
        pipeline.feed_input("windows", windows)
        pipeline.schedule_run()
        found = np.asarray(pipeline.outputs()[0].as_array()).tolist()
        for row, (width, height) in enumerate(shapes):
            assert tuple(found[row]) == crop_box(transform, windows[row], height, width)
    crew.close()


def test_mean_and_std_are_applied(kind: str, load: Load, photos: Photos) -> None:
    plain = replace(eval_transform(32), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    scaled = replace(eval_transform(32), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    request = Request([0, 1], 0)
    images = next(load(kind, photos[1], plain).batches([request])).images
    normalised = next(load(kind, photos[1], scaled).batches([request])).images
    assert 0 <= images.min() < 0.2 < 0.8 < images.max() <= 1
    mean = torch.tensor(scaled.mean).view(3, 1, 1)
    std = torch.tensor(scaled.std).view(3, 1, 1)
    torch.testing.assert_close(normalised, (images - mean) / std, atol=1e-5, rtol=0)


def test_flip_mirrors_the_image(
    kind: str, load: Load, grey_levels: GreyLevels, photos: Photos
) -> None:
    request = Request(range(8), 5)
    never, always = (
        grey_levels(load(kind, photos[0], transform), transform, request)
        for transform in (
            train_transform(32, flip_probability=0.0),
            train_transform(32, flip_probability=1.0),
        )
    )
    torch.testing.assert_close(always.flip(-1), never, atol=1e-3, rtol=0)
