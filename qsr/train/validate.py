"""Validation of a model file or of published weights, outside a run."""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from qsr.cluster.group import choose_device
from qsr.cluster.place import find_place
from qsr.config.evaluate import OF_NETWORK, EvaluateConfig, load_evaluate, settings_of_run
from qsr.config.schema import OwnModelConfig
from qsr.data import (
    EvalTransform,
    ImageFolder,
    open_loader,
    open_validation_folder,
    try_some,
    uses_dali,
)
from qsr.data.names import appearance, how_they_differ
from qsr.errors import ClusterError, ConfigError, DataError, ModelFileError
from qsr.output import warn
from qsr.run.folder import RunFolder
from qsr.run.yaml_file import read_yaml
from qsr.sync.communicator import Communicator
from qsr.sync.topology import Topology
from qsr.train.evaluation import Evaluation, validate
from qsr.train.model_file import (
    Description,
    load_model,
    put_weights,
    read_description,
    read_weights,
)
from qsr.train.models import build_model, check_model
from qsr.train.precision import Precision


class Candidate(NamedTuple):
    """A network with its weights on its device, and what is needed to validate it."""

    module: nn.Module
    config: EvaluateConfig
    val: ImageFolder
    device: torch.device
    about: Description | None
    """None if the weight file has no description."""


def evaluate(source: str | None, config: EvaluateConfig) -> int:
    """Validate a run folder or a model file (`source`), or without one the weights that the
    settings name. Prints the result; returns the exit status: 0 done, 1 failed, 2 refused."""
    try:
        candidate = _open(source, config)
        data = config.data
        communicator = Communicator(Topology(0, 1, 0, 1), candidate.device, 0.0)
        loader = open_loader(
            data,
            candidate.val,
            EvalTransform.of(data),
            batch_size=config.evaluation.batch,
            device=candidate.device,
            cores=find_place().cores,
        )
    except (ConfigError, DataError, ClusterError, ModelFileError) as error:
        warn(f"refused: {error}")
        return 2
    for note in (*candidate.val.notes, *_notes(candidate)):
        warn(f"note: {note}")
    try:
        result = validate(
            candidate.module,
            loader,
            len(candidate.val),
            config.evaluation.batch,
            communicator,
            Precision(config.precision, candidate.device),
        )
    except DataError as error:
        warn(f"failed: {error}")
        return 1
    finally:
        loader.close()
    with_ = f"{'DALI' if uses_dali(data.loader) else 'torchvision'} on {candidate.device}"
    print(f"{_numbers(result)}  ({result.images:,} images, {with_}, {config.precision})")
    if candidate.about is not None:
        about = candidate.about
        top5 = "" if about.top5 is None else f"  top-5 {about.top5:.3f} %"
        print(f"the file says: top-1 {about.top1:.3f} %{top5}, after {about.step:,} steps")
    return 0


def _numbers(result: Evaluation) -> str:
    top5 = "" if result.top5 is None else f"  top-5 {result.top5:.3f} %"
    return f"top-1 {result.top1:.3f} %{top5}  loss {result.loss:.4f}"


def settings_of(
    source: str | None, overrides: Sequence[str], more: Sequence[Path] = ()
) -> EvaluateConfig:
    """The settings of a validation. `more`: folders with further files of groups. Raises
    ConfigError, ModelFileError."""
    if source is None:
        return load_evaluate(overrides, more=more)
    _, about = read_description(source)
    known, own = _known(Path(source), about), about.target
    config = load_evaluate(overrides, known, needs_code=own is not None, more=more)
    if own is not None and config.model is None:
        raise ConfigError(
            f"{source} holds a network of your own: add model=custom model.target={own}"
        )
    return config


def _open(source: str | None, config: EvaluateConfig) -> Candidate:
    """Raises ConfigError, DataError, ClusterError, ModelFileError."""
    about = None if source is None else read_description(source)[1]
    device = choose_device(config.cluster.device, 0)
    data = config.data
    val = open_validation_folder(
        data.root, expected_images=data.val_images, expected_classes=data.classes
    )
    if about is None:
        module = _published(config, len(val.classes))
    else:
        assert source is not None
        _check_classes(source, about.classes, val)
        code = config.model
        if code is not None and not isinstance(code, OwnModelConfig):
            raise ConfigError(f"{source} holds a network of your own: model={code.name} is not it")
        module = load_model(source, build=None if code is None else code.load("model")).module
    _try(module, data.image_size)
    try_some(val)
    return Candidate(module.to(device).eval(), config, val, device, about)


def _known(source: Path, about: Description) -> dict[str, Any]:
    """The settings from a model file; for a run folder also those of its config.yaml."""
    seen = (about.image_size, about.crop_fraction, list(about.mean), list(about.std))
    of_file = {**dict(zip(OF_NETWORK, seen, strict=True)), "precision": about.precision}
    if not source.is_dir():
        return of_file
    path = RunFolder(source).config
    try:
        return settings_of_run(read_yaml(path)) | of_file
    except ConfigError as error:
        raise ConfigError(
            f"{error}: give the model.safetensors file itself, and data.root"
        ) from None


def _published(config: EvaluateConfig, num_classes: int) -> nn.Module:
    assert config.model is not None
    assert config.weights is not None
    check_model(config.model, config.data.image_size)
    weights = read_weights(Path(config.weights))
    try:
        module = build_model(config.model, num_classes, config.data.image_size)
    except (ValueError, RuntimeError, AssertionError) as error:  # timm's, for its models' limits
        raise ConfigError(f"the network cannot be built ({' '.join(str(error).split())})") from None
    put_weights(module, weights, Path(config.weights), num_classes)
    return module


def _check_classes(source: str, classes: Sequence[str], val: ImageFolder) -> None:
    """Raise DataError unless the folder's classes are those of the logits, in order."""
    for label, (ours, theirs) in enumerate(zip_longest(classes, val.classes)):
        if ours != theirs:
            here, there = (f"{name!r}" if name else "none" for name in (ours, theirs))
            alike = bool(ours and theirs) and appearance(ours) == appearance(theirs)
            hint = f"; {how_they_differ(ours, theirs)}" if alike else ""
            raise DataError(
                f"{source} and {val.root / val.split} have different classes ({len(classes)} and "
                f"{len(val.classes)}): class {label} is {here} in the model, {there} in the folder"
                f"{hint}"
            )


@torch.no_grad()
def _try(module: nn.Module, image_size: int) -> None:
    """Raise ConfigError if the network does not accept this image size; some show it only in a
    forward pass."""
    try:
        module.eval()(torch.zeros(1, 3, image_size, image_size))
    except Exception as error:  # timm asserts, torch raises RuntimeError and others
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"data.image_size={image_size}: the network does not accept this size ({reason})"
        ) from None


def _notes(candidate: Candidate) -> list[str]:
    """What to know before comparing the result with a published one."""
    model, data = candidate.config.model, candidate.config.data
    if model is None or model.name != "timm":
        return []
    from timm.data.config import resolve_data_config

    theirs = resolve_data_config(  # type: ignore[no-untyped-call]
        {}, model=candidate.module, use_test_size=True
    )
    wanted = {
        "data.image_size": theirs["input_size"][-1],
        "data.eval_crop_fraction": theirs["crop_pct"],
        "data.mean": tuple(theirs["mean"]),
        "data.std": tuple(theirs["std"]),
    }
    ours = (data.image_size, data.eval_crop_fraction, data.mean, data.std)
    settings = [
        f"{name}={list(value) if isinstance(value, tuple) else value}".replace(" ", "")
        for (name, value), own in zip(wanted.items(), ours, strict=True)
        if value != own
    ]
    notes = []
    if settings:
        notes.append(f"timm validates {model.timm_name} with {' '.join(settings)}")
    if theirs["interpolation"] != "bilinear":
        notes.append(
            f"timm validates {model.timm_name} with {theirs['interpolation']} resizing, qsr with "
            f"bilinear resizing: the results will differ slightly"
        )
    return notes
