"""CvT: Introducing Convolutions to Vision Transformers (Wu et al., ICCV 2021, arXiv:2103.15808).

Three stages, each an overlapping convolution that makes fewer and wider tokens, then transformer blocks whose queries, keys and
values come out of depthwise convolutions. There is no position embedding, so any image size works.

Parameter names are the authors' (`stage2.blocks.0.attn.conv_proj_q.bn`), so their checkpoints load unchanged; `from_official`
converts those of transformers (`microsoft/cvt-13`). As in the released code, not in the text: attention logits are divided by the
square root of the stage's width, not of a head's; the GELU is its sigmoid approximation (transformers runs the same
weights with the exact one: `activation="gelu"`); there is no class token before the last stage.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C)."""
    return x.flatten(2).transpose(1, 2)


class ConvEmbed(nn.Module):
    """Convolutional token embedding (sec. 3.1), then layer norm over channels. (B, C, H, W) -> (B, dim, H', W')."""

    def __init__(self, in_channels: int, dim: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel, stride, padding)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvProjection(nn.Module):
    """Depthwise convolution and batch norm (sec. 3.2). (B, C, H, W) -> tokens (B, H' * W', C)."""

    def __init__(self, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel, stride, kernel // 2, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(self.bn(self.conv(x)))


class Attention(nn.Module):
    """Multi-head attention over tokens of a map, with convolutional projections (fig. 3c). (B, [1 +] H * W, dim) -> the same.

    Args:
        dim: channels.
        num_heads: heads.
        kernel: side of the depthwise convolutions.
        stride_kv: stride of those that make keys and values.
        qkv_bias: whether the linear maps behind the convolutions have a bias.
    """

    def __init__(self, dim: int, num_heads: int, kernel: int = 3, stride_kv: int = 2, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, dim**-0.5
        self.conv_proj_q = ConvProjection(dim, kernel, 1)
        self.conv_proj_k = ConvProjection(dim, kernel, stride_kv)
        self.conv_proj_v = ConvProjection(dim, kernel, stride_kv)
        self.proj_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj_k = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj_v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        extra = x.shape[1] - height * width  # the class token has no place in the map and goes around the convolutions
        token, grid = x[:, :extra], x[:, extra:].transpose(1, 2).reshape(x.shape[0], -1, height, width)

        def heads(convolution: ConvProjection, linear: nn.Linear) -> Tensor:
            tokens = convolution(grid)
            tokens = linear(torch.cat([token.to(tokens.dtype), tokens], dim=1) if extra else tokens)
            return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        q = heads(self.conv_proj_q, self.proj_q)
        k, v = heads(self.conv_proj_k, self.proj_k), heads(self.conv_proj_v, self.proj_v)
        return self.proj(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with an activation between them."""

    def __init__(self, dim: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Block(nn.Module):
    """Convolutional transformer block, pre-norm. Tokens (B, [1 +] H * W, dim) -> the same."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float, activation: str, **attention
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, **attention)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), activation)
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else nn.Identity()

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), height, width))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Token embedding and blocks. (B, C, H, W) -> map (B, dim, H', W') and the class token (B, 1, dim), empty without one."""

    def __init__(
        self,
        in_channels: int,
        dim: int,
        patch: tuple[int, int, int],
        depth: int,
        class_token: bool,
        drop_path_rate: float,
        **block,
    ) -> None:
        super().__init__()
        self.patch_embed = ConvEmbed(in_channels, dim, *patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, drop_path=rate, **block) for rate in rates)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch_embed(x)
        height, width = x.shape[2:]
        x, extra = to_tokens(x), 0
        if self.cls_token is not None:
            x, extra = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1), 1
        for block in self.blocks:
            x = block(x, height, width)
        return x[:, extra:].transpose(1, 2).reshape(x.shape[0], -1, height, width), x[:, :extra]


class CvT(nn.Module):
    """Images (B, in_channels, H, W), normalised, -> logits (B, num_classes).

    Args:
        embed_dim: channels of each stage.
        depth: blocks in each stage.
        num_heads: heads in each stage.
        num_classes: columns of the logits; 0 for features.
        in_channels: channels of the image.
        patch_sizes, patch_strides, patch_paddings: of each stage's token embedding.
        mlp_ratio: hidden channels of the two-layer network, over the stage's.
        stride_kv: stride of the convolutions that make keys and values.
        drop_rate: dropout before the last layer.
        drop_path_rate: of the last block of the last stage; the earlier stages have none, as in the released configurations.
        activation: "quick_gelu", which the released weights were learned with, or "gelu".

    Raises:
        ValueError: if the stages' settings have different lengths, or heads do not divide the channels.
    """

    def __init__(
        self,
        embed_dim: Sequence[int] = (64, 192, 384),
        depth: Sequence[int] = (1, 2, 10),
        num_heads: Sequence[int] = (1, 3, 6),
        num_classes: int = 1000,
        in_channels: int = 3,
        patch_sizes: Sequence[int] = (7, 3, 3),
        patch_strides: Sequence[int] = (4, 2, 2),
        patch_paddings: Sequence[int] = (2, 1, 1),
        mlp_ratio: float = 4.0,
        stride_kv: int = 2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        activation: str = "quick_gelu",
    ) -> None:
        super().__init__()
        lengths = {len(s) for s in (embed_dim, depth, num_heads, patch_sizes, patch_strides, patch_paddings)}
        if len(lengths) > 1:
            raise ValueError("embed_dim, depth, num_heads and the patch settings have one entry for each stage")
        if any(dim % heads for dim, heads in zip(embed_dim, num_heads, strict=True)):
            raise ValueError(f"num_heads must divide embed_dim {tuple(embed_dim)}, got {tuple(num_heads)}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}, got '{activation}'")
        self.stage_count, self.num_classes = len(depth), num_classes
        self.stage_channels, self.stage_strides, stride = list(embed_dim), [], 1
        patches = list(zip(patch_sizes, patch_strides, patch_paddings, strict=True))
        for i, dim in enumerate(embed_dim):
            last = i == len(embed_dim) - 1
            stage = Stage(in_channels, dim, patches[i], depth[i], last, drop_path_rate if last else 0.0,
                          num_heads=num_heads[i], mlp_ratio=mlp_ratio, stride_kv=stride_kv, activation=activation)  # fmt: skip
            self.add_module(f"stage{i}", stage)
            in_channels, stride = dim, stride * patch_strides[i]
            self.stage_strides.append(stride)
        self.num_features = embed_dim[-1]
        self.norm = nn.LayerNorm(self.num_features)
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.apply(initialise)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The outputs of the stages (B, C_i, H_i, W_i), strides 4, 8, 16; without the class token."""
        outputs = []
        for i in range(self.stage_count):
            x, _ = self.get_submodule(f"stage{i}")(x)
            outputs.append(x)
        return outputs

    def embed(self, x: Tensor) -> Tensor:
        """The class token at the end (B, num_features)."""
        token = x
        for i in range(self.stage_count):
            x, token = self.get_submodule(f"stage{i}")(x)
        return self.norm(token[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.embed(x)))

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer for another number of classes; 0 leaves none."""
        self.num_classes = num_classes
        fresh = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        fresh.apply(initialise)
        self.head = fresh.to(self.norm.weight)


def initialise(module: nn.Module) -> None:
    """Truncated normal weights for linear layers and the class token; convolutions keep torch's default."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Stage) and module.cls_token is not None:
        nn.init.trunc_normal_(module.cls_token, std=0.02)


# -- variants (table 2) ------------------------------------------------------------------------------------------------------


def cvt_13(**settings) -> CvT:
    """CvT-13, 20M parameters; `settings` as `CvT`."""
    return CvT(**settings)


def cvt_21(**settings) -> CvT:
    """CvT-21, 32M parameters."""
    return CvT(**{"depth": (1, 4, 16), **settings})


def cvt_w24(**settings) -> CvT:
    """CvT-W24, 277M parameters, for 384 x 384 images."""
    wide = {"embed_dim": (192, 768, 1024), "depth": (2, 2, 20), "num_heads": (3, 12, 16), "drop_path_rate": 0.3}
    return CvT(**{**wide, **settings})


def cvt_digits(**settings) -> CvT:
    """Three small stages for 16x16 images, 0.3M parameters; not in the paper, for seconds on a CPU."""
    small = {"embed_dim": (24, 48, 96), "depth": (1, 1, 2), "num_heads": (1, 2, 4), "drop_path_rate": 0.0}
    patches = {"patch_sizes": (3, 3, 3), "patch_strides": (2, 2, 2), "patch_paddings": (1, 1, 1)}
    return CvT(**{"num_classes": 10, **small, **patches, **settings})


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts the checkpoints of transformers; the authors' are returned as they are."""
    rules = [
        (r"^cvt\.encoder\.stages\.(\d+)\.", r"stage\1."),
        (r"embedding\.convolution_embeddings\.projection\.", "patch_embed.proj."),
        (r"embedding\.convolution_embeddings\.normalization\.", "patch_embed.norm."),
        (r"\.layers\.", ".blocks."),
        (r"attention\.attention\.convolution_projection_([qkv])\w+\.convolution_projection\.convolution\.", r"attn.conv_proj_\1.conv."),
        (r"attention\.attention\.convolution_projection_([qkv])\w+\.convolution_projection\.normalization\.", r"attn.conv_proj_\1.bn."),
        (r"attention\.attention\.projection_([qkv])\w+\.", r"attn.proj_\1."),
        (r"attention\.output\.dense\.", "attn.proj."),
        (r"intermediate\.dense\.", "mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"layernorm_before\.", "norm1."),
        (r"layernorm_after\.", "norm2."),
        (r"^layernorm\.", "norm."),
        (r"^classifier\.", "head."),
    ]  # fmt: skip
    converted = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        converted[name] = value
    return converted
