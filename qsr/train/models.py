"""Settings -> network. All start from random weights, drawn from torch's generator."""

import re
from difflib import get_close_matches
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qsr.config.schema import Config, ModelConfig
from qsr.core.seeds import seed_for
from qsr.errors import ConfigError
from qsr.train.networks import build_network

_CLASSES = 10
"""For the trial of a network: that of another number of classes goes as well or as badly."""


def build_model(settings: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    """The network for square images of `image_size` pixels; input [b, 3, size, size], output
    logits [b, num_classes]. The caller seeds torch, and has called `check_model`."""
    return build_network(
        settings.name,
        settings.timm_name,
        num_classes,
        image_size,
        channels_last=settings.channels_last,
    )


def initial_model(config: Config, num_classes: int, device: torch.device) -> nn.Module:
    """The run's network at its start: the same weights on every worker."""
    torch.manual_seed(seed_for(config.seed, "weights"))
    return build_model(config.model, num_classes, config.data.image_size).to(device)


def outline(settings: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    """The network without memory for its weights, on the meta device. Some networks of older
    timms cannot be built there: on the CPU then. Raises ConfigError if it cannot be built."""
    try:
        with torch.device("meta"):
            return build_model(settings, num_classes, image_size)
    except Exception:  # the CPU tells whether that is the network's fault
        return _build_on_cpu(settings, num_classes, image_size)


def _build_on_cpu(settings: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]):
            return build_model(settings, num_classes, image_size)
    except Exception as error:  # timm asserts, torch raises RuntimeError and others
        raise ConfigError(
            f"{_name(settings)} cannot be built for data.image_size={image_size} "
            f"({_line(error)}): take another network"
        ) from None


def count_parameters(settings: ModelConfig, num_classes: int, image_size: int) -> int:
    """Parameters of the network. Raises ConfigError if it cannot be built."""
    return sum(p.numel() for p in outline(settings, num_classes, image_size).parameters())


def check_model(settings: ModelConfig, image_size: int) -> None:
    """Raise ConfigError if there is no such network, or none for these images."""
    patch = {"vit_b16": 16, "small_vit": 4}.get(settings.name, 1)
    if image_size % patch:
        raise ConfigError(
            f"data.image_size={image_size} does not divide by {settings.name}'s patches of {patch}"
        )
    if settings.timm_name is None:
        return
    import timm  # slow, and not needed by the others

    architecture, _, tag = settings.timm_name.partition(".")
    if not timm.is_model(settings.timm_name):
        plain = re.split("[:/]", architecture)[-1]  # of a path, or an address that timm would load
        near = get_close_matches(plain, timm.list_models(), n=3)
        raise ConfigError(
            f"{_name(settings)}: timm has no such model; near: {', '.join(near) or 'none'}"
        )
    try:
        timm.models.get_pretrained_cfg(settings.timm_name)
    except RuntimeError:
        raise ConfigError(
            f"{_name(settings)}: timm's {architecture} has no tag {tag!r}; tags name trained "
            f"weights, and here they start at random: take model.timm_name={architecture}"
        ) from None


def check_network(config: Config) -> None:
    """Try the passes of a run, which alone show whether the network takes images of this size, a
    pass of one image, and gives logits. Raises ConfigError if not, or if there is no such network.

    It needs neither data nor a device, and takes a second or two for the largest networks: shapes
    are computed without numbers. Only what fails so is tried again with numbers, on the CPU, before
    it is refused.
    """
    check_model(config.model, config.data.image_size)
    _try_passes(config.model, config.data.image_size, config.micro_batch_size)


class _Pass(NamedTuple):
    training: bool
    images: int
    size: int
    """Pixels of a side."""


@cache  # a list of runs is of one network
def _try_passes(settings: ModelConfig, size: int, micro_batch: int) -> None:
    network = outline(settings, _CLASSES, size)
    training = _Pass(True, min(micro_batch, 2), size)  # two stand for more
    evaluation = _Pass(False, 1, size)  # the last batch of a validation set may be one image
    for one in (training, evaluation):
        if _fault(network, one) is not None:
            reason = _fault(_build_on_cpu(settings, _CLASSES, size), one)
            if reason is not None:
                raise ConfigError(_refusal(settings, network, one, reason))


@torch.no_grad()
def _fault(network: nn.Module, tried: _Pass) -> str | None:
    """What goes wrong in a pass through `network`, on its device."""
    device = next(network.parameters()).device
    network.train(tried.training)
    try:
        with torch.random.fork_rng(devices=[]):
            images = torch.zeros(tried.images, 3, tried.size, tried.size, device=device)
            logits: Any = network(images)
    except Exception as error:
        return _line(error)
    if not isinstance(logits, Tensor):
        return f"it gives a {type(logits).__name__} where logits are needed"
    if logits.shape != (tried.images, _CLASSES):
        wanted = [tried.images, _CLASSES]
        return f"it gives {list(logits.shape)} where logits {wanted} are needed"
    return None


def _refusal(settings: ModelConfig, network: nn.Module, tried: _Pass, reason: str) -> str:
    """One line: what is refused, why, and what to take instead, as far as trying tells."""
    name = _name(settings)
    if tried.images == 1 and _fault(network, tried._replace(images=2)) is None:
        kind = "training" if tried.training else "validation"
        mend = (
            "micro_batch, or global_batch / workers, must be 2 or more"
            if tried.training
            else "take another network"
        )
        return (
            f"{name} takes no single image of data.image_size={tried.size} in {kind} ({reason}): "
            f"{mend}"
        )
    own = getattr(network, "default_cfg", {}).get("input_size", (3, tried.size))[-1]
    if own != tried.size and _fault(network, tried._replace(size=own)) is None:
        return (
            f"data.image_size={tried.size}: {name} takes no such images ({reason}): take "
            f"data.image_size={own}, for which it is made, or another network"
        )
    return f"{name} cannot be used with data.image_size={tried.size} ({reason}): take another one"


def _name(settings: ModelConfig) -> str:
    if settings.timm_name is None:
        return f"model.name={settings.name}"
    return f"model.timm_name={settings.timm_name}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
