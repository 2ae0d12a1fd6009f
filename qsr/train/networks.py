"""Name -> network, from plain values; imports timm only for timm's networks."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torchvision.models import resnet50, resnet152
from torchvision.models.resnet import BasicBlock, conv1x1

from qsr.train.vit import SimpleViT


def build_network(
    name: str, timm_name: str | None, num_classes: int, image_size: int, *, channels_last: bool
) -> nn.Module:
    """The network for square images of `image_size` pixels, with random weights from torch's
    generator; input [b, 3, size, size], output logits [b, num_classes].

    Raises ValueError for an unknown name or an unsupported image size, ImportError if timm is
    needed but not installed, and whatever timm raises.
    """
    model: nn.Module
    match name:
        case "resnet152":
            model = resnet152(weights=None, num_classes=num_classes)
        case "resnet50":
            model = resnet50(weights=None, num_classes=num_classes)
        case "vit_b16" | "vit_s16":
            width, heads = (768, 12) if name == "vit_b16" else (384, 6)
            model = SimpleViT(
                image_size=image_size,
                patch_size=16,
                num_classes=num_classes,
                width=width,
                depth=12,
                heads=heads,
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
            import timm  # slow, and not needed by the others

            if not timm.is_model(timm_name or ""):  # create_model also takes addresses
                raise ValueError(f"Unknown model ({timm_name})")
            model = timm.create_model(timm_name or "", num_classes=num_classes)
        case _:
            raise ValueError(f"unknown network {name!r}")
    return _in_format(model, channels_last)


def build_own_network(
    build: Callable[..., Any],
    options: Mapping[str, Any],
    num_classes: int,
    image_size: int,
    *,
    channels_last: bool,
) -> nn.Module:
    """The same for a network that a function of the user builds. Raises ValueError if it returns
    something else, and whatever it raises."""
    model = build(num_classes=num_classes, image_size=image_size, **options)
    if not isinstance(model, nn.Module):
        raise ValueError(f"it returns a {type(model).__name__}, not a torch.nn.Module")
    if next(model.parameters(), None) is None:
        raise ValueError("it returns a module without parameters")
    return _in_format(model, channels_last)


def _in_format(model: nn.Module, channels_last: bool) -> nn.Module:
    return model.to(memory_format=torch.channels_last) if channels_last else model


def evaluation_mode(module: nn.Module) -> nn.Module:
    """Put `module` into evaluation mode, without cached tensors, and return it.

    Some networks (timm's LeViT, TinyViT and EfficientViT, for attention biases) cache a tensor that
    they compute from their weights in the first pass in evaluation mode. train() always drops that
    cache, eval() does not: after a change of weights, eval() alone would leave a stale cache.
    """
    return module.train().eval()


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
    block: nn.Module = BasicBlock(channels_in, channels_out, stride=2, downsample=shortcut)
    return block
