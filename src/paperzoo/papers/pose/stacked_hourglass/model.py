"""Stacked Hourglass Networks for Human Pose Estimation (Newell, Yang and Deng, ECCV 2016, arXiv:1603.06937).

An hourglass halves its map four times and doubles it again, with a residual block on the way across at every scale (fig. 3).
Several follow each other; each makes heat maps, which are supervised and fed back into the features (fig. 4).

Names are those of the authors' PyTorch code (`pre.0.conv`, `hgs.0.0.up1.conv1.conv`, …). `from_official` takes its checkpoints; it
leaves out the shortcuts' convolutions that the released blocks hold, but do not use, where the channels stay the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv(nn.Module):
    """A convolution with bias, then batch norm and ReLU where they are wanted."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        bn: bool = False,
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, (kernel_size - 1) // 2)
        self.bn = nn.BatchNorm2d(out_channels) if bn else None
        self.relu = nn.ReLU() if relu else None

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.conv, self.bn, self.relu):
            x = x if layer is None else layer(x)
        return x


class Residual(nn.Module):
    """A bottleneck of 1x1, 3x3 and 1x1 with batch norm and ReLU before each (fig. 4 left): (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        middle = out_channels // 2
        self.relu = nn.ReLU()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = Conv(in_channels, middle, 1)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv2 = Conv(middle, middle, 3)
        self.bn3 = nn.BatchNorm2d(middle)
        self.conv3 = Conv(middle, out_channels, 1)
        self.skip_layer = Conv(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.skip_layer is None else self.skip_layer(x)
        y = self.conv1(self.relu(self.bn1(x)))
        y = self.conv2(self.relu(self.bn2(y)))
        return shortcut + self.conv3(self.relu(self.bn3(y)))


class Hourglass(nn.Module):
    """Of order n: across at this scale, and down, through an hourglass of order n - 1, and up (fig. 3). (B, C, H, W) -> the same."""

    def __init__(self, order: int, channels: int) -> None:
        super().__init__()
        self.up1 = Residual(channels, channels)
        self.pool1 = nn.MaxPool2d(2, 2)
        self.low1 = Residual(channels, channels)
        self.low2 = Hourglass(order - 1, channels) if order > 1 else Residual(channels, channels)
        self.low3 = Residual(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        across = self.up1(x)
        low = self.low3(self.low2(self.low1(self.pool1(x))))
        return across + F.interpolate(low, size=across.shape[2:], mode="nearest")


class Merge(nn.Module):
    """A 1x1 convolution that brings features or heat maps back (fig. 4 right)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class StackedHourglass(nn.Module):
    """Images (B, in_channels, H, W) -> heat maps of every stage (B, stacks, num_keypoints, H / 4, W / 4), the last one the best.

    Args:
        stacks: hourglasses, one after another, without shared weights.
        num_keypoints: heat maps.
        in_channels: channels of the image.
        channels: of the features.
        stem: channels of the first convolution and of the residual blocks after it.
        order: how often an hourglass halves its map; H / 4 and W / 4 are at least 2^order.
    """

    def __init__(
        self,
        stacks: int,
        num_keypoints: int = 16,
        in_channels: int = 3,
        channels: int = 256,
        stem: tuple[int, int] = (64, 128),
        order: int = 4,
    ) -> None:
        super().__init__()
        if stacks < 1 or order < 1 or num_keypoints < 1:
            raise ValueError("stacks, order and num_keypoints must be 1 or more")
        self.num_keypoints, self.stacks, self.order, self.stride = num_keypoints, stacks, order, 4
        self.pre = nn.Sequential(
            Conv(in_channels, stem[0], 7, 2, bn=True, relu=True),
            Residual(stem[0], stem[1]),
            nn.MaxPool2d(2, 2),
            Residual(stem[1], stem[1]),
            Residual(stem[1], channels),
        )
        each = range(stacks)
        self.hgs = nn.ModuleList(nn.Sequential(Hourglass(order, channels)) for _ in each)
        self.features = nn.ModuleList(
            nn.Sequential(Residual(channels, channels), Conv(channels, channels, 1, bn=True, relu=True)) for _ in each
        )
        self.outs = nn.ModuleList(Conv(channels, num_keypoints, 1) for _ in each)
        self.merge_features = nn.ModuleList(Merge(channels, channels) for _ in each[1:])
        self.merge_preds = nn.ModuleList(Merge(num_keypoints, channels) for _ in each[1:])

    def forward(self, images: Tensor) -> Tensor:
        least = 4 * 2**self.order
        if min(images.shape[-2:]) < least:
            raise ValueError(
                f"images of {tuple(images.shape[-2:])} pixels; an hourglass of order {self.order} needs {least} or more"
            )
        x, heatmaps = self.pre(images), []
        for i in range(self.stacks):
            features = self.features[i](self.hgs[i](x))
            heatmaps.append(self.outs[i](features))
            if i < self.stacks - 1:  # x' = x + W1 f + W2 h (sec. 3.3)
                x = x + self.merge_preds[i](heatmaps[-1]) + self.merge_features[i](features)
        return torch.stack(heatmaps, 1)


# -- variants ------------------------------------------------------------------------------------------------------------


def hg1(num_keypoints: int = 16, in_channels: int = 3) -> StackedHourglass:
    """One hourglass."""
    return StackedHourglass(1, num_keypoints, in_channels)


def hg2(num_keypoints: int = 16, in_channels: int = 3) -> StackedHourglass:
    """Two."""
    return StackedHourglass(2, num_keypoints, in_channels)


def hg8(num_keypoints: int = 16, in_channels: int = 3) -> StackedHourglass:
    """Eight: the paper's."""
    return StackedHourglass(8, num_keypoints, in_channels)


def hg2_slim(num_keypoints: int = 14, in_channels: int = 3) -> StackedHourglass:
    """Two thin ones for small pictures and quick runs, whose heat maps start near 0; not in the paper."""
    network = StackedHourglass(2, num_keypoints, in_channels, channels=48, stem=(16, 24))
    for layer in network.outs:
        nn.init.normal_(layer.conv.weight, std=0.01)
        nn.init.zeros_(layer.conv.bias)
    return network


PARTS = ("pre", "hgs", "features", "outs", "merge_features", "merge_preds")


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' checkpoints: names from the network on (`model.module.` goes), without the shortcuts that are not used."""
    renamed = {}
    for name, value in state_dict.items():
        parts = name.split(".")
        start = next((i for i, part in enumerate(parts) if part in PARTS), 0)
        owner = ".".join(parts[: parts.index("skip_layer")]) if "skip_layer" in parts else None
        if owner is not None:
            weight = state_dict[f"{owner}.skip_layer.conv.weight"]
            if weight.shape[0] == weight.shape[1]:
                continue
        renamed[".".join(parts[start:])] = torch.as_tensor(value)
    return renamed
