"""The hourglass with skip connections of Deep Image Prior (Ulyanov, Vedaldi and Lempitsky, 2018, arXiv 1711.10925).

The network of the supplementary material and of the authors' `models/skip.py`: at each scale two convolutions on the
way down (the first with stride 2), a narrow 1x1 skip, and on the way up bilinear or nearest enlargement, concatenation,
batch norm, a 3x3 and a 1x1 convolution. Reflection padding, LeakyReLU 0.2 and a sigmoid at the end. It is never trained
on a data set: its structure alone is the prior.

Sides of the input must be multiples of 2 ** len(channels). The authors crop larger branches where sizes do not fit; here
the recipe feeds noise of a fitting size and crops the result, so that any image can be restored.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paperzoo.tasks.restoration import LanczosDownsample

UPSAMPLING, DOWNSAMPLING = ("nearest", "bilinear"), ("stride", "avg", "lanczos2")


def conv(in_channels: int, out_channels: int, kernel_size: int, downsample: str = "none") -> nn.Sequential:
    """Reflection padding and a convolution that keeps the size, or halves it in one of three ways; then norm and LeakyReLU."""
    stride = 2 if downsample == "stride" else 1
    padding = kernel_size // 2
    layers: list[nn.Module] = [nn.ReflectionPad2d(padding)] if padding else []
    layers.append(nn.Conv2d(in_channels, out_channels, kernel_size, stride))
    if downsample == "avg":
        layers.append(nn.AvgPool2d(2))
    elif downsample == "lanczos2":
        layers.append(LanczosDownsample(2))
    return nn.Sequential(*layers, nn.BatchNorm2d(out_channels), nn.LeakyReLU(0.2))


class Scale(nn.Module):
    """One scale of the hourglass and, inside it, all the smaller ones: (B, C_in, H, W) -> (B, channels[0], H, W)."""

    def __init__(
        self,
        in_channels: int,
        channels: tuple[int, ...],
        skip_channels: tuple[int, ...],
        kernel_size: int,
        upsample: str,
        downsample: str,
        mix: bool,
    ) -> None:
        super().__init__()
        width, skip, smaller = channels[0], skip_channels[0], channels[1:]
        self.skip = conv(in_channels, skip, 1) if skip else None
        self.down = nn.Sequential(conv(in_channels, width, kernel_size, downsample), conv(width, width, kernel_size))
        rest = (smaller, skip_channels[1:], kernel_size, upsample, downsample, mix)
        self.inner = Scale(width, *rest) if smaller else nn.Identity()
        below = smaller[0] if smaller else width
        self.enlarge = nn.Upsample(scale_factor=2, mode=upsample)
        self.norm = nn.BatchNorm2d(skip + below)
        self.up = nn.Sequential(conv(skip + below, width, 3), *([conv(width, width, 1)] if mix else []))

    def forward(self, x: Tensor) -> Tensor:
        below = self.enlarge(self.inner(self.down(x)))
        joined = below if self.skip is None else torch.cat([self.skip(x), below], dim=1)
        return self.up(self.norm(joined))


class Hourglass(nn.Module):
    """f_theta(z): noise (B, in_channels, H, W) -> image (B, out_channels, H, W) in (0, 1).

    Args:
        channels: of each scale, from fine to coarse. skip_channels: of each scale's skip, 0 for none.
        kernel_size: on the way down (3 on the way up). upsample: "bilinear" or "nearest".
        downsample: "stride", "avg" or "lanczos2". mix: a 1x1 convolution after each 3x3 on the way up.
    """

    def __init__(
        self,
        in_channels: int,
        channels: tuple[int, ...],
        skip_channels: tuple[int, ...],
        out_channels: int = 3,
        kernel_size: int = 3,
        upsample: str = "bilinear",
        downsample: str = "stride",
        mix: bool = True,
    ) -> None:
        super().__init__()
        if len(channels) != len(skip_channels) or not channels:
            raise ValueError(
                f"channels and skip_channels need one number for each scale, not {len(channels)} and {len(skip_channels)}"
            )
        if upsample not in UPSAMPLING:
            raise ValueError(f"upsample is '{upsample}'; it is one of {', '.join(UPSAMPLING)}")
        if downsample not in DOWNSAMPLING:
            raise ValueError(f"downsample is '{downsample}'; it is one of {', '.join(DOWNSAMPLING)}")
        self.in_channels, self.multiple = in_channels, 2 ** len(channels)
        self.scales = Scale(in_channels, tuple(channels), tuple(skip_channels), kernel_size, upsample, downsample, mix)
        self.to_image = nn.Conv2d(channels[0], out_channels, 1)

    def forward(self, noise: Tensor) -> Tensor:
        return self.to_image(self.scales(noise)).sigmoid()


def dip_skip(
    in_channels: int = 32, out_channels: int = 3, upsample: str = "bilinear", downsample: str = "stride"
) -> Hourglass:
    """The default architecture of the paper: denoising, super-resolution, restoration of hidden pixels."""
    return Hourglass(in_channels, (128,) * 5, (4,) * 5, out_channels, upsample=upsample, downsample=downsample)


def dip_skip_text(in_channels: int = 32, out_channels: int = 3) -> Hourglass:
    """For text inpainting (figure 7): skips as wide as the rest, nearest enlargement."""
    return Hourglass(in_channels, (128,) * 5, (128,) * 5, out_channels, upsample="nearest")


def dip_skip_hole(in_channels: int = 1, out_channels: int = 3) -> Hourglass:
    """For inpainting large holes (figure 8): six scales, no skips, 5x5 kernels on the way down, no 1x1 convolutions."""
    channels = (16, 32, 64, 128, 128, 128)
    return Hourglass(in_channels, channels, (0,) * 6, out_channels, kernel_size=5, upsample="nearest", mix=False)


def dip_skip_jpeg(in_channels: int = 3, out_channels: int = 3) -> Hourglass:
    """For removing JPEG artefacts (figure 3): narrow, with skips at the two coarsest scales alone."""
    return Hourglass(in_channels, (8, 16, 32, 64, 128), (0, 0, 0, 4, 4), out_channels)


def dip_skip_slim(in_channels: int = 16, out_channels: int = 3, width: int = 16) -> Hourglass:
    """Four narrow scales with the default's skips: for small images on a CPU in seconds (not in the paper)."""
    return Hourglass(in_channels, (width, 2 * width, 4 * width, 4 * width), (4,) * 4, out_channels)
