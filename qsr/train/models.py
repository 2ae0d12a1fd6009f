"""Settings -> network, with random initial weights from torch's generator."""

import re
from difflib import get_close_matches
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qsr.config.schema import AnyModel, Config, OwnModelConfig
from qsr.core.seeds import seed_for
from qsr.errors import ConfigError
from qsr.train.networks import build_network, build_own_network

_CLASSES = 10
"""Classes of the network in a trial; the result does not depend on their number."""


def build_model(settings: AnyModel, num_classes: int, image_size: int) -> nn.Module:
    """The network for square images of `image_size` pixels; input [b, 3, size, size], output
    logits [b, num_classes]. The caller has seeded torch and called `check_model`."""
    if isinstance(settings, OwnModelConfig):
        return build_own_network(
            settings.load("model"),
            settings.options,
            num_classes,
            image_size,
            channels_last=settings.channels_last,
        )
    return build_network(
        settings.name,
        settings.timm_name,
        num_classes,
        image_size,
        channels_last=settings.channels_last,
    )


def initial_model(config: Config, num_classes: int, device: torch.device) -> nn.Module:
    """The run's network with its initial weights, the same on every worker."""
    torch.manual_seed(seed_for(config.seed, "weights"))
    return build_model(config.model, num_classes, config.data.image_size).to(device)


def outline(settings: AnyModel, num_classes: int, image_size: int) -> nn.Module:
    """The network on the meta device, without memory for its weights, or on the CPU where the meta
    device does not work (some networks of older timms). Raises ConfigError if it cannot be
    built."""
    try:
        with torch.device("meta"):
            return build_model(settings, num_classes, image_size)
    except Exception:  # the CPU shows whether the network is at fault
        return _build_on_cpu(settings, num_classes, image_size)


def _build_on_cpu(settings: AnyModel, num_classes: int, image_size: int) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]):
            return build_model(settings, num_classes, image_size)
    except Exception as error:  # timm asserts, torch raises RuntimeError and others
        raise ConfigError(
            f"{_name(settings)} cannot be built for data.image_size={image_size} "
            f"({_line(error)}): {_way(settings, 'choose another network')}"
        ) from None


def count_parameters(settings: AnyModel, num_classes: int, image_size: int) -> int:
    """Number of parameters. Raises ConfigError if the network cannot be built."""
    return sum(p.numel() for p in outline(settings, num_classes, image_size).parameters())


def check_model(settings: AnyModel, image_size: int) -> None:
    """Raise ConfigError if there is no such network, or if it cannot take this image size."""
    patch = {"vit_b16": 16, "vit_s16": 16, "small_vit": 4}.get(settings.name, 1)
    if image_size % patch:
        raise ConfigError(
            f"data.image_size={image_size} is not a multiple of {settings.name}'s patch size "
            f"{patch}"
        )
    if isinstance(settings, OwnModelConfig):
        settings.load("model")
        return
    if settings.timm_name is None:
        return
    import timm  # slow, and not needed by the others

    architecture, _, tag = settings.timm_name.partition(".")
    if not timm.is_model(settings.timm_name):
        plain = re.split("[:/]", architecture)[-1]  # timm would also load a path or an address
        near = get_close_matches(plain, timm.list_models(), n=3)
        raise ConfigError(
            f"{_name(settings)}: timm has no such model; closest: {', '.join(near) or 'none'}"
        )
    try:
        timm.models.get_pretrained_cfg(settings.timm_name)
    except RuntimeError:
        raise ConfigError(
            f"{_name(settings)}: timm's {architecture} has no tag {tag!r}; tags select pretrained "
            f"weights, but runs start from random ones: use model.timm_name={architecture}"
        ) from None


def check_network(config: Config) -> None:
    """Raise ConfigError unless the network exists, accepts images of this size and batches of one
    image, and returns logits. Only trying the passes of a run can show that.

    It needs neither data nor a GPU. Passes run on the meta device, which takes a second or two for
    the largest networks; one that fails there is tried again on the CPU before it is refused.
    """
    check_model(config.model, config.data.image_size)
    _try_passes(config.model, config.data.image_size, config.micro_batch_size)


class _Pass(NamedTuple):
    training: bool
    images: int
    size: int
    """Side of the images, in pixels."""


@cache  # a list of runs often has one network
def _try_passes(settings: AnyModel, size: int, micro_batch: int) -> None:
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
    """What goes wrong in a pass through `network`, on its device; None if nothing."""
    device = next(network.parameters()).device
    network.train(tried.training)
    try:
        with torch.random.fork_rng(devices=[]):
            images = torch.zeros(tried.images, 3, tried.size, tried.size, device=device)
            logits: Any = network(images)
    except Exception as error:
        return _line(error)
    if not isinstance(logits, Tensor):
        return f"it returns a {type(logits).__name__} instead of logits"
    if logits.shape != (tried.images, _CLASSES):
        wanted = [tried.images, _CLASSES]
        return f"it returns shape {list(logits.shape)} instead of logits {wanted}"
    return None


def _refusal(settings: AnyModel, network: nn.Module, tried: _Pass, reason: str) -> str:
    """One line: what is refused, why, and what to use instead, as far as trying can show."""
    name = _name(settings)
    if tried.images == 1 and _fault(network, tried._replace(images=2)) is None:
        kind = "training" if tried.training else "validation"
        fix = (
            "set micro_batch, or global_batch / workers, to 2 or more"
            if tried.training
            else _way(settings, "choose another network")
        )
        return (
            f"{name} cannot process a single image of data.image_size={tried.size} in {kind} "
            f"({reason}): {fix}"
        )
    own = getattr(network, "default_cfg", {}).get("input_size", (3, tried.size))[-1]
    if own != tried.size and _fault(network, tried._replace(size=own)) is None:
        return (
            f"data.image_size={tried.size}: {name} does not accept images of this size ({reason}): "
            f"use data.image_size={own}, its default, or another network"
        )
    return (
        f"{name} cannot be used with data.image_size={tried.size} ({reason}): "
        f"{_way(settings, 'choose another')}"
    )


def _name(settings: AnyModel) -> str:
    if isinstance(settings, OwnModelConfig):
        return f"model.target={settings.target}"
    if settings.timm_name is None:
        return f"model.name={settings.name}"
    return f"model.timm_name={settings.timm_name}"


def _way(settings: AnyModel, otherwise: str) -> str:
    return "correct it" if isinstance(settings, OwnModelConfig) else otherwise


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
