"""RandAugment: drawn as composer, torchvision and timm draw it, carried out as Pillow does."""

import random as python_random
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_images
from timm.data import auto_augment as timm_augment
from torchvision.transforms import v2

from qsr.data import randaugment_pillow, randaugment_torch
from qsr.data.randaugment import (
    BICUBIC,
    BILINEAR,
    COMPOSER_OPS,
    GEOMETRIC,
    NEAREST,
    OPS,
    TIMM_OPS,
    TORCHVISION_OPS,
    RandAugment,
    RandAugmentDraws,
)
from tests import composer

SIDE = 224
PAPER = RandAugment("composer", depth=2, severity=10)
BLACK = (0, 0, 0)
COLOUR = (124, 116, 104)

Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def pictures() -> Pixels:
    """[6, SIDE, SIDE, 3]: two photographs, a dark and flat one, noise, one colour, two colours."""
    photos = [
        np.asarray(Image.fromarray(photo).resize((SIDE, SIDE)))
        for photo in load_sample_images().images
    ]
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    halves = np.zeros((SIDE, SIDE, 3), np.uint8)
    halves[:, 100:] = (30, 200, 90)
    return np.stack([*photos, photos[0] // 4 + 60, noise, np.full_like(noise, 77), halves])


@pytest.fixture(scope="module")
def patches(pictures: Pixels) -> Pixels:
    """Their middles: torch's filters take long on a CPU."""
    return np.ascontiguousarray(pictures[:, 60:156, 60:156])


TEN_VALUES: dict[str, list[float]] = {
    "posterize": [1, 2, 3, 4, 1, 2, 3, 4, 8, 0],
    "rotate": [-30, -23, -11, -1, 0, 2, 7, 15, 29, 30],
    "solarize": [0, 1, 25, 51, 102, 128, 153, 204, 255, 256],
    "solarize_add": [0, 1, 10, 22, 33, 55, 77, 99, 109, 110],
    "shear_x": [-0.3, -0.21, -0.1, -0.003, 0, 0.05, 0.12, 0.2, 0.25, 0.3],
    "shear_y": [-0.3, -0.21, -0.1, -0.003, 0, 0.05, 0.12, 0.2, 0.25, 0.3],
    "translate_x": [-100, -74, -33, -3.7, -1, 0, 1, 20.4, 50, 74],
    "translate_y": [-100, -74, -33, -3.7, -1, 0, 1, 20.4, 50, 74],
    **{
        name: [0.1, 0.25, 0.5, 0.9, 1.0, 1.3, 2.5, 5.0, 7.5, 10.0]
        for name in ("color", "contrast", "brightness", "sharpness")
    },
}


def pillow(pictures: Pixels, name: str, value: float, resample: int, fill: Any) -> Pixels:
    return np.stack(
        [
            np.asarray(randaugment_pillow.apply_op(Image.fromarray(p), name, value, resample, fill))
            for p in pictures
        ]
    )


@pytest.mark.parametrize("name", COMPOSER_OPS)
def test_pillows_part_is_composers_to_the_bit(pictures: Pixels, name: str) -> None:
    """At ten values each, against composer's own calls."""
    for value in TEN_VALUES.get(name, [0.0]):
        if name == "posterize" and value == 0:
            continue  # Pillow refuses to keep no bit; composer never asks for it
        expected = [
            np.asarray(composer.OPERATIONS[name].apply(Image.fromarray(p), value)) for p in pictures
        ]
        assert np.array_equal(pillow(pictures, name, value, BILINEAR, BLACK), np.stack(expected))


@pytest.mark.parametrize(
    ("name", "resample"),
    [
        (name, resample)
        for name in OPS
        for resample in ((NEAREST, BILINEAR, BICUBIC) if name in GEOMETRIC else (BILINEAR,))
    ],
)
def test_torchs_part_is_pillows(patches: Pixels, name: str, resample: int) -> None:
    """What runs on a GPU, here on the CPU, at ten values each. Whole levels are cut off, not
    rounded, so a last bit of a coordinate may make one level; nothing makes more."""
    values = TEN_VALUES.get(name, [0.0])
    images = torch.from_numpy(patches)
    for value in values:
        of_all = np.full(len(patches), float(value))
        found = randaugment_torch.apply_op(images, name, of_all, resample, COLOUR).numpy()
        expected = pillow(patches, name, value, resample, COLOUR)
        difference = np.abs(found.astype(int) - expected)
        assert difference.max() <= 1, value
        assert difference.mean() < 1e-4, value
        if name not in GEOMETRIC or resample == NEAREST:
            assert difference.max() == 0, value


def test_keeping_no_bit_is_black(pictures: Pixels) -> None:
    assert pillow(pictures, "posterize", 0, BILINEAR, BLACK).max() == 0


@pytest.mark.parametrize("kind", ["composer", "torchvision", "timm"])
def test_a_batch_is_its_images_one_by_one(patches: Pixels, kind: Any) -> None:
    """Depth 3, every image with operations of its own."""
    augment = RandAugment(kind, depth=3, severity=9)
    batch = np.concatenate([patches] * 5)
    draws = augment.draw(np.random.default_rng(7), len(batch), patches.shape[1])
    fill = augment.fill((0.485, 0.456, 0.406))
    found = randaugment_torch.augment_batch(torch.from_numpy(batch), draws, fill).numpy()
    close = 0
    for row, picture in enumerate(batch):
        image = Image.fromarray(picture)
        expected = np.asarray(randaugment_pillow.augment_image(image, draws, row, fill))
        close += int((np.abs(found[row].astype(int) - expected) <= 1).mean() > 0.999)
    # a level more or less before equalize or contrast is many levels after it
    assert close >= len(batch) - 1


@cache  # 60,000 are drawn once for all tests of their operations
def draws_of(augment: RandAugment, samples: int = 60_000) -> RandAugmentDraws:
    return augment.draw(np.random.default_rng(1), samples, SIDE)


def values_of(draws: RandAugmentDraws, name: str) -> NDArray[np.float64]:
    values: NDArray[np.float64] = draws.values[draws.ops == OPS.index(name)]
    return values


@pytest.mark.parametrize(
    ("kind", "names"),
    [("composer", COMPOSER_OPS), ("torchvision", TORCHVISION_OPS), ("timm", TIMM_OPS)],
)
def test_operations_are_equally_likely(kind: Any, names: tuple[str, ...]) -> None:
    draws = draws_of(RandAugment(kind, depth=2, severity=9))
    counts = np.bincount(draws.ops.ravel(), minlength=len(OPS))
    if kind == "timm":  # each is left out half of the time
        identity = counts[OPS.index("identity")] / draws.ops.size
        assert identity == pytest.approx(0.5, abs=0.01)
    drawn = counts[[OPS.index(name) for name in names]]
    assert drawn.sum() + (kind == "timm") * counts[0] == draws.ops.size
    assert stats.chisquare(drawn).pvalue > 0.001


@pytest.mark.parametrize("severity", [10, 9, 3.5])
@pytest.mark.parametrize("name", COMPOSER_OPS)
def test_values_are_drawn_as_composer_draws_them(name: str, severity: float) -> None:
    """Two samples, by Kolmogorov-Smirnov; and the same extremes."""
    ours = values_of(draws_of(RandAugment("composer", depth=2, severity=severity)), name)
    random = np.random.RandomState(2)
    theirs = [composer.OPERATIONS[name].draw(random, severity, SIDE) for _ in range(9000)]
    assert stats.ks_2samp(ours, theirs).pvalue > 0.001
    assert np.quantile(ours, [0, 1]) == pytest.approx(np.quantile(theirs, [0, 1]), rel=0.02)


def test_the_papers_strengths() -> None:
    """A table to check by eye: the smallest and the largest value of each operation."""
    draws = draws_of(PAPER)
    found = {name: values_of(draws, name) for name in COMPOSER_OPS}
    extremes = {name: (v.min(), v.max()) for name, v in found.items()}
    assert extremes["posterize"] == (1, 4)
    assert extremes["rotate"] == (-29, 29)
    assert extremes["solarize"] == (1, 254)  # 256 - 255, and 256 - int(0.1 x 25.6)
    assert extremes["translate_x"] == extremes["translate_y"] == (-74, 74)
    assert extremes["shear_x"] == pytest.approx((-0.3, 0.3), abs=1e-3)
    assert extremes["color"] == pytest.approx((0.1, 10), abs=0.01)
    assert extremes["brightness"] == pytest.approx((0.1, 7.5), abs=0.01)
    assert extremes["equalize"] == extremes["autocontrast"] == (0, 0)
    assert set(draws.filters.ravel()) == {BILINEAR}


@pytest.mark.parametrize(
    ("severity", "side"), [(9, 224), (30, 224), *((severity, 33) for severity in range(0, 31, 5))]
)
def test_torchvisions_operations(severity: int, side: int) -> None:
    """Every operation with both signs, pixel by pixel against torchvision's own function."""
    augment = RandAugment("torchvision", depth=2, severity=severity)
    draws = augment.draw(np.random.default_rng(0), 300, side)
    library = v2.RandAugment(num_ops=2, magnitude=severity)
    photo = Image.fromarray(load_sample_images().images[1]).resize((side, side))
    ids = {name.replace("_", ""): name for name in TORCHVISION_OPS}
    for transform_id, (magnitudes, is_signed) in library._AUGMENTATION_SPACE.items():
        name = ids[transform_id.lower()]
        mine = values_of(draws, name)
        table = magnitudes(31, side, side)
        magnitude = 0.0 if table is None else float(table[severity])
        signs = (-1, 1) if is_signed else (1,)
        expected = {
            np.asarray(
                library._apply_image_or_video_transform(
                    photo, transform_id, sign * magnitude, interpolation=0, fill=library._fill
                )
            ).tobytes()
            for sign in signs
        }
        found = {
            np.asarray(
                randaugment_pillow.apply_op(photo, name, float(value), NEAREST, BLACK)
            ).tobytes()
            for value in set(mine.tolist())
        }
        assert found == expected, name


TIMM_NAMES = {
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}


def test_timms_operations_are_its_increasing_set() -> None:
    assert set(TIMM_NAMES) == set(TIMM_OPS)
    assert set(TIMM_NAMES.values()) == set(timm_augment._RAND_INCREASING_TRANSFORMS)


@pytest.mark.parametrize("name", TIMM_OPS)
def test_values_are_drawn_as_timm_draws_them(name: str) -> None:
    """ "rand-m9-n2-mstd0.5-inc1", the level of DeiT, Swin and ConvNeXt."""
    ours = values_of(draws_of(RandAugment("timm", depth=2, severity=9)), name)
    convert: Any = timm_augment.LEVEL_TO_ARG[TIMM_NAMES[name]]
    scale = SIDE if name.startswith("translate") else 1
    python_random.seed(3)
    theirs = []
    for _ in range(4000):
        level = max(0.0, min(python_random.gauss(9, 0.5), 10.0))
        value = 0 if convert is None else convert(level, timm_augment._HPARAMS_DEFAULT)
        # a tuple, but for one operation that gives a number
        theirs.append(scale * float(value[0] if isinstance(value, tuple) else value))
    assert stats.ks_2samp(ours, theirs).pvalue > 0.001


@pytest.mark.parametrize("name", TIMM_OPS)
def test_timms_operations(pictures: Pixels, name: str) -> None:
    """Pixel by pixel against timm's own function, with both of its filters."""
    function: Any = timm_augment.NAME_TO_OP[TIMM_NAMES[name]]
    values = values_of(draws_of(RandAugment("timm", depth=2, severity=9), 400), name)
    for value in values[:5]:
        arguments = {
            "translate_x": [value / SIDE],
            "translate_y": [value / SIDE],
            "posterize": [int(value)],
            "solarize_add": [int(value)],
        }.get(name, [] if value == 0 else [value])
        if name == "posterize" and value == 0:
            continue
        for resample in (BILINEAR, BICUBIC):
            image = Image.fromarray(pictures[0])
            expected = function(image, *arguments, resample=resample, fillcolor=COLOUR)
            found = randaugment_pillow.apply_op(image, name, float(value), resample, COLOUR)
            assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_corners_are_black_or_the_mean() -> None:
    mean = (0.485, 0.456, 0.406)
    assert PAPER.fill(mean) == BLACK
    assert RandAugment("torchvision", 2, 9).fill(mean) == BLACK
    assert RandAugment("timm", 2, 9).fill(mean) == COLOUR  # timm's own numbers for ImageNet


def quantiles(values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """`count` evenly spaced ones of them, so that two draws compare with little noise."""
    places = ((np.arange(count) + 0.5) / count * len(values)).astype(int)
    spaced: NDArray[np.float64] = np.sort(values)[places]
    return spaced


def test_images_change_as_much_as_composers() -> None:
    """The mean change of a pixel over 500 crops of photographs, for each operation and overall:
    within 2 % of composer's. What is drawn here goes through torch, composer's through Pillow."""
    side, count = 32, 500
    random = np.random.default_rng(0)
    sources = load_sample_images().images
    crops = np.empty((count, side, side, 3), np.uint8)
    for crop in crops:
        source = sources[random.integers(2)]
        top, left = (random.integers(n - 160) for n in source.shape[:2])
        window = Image.fromarray(source[top : top + 160, left : left + 160])
        crop[:] = np.asarray(window.resize((side, side)))
    draws = PAPER.draw(np.random.default_rng(1), 60_000, side)
    reference = np.random.RandomState(2)
    changes = {}
    for name in COMPOSER_OPS:
        operation = composer.OPERATIONS[name]
        theirs = quantiles(
            np.array([operation.draw(reference, 10, side) for _ in range(9000)]), count
        )
        ours = quantiles(values_of(draws, name), count)
        together = random.permutation(count)  # both sides give a crop the same rank
        expected = np.stack(
            [
                np.asarray(operation.apply(Image.fromarray(crop), value))
                for crop, value in zip(crops, theirs[together], strict=True)
            ]
        )
        found = randaugment_torch.apply_op(
            torch.from_numpy(crops), name, ours[together], BILINEAR, BLACK
        ).numpy()
        changes[name] = [np.abs(x.astype(float) - crops).mean() for x in (found, expected)]
        assert changes[name][0] == pytest.approx(changes[name][1], rel=0.02), name
    found_mean, expected_mean = np.mean(list(changes.values()), axis=0)
    assert found_mean == pytest.approx(expected_mean, rel=0.02)
    assert expected_mean > 25  # the paper's augmentation is a strong one


def test_an_unknown_operation_is_an_error(pictures: Pixels) -> None:
    with pytest.raises(ValueError, match="blur is not a RandAugment operation"):
        randaugment_pillow.apply_op(Image.fromarray(pictures[0]), "blur", 1.0, BILINEAR, BLACK)
    with pytest.raises(ValueError, match="blur is not a RandAugment operation"):
        randaugment_torch.apply_op(torch.from_numpy(pictures), "blur", np.ones(6), BILINEAR, BLACK)
