"""Name -> network. All start from random weights, drawn from torch's generator."""

from difflib import get_close_matches

import timm
import torch
from torch import nn
from torchvision.models import resnet152
from torchvision.models.resnet import BasicBlock, conv1x1

from qsr.config.load import ConfigError
from qsr.config.schema import ModelConfig
from qsr.vit import SimpleViT


def build_model(settings: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    """The network for square images of `image_size` pixels; input [b, 3, size, size], output
    logits [b, num_classes]. The caller seeds torch, and has called `check_model`."""
    model: nn.Module
    match settings.name:
        case "resnet152":
            model = resnet152(weights=None, num_classes=num_classes)
        case "vit_b16":
            model = SimpleViT(
                image_size=image_size,
                patch_size=16,
                num_classes=num_classes,
                width=768,
                depth=12,
                heads=12,
            )
        case "small_resnet":
            model = SmallResNet(num_classes)
        case "small_vit":
            model = SimpleViT(
                image_size=image_size,
                patch_size=4,
                num_classes=num_classes,
                width=64,
                depth=4,
                heads=4,
            )
        case "timm":
            model = timm.create_model(settings.timm_name or "", num_classes=num_classes)
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    return model


def check_model(settings: ModelConfig, image_size: int) -> None:
    """Raise ConfigError if this network cannot be built for these images."""
    patch = {"vit_b16": 16, "small_vit": 4}.get(settings.name, 1)
    if image_size % patch:
        raise ConfigError(
            f"data.image_size={image_size} does not divide by {settings.name}'s patches of {patch}"
        )
    if settings.timm_name is not None and not timm.is_model(settings.timm_name):
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


class SmallResNet(nn.Sequential):
    """Three residual blocks of 16, 32 and 64 channels with BatchNorm, 78,000 parameters, for
    images of about 32 pixels."""

    def __init__(self, num_classes: int) -> None:
        stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        super().__init__(
            stem,
            BasicBlock(16, 16),
            _downsampling_block(16, 32),
            _downsampling_block(32, 64),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, num_classes),
        )


def _downsampling_block(channels_in: int, channels_out: int) -> nn.Module:
    shortcut = nn.Sequential(
        conv1x1(channels_in, channels_out, stride=2), nn.BatchNorm2d(channels_out)
    )
    return BasicBlock(channels_in, channels_out, stride=2, downsample=shortcut)
