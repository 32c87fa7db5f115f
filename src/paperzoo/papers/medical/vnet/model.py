"""V-Net (Milletari, Navab and Ahmadi, 3DV 2016, arXiv:1606.04797).

A volume goes down four times and up again (fig. 2). Every stage learns a residual: one to three convolutions of 5x5x5 voxels whose result is
added to the stage's input before the last PReLU. Between stages convolutions of 2x2x2 with stride 2 take the place of pooling, transposed ones
that of unpooling, and the way down hands its maps to the way up.

Parameters have the names of the authors' reference in PyTorch (github.com/mattmacy/vnet.pytorch), which MONAI's `VNet` keeps too; `from_official`
takes either's weights. Both put batch norm before every activation; the paper does not speak of it, and the authors' released network has none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Step(nn.Module):
    """Convolution, batch norm, PReLU with a slope a channel."""

    def __init__(self, channels: int, kernel_size: int, in_channels: int | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels or channels, channels, kernel_size, padding=kernel_size // 2)
        self.bn1 = nn.BatchNorm3d(channels)
        self.relu1 = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu1(self.bn1(self.conv1(x)))


class InputStage(nn.Module):
    """One convolution to `channels`; the input itself, repeated to as many channels, is added to it before the PReLU."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv1 = nn.Conv3d(in_channels, channels, kernel_size, padding=kernel_size // 2)
        self.bn1 = nn.BatchNorm3d(channels)
        self.relu1 = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        times = -(-self.channels // x.shape[1])
        repeated = x.repeat(1, times, 1, 1, 1)[:, : self.channels]
        return self.relu1(self.bn1(self.conv1(x)) + repeated)


class DownStage(nn.Module):
    """Halves the resolution and doubles the channels by a strided convolution, then `steps` convolutions around which the input is carried."""

    def __init__(self, in_channels: int, steps: int, kernel_size: int, drop_rate: float) -> None:
        super().__init__()
        channels = 2 * in_channels
        self.down_conv = nn.Conv3d(in_channels, channels, 2, stride=2)
        self.bn1 = nn.BatchNorm3d(channels)
        self.relu1 = nn.PReLU(channels)
        self.dropout = nn.Dropout3d(drop_rate)
        self.ops = nn.Sequential(*(Step(channels, kernel_size) for _ in range(steps)))
        self.relu2 = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        down = self.relu1(self.bn1(self.down_conv(x)))
        return self.relu2(self.ops(self.dropout(down)) + down)


class UpStage(nn.Module):
    """Doubles the resolution by a transposed convolution to half of `channels`; the map from the way down is the other half."""

    def __init__(
        self, in_channels: int, channels: int, steps: int, kernel_size: int, drop_rate: float, skip_drop_rate: float
    ) -> None:
        super().__init__()
        self.up_conv = nn.ConvTranspose3d(in_channels, channels // 2, 2, stride=2)
        self.bn1 = nn.BatchNorm3d(channels // 2)
        self.relu1 = nn.PReLU(channels // 2)
        self.dropout = nn.Dropout3d(drop_rate)
        self.dropout2 = nn.Dropout3d(skip_drop_rate)
        self.ops = nn.Sequential(*(Step(channels, kernel_size) for _ in range(steps)))
        self.relu2 = nn.PReLU(channels)

    def forward(self, x: Tensor, skipped: Tensor) -> Tensor:
        up = self.relu1(self.bn1(self.up_conv(self.dropout(x))))
        both = torch.cat([up, self.dropout2(skipped)], 1)
        return self.relu2(self.ops(both) + both)


class OutputStage(nn.Module):
    """5x5x5 to as many channels as there are classes, PReLU, 1x1x1: logits."""

    def __init__(self, in_channels: int, num_classes: int, kernel_size: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, num_classes, kernel_size, padding=kernel_size // 2)
        self.bn1 = nn.BatchNorm3d(num_classes)
        self.relu1 = nn.PReLU(num_classes)
        self.conv2 = nn.Conv3d(num_classes, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.relu1(self.bn1(self.conv1(x))))


class VNet(nn.Module):
    """(B, in_channels, X, Y, Z) -> logits (B, num_classes, X, Y, Z). Any size: it is padded with its last voxels to a multiple of 2^stages, and cut again.

    Args:
        width: channels of the first stage.
        steps: convolutions of each stage on the way down, the deepest last.
        up_steps: of each stage on the way up, the deepest first; its channels are `up_widths` times `width`.
        drop_rate: of whole channels, at the two deepest stages and all skipped maps (the reference's choice; the paper has none).
    """

    def __init__(
        self,
        num_classes: int = 2,
        in_channels: int = 1,
        width: int = 16,
        steps: Sequence[int] = (1, 2, 3, 2),
        up_steps: Sequence[int] = (2, 2, 1, 1),
        up_widths: Sequence[int] = (16, 8, 4, 2),
        kernel_size: int = 5,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.names = [2**i * width for i in range(len(steps) + 1)]
        self.in_tr = InputStage(in_channels, width, kernel_size)
        for level, count in enumerate(steps):
            deep = level >= len(steps) - 2
            stage = DownStage(self.names[level], count, kernel_size, drop_rate if deep else 0.0)
            self.add_module(f"down_tr{self.names[level + 1]}", stage)
        channels = self.names[-1]
        for level, (count, times) in enumerate(zip(up_steps, up_widths, strict=True)):
            deep = level < 2
            stage = UpStage(channels, times * width, count, kernel_size, drop_rate if deep else 0.0, drop_rate)
            self.add_module(f"up_tr{self.names[-1 - level]}", stage)
            channels = times * width
        self.out_tr = OutputStage(channels, num_classes, kernel_size)
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                nn.init.kaiming_normal_(
                    module.weight, a=0.25, mode="fan_in"
                )  # as He et al. for PReLU, which the paper follows
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        size, step = x.shape[2:], 2 ** (len(self.names) - 1)
        lacking = [-n % step for n in size]
        if any(lacking):
            x = F.pad(x, [pad for n in reversed(lacking) for pad in (0, n)], mode="replicate")
        maps = [self.in_tr(x)]
        for name in self.names[1:]:
            maps.append(getattr(self, f"down_tr{name}")(maps[-1]))
        h = maps.pop()
        for name in self.names[:0:-1]:
            h = getattr(self, f"up_tr{name}")(h, maps.pop())
        h = self.out_tr(h)
        return h[:, :, : size[0], : size[1], : size[2]] if any(lacking) else h


MONAI = (  # its wrappers of convolution and norm, and its activations, to the names of the reference
    (r"\.conv_block\.conv\.", ".conv1."),
    (r"\.conv_block\.adn\.N\.", ".bn1."),
    (r"(ops\.\d+|in_tr|out_tr)\.act_function1?\.", r"\1.relu1."),
    (r"\.act_function1\.", ".relu1."),
    (r"\.act_function2\.", ".relu2."),
)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of MONAI's `VNet(act="prelu")` to ours; a convolution that it has without bias gets zeros."""
    renamed = {}
    for name, value in state.items():
        for pattern, ours in MONAI:
            name = re.sub(pattern, ours, name)
        renamed[name] = value
    for name in [n for n in renamed if n.endswith((".conv1.weight", "down_conv.weight"))]:
        renamed.setdefault(name.removesuffix("weight") + "bias", torch.zeros(len(renamed[name])))
    return renamed


def vnet(num_classes: int = 2, in_channels: int = 1, drop_rate: float = 0.0) -> VNet:
    """The paper's network (fig. 2, table 1): 16 to 256 channels, kernels of 5x5x5."""
    return VNet(num_classes, in_channels, drop_rate=drop_rate)


def vnet_slim(num_classes: int = 2, in_channels: int = 1, drop_rate: float = 0.0) -> VNet:
    """Not of the paper: two halvings, 16 to 64 channels, kernels of 3x3x3, for small volumes and learning in seconds."""
    return VNet(num_classes, in_channels, 16, (1, 1), (1, 1), (4, 2), 3, drop_rate)
