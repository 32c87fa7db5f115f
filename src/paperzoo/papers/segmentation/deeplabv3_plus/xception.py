"""The modified aligned Xception (fig. 4): deeper than Chollet's, pooling replaced by strided separable convolutions, which can be dilated.

Names and epsilon are timm's (`xception65`), whose weights are those of the authors' TensorFlow release.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-3
ENTRY = ((128, 128, 128), (256, 256, 256), (728, 728, 728))
EXIT = ((728, 1024, 1024), (1536, 1536, 2048))


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=EPSILON)


class ConvNorm(nn.Module):
    """Convolution and batch norm. (B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.bn = norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Separable(nn.Module):
    """A 3x3 depthwise convolution, then 1x1, each with batch norm (the paper's addition) and, if `relu`, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, relu: bool = False) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False)
        self.bn_dw = norm(inputs)
        self.conv_pw = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn_pw = norm(outputs)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn_dw(self.conv_dw(x))
        x = self.bn_pw(self.conv_pw(F.relu(x, inplace=True) if self.relu else x))
        return F.relu(x, inplace=True) if self.relu else x


class XceptionModule(nn.Module):
    """Three separable convolutions, the last with the stride, and a shortcut around them.

    In the exit flow's last module (`last`) ReLU follows each convolution instead of preceding it, and there is no shortcut.
    """

    def __init__(self, inputs: int, widths: Sequence[int], stride: int = 1, last: bool = False) -> None:
        super().__init__()
        self.last = last
        self.shortcut = ConvNorm(inputs, widths[2], 1, stride) if inputs != widths[2] and not last else None
        self.stack = nn.Module()
        for i, (before, width) in enumerate(zip([inputs, *widths], widths, strict=False), 1):
            self.stack.add_module(f"conv{i}", Separable(before, width, stride if i == 3 else 1, relu=last))

    def head(self, x: Tensor) -> Tensor:
        """After two of the three convolutions: the finest map of the module, without ReLU."""
        x = self.stack.conv1(x if self.last else F.relu(x))
        return self.stack.conv2(x if self.last else F.relu(x, inplace=True))

    def tail(self, x: Tensor, tapped: Tensor) -> Tensor:
        """From the module's input and what `head` made of it to its output."""
        h = self.stack.conv3(tapped if self.last else F.relu(tapped))
        if self.last:
            return h
        return h + (x if self.shortcut is None else self.shortcut(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(x, self.head(x))


class AlignedXception(nn.Module):
    """(B, in_channels, H, W) -> by `stages` the decoder's map (B, 256, H / 4, W / 4) and the last (B, 2048, H / 32, W / 32).

    Args:
        middle: modules of the middle flow; 16 in Xception-65, 8 in Xception-41.
    """

    def __init__(self, in_channels: int = 3, middle: int = 16) -> None:
        super().__init__()
        self.stem = nn.ModuleList([ConvNorm(in_channels, 32, 3, 2), ConvNorm(32, 64, 3)])
        plan = [(widths, 2) for widths in ENTRY] + [((728, 728, 728), 1)] * middle + [(EXIT[0], 2), (EXIT[1], 1)]
        channels, self.blocks = 64, nn.ModuleList()
        for i, (widths, stride) in enumerate(plan):
            self.blocks.append(XceptionModule(channels, widths, stride, last=i == len(plan) - 1))
            channels = widths[2]
        self.stage_channels, self.stage_strides = [ENTRY[1][1], channels], [4, 32]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stages(self, x: Tensor) -> list[Tensor]:
        """The decoder takes the second module's map before its stride, as the authors' code."""
        for layer in self.stem:
            x = F.relu(layer(x), inplace=True)
        x = self.blocks[0](x)
        low = self.blocks[1].head(x)
        x = self.blocks[1].tail(x, low)
        for block in self.blocks[2:]:
            x = block(x)
        return [low, x]
