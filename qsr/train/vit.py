"""SimpleViT: the vision transformer that the paper trains.

The paper's code uses `SimpleViT` of vit-pytorch 1.2.8 (Beyer et al. 2022, "Better plain ViT
baselines for ImageNet-1k"). This is the same function with the same initial weights, bit for bit,
for the same state of torch's generator. It needs only torch, so it can be copied into other code;
`to_vit_pytorch` and `from_vit_pytorch` rename the weights.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional


class SimpleViT(nn.Module):
    """A patch projection with LayerNorm before and after it, fixed 2-D sine-cosine positions,
    pre-norm blocks, the mean over all tokens, LayerNorm and a linear head. No class token, no
    dropout, no bias in attention.

    Args:
        image_size: height and width of the images, in pixels; a multiple of `patch_size`.
        width: features of a token; a multiple of 4 and of `heads`.
        mlp_width: hidden features of each block's MLP; 4 * width by default.

    Input [b, 3, image_size, image_size], output logits [b, num_classes].
    """

    positions: Tensor

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        num_classes: int,
        width: int,
        depth: int,
        heads: int,
        mlp_width: int | None = None,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"image_size {image_size} must be a multiple of patch_size {patch_size}"
            )
        if width % 4 or width % heads:
            raise ValueError(f"width {width} must be a multiple of 4 and of heads = {heads}")
        self.image_size = image_size
        self.patch_size = patch_size
        side = image_size // patch_size
        pixels = 3 * patch_size**2
        # Modules are created in vit-pytorch's order, so that equal seeds give equal weights.
        self.patch_norm = nn.LayerNorm(pixels)
        self.patch_projection = nn.Linear(pixels, width)
        self.token_norm = nn.LayerNorm(width)
        self.blocks = nn.Sequential(
            *(Block(width, heads, mlp_width or 4 * width) for _ in range(depth))
        )
        self.head_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        # A constant, so it is not in the state dict.
        self.register_buffer("positions", sincos_positions(side, width), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch_projection(self.patch_norm(self.patches(images)))
        tokens = self.token_norm(tokens)
        tokens = self.blocks(tokens + self.positions.to(tokens.dtype))
        logits: Tensor = self.head(self.head_norm(tokens.mean(dim=1)))
        return logits

    def patches(self, images: Tensor) -> Tensor:
        """[b, (h w), (row column channel)]: the pixels of each patch, channels innermost."""
        batch, channels, height, width = images.shape
        patch = self.patch_size
        grid = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
        return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


class Block(nn.Module):
    """Attention and MLP, each with a LayerNorm before it and a residual connection around it."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_projection = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, mlp_width),
            nn.GELU(),
            nn.Linear(mlp_width, width),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.attention_norm(tokens))
        out: Tensor = tokens + self.mlp(tokens)
        return out

    def attention(self, tokens: Tensor) -> Tensor:
        """Softmax(q k^T / sqrt(width / heads)) v, for each head."""
        batch, count, width = tokens.shape
        qkv = self.qkv(tokens).view(batch, count, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.attention_projection(mixed.transpose(1, 2).reshape(tokens.shape))
        return out


def sincos_positions(side: int, width: int) -> Tensor:
    """[side^2, width]: sin x, cos x, sin y, cos y of each token's column x and row y, at width / 4
    frequencies that fall geometrically from 1 to 1/10,000."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    frequencies = 1.0 / 10_000 ** (torch.arange(width // 4) / (width // 4 - 1))
    x = x.flatten()[:, None] * frequencies
    y = y.flatten()[:, None] * frequencies
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)


_BLOCK_NAMES = {
    "attention_norm": "0.norm",
    "qkv": "0.to_qkv",
    "attention_projection": "0.to_out",
    "mlp.": "1.net.",
}
_OUTER_NAMES = {
    "patch_norm": "to_patch_embedding.1",
    "patch_projection": "to_patch_embedding.2",
    "token_norm": "to_patch_embedding.3",
    "head_norm": "linear_head.0",
    "head": "linear_head.1",
}


def to_vit_pytorch(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A `SimpleViT.state_dict()` under the names of vit-pytorch's SimpleViT."""
    return {_their_name(name): tensor for name, tensor in state.items()}


def from_vit_pytorch(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of vit-pytorch's SimpleViT under the names of ours. Raises ValueError if a
    name is not one of that network's."""
    return {_our_name(name): tensor for name, tensor in state.items()}


def _their_name(name: str) -> str:
    in_block = re.fullmatch(r"blocks\.(\d+)\.(mlp\.|\w+)(.*)", name)
    if in_block and in_block[2] in _BLOCK_NAMES:
        return f"transformer.layers.{in_block[1]}.{_BLOCK_NAMES[in_block[2]]}{in_block[3]}"
    module, _, leaf = name.rpartition(".")
    if module in _OUTER_NAMES:
        return f"{_OUTER_NAMES[module]}.{leaf}"
    raise ValueError(f"{name} is not a weight of SimpleViT")


def _our_name(name: str) -> str:
    for ours, theirs in _OUTER_NAMES.items():
        if name.rpartition(".")[0] == theirs:
            return f"{ours}.{name.rpartition('.')[2]}"
    in_block = re.fullmatch(r"transformer\.layers\.(\d+)\.(.*)", name)
    for ours, theirs in _BLOCK_NAMES.items():
        if in_block and in_block[2].startswith(theirs):
            return f"blocks.{in_block[1]}.{ours}{in_block[2].removeprefix(theirs)}"
    raise ValueError(f"{name} is not a weight of vit-pytorch's SimpleViT")
