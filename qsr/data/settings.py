"""The image transforms of a run, from its settings."""

from qsr.config.schema import AugmentationConfig, DataConfig
from qsr.data.randaugment import RandAugment
from qsr.data.transforms import EvalTransform, TrainTransform


def transforms(data: DataConfig) -> tuple[TrainTransform, EvalTransform]:
    """The transforms of training and validation images."""
    change = data.augmentation
    train = TrainTransform(
        size=data.image_size,
        min_area=change.min_area,
        max_area=change.max_area,
        min_aspect=change.min_aspect,
        max_aspect=change.max_aspect,
        flip_probability=change.flip_probability,
        randaugment=_randaugment(change),
        mean=data.mean,
        std=data.std,
    )
    validation = EvalTransform(
        size=data.image_size, crop_fraction=data.eval_crop_fraction, mean=data.mean, std=data.std
    )
    return train, validation


def _randaugment(settings: AugmentationConfig) -> RandAugment | None:
    if settings.randaugment == "none":
        return None
    depth, severity = settings.randaugment_depth, settings.randaugment_severity
    assert depth is not None  # config.load.check
    assert severity is not None
    return RandAugment(settings.randaugment, depth, severity)
