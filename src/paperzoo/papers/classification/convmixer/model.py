"""Patches Are All You Need? (Trockman and Kolter, TMLR 2023, arXiv:2201.09792): ConvMixer.

Patches, then depthwise convolutions of a large kernel that mix space and pointwise ones that mix channels, all at one
resolution and width (fig. 2).

Parameter names are those of timm's `convmixer_768_32` (`blocks.3.0.fn.0`), which has the authors' weights; `from_official`
converts the authors' own files. Weights start as PyTorch's layers do, as in the authors' code.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor, nn

from paperzoo.blocks.classifier import last_layer


class Residual(nn.Module):
    """y = f(x) + x."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


def mixer_layer(dim: int, kernel_size: int, activation: Callable[[], nn.Module] = nn.GELU) -> nn.Sequential:
    """Eq. 2 and 3: z' = BN(act(depthwise(z))) + z, then BN(act(pointwise(z'))). (B, dim, H, W) -> the same shape."""
    depthwise = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
    space = Residual(nn.Sequential(depthwise, activation(), nn.BatchNorm2d(dim)))
    return nn.Sequential(space, nn.Conv2d(dim, dim, 1), activation(), nn.BatchNorm2d(dim))


class ConvMixer(nn.Module):
    """Images (B, in_channels, H, W) of any size from a patch up -> logits (B, num_classes).

    Args:
        dim: h, the channels of every layer.
        depth: d, how many layers.
        kernel_size: k of the depthwise convolutions, odd.
        patch_size: p, side of a patch, pixels; rows and columns that fill none are cut off.
        num_classes: columns of the logits; 0 for features.
        in_channels: channels of the image.
        drop_rate: dropout before the head.
        activation: makes an activation; the authors' 768/32 has ReLU.

    Raises:
        ValueError: for an even kernel, or an image smaller than a patch.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        kernel_size: int = 9,
        patch_size: int = 7,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_rate: float = 0.0,
        activation: Callable[[], nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size is {kernel_size}; it must be odd, or the map would be shifted by half a pixel"
            )
        self.num_features, self.patch_size = dim, patch_size
        self.stage_channels, self.stage_strides = [dim], [patch_size]
        patches = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.stem = nn.Sequential(patches, activation(), nn.BatchNorm2d(dim))  # eq. 1
        self.blocks = nn.Sequential(*(mixer_layer(dim, kernel_size, activation) for _ in range(depth)))
        self.dropout = nn.Dropout(drop_rate)
        self.head = last_layer(dim, num_classes)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The one map (B, dim, H / p, W / p), after the last layer."""
        if min(x.shape[-2:]) < self.patch_size:
            raise ValueError(f"image_size: a patch has {self.patch_size} pixels, the image {tuple(x.shape[-2:])}")
        return [self.blocks(self.stem(x))]

    def embed(self, x: Tensor) -> Tensor:
        """Pooled features (B, num_features)."""
        return self.stages(x)[0].mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.embed(x)))

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer for another number of classes; 0 for none."""
        self.head = last_layer(self.num_features, num_classes).to(self.stem[0].weight)


# -- variants ------------------------------------------------------------------------------------------------------------


def convmixer_1536_20(num_classes: int = 1000, in_channels: int = 3, **options) -> ConvMixer:
    """ConvMixer-1536/20 (table 1): kernel 9, patch 7, 51.6M parameters; `options` as `ConvMixer`."""
    return ConvMixer(1536, 20, 9, 7, num_classes, in_channels, **options)


def convmixer_768_32(num_classes: int = 1000, in_channels: int = 3, **options) -> ConvMixer:
    """ConvMixer-768/32 (table 1): kernel 7, patch 7, ReLU, 21.1M parameters."""
    return ConvMixer(768, 32, 7, 7, num_classes, in_channels, **{"activation": nn.ReLU, **options})


def convmixer_1024_20_ks9_p14(num_classes: int = 1000, in_channels: int = 3, **options) -> ConvMixer:
    """ConvMixer-1024/20: kernel 9, patches of 14 pixels, four times as fast, 24.4M parameters."""
    return ConvMixer(1024, 20, 9, 14, num_classes, in_channels, **options)


def convmixer_256_8_cifar(num_classes: int = 10, in_channels: int = 3, **options) -> ConvMixer:
    """ConvMixer-256/8 for CIFAR-10 (sec. 3): kernel 5, patches of 2 pixels, 0.6M parameters."""
    return ConvMixer(256, 8, 5, 2, num_classes, in_channels, **options)


def convmixer_digits(num_classes: int = 10, in_channels: int = 3, **options) -> ConvMixer:
    """Not of the paper: ConvMixer-64/4 with kernel 5 and patches of 4 pixels, for images of 32."""
    return ConvMixer(64, 4, 5, 4, num_classes, in_channels, **options)


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' files, whose network is one chain of numbered layers, to these names; others come through unchanged."""
    numbers = {int(name.split(".")[0]) for name in state_dict if re.match(r"\d+\.", name)}
    if not numbers:
        return dict(state_dict)
    renamed = {}
    for name, value in state_dict.items():
        number, rest = name.split(".", 1)
        if int(number) < 3:  # convolution, activation, batch norm
            renamed[f"stem.{name}"] = value
        elif int(number) == max(numbers):  # behind the pooling and the flattening
            renamed[f"head.{rest}"] = value
        else:
            renamed[f"blocks.{int(number) - 3}.{rest}"] = value
    return renamed
