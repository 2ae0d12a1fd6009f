"""The networks: their sizes, what is a weight and what is not, and that they train."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from qsr.config.schema import ModelConfig
from qsr.errors import ConfigError
from qsr.train.models import build_model, check_model, count_parameters


def settings(
    name: str, *, channels_last: bool = False, timm_name: str | None = None
) -> ModelConfig:
    return ModelConfig(name, timm_name, channels_last)  # type: ignore[arg-type]


def build(name: str, num_classes: int = 10, image_size: int = 32) -> nn.Module:
    torch.manual_seed(1)
    return build_model(settings(name), num_classes, image_size)


@pytest.mark.parametrize(
    ("name", "classes", "size", "parameters"),
    [
        ("resnet152", 1000, 224, 60_192_808),
        ("resnet50", 1000, 224, 25_557_032),
        ("vit_s16", 1000, 224, 21_958_504),
        ("vit_b16", 1000, 224, 86_381_800),  # vit-pytorch 1.2.8's SimpleViT
        ("small_resnet", 10, 32, 78_042),
        ("small_vit", 10, 32, 203_050),
    ],
)
def test_parameter_counts(name: str, classes: int, size: int, parameters: int) -> None:
    assert count_parameters(settings(name), classes, size) == parameters


@pytest.mark.parametrize("name", ["small_resnet", "small_vit"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_small_models_learn(name: str, channels_last: bool) -> None:
    torch.manual_seed(1)
    model = build_model(settings(name, channels_last=channels_last), 4, 32)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_channels_last_is_a_memory_format_and_no_other_network() -> None:
    torch.manual_seed(1)
    last = build_model(settings("small_resnet", channels_last=True), 10, 32).eval()
    plain = build("small_resnet").eval()
    convolutions = [m for m in last.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 9
    assert all(c.weight.is_contiguous(memory_format=torch.channels_last) for c in convolutions)
    for ours, theirs in zip(last.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(last(images), plain(images), rtol=1e-4, atol=1e-5)
    features = last[0](images.to(memory_format=torch.channels_last))  # type: ignore[index]
    assert features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["small_resnet", "small_vit"])
def test_the_seed_decides_the_weights(name: str) -> None:
    first, same = build(name), build(name)
    torch.manual_seed(2)
    other = build_model(settings(name), 10, 32)
    for a, b in zip(first.state_dict().values(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    weights = [p for p in first.parameters() if p.dim() > 1]
    others = [p for p in other.parameters() if p.dim() > 1]
    assert not any(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def test_any_timm_model_by_name() -> None:
    model = build_model(settings("timm", timm_name="test_resnet"), 7, 64)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet18_large", "resent18"])
def test_an_unknown_timm_model_is_refused_with_near_names(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: timm has no such model; closest: .*resnet18"):
        check_model(settings("timm", timm_name=name), 32)


def test_images_that_do_not_divide_into_patches_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.image_size=225 is not a multiple"):
        check_model(settings("vit_b16"), 225)
    with pytest.raises(ConfigError, match=r"is not a multiple of vit_s16's patch size 16"):
        check_model(settings("vit_s16"), 232)
    check_model(settings("vit_b16"), 240)
