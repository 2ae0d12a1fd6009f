"""SimpleViT is vit-pytorch 1.2.8's, which the paper's code trains: weights, outputs, gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from vit_pytorch.simple_vit import SimpleViT as Reference
from vit_pytorch.simple_vit import posemb_sincos_2d

from qsr.train.vit import SimpleViT, from_vit_pytorch, sincos_positions, to_vit_pytorch

SIZES = {
    "small": {
        "image_size": 32,
        "patch_size": 4,
        "classes": 10,
        "width": 64,
        "depth": 4,
        "heads": 4,
    },
    "heads of 64, as ViT-B/16": {
        "image_size": 96,
        "patch_size": 16,
        "classes": 100,
        "width": 192,
        "depth": 3,
        "heads": 3,
    },
}


def ours(sizes: dict[str, int], seed: int = 0) -> SimpleViT:
    torch.manual_seed(seed)
    arguments = {k: v for k, v in sizes.items() if k != "classes"}
    return SimpleViT(num_classes=sizes["classes"], **arguments)


def theirs(sizes: dict[str, int], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Reference(
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        num_classes=sizes["classes"],
        dim=sizes["width"],
        depth=sizes["depth"],
        heads=sizes["heads"],
        mlp_dim=4 * sizes["width"],
        dim_head=sizes["width"] // sizes["heads"],
    )


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(images)
    functional.cross_entropy(logits, labels).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return logits.detach(), {name: grad for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize("copied", ["from theirs", "from ours"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_same_weights_give_the_same_logits_and_gradients(
    sizes: dict[str, int], copied: str
) -> None:
    """In double precision, so that only an error is left and no rounding; and in single."""
    mine, reference = ours(sizes, seed=1), theirs(sizes, seed=2)
    if copied == "from theirs":
        mine.load_state_dict(from_vit_pytorch(reference.state_dict()))
    else:
        reference.load_state_dict(to_vit_pytorch(mine.state_dict()))
    images = torch.randn(3, 3, sizes["image_size"], sizes["image_size"])
    labels = torch.tensor([1, 0, 7])
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-9)):
        mine.zero_grad()
        reference.zero_grad()
        logits, grads = gradients(mine.to(dtype), images.to(dtype), labels)
        expected, expected_grads = gradients(reference.to(dtype), images.to(dtype), labels)
        torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
        renamed = to_vit_pytorch(grads)
        assert renamed.keys() == expected_grads.keys()
        assert len(renamed) == 5 * 2 + sizes["depth"] * 10
        for name, grad in expected_grads.items():
            scale = float(grad.abs().max())
            torch.testing.assert_close(
                renamed[name], grad, rtol=tolerance, atol=tolerance * scale, msg=name
            )


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_same_generator_gives_the_same_initial_weights(sizes: dict[str, int]) -> None:
    mine, reference = ours(sizes), theirs(sizes).state_dict()
    renamed = to_vit_pytorch(mine.state_dict())
    assert list(renamed) == list(reference)
    for name, tensor in renamed.items():
        assert torch.equal(tensor, reference[name]), name


def test_names_convert_both_ways() -> None:
    state = ours(SIZES["small"]).state_dict()
    assert list(from_vit_pytorch(to_vit_pytorch(state))) == list(state)
    for convert in (to_vit_pytorch, from_vit_pytorch):
        with pytest.raises(ValueError, match=r"cls_token is not a weight of"):
            convert({"cls_token": torch.zeros(1)})
        with pytest.raises(ValueError, match=r"is not a weight of"):
            convert({"blocks.0.other.weight": torch.zeros(1)})


@pytest.mark.parametrize(("side", "width"), [(8, 64), (4, 64), (14, 768)])
def test_positions_are_the_2d_sines_and_cosines(side: int, width: int) -> None:
    frequencies = [10_000 ** (-i / (width // 4 - 1)) for i in range(width // 4)]
    rows = []
    for y in range(side):
        for x in range(side):
            of_x, of_y = ([place * f for f in frequencies] for place in (x, y))
            rows.append(
                [
                    function(a)
                    for angles in (of_x, of_y)
                    for function in (math.sin, math.cos)
                    for a in angles
                ]
            )
    torch.testing.assert_close(sincos_positions(side, width), torch.tensor(rows), rtol=0, atol=5e-6)
    assert torch.equal(sincos_positions(side, width), posemb_sincos_2d(side, side, width))


def test_positions_are_a_constant_and_never_missing() -> None:
    """They are recomputed: no weight, not in a file, and the same after loading a state dict."""
    model = ours(SIZES["small"])
    assert not [name for name in model.state_dict() if "pos" in name]
    other = ours(SIZES["small"], seed=5)
    other.load_state_dict(model.state_dict())  # strict
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(other(images), model(images))
    assert torch.equal(other.positions, sincos_positions(8, 64))


def test_positions_matter() -> None:
    """Without them an image and its mirror image, patch by patch, could not be told apart."""
    model = ours(SIZES["small"])
    patches = torch.randn(1, 3, 8, 1, 8, 1).expand(-1, -1, -1, 4, -1, 4)
    image = patches.reshape(1, 3, 32, 32)  # each patch of one colour
    assert (model(image) - model(image.flip(-1))).abs().max() > 1e-3


def test_a_vit_has_nothing_random_in_training() -> None:
    model = ours(SIZES["small"]).train()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 33}, "image_size 33 must be a multiple of patch_size 4"),
        ({"width": 66}, "width 66 must be a multiple of 4 and of heads = 4"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(SIZES["small"] | change)
