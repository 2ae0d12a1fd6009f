"""Settings -> network. All start from random weights, drawn from torch's generator."""

from difflib import get_close_matches

import torch
from torch import nn

from qsr.config.load import ConfigError
from qsr.config.schema import ModelConfig
from qsr.networks import build_network


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


def check_model(settings: ModelConfig, image_size: int) -> None:
    """Raise ConfigError if this network cannot be built for these images."""
    patch = {"vit_b16": 16, "small_vit": 4}.get(settings.name, 1)
    if image_size % patch:
        raise ConfigError(
            f"data.image_size={image_size} does not divide by {settings.name}'s patches of {patch}"
        )
    if settings.timm_name is None:
        return
    import timm  # slow, and not needed by the others

    if not timm.is_model(settings.timm_name):
        near = get_close_matches(settings.timm_name, timm.list_models(), n=3)
        raise ConfigError(
            f"model.timm_name={settings.timm_name}: timm has no such model; "
            f"near: {', '.join(near) or 'none'}"
        )


def count_parameters(settings: ModelConfig, num_classes: int, image_size: int) -> int:
    """Parameters of the network, counted without memory for them."""
    with torch.device("meta"):
        model = build_model(settings, num_classes, image_size)
    return sum(parameter.numel() for parameter in model.parameters())
