"""Files of weights: a run's model.safetensors, which says what it holds, and published ones.

    from qsr import load_model
    model = load_model("runs/demo/quadratic/seed_1")
    logits = model.module(model.transform(image)[None])

This needs torch, torchvision, Pillow and safetensors, timm only for timm's networks, and nothing
of the settings. Nothing that is opened here can run code.
"""

import json
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
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
from qsr.train.networks import build_network, evaluation_mode
from qsr.train.vit import SimpleViT, from_vit_pytorch, to_vit_pytorch

_KEY = "qsr"
_FORMAT = 1


@dataclass(frozen=True)
class Description:
    """What a model file says of itself, as JSON under the key "qsr" of its metadata."""

    network: str
    """A name of `qsr.train.networks`."""
    timm_name: str | None
    """In timm's registry, for network "timm"."""
    channels_last: bool
    """Whether convolution weights are in channels_last memory format."""
    classes: tuple[str, ...]
    """Names in the order of the logits."""
    image_size: int
    """Side of the square image that the network sees, in pixels."""
    crop_fraction: float
    """Validation: image_size over the short side before the crop."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Per channel, of pixels on the scale 0 to 1."""
    precision: str
    """fp32, bf16 or fp16: how it was validated."""
    experiment: str
    seed: int
    step: int
    """Steps that it was trained for."""
    top1: float
    """Percent of the validation images."""
    top5: float | None
    """Percent; None where there are no more than five classes."""

    @property
    def transform(self) -> EvalTransform:
        """What happens to validation images."""
        return EvalTransform(self.image_size, self.crop_fraction, self.mean, self.std)

    def metadata(self) -> dict[str, str]:
        """The metadata of the safetensors file."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, ensure_ascii=False)
        # a class may have a name that is no UTF-8: its bytes become escapes, which JSON reads back
        return {_KEY: text.encode("utf-8", "backslashreplace").decode()}


class LoadedModel(NamedTuple):
    """A trained network, ready for use."""

    module: nn.Module
    """In evaluation mode; input [b, 3, size, size], output logits [b, number of classes]."""
    transform: Callable[[Image.Image], Tensor]
    """An image of any mode and size -> float32 [3, size, size], as in validation."""
    classes: tuple[str, ...]
    """Names in the order of the logits."""
    about: Description
    """All that the file says."""

    def export(self) -> dict[str, Tensor]:
        """The weights under the names of whose network it is: vit-pytorch's SimpleViT for vit_b16
        and small_vit, torchvision and timm alike for resnet152, timm for timm's. small_resnet is
        nobody else's."""
        state = self.module.state_dict()
        return to_vit_pytorch(state) if isinstance(self.module, SimpleViT) else state


def load_model(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> LoadedModel:
    """The model of a run folder, or of its model.safetensors alone. Raises ModelFileError."""
    file, about = read_description(path)
    weights = read_weights(file)
    try:
        module = _build(about)
    except ImportError as error:
        raise ModelFileError(f"{file} is a network of timm's ({error}): pip install timm") from None
    except (ValueError, RuntimeError) as error:  # of another version, of timm too
        raise ModelFileError(f"{file}: its network cannot be built ({_line(error)})") from None
    put_weights(module, weights, file, len(about.classes))
    transform = about.transform
    return LoadedModel(
        evaluation_mode(module.to(device)),
        lambda image: validation_input(image, transform),
        about.classes,
        about,
    )


def _build(about: Description) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # the caller's draws are not for weights to be replaced
        return build_network(
            about.network,
            about.timm_name,
            len(about.classes),
            about.image_size,
            channels_last=about.channels_last,
        )


def read_description(path: str | os.PathLike[str]) -> tuple[Path, Description]:
    """The model file of a run folder, or the file itself, and what it says. Raises
    ModelFileError."""
    file = Path(path)
    if file.is_dir():
        file /= MODEL_NAME
        if not file.exists():
            raise ModelFileError(
                f"{path} has no {MODEL_NAME}: it is written when a run has come to its end"
            )
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except FileNotFoundError:
        raise ModelFileError(f"there is no {file}") from None
    except (OSError, SafetensorError) as error:
        raise ModelFileError(
            f"{file} cannot be read as safetensors ({_line(error)}); scripts/evaluate.py takes "
            f"other files as weights=FILE model=NAME"
        ) from None
    if _KEY not in metadata:
        raise ModelFileError(
            f"{file} does not say which network it is: an older version of qsr made it, whose ViT "
            f"was another network (train again, or use that version), or another program (then "
            f"scripts/evaluate.py takes weights=FILE model=NAME)"
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
            about.transform  # noqa: B018  (checks the numbers)
            return about
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelFileError(f"{file}: its metadata cannot be read ({_line(error)})") from None
    raise ModelFileError(
        f"{file} was made by another version of qsr (format {version}; this one reads {_FORMAT})"
    )


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a file of torch.save (.pth, .pt, ...): a state
    dict, also within "state_dict" or "model", also of a DistributedDataParallel module. Raises
    ModelFileError."""
    try:
        if file.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(file))
        found = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelFileError(f"there is no {file}") from None
    except (OSError, SafetensorError) as error:
        raise ModelFileError(f"{file} cannot be read ({_line(error)})") from None
    except pickle.UnpicklingError:
        raise ModelFileError(
            f"{file} holds more than weights, which could run code: where you trust it, save the "
            f"model's state_dict() alone"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ModelFileError(f"{file} is no file of torch.save ({_line(error)})") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not found:
        raise ModelFileError(f"{file} holds no state dict")
    other = next((name for name, value in found.items() if not isinstance(value, Tensor)), None)
    if other is not None:
        raise ModelFileError(f"{file} holds no state dict: {other!r} is no tensor")
    if all(name.startswith("module.") for name in found):
        return {name.removeprefix("module."): tensor for name, tensor in found.items()}
    return dict(found)


def put_weights(
    module: nn.Module, weights: Mapping[str, Tensor], file: Path, num_classes: int
) -> None:
    """Load `weights` into `module`, which was built for `num_classes`; a SimpleViT takes
    vit-pytorch's names too. Raises ModelFileError, before any weight is changed, if names or shapes
    differ."""
    if isinstance(module, SimpleViT) and any(name.startswith("transformer.") for name in weights):
        try:
            weights = from_vit_pytorch(weights)
        except ValueError as error:
            raise ModelFileError(f"{file} does not fit: {error}") from None
    own = module.state_dict()
    # files of before 2018 lack these counters; nothing in evaluation reads them
    missing = [n for n in own if n not in weights and not n.endswith(".num_batches_tracked")]
    more = [name for name in weights if name not in own]
    if missing or more:
        name = (missing or more)[0]
        what = f"has no {name}" if missing else f"has {name}, which this network has not"
        others = len(missing) + len(more) - 1
        and_more = f" ({others} more names differ)" if others else ""
        raise ModelFileError(f"{file} is of another network: it {what}{and_more}")
    differing = [name for name in weights if weights[name].shape != own[name].shape]
    heads = {_classes_of(weights[name], own[name], num_classes) for name in differing}
    if len(heads) == 1 and None not in heads:
        raise ModelFileError(f"{file} is of {heads.pop()} classes, not of {num_classes}")
    if differing:
        name = differing[0]
        raise ModelFileError(
            f"{file} is of another network: {name} is {list(weights[name].shape)}, not "
            f"{list(own[name].shape)}"
        )
    module.load_state_dict(weights, strict=False)  # but for those counters all is there


def _classes_of(theirs: Tensor, ours: Tensor, num_classes: int) -> int | None:
    """The classes of `theirs`, if it differs from `ours` in nothing but their number."""
    if theirs.dim() and theirs.shape[1:] == ours.shape[1:] and ours.shape[0] == num_classes:
        return theirs.shape[0]
    return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
