"""Image transforms with ImageNet's usual settings."""

from typing import Any

from qsr.config.schema import AugmentationConfig
from qsr.data import EvalTransform, TrainTransform
from qsr.data.randaugment import RandAugment

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

PLAIN: dict[str, Any] = {
    "min_area": 0.08,
    "max_area": 1.0,
    "min_aspect": 3 / 4,
    "max_aspect": 4 / 3,
    "flip_probability": 0.5,
    "randaugment": "none",
    "randaugment_depth": None,
    "randaugment_severity": None,
}


def train_transform(
    size: int, randaugment: RandAugment | None = None, **changes: float
) -> TrainTransform:
    """Of torchvision's RandomResizedCrop and flip, with `changes` of their settings."""
    settings = PLAIN | changes
    if randaugment is not None:
        settings["randaugment"] = randaugment.kind
        settings["randaugment_depth"] = randaugment.depth
        settings["randaugment_severity"] = randaugment.severity
    return TrainTransform(size, AugmentationConfig(**settings), MEAN, STD)


def eval_transform(size: int, crop_fraction: float = 224 / 256) -> EvalTransform:
    return EvalTransform(size, crop_fraction, MEAN, STD)
