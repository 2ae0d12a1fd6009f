"""Weight files: a run's model.safetensors, which describes its network, and published weights.

    from qsr import load_model
    model = load_model("runs/demo/quadratic/seed_1")
    logits = model.module(model.transform(image)[None])

This needs torch, torchvision, Pillow and safetensors, and timm for timm's networks. It needs no
settings. Loading a file never runs code from it.
"""

import json
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qsr.data import EvalTransform
from qsr.data.torchvision import validation_input
from qsr.errors import ModelFileError
from qsr.run.folder import MODEL_NAME
from qsr.train.networks import build_network, build_own_network, evaluation_mode
from qsr.train.vit import SimpleViT, from_vit_pytorch, to_vit_pytorch

_KEY = "qsr"
_FORMAT = 1


@dataclass(frozen=True)
class Description:
    """Description of a model, stored as JSON under the key "qsr" of the file's metadata."""

    network: str
    """Name in `qsr.train.networks`."""
    timm_name: str | None
    """Name in timm's registry; only for network "timm"."""
    channels_last: bool
    """Whether convolution weights are in channels_last memory format."""
    classes: tuple[str, ...]
    """Class names in the order of the logits."""
    image_size: int
    """Side of the square input image, in pixels."""
    crop_fraction: float
    """Validation: image_size / short side of the image before the crop."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Mean and standard deviation per channel, of pixels scaled to 0..1."""
    precision: str
    """Precision of the validation: fp32, bf16 or fp16."""
    experiment: str
    seed: int
    step: int
    """Number of training steps."""
    top1: float
    """Percent of the validation images."""
    top5: float | None
    """Percent; None if there are at most five classes."""
    target: str | None = None
    """The function that builds a network of the user's own; only for network "custom"."""
    options: dict[str, Any] = field(default_factory=dict)
    """Its keyword arguments."""

    @property
    def transform(self) -> EvalTransform:
        """Preprocessing of validation images."""
        return EvalTransform(self.image_size, self.crop_fraction, self.mean, self.std)

    def metadata(self) -> dict[str, str]:
        """The metadata of the safetensors file."""
        body = {"format": _FORMAT, **asdict(self)}
        if self.target is None:  # as in files of earlier versions
            del body["target"], body["options"]
        text = json.dumps(body, ensure_ascii=False)
        # class names may not be valid UTF-8: such bytes become escapes, which JSON reads back
        return {_KEY: text.encode("utf-8", "backslashreplace").decode()}


class LoadedModel(NamedTuple):
    """A trained network, ready for use."""

    module: nn.Module
    """In evaluation mode; input [b, 3, size, size], output logits [b, number of classes]."""
    transform: Callable[[Image.Image], Tensor]
    """An image of any mode and size -> float32 [3, size, size], as in validation."""
    classes: tuple[str, ...]
    """Class names in the order of the logits."""
    about: Description
    """The description stored in the file."""

    def export(self) -> dict[str, Tensor]:
        """The weights under the names of the library that the network comes from: vit-pytorch's
        SimpleViT for vit_b16, vit_s16 and small_vit, torchvision (and timm) for resnet152 and
        resnet50, timm for its own networks. small_resnet, and your own, keep their names."""
        state = self.module.state_dict()
        return to_vit_pytorch(state) if isinstance(self.module, SimpleViT) else state


def load_model(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    build: Callable[..., nn.Module] | None = None,
) -> LoadedModel:
    """The model of a run folder, or of a single model.safetensors. `build`: the function that
    builds a network of your own, and only of such a network. Raises ModelFileError."""
    file, about = read_description(path)
    if build is None and about.target is not None:
        raise ModelFileError(
            f"{file} holds a network of your own: give what builds it, {about.target}: "
            f"load_model(PATH, build=...)"
        )
    if build is not None and about.target is None:
        raise ModelFileError(f"{file} holds {about.network}, which needs no code: leave out build")
    weights = read_weights(file)
    try:
        module = _build(about, build)
    except ImportError as error:
        raise ModelFileError(f"{file} holds a timm network ({error}): pip install timm") from None
    except (ValueError, RuntimeError) as error:  # from another version of qsr or timm
        raise ModelFileError(
            f"{file}: its network cannot be built ({_line(error)}); it may be from another version "
            f"of qsr or timm"
        ) from None
    put_weights(module, weights, file, len(about.classes))
    transform = about.transform
    return LoadedModel(
        evaluation_mode(module.to(device)),
        lambda image: validation_input(image, transform),
        about.classes,
        about,
    )


def _build(about: Description, build: Callable[..., nn.Module] | None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # leaves the caller's generator as it was
        if build is not None:
            return build_own_network(
                build,
                about.options,
                len(about.classes),
                about.image_size,
                channels_last=about.channels_last,
            )
        return build_network(
            about.network,
            about.timm_name,
            len(about.classes),
            about.image_size,
            channels_last=about.channels_last,
        )


def read_description(path: str | os.PathLike[str]) -> tuple[Path, Description]:
    """The model file of a run folder, or the given file, and its description. Raises
    ModelFileError."""
    file = Path(path)
    if file.is_dir():
        file /= MODEL_NAME
        if not file.exists():
            raise ModelFileError(f"{path} has no {MODEL_NAME}: it is written when a run finishes")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except FileNotFoundError:
        raise ModelFileError(f"{file} does not exist") from None
    except (OSError, SafetensorError) as error:
        raise ModelFileError(
            f"{file} is not a readable safetensors file ({_line(error)}); pass other files to "
            f"qsr evaluate as weights=FILE model=NAME"
        ) from None
    if _KEY not in metadata:
        raise ModelFileError(
            f"{file} does not say which network it holds: if an older version of qsr wrote it, use "
            f"that version or train again (its ViT was a different network); if another program "
            f"did, give it to qsr evaluate as weights=FILE model=NAME"
        )
    return file, _parse(metadata[_KEY], file)


def _parse(text: str, file: Path) -> Description:
    try:
        body: dict[str, Any] = json.loads(text)
        version = body.pop("format")
        if version == _FORMAT:
            for name in ("classes", "mean", "std"):
                body[name] = tuple(body[name])
            about = Description(**body)
            if about.image_size < 1:
                raise ValueError(f"image_size must be positive, got {about.image_size}")
            if not 0 < about.crop_fraction <= 1:
                raise ValueError(f"crop_fraction must be in (0, 1], got {about.crop_fraction}")
            return about
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelFileError(f"{file}: its metadata cannot be read ({_line(error)})") from None
    raise ModelFileError(
        f"{file} was written by another version of qsr (format {version}; this one reads {_FORMAT})"
    )


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a torch.save file (.pth, .pt, ...). The latter holds
    a state dict, possibly under "state_dict" or "model", possibly of a DistributedDataParallel
    module. Raises ModelFileError."""
    try:
        if file.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(file))
        found = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelFileError(f"{file} does not exist") from None
    except (OSError, SafetensorError) as error:
        raise ModelFileError(f"{file} cannot be read ({_line(error)})") from None
    except pickle.UnpicklingError:
        raise ModelFileError(
            f"{file} holds more than tensors, so loading it could run code: if you trust it, save "
            f"only the model's state_dict() to a new file"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ModelFileError(f"{file} is not a torch.save file ({_line(error)})") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not found:
        raise ModelFileError(f"{file} does not hold a state dict")
    other = next((name for name, value in found.items() if not isinstance(value, Tensor)), None)
    if other is not None:
        raise ModelFileError(f"{file} does not hold a state dict: {other!r} is not a tensor")
    if all(name.startswith("module.") for name in found):
        return {name.removeprefix("module."): tensor for name, tensor in found.items()}
    return dict(found)


def put_weights(
    module: nn.Module, weights: Mapping[str, Tensor], file: Path, num_classes: int
) -> None:
    """Load `weights` into `module`, which was built for `num_classes`. A SimpleViT also accepts
    vit-pytorch's names. Raises ModelFileError, before any weight is changed, if names or shapes
    differ."""
    if isinstance(module, SimpleViT) and any(name.startswith("transformer.") for name in weights):
        try:
            weights = from_vit_pytorch(weights)
        except ValueError as error:
            raise ModelFileError(f"{file} holds a different network: {error}") from None
    own = module.state_dict()
    # files from before 2018 lack these counters, which evaluation does not use
    missing = [n for n in own if n not in weights and not n.endswith(".num_batches_tracked")]
    more = [name for name in weights if name not in own]
    if missing or more:
        name = (missing or more)[0]
        what = f"lacks {name}" if missing else f"has {name}, which this network lacks"
        others = len(missing) + len(more) - 1
        and_more = f" ({others} more names differ)" if others else ""
        raise ModelFileError(f"{file} holds a different network: it {what}{and_more}")
    differing = [name for name in weights if weights[name].shape != own[name].shape]
    heads = {_classes_of(weights[name], own[name], num_classes) for name in differing}
    if len(heads) == 1 and None not in heads:
        raise ModelFileError(f"{file} is for {heads.pop()} classes, not {num_classes}")
    if differing:
        name = differing[0]
        raise ModelFileError(
            f"{file} holds a different network: {name} has shape {list(weights[name].shape)}, not "
            f"{list(own[name].shape)}"
        )
    module.load_state_dict(weights, strict=False)  # only those counters may be missing


def _classes_of(theirs: Tensor, ours: Tensor, num_classes: int) -> int | None:
    """The number of classes of `theirs`, if that is all that differs from `ours`."""
    if theirs.dim() and theirs.shape[1:] == ours.shape[1:] and ours.shape[0] == num_classes:
        return theirs.shape[0]
    return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
