"""U-Net (Ronneberger, Fischer and Brox, MICCAI 2015, arXiv:1505.04597).

Two 3x3 convolutions a level, four halvings with doubled channels, four 2x2 transposed convolutions back, each followed by the concatenation
with the map of the same level on the way down (fig. 1).

`unet` is the network of the paper: convolutions without padding, so that every output pixel has seen its full context, 572 x 572 in and 388 x 388
out; maps of the way down are cropped in the middle. With `tile` it answers pictures of any size at their own size, by the overlap-tile
strategy (fig. 2): tile by tile, the border mirrored.

`unet_padded` is what the name mostly means today: padded convolutions with batch norm, output as large as the input. Its parameters have the
names of the most used PyTorch version (github.com/milesial/Pytorch-UNet), whose weights load as they are; biases come before ReLU alone
in `unet`, batch norm takes their place here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DoubleConv(nn.Module):
    """Twice (3x3 convolution, batch norm if asked for, ReLU)."""

    def __init__(self, in_channels: int, out_channels: int, padded: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            layers.append(nn.Conv2d(channels, out_channels, 3, padding=int(padded), bias=not padded))
            if padded:
                layers.append(nn.BatchNorm2d(out_channels))
            layers.append(nn.ReLU(inplace=True))
        self.double_conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Down(nn.Module):
    """Max pooling by 2, then two convolutions with twice the channels."""

    def __init__(self, in_channels: int, out_channels: int, padded: bool) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(in_channels, out_channels, padded))

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)


class Up(nn.Module):
    """ "Up-convolution" 2x2 that halves the channels, concatenation with the skipped map, two convolutions."""

    def __init__(self, in_channels: int, out_channels: int, padded: bool) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, 2, stride=2)
        self.conv = DoubleConv(in_channels, out_channels, padded)

    def forward(self, x: Tensor, skipped: Tensor) -> Tensor:
        x = self.up(x)
        high, wide = skipped.shape[2] - x.shape[2], skipped.shape[3] - x.shape[3]
        if self.conv.double_conv[0].padding[0]:
            if high or wide:  # odd sizes were rounded down by pooling
                x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        else:  # the skipped map has lost fewer border pixels
            top, left = high // 2, wide // 2
            skipped = skipped[:, :, top : top + x.shape[2], left : left + x.shape[3]]
        return self.conv(torch.cat([skipped, x], 1))


class UNet(nn.Module):
    """(B, in_channels, H, W) -> logits (B, num_classes, H', W'): as large with `padded` or `tile`, else smaller by 2 * `border`.

    Args:
        width: channels of the first level.
        depth: how often the resolution is halved.
        padded: padded convolutions with batch norm; else convolutions without padding.
        tile: None; or the side of the output tiles in which pictures of any size are answered (not with `padded`).
        drop_rate: dropout at the end of the way down (sec. 3.1).
    """

    def __init__(
        self,
        num_classes: int = 2,
        in_channels: int = 1,
        width: int = 64,
        depth: int = 4,
        padded: bool = False,
        drop_rate: float = 0.0,
        tile: int | None = None,
    ) -> None:
        super().__init__()
        if padded and tile is not None:
            raise ValueError("tile is for convolutions without padding; a padded network answers any size as it is")
        if tile is not None and tile < 1:
            raise ValueError(f"tile is {tile}; it must be 1 or more")
        self.depth, self.padded, self.tile = depth, padded, tile
        widths = [width * 2**level for level in range(depth + 1)]
        self.inc = DoubleConv(in_channels, widths[0], padded)
        for level in range(1, depth + 1):
            self.add_module(f"down{level}", Down(widths[level - 1], widths[level], padded))
        for step, level in enumerate(range(depth, 0, -1), 1):
            self.add_module(f"up{step}", Up(widths[level], widths[level - 1], padded))
        self.outc = nn.Module()
        self.outc.conv = nn.Conv2d(widths[0], num_classes, 1)
        self.dropout = nn.Dropout(drop_rate)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                # sec. 3: Gaussian of deviation sqrt(2 / N), N the incoming nodes of one neuron; of a transposed convolution with
                # stride 2 and kernel 2 these are its input channels
                incoming = module.in_channels * (9 if module.kernel_size == (3, 3) else 1)
                nn.init.normal_(module.weight, std=(2 / incoming) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def border(self) -> int:
        """Pixels that the output lacks on each side: 92 at depth 4. A level loses 4 of its own pixels down, the deepest too, and 4 up."""
        return 0 if self.padded else 6 * 2**self.depth - 4

    def legal(self, side: int) -> int:
        """The smallest output side of at least `side` for which every pooled map has an even size: 4 + a multiple of 2^depth."""
        step = 2**self.depth
        return 4 + max(1, -(-(side - 4) // step)) * step

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) if self.tile is None else self.overlap_tile(x)

    def network(self, x: Tensor) -> Tensor:
        """The U alone. Without padding H and W are 4 + a multiple of 2^depth, plus 2 * `border`, else pooling drops a row."""
        maps = [self.inc(x)]
        for level in range(1, self.depth + 1):
            h = getattr(self, f"down{level}")(maps[-1])
            # the last two levels, as the authors' network file has it
            maps.append(self.dropout(h) if level >= self.depth - 1 else h)
        x = maps.pop()
        for step in range(1, self.depth + 1):
            x = getattr(self, f"up{step}")(x, maps.pop())
        return self.outc.conv(x)

    def overlap_tile(self, x: Tensor) -> Tensor:
        """The overlap-tile strategy: (B, C, H, W) of any size -> (B, num_classes, H, W). Context beyond the border is mirrored.

        Tiles of the output lie side by side, their inputs overlap: there is no seam, as every output pixel sees what it would see in one piece.
        """
        height, width = x.shape[2:]
        sides = [self.legal(min(self.tile, n)) for n in (height, width)]
        counts = [-(-n // side) for n, side in zip((height, width), sides, strict=True)]
        for axis, (n, side, count) in enumerate(zip((height, width), sides, counts, strict=True), 2):
            x = x.index_select(axis, mirrored(n, self.border, side * count - n + self.border).to(x.device))
        high, wide = (side + 2 * self.border for side in sides)
        rows = []
        for top in range(0, counts[0] * sides[0], sides[0]):
            lefts = range(0, counts[1] * sides[1], sides[1])
            rows.append(torch.cat([self.network(x[:, :, top : top + high, left : left + wide]) for left in lefts], 3))
        return torch.cat(rows, 2)[:, :, :height, :width]


def mirrored(size: int, before: int, after: int) -> Tensor:
    """Indices int64 (before + size + after,) that continue a line of pixels by its mirror image, back and forth, the edge pixel not repeated."""
    at = torch.arange(-before, size + after)
    period = max(1, 2 * (size - 1))
    at = at.remainder(period)
    return torch.minimum(at, period - at) if size > 1 else torch.zeros_like(at)


def unet(num_classes: int = 2, in_channels: int = 1, drop_rate: float = 0.5, tile: int | None = None) -> UNet:
    """The paper's network (fig. 1): 23 convolutional layers, none padded; 572 x 572 -> 388 x 388."""
    return UNet(num_classes, in_channels, drop_rate=drop_rate, tile=tile)


def unet_padded(num_classes: int = 2, in_channels: int = 3, drop_rate: float = 0.0) -> UNet:
    """Padded convolutions with batch norm, 64 channels: any size in, the same size out."""
    return UNet(num_classes, in_channels, padded=True, drop_rate=drop_rate)


def unet_slim(num_classes: int = 2, in_channels: int = 3, drop_rate: float = 0.0, tile: int | None = None) -> UNet:
    """Not of the paper: 16 channels and two halvings, without padding, for small pictures and learning in seconds."""
    return UNet(num_classes, in_channels, width=16, depth=2, drop_rate=drop_rate, tile=tile)
