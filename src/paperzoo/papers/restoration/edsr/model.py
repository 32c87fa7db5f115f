"""EDSR and MDSR: residual networks for super-resolution without batch norm, made wide, and enlarged by sub-pixel convolutions at the end.

    block(x) = x + res_scale * conv(relu(conv(x)))                                          (figure 2c, section 3.3)
    EDSR(x)  = add_mean(tail(up(head(x - mean) + body(head(x - mean)))))                    (figure 3)
    MDSR: the head, the body and the tail are shared; two blocks of 5 x 5 kernels before the body, and the enlarging after it, are the scale's own   (figure 5)

Parameter names and the range of 255 inside are those of the released checkpoints (EDSR-PyTorch), which load without a map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

DIV2K_MEAN = (0.4488, 0.4371, 0.4040)  # of red, green, blue in [0, 1]


class MeanShift(nn.Conv2d):
    """Takes the mean colour of DIV2K away, or adds it: a fixed 1 x 1 convolution, as the checkpoints store it."""

    def __init__(self, value_range: float, sign: int, in_channels: int = 3) -> None:
        super().__init__(in_channels, in_channels, 1)
        mean = DIV2K_MEAN if in_channels == 3 else (sum(DIV2K_MEAN) / 3,) * in_channels
        with torch.no_grad():
            self.weight.copy_(torch.eye(in_channels)[:, :, None, None])
            self.bias.copy_(torch.tensor(mean) * (sign * value_range))
        self.requires_grad_(False)


class ResidualBlock(nn.Module):
    """Conv, ReLU, Conv, times `res_scale`, plus what came in: (B, C, H, W) to the same."""

    def __init__(self, width: int, kernel_size: int = 3, res_scale: float = 1.0) -> None:
        super().__init__()
        self.res_scale = res_scale
        self.body = nn.Sequential(
            nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.body(x), alpha=self.res_scale)


class Upsampler(nn.Sequential):
    """Sub-pixel convolutions (Shi et al. 2016): (B, C, H, W) to (B, C, scale * H, scale * W). Scale 4 and 8 in steps of 2.

    Raises:
        ValueError: for a scale that is neither 3 nor a power of 2.
    """

    def __init__(self, scale: int, width: int) -> None:
        if scale < 1 or (scale & (scale - 1) and scale != 3):
            raise ValueError(f"scale is {scale}; it is 3 or a power of 2")
        factors = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
        layers: list[nn.Module] = []
        for factor in factors:
            layers += [nn.Conv2d(width, width * factor**2, 3, padding=1), nn.PixelShuffle(factor)]
        super().__init__(*layers)


class EDSR(nn.Module):
    """Small images (B, C, H, W) in [0, 1] to (B, C, scale * H, scale * W), any size.

    Args:
        blocks, width: 16 and 64 for the baseline, 32 and 256 for EDSR. res_scale: 0.1 for EDSR, so that its wide blocks train at all (section 3.3).
        value_range: what the network inside works with; the released ones with 255.
    """

    def __init__(
        self,
        scale: int = 2,
        blocks: int = 16,
        width: int = 64,
        res_scale: float = 1.0,
        in_channels: int = 3,
        value_range: float = 255.0,
    ) -> None:
        super().__init__()
        self.scale, self.value_range = scale, value_range
        self.receptive_radius = 2 * blocks + 4  # head, body, its end, the enlarging, the tail
        self.sub_mean = MeanShift(value_range, -1, in_channels)
        self.add_mean = MeanShift(value_range, 1, in_channels)
        self.head = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1))
        body: list[nn.Module] = [ResidualBlock(width, res_scale=res_scale) for _ in range(blocks)]
        self.body = nn.Sequential(*body, nn.Conv2d(width, width, 3, padding=1))
        self.tail = nn.Sequential(Upsampler(scale, width), nn.Conv2d(width, in_channels, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        x = self.head(self.sub_mean(images * self.value_range))
        return self.add_mean(self.tail(x + self.body(x))) / self.value_range


class MDSR(nn.Module):
    """One network for several scales. `scale` is the one that it enlarges by now, one of `scales`; `set_scale` changes it.

    Small images (B, C, H, W) in [0, 1] to (B, C, scale * H, scale * W).
    """

    def __init__(
        self,
        scales: Sequence[int] = (2, 3, 4),
        blocks: int = 16,
        width: int = 64,
        scale: int = 2,
        in_channels: int = 3,
        value_range: float = 255.0,
    ) -> None:
        super().__init__()
        self.scales, self.value_range = tuple(scales), value_range
        self.receptive_radius = 2 * blocks + 12  # as EDSR's, and four kernels of 5 x 5
        self.sub_mean = MeanShift(value_range, -1, in_channels)
        self.add_mean = MeanShift(value_range, 1, in_channels)
        self.head = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1))
        self.pre_process = nn.ModuleList(
            nn.Sequential(ResidualBlock(width, 5), ResidualBlock(width, 5)) for _ in self.scales
        )
        self.body = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)), nn.Conv2d(width, width, 3, padding=1))
        self.upsample = nn.ModuleList(Upsampler(s, width) for s in self.scales)
        self.tail = nn.Sequential(nn.Conv2d(width, in_channels, 3, padding=1))
        self.set_scale(scale)

    def set_scale(self, scale: int) -> None:
        """Choose the scale of the next calls.

        Raises:
            ValueError: if the network has no such scale.
        """
        if scale not in self.scales:
            raise ValueError(f"scale is {scale}; this network enlarges by {', '.join(map(str, self.scales))}")
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        k = self.scales.index(self.scale)
        x = self.pre_process[k](self.head(self.sub_mean(images * self.value_range)))
        return self.add_mean(self.tail(self.upsample[k](x + self.body(x)))) / self.value_range


def edsr_baseline(scale: int = 2, in_channels: int = 3) -> EDSR:
    """The baseline of one scale (2, 3, 4): 16 blocks of 64 channels."""
    return EDSR(scale, 16, 64, 1.0, in_channels)


def edsr(scale: int = 2, in_channels: int = 3) -> EDSR:
    """EDSR: 32 blocks of 256 channels, each block's change scaled by 0.1."""
    return EDSR(scale, 32, 256, 0.1, in_channels)


def mdsr_baseline(scale: int = 2, in_channels: int = 3) -> MDSR:
    """The baseline of scales 2, 3 and 4: 16 blocks of 64 channels."""
    return MDSR((2, 3, 4), 16, 64, scale, in_channels)


def mdsr(scale: int = 2, in_channels: int = 3) -> MDSR:
    """MDSR: 80 blocks of 64 channels."""
    return MDSR((2, 3, 4), 80, 64, scale, in_channels)


def edsr_slim(scale: int = 2, in_channels: int = 3) -> EDSR:
    """Not in the paper: 3 blocks of 32 channels, to learn in seconds."""
    return EDSR(scale, 3, 32, 1.0, in_channels)
