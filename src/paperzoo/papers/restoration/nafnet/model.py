"""NAFNet: Simple Baselines for Image Restoration (Chen et al., ECCV 2022, arXiv:2204.04676).

A U-shaped network whose blocks have no activation function: a product of channel halves (`SimpleGate`) and a product with pooled
features (simplified channel attention) are what is not linear. `Baseline` is the paper's starting point, with GELU and channel attention.

Images are (B, in_channels, H, W) in [0, 1] of any size: they are padded with zeros to multiples of 2 to the number of levels, and
the result is cut. Parameter names are those of the released code, so that its files load unchanged.

`train_size` is the test-time local converter (Chu et al. 2022, arXiv:2112.04491) that the paper uses for deblurring: while
testing, channel attention pools over windows of one and a half times the training patches instead of the whole image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.papers.classification.convnext.model import EPS, LayerNorm2d


class SimpleGate(nn.Module):
    """X * Y on two halves of the channels (sec. 4). (B, 2 C, H, W) -> (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return a * b


class LocalPool(nn.Module):
    """The mean of the window around each place; the one of the whole map where the window covers it. (B, C, H, W).

    Windows lie inside the map: near a border, the answer of the nearest full window is taken.

    Args:
        window: side of the window in places of the map.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if self.window >= height and self.window >= width:
            return F.adaptive_avg_pool2d(x, 1)
        for axis in (2, 3):
            side = min(self.window, x.shape[axis])
            sums = F.pad(x.cumsum(axis), (1, 0) if axis == 3 else (0, 0, 1, 0))
            count = x.shape[axis] - side + 1
            x = (sums.narrow(axis, side, count) - sums.narrow(axis, 0, count)) / side
        down, right = height - x.shape[2], width - x.shape[3]
        return F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2), mode="replicate")


def pool(window: int | None) -> nn.Module:
    return nn.AdaptiveAvgPool2d(1) if window is None else LocalPool(window)


def dropout(rate: float) -> nn.Module:
    return nn.Dropout(rate) if rate else nn.Identity()


class NAFBlock(nn.Module):
    """Figure 3d: x + beta * mixing(LN(x)), then x + gamma * feed-forward(LN(x)). (B, C, H, W) -> the same.

    Args:
        channels: C. Both branches widen twice, and their gate halves again.
        window: side of the windows that channel attention pools over; None for the whole map.
        drop_rate: dropout at the end of each branch.
    """

    def __init__(self, channels: int, window: int | None = None, drop_rate: float = 0.0) -> None:
        super().__init__()
        wide = 2 * channels
        self.norm1, self.norm2 = LayerNorm2d(channels, eps=EPS), LayerNorm2d(channels, eps=EPS)
        self.conv1 = nn.Conv2d(channels, wide, 1)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.sca = self.attention(channels, window)
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.conv4 = nn.Conv2d(channels, wide, 1)
        self.conv5 = nn.Conv2d(channels, channels, 1)
        self.sg = SimpleGate()
        self.dropout1, self.dropout2 = dropout(drop_rate), dropout(drop_rate)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    @staticmethod
    def attention(channels: int, window: int | None) -> nn.Module:
        """W pool(X) of simplified channel attention (sec. 4)."""
        return nn.Sequential(pool(window), nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.sg(self.conv2(self.conv1(self.norm1(x))))
        x = x + self.dropout1(self.conv3(y * self.sca(y))) * self.beta
        y = self.sg(self.conv4(self.norm2(x)))
        return x + self.dropout2(self.conv5(y)) * self.gamma


class BaselineBlock(nn.Module):
    """Figure 3c: as `NAFBlock`, with GELU in place of the gates and channel attention with two layers (sec. 3).

    `channels` is C, widened only in the feed-forward branch, as in the released code.
    """

    def __init__(self, channels: int, window: int | None = None, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm2d(channels, eps=EPS), LayerNorm2d(channels, eps=EPS)
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.se = nn.Sequential(
            pool(window),
            nn.Conv2d(channels, channels // 2, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // 2, channels, 1),
            nn.Sigmoid(),
        )
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.conv4 = nn.Conv2d(channels, 2 * channels, 1)
        self.conv5 = nn.Conv2d(2 * channels, channels, 1)
        self.dropout1, self.dropout2 = dropout(drop_rate), dropout(drop_rate)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.conv2(self.conv1(self.norm1(x))))
        x = x + self.dropout1(self.conv3(y * self.se(y))) * self.beta
        y = F.gelu(self.conv4(self.norm2(x)))
        return x + self.dropout2(self.conv5(y)) * self.gamma


class NAFNet(nn.Module):
    """Degraded images (B, in_channels, H, W) in [0, 1] -> restored images of the same shape, not clipped.

    Args:
        width: channels of the first level; each further one has twice as many.
        encoder: blocks of each level on the way down.
        middle: blocks at the bottom.
        decoder: blocks of each level on the way up, the lowest first; additions join them to the encoder's.
        in_channels: channels of the images.
        train_size: side of the training patches, for local pooling over windows of 1.5 times that; None for global pooling.
        drop_rate: dropout at the end of each branch.
        block: what levels are made of.

    Raises:
        ValueError: if the ways down and up have different numbers of levels.
    """

    scale = 1

    def __init__(
        self,
        width: int = 32,
        encoder: Sequence[int] = (2, 2, 4, 8),
        middle: int = 12,
        decoder: Sequence[int] = (2, 2, 2, 2),
        in_channels: int = 3,
        train_size: int | None = None,
        drop_rate: float = 0.0,
        block: type[nn.Module] = NAFBlock,
    ) -> None:
        super().__init__()
        if len(encoder) != len(decoder):
            raise ValueError(f"encoder and decoder have as many levels, got {len(encoder)} and {len(decoder)}")
        self.multiple = 2 ** len(encoder)

        def blocks(level: int, count: int) -> nn.Sequential:
            window = None if train_size is None else max(1, 3 * train_size // 2 // 2**level)
            return nn.Sequential(*(block(width * 2**level, window, drop_rate) for _ in range(count)))

        levels = range(len(encoder))
        self.intro = nn.Conv2d(in_channels, width, 3, padding=1)
        self.encoders = nn.ModuleList(blocks(level, encoder[level]) for level in levels)
        self.downs = nn.ModuleList(nn.Conv2d(width * 2**level, width * 2 ** (level + 1), 2, 2) for level in levels)
        self.middle_blks = blocks(len(encoder), middle)
        self.ups = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width * 2 ** (level + 1), width * 2 ** (level + 2), 1, bias=False), nn.PixelShuffle(2)
            )
            for level in reversed(levels)
        )
        self.decoders = nn.ModuleList(
            blocks(level, count) for level, count in zip(reversed(levels), decoder, strict=True)
        )
        self.ending = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        images = F.pad(images, (0, -width % self.multiple, 0, -height % self.multiple))
        x, skips = self.intro(images.contiguous(memory_format=torch.channels_last)), []  # norms have the channels last
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            x = encoder(x)
            skips.append(x)
            x = down(x)
        x = self.middle_blks(x)
        for up, decoder, skip in zip(self.ups, self.decoders, reversed(skips), strict=True):
            x = decoder(up(x) + skip)
        return (self.ending(x) + images)[:, :, :height, :width]


# -- variants ----------------------------------------------------------------------------------------------------------

SIDD = {"encoder": (2, 2, 4, 8), "middle": 12, "decoder": (2, 2, 2, 2)}
GOPRO = {"encoder": (1, 1, 1, 28), "middle": 1, "decoder": (1, 1, 1, 1), "train_size": 256}


def nafnet_sidd_width32(in_channels: int = 3, **settings) -> NAFNet:
    """For denoising (and, in the paper, all studies): 36 blocks, 16 GMACs for 256 x 256."""
    return NAFNet(**{"width": 32, "in_channels": in_channels, **SIDD, **settings})


def nafnet_sidd_width64(in_channels: int = 3, **settings) -> NAFNet:
    return NAFNet(**{"width": 64, "in_channels": in_channels, **SIDD, **settings})


def nafnet_gopro_width32(in_channels: int = 3, **settings) -> NAFNet:
    """For deblurring: 36 blocks, 28 of them at the fourth level, and local pooling while testing."""
    return NAFNet(**{"width": 32, "in_channels": in_channels, **GOPRO, **settings})


def nafnet_gopro_width64(in_channels: int = 3, **settings) -> NAFNet:
    """Also the network for blurred and compressed images (REDS)."""
    return NAFNet(**{"width": 64, "in_channels": in_channels, **GOPRO, **settings})


def baseline_sidd_width32(in_channels: int = 3, **settings) -> NAFNet:
    """The paper's starting point: NAFNet's plan with `BaselineBlock`."""
    return NAFNet(**{"width": 32, "in_channels": in_channels, **SIDD, "block": BaselineBlock, **settings})


def baseline_sidd_width64(in_channels: int = 3, **settings) -> NAFNet:
    return NAFNet(**{"width": 64, "in_channels": in_channels, **SIDD, "block": BaselineBlock, **settings})


def baseline_gopro_width32(in_channels: int = 3, **settings) -> NAFNet:
    return NAFNet(**{"width": 32, "in_channels": in_channels, **GOPRO, "block": BaselineBlock, **settings})


def baseline_gopro_width64(in_channels: int = 3, **settings) -> NAFNet:
    return NAFNet(**{"width": 64, "in_channels": in_channels, **GOPRO, "block": BaselineBlock, **settings})


def nafnet_small(in_channels: int = 3, **settings) -> NAFNet:
    """Two levels of 16 and 32 channels, 6 blocks; not in the paper, for seconds on a CPU."""
    small = {"width": 16, "encoder": (1, 1), "middle": 2, "decoder": (1, 1)}
    return NAFNet(**{"in_channels": in_channels, **small, **settings})
