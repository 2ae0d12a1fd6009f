"""The networks: their sizes, what is a weight and what is not, and that they train."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qsr.config.load import ConfigError
from qsr.config.schema import ModelConfig
from qsr.models import SimpleViT, build_model, check_model


def settings(
    name: str, *, channels_last: bool = False, timm_name: str | None = None
) -> ModelConfig:
    return ModelConfig(name, timm_name, channels_last)  # type: ignore[arg-type]


def build(name: str, num_classes: int = 10, image_size: int = 32) -> nn.Module:
    torch.manual_seed(1)
    return build_model(settings(name), num_classes, image_size)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def vit_parameters(width: int, depth: int, patch: int, classes: int) -> int:
    """Patches, blocks (two norms, attention, an MLP of 4 times the width), last norm, head; no
    positions and no class token."""
    mlp = 4 * width
    attention = (3 * width * width + 3 * width) + (width * width + width)
    block = 2 * 2 * width + attention + (width * mlp + mlp) + (mlp * width + width)
    return (3 * patch**2 + 1) * width + depth * block + 2 * width + (width + 1) * classes


@pytest.mark.parametrize(
    ("name", "classes", "size", "parameters"),
    [
        ("resnet152", 1000, 224, 60_192_808),
        ("vit_b16", 1000, 224, 86_415_592),
        ("small_resnet", 10, 32, 78_042),
        ("small_vit", 10, 32, 203_850),
    ],
)
def test_parameter_counts(name: str, classes: int, size: int, parameters: int) -> None:
    with torch.device("meta"):
        if "vit" not in name:
            assert count(build_model(settings(name), classes, size)) == parameters
            return
    assert count(build_model(settings(name), classes, size)) == parameters
    width, depth, patch = (768, 12, 16) if name == "vit_b16" else (64, 4, 4)
    assert vit_parameters(width, depth, patch, classes) == parameters


def sincos_2d(side: int, width: int) -> Tensor:
    """[side^2, width]: sines of row and column, then their cosines, at width / 4 frequencies that
    fall from 1 towards 1/10,000."""
    rows = []
    for row in range(side):
        for column in range(side):
            angles = [
                place * 10_000 ** (-i / (width // 4))
                for place in (row, column)
                for i in range(width // 4)
            ]
            rows.append([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
    return torch.tensor(rows)


@pytest.mark.parametrize(("size", "side"), [(32, 8), (16, 4)])
def test_positions_are_the_2d_sines_and_cosines(size: int, side: int) -> None:
    model = build("small_vit", image_size=size)
    torch.testing.assert_close(
        model.get_buffer("pos_embed")[0], sincos_2d(side, 64), rtol=0, atol=2e-6
    )


def test_positions_are_no_weights_and_there_is_no_class_token() -> None:
    model = build("small_vit")
    names = {*dict(model.named_parameters()), *model.state_dict()}
    assert not [name for name in names if "pos" in name or "token" in name]
    assert "pos_embed" in dict(model.named_buffers())
    tokens = model.forward_features(torch.zeros(2, 3, 32, 32))  # type: ignore[operator]
    assert tokens.shape == (2, 64, 64)  # the patches alone


def test_the_head_sees_the_mean_over_the_normalised_patches() -> None:
    model = build("small_vit")
    assert isinstance(model, SimpleViT)
    nn.init.normal_(model.get_parameter("head.weight"))
    images = torch.randn(2, 3, 32, 32)
    tokens = model.patch_embed(images) + model.pos_embed
    for block in model.blocks:
        tokens = block(tokens)
    pooled = model.norm(tokens).mean(dim=1)
    torch.testing.assert_close(model(images), model.head(pooled), rtol=1e-5, atol=1e-5)


def test_a_vit_has_nothing_random_in_training() -> None:
    model = build("small_vit").train()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), model(images))


def test_positions_matter() -> None:
    """Without them an image and its mirror image, patch by patch, could not be told apart."""
    model = build("small_vit")
    nn.init.normal_(model.get_parameter("head.weight"))
    patches = torch.randn(1, 3, 8, 1, 8, 1).expand(-1, -1, -1, 4, -1, 4)
    image = patches.reshape(1, 3, 32, 32)  # each patch of one colour
    assert (model(image) - model(image.flip(-1))).abs().max() > 1e-3


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
    differ = [not torch.equal(a, b) for a, b in zip(weights, others, strict=True)]
    # the last layer of timm's ViT may start at zero; every other one is drawn
    assert all(differ[:-1])


def test_any_timm_model_by_name() -> None:
    model = build_model(settings("timm", timm_name="test_resnet"), 7, 64)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet18_large", "resent18"])
def test_an_unknown_timm_model_is_refused_with_near_names(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: timm has no such model; near: .*resnet18"):
        check_model(settings("timm", timm_name=name), 32)


def test_images_that_do_not_divide_into_patches_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.image_size=225 does not divide"):
        check_model(settings("vit_b16"), 225)
    check_model(settings("vit_b16"), 240)
