"""MobileViT (Mehta and Rastegari, ICLR 2022, arXiv:2110.02178).

A MobileNet of inverted residuals in whose last three stages a block treats a transformer as a convolution: pixels are
unfolded into patches, related with the same pixel of every other patch, and folded back (fig. 1b, sec. 3.1).

Parameter names are those of timm's `mobilevit_s`, which has the authors' weights, with `layers` where timm says `stages`
(`layers.2.1.transformer.0.attn.qkv`); `from_official` converts timm's files and those that `transformers` publishes. A map
that the patches do not divide is resized before unfolding and back after folding, as in the authors' code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.classifier import last_layer


class ConvNormAct(nn.Module):
    """A convolution without bias, batch norm and, unless `linear`, SiLU ("Swish", sec. 4.1). `kernel` is odd; same padding."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, linear: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return x if self.linear else F.silu(x, inplace=True)


class InvertedResidual(nn.Module):
    """MobileNetV2's block, "MV2" in fig. 1b: wide, depthwise, narrow; a shortcut where the shape stays.

    (B, inputs, H, W) -> (B, outputs, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, expansion: float = 4.0) -> None:
        super().__init__()
        hidden = int(inputs * expansion)
        self.conv1_1x1 = ConvNormAct(inputs, hidden)
        self.conv2_kxk = ConvNormAct(hidden, hidden, 3, stride, groups=hidden)
        self.conv3_1x1 = ConvNormAct(hidden, outputs, linear=True)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3_1x1(self.conv2_kxk(self.conv1_1x1(x)))
        return x + y if self.shortcut else y


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, dim) -> the same shape."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with SiLU and dropout: (B, N, dim) -> the same shape."""

    def __init__(self, dim: int, hidden: int, drop_rate: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.silu(self.fc1(x)), self.drop_rate, self.training)
        return F.dropout(self.fc2(x), self.drop_rate, self.training)


class TransformerLayer(nn.Module):
    """Attention and perceptron, each behind a layer norm and with a shortcut: (B, N, dim) -> the same shape."""

    def __init__(self, dim: int, num_heads: int = 4, mlp_ratio: float = 2.0, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop_rate)
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.attn(self.norm1(x)), self.drop_rate, self.training)
        return x + self.mlp(self.norm2(x))


def unfold(x: Tensor, patch: int) -> Tensor:
    """Sec. 3.1, X_U: a map (B, C, H, W) to sequences (B * P, N, C), one for each of the P = patch^2 pixels of a patch.

    N is the number of patches; `patch` divides H and W. Sequence p of an image holds pixel p of every patch.
    """
    b, c, height, width = x.shape
    x = x.reshape(b, c, height // patch, patch, width // patch, patch)
    return x.permute(0, 3, 5, 2, 4, 1).reshape(b * patch * patch, (height // patch) * (width // patch), c)


def fold(x: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The inverse of `unfold`: (B * P, N, C) -> (B, C, height, width)."""
    x = x.reshape(-1, patch, patch, height // patch, width // patch, x.shape[2])
    return x.permute(0, 5, 3, 1, 4, 2).reshape(-1, x.shape[5], height, width)


class MobileViTBlock(nn.Module):
    """Fig. 1b: local, global, fused. (B, channels, H, W) -> the same shape.

    Args:
        dim: d, the transformer's channels.
        depth: L, its layers.
        patch: h = w, pixels; not larger than the 3x3 convolutions around, so that every pixel sees all others (fig. 4).
    """

    def __init__(self, channels: int, dim: int, depth: int, patch: int = 2, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.patch = patch
        self.conv_kxk = ConvNormAct(channels, channels, 3)
        self.conv_1x1 = nn.Conv2d(channels, dim, 1, bias=False)
        self.transformer = nn.Sequential(*(TransformerLayer(dim, drop_rate=drop_rate) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.conv_proj = ConvNormAct(dim, channels)
        self.conv_fusion = ConvNormAct(2 * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_1x1(self.conv_kxk(x))
        size = y.shape[-2:]
        height, width = (-(-side // self.patch) * self.patch for side in size)
        resized = (height, width) != tuple(size)
        if resized:
            y = F.interpolate(y, (height, width), mode="bilinear")
        y = fold(self.norm(self.transformer(unfold(y, self.patch))), self.patch, height, width)
        if resized:
            y = F.interpolate(y, size, mode="bilinear")
        return self.conv_fusion(torch.cat([x, self.conv_proj(y)], dim=1))


class MobileViT(nn.Module):
    """Fig. 1b: images (B, in_channels, H, W) of any size, in [0, 1], red last in the authors' weights, -> logits (B, num_classes).

    Args:
        channels: of the stem, the five stages and the last convolution.
        dims, depths: d and L of the blocks in the last three stages.
        expansion: of the inverted residuals.
        num_classes: columns of the logits; 0 for features.
        in_channels: channels of the image.
        drop_rate: dropout before the head.
        transformer_drop_rate: dropout inside the transformers.
        stem_stride: of the first convolution; 1 keeps small images large.
    """

    def __init__(
        self,
        channels: Sequence[int],
        dims: Sequence[int],
        depths: Sequence[int] = (2, 4, 3),
        expansion: float = 4.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_rate: float = 0.0,
        transformer_drop_rate: float = 0.0,
        stem_stride: int = 2,
    ) -> None:
        super().__init__()
        if len(channels) != 7 or len(dims) != 3 or len(depths) != 3:
            raise ValueError(
                f"channels has 7 entries, dims and depths 3 each; got {len(channels)}, {len(dims)} and {len(depths)}"
            )
        stem, *widths, self.num_features = channels
        self.stage_channels = list(widths)
        self.stage_strides = [stem_stride << i for i in range(5)]
        self.stem = ConvNormAct(in_channels, stem, 3, stem_stride)
        layers, before = [], stem
        for i, width in enumerate(widths):
            stage = [InvertedResidual(before, width, 1 if i == 0 else 2, expansion)]
            if i == 1:
                stage += [InvertedResidual(width, width, 1, expansion) for _ in range(2)]
            elif i > 1:
                stage.append(MobileViTBlock(width, dims[i - 2], depths[i - 2], drop_rate=transformer_drop_rate))
            layers.append(nn.Sequential(*stage))
            before = width
        self.layers = nn.Sequential(*layers)
        self.final_conv = ConvNormAct(before, self.num_features)
        self.dropout = nn.Dropout(drop_rate)
        self.head = nn.ModuleDict({"fc": last_layer(self.num_features, num_classes)})
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The outputs at the five resolutions, before the last 1x1 convolution."""
        x, maps = self.stem(x), []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps

    def embed(self, x: Tensor) -> Tensor:
        """Pooled features (B, num_features). Not by `stages`, so that each map is freed when it was read."""
        return self.final_conv(self.layers(self.stem(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head["fc"](self.dropout(self.embed(x)))

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer for another number of classes; 0 for none."""
        self.head["fc"] = last_layer(self.num_features, num_classes).to(self.stem.conv.weight)


# -- variants ------------------------------------------------------------------------------------------------------------


def mobilevit_s(num_classes: int = 1000, in_channels: int = 3, **options) -> MobileViT:
    """MobileViT-S (table 4), 5.6M parameters, for 256 pixels; `options` as `MobileViT`."""
    return MobileViT(
        (16, 32, 64, 96, 128, 160, 640), (144, 192, 240), (2, 4, 3), 4.0, num_classes, in_channels, **options
    )


def mobilevit_xs(num_classes: int = 1000, in_channels: int = 3, **options) -> MobileViT:
    """MobileViT-XS, 2.3M parameters."""
    return MobileViT((16, 32, 48, 64, 80, 96, 384), (96, 120, 144), (2, 4, 3), 4.0, num_classes, in_channels, **options)


def mobilevit_xxs(num_classes: int = 1000, in_channels: int = 3, **options) -> MobileViT:
    """MobileViT-XXS, 1.3M parameters."""
    return MobileViT((16, 16, 24, 48, 64, 80, 320), (64, 80, 96), (2, 4, 3), 2.0, num_classes, in_channels, **options)


def mobilevit_digits(num_classes: int = 10, in_channels: int = 3, **options) -> MobileViT:
    """Not of the paper: XXS at half its width with one transformer layer a stage, for images of 32 pixels."""
    small = {"expansion": 2.0, "stem_stride": 1}
    return MobileViT(
        (8, 8, 16, 24, 32, 40, 160),
        (32, 40, 48),
        (1, 1, 1),
        num_classes=num_classes,
        in_channels=in_channels,
        **{**small, **options},
    )


NAMES = (
    (r"^mobilevit\.", ""),
    (r"^conv_stem\.", "stem."),
    (r"^conv_1x1_exp\.", "final_conv."),
    (r"^classifier\.", "head.fc."),
    (r"^encoder\.layer\.([01])\.layer\.", r"layers.\1."),
    (r"^encoder\.layer\.(\d)\.downsampling_layer\.", r"layers.\1.0."),
    (r"^encoder\.layer\.(\d)\.", r"layers.\1.1."),
    (r"\.expand_1x1\.", ".conv1_1x1."),
    (r"\.conv_3x3\.", ".conv2_kxk."),
    (r"\.reduce_1x1\.", ".conv3_1x1."),
    (r"\.conv_1x1\.convolution\.", ".conv_1x1."),
    (r"\.conv_projection\.", ".conv_proj."),
    (r"\.fusion\.", ".conv_fusion."),
    (r"(conv\w*|stem|conv1_1x1|conv2_kxk|conv3_1x1)\.convolution\.", r"\1.conv."),
    (r"\.normalization\.", ".bn."),
    (r"\.transformer\.layer\.", ".transformer."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm\.", ".norm."),
    (r"^stages\.", "layers."),
)
"""What `transformers` calls the parts, and what they are called here; and timm's one other word."""


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Files of timm and of `transformers` (where queries, keys and values are apart) to these names."""
    renamed: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    for name in [n for n in renamed if ".attention.attention.query." in n]:
        parts = [renamed.pop(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        renamed[name.replace(".attention.attention.query.", ".attn.qkv.")] = torch.cat(parts)
    return renamed
