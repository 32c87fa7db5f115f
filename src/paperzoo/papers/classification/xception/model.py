"""Xception: Deep Learning with Depthwise Separable Convolutions (Chollet, CVPR 2017, arXiv:1610.02357).

Inception's hypothesis taken to its end: correlations between channels and correlations in space are mapped apart, by
separable convolutions with nothing in between, in fourteen modules with linear shortcuts (fig. 5).

Parameter names are those of timm's `legacy_xception` (`block3.rep.1.pointwise`, `block12.skipbn`), whose weights are the
author's. What differs from the paper: the starting weights, of which it says nothing, are He's; batch norm has PyTorch's
epsilon and momentum (the author's framework: 1e-3 and 0.99).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.classifier import last_layer

WIDTHS = (32, 64, 128, 256, 728, 1024, 1536, 2048)
"""Fig. 5: the two convolutions of the stem, the three modules of the entry flow, and the exit flow."""


class SeparableConvolution(nn.Module):
    """One 3x3 filter a channel, then 1x1 across channels (sec. 1.2). (B, inputs, H, W) -> (B, outputs, H, W).

    Args:
        between: makes an activation between the two. None is the paper's finding (fig. 10): there ReLU and ELU both hurt.
    """

    def __init__(self, inputs: int, outputs: int, between: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
        self.between = between() if between is not None else None
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.pointwise(x if self.between is None else self.between(x))


class Module(nn.Module):
    """Separable convolutions with batch norm, each behind a ReLU, a max pool where the map is halved, and a shortcut around all.

    (B, inputs, H, W) -> (B, widths[-1], ceil(H / stride), ceil(W / stride)).

    Args:
        widths: channels after each separable convolution.
        stride: 2 pools at the end, and strides on the shortcut's 1x1 convolution; 1 leaves the shortcut without weights.
        first_relu: False for the first module alone, which follows a ReLU.
        between: as `SeparableConvolution`.
    """

    def __init__(
        self,
        inputs: int,
        widths: Sequence[int],
        stride: int = 1,
        first_relu: bool = True,
        between: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (before, width) in enumerate(zip([inputs, *widths], widths, strict=False)):
            if i or first_relu:
                layers.append(nn.ReLU(inplace=i > 0))  # the first one's input is the shortcut's as well
            layers += [SeparableConvolution(before, width, between), nn.BatchNorm2d(width)]
        if stride > 1:
            layers.append(nn.MaxPool2d(3, stride, padding=1))
        self.rep = nn.Sequential(*layers)
        self.skip = self.skipbn = None
        if stride > 1 or inputs != widths[-1]:
            self.skip = nn.Conv2d(inputs, widths[-1], 1, stride, bias=False)
            self.skipbn = nn.BatchNorm2d(widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.skip is None else self.skipbn(self.skip(x))
        return self.rep(x) + shortcut


class Xception(nn.Module):
    """Fig. 5: images (B, in_channels, H, W), 299 pixels in the paper and 71 at least, -> logits (B, num_classes).

    Args:
        num_classes: columns of the logits; 0 for features.
        in_channels: channels of the image.
        drop_rate: dropout before the last layer (sec. 4.3: 0.5).
        widths: channels, in the order of `WIDTHS`.
        middle: modules of the middle flow.
        stem_stride: of the first convolution; 1 keeps small images large (27 pixels at least).
        between: as `SeparableConvolution`.

    Raises:
        ValueError: for an image that is too small for the five halvings.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_rate: float = 0.0,
        widths: Sequence[int] = WIDTHS,
        middle: int = 8,
        stem_stride: int = 2,
        between: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if len(widths) != len(WIDTHS):
            raise ValueError(f"widths has {len(widths)} entries; {len(WIDTHS)} are needed, as in fig. 5: {WIDTHS}")
        first, second, a, b, c, d, e, f = widths
        self.smallest = 35 * stem_stride + 1 if stem_stride > 1 else 27
        self.num_features = f
        self.stage_channels = [second, a, b, c, f]
        self.stage_strides = [stem_stride << i for i in range(5)]
        self.conv1 = nn.Conv2d(in_channels, first, 3, stem_stride, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.block1 = Module(second, (a, a), 2, first_relu=False, between=between)
        self.block2 = Module(a, (b, b), 2, between=between)
        self.block3 = Module(b, (c, c), 2, between=between)
        self.middle = middle
        for i in range(4, 4 + middle):
            self.add_module(f"block{i}", Module(c, (c, c, c), between=between))
        self.add_module(f"block{4 + middle}", Module(c, (c, d), 2, between=between))
        self.conv3 = SeparableConvolution(d, e, between)
        self.bn3 = nn.BatchNorm2d(e)
        self.conv4 = SeparableConvolution(e, f, between)
        self.bn4 = nn.BatchNorm2d(f)
        self.dropout = nn.Dropout(drop_rate)
        self.fc = last_layer(f, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stem(self, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) < self.smallest:
            raise ValueError(
                f"image_size: this Xception needs at least {self.smallest} x {self.smallest} pixels, got {tuple(x.shape[-2:])}"
            )
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # without padding, as the author's
        return F.relu(self.bn2(self.conv2(x)), inplace=True)

    def exit(self, x: Tensor) -> Tensor:
        """From the end of the middle flow to the last map."""
        x = getattr(self, f"block{4 + self.middle}")(x)
        x = F.relu(self.bn3(self.conv3(x)), inplace=True)
        return F.relu(self.bn4(self.conv4(x)), inplace=True)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The last maps at the five resolutions: of the stem, modules 1 and 2, the middle flow, and the end."""
        maps = [self.stem(x)]
        for block in (self.block1, self.block2):
            maps.append(block(maps[-1]))
        x = self.block3(maps[-1])
        for i in range(4, 4 + self.middle):
            x = getattr(self, f"block{i}")(x)
        return [*maps, x, self.exit(x)]

    def embed(self, x: Tensor) -> Tensor:
        """Pooled features (B, num_features). Not by `stages`, so that each map is freed when it was read."""
        x = self.block3(self.block2(self.block1(self.stem(x))))
        for i in range(4, 4 + self.middle):
            x = getattr(self, f"block{i}")(x)
        return self.exit(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(self.embed(x)))

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer for another number of classes; 0 for none."""
        self.fc = last_layer(self.num_features, num_classes).to(self.conv1.weight)


# -- variants ------------------------------------------------------------------------------------------------------------


def xception(num_classes: int = 1000, in_channels: int = 3, **options) -> Xception:
    """The network of the paper, 22.9M parameters, for 299 pixels; `options` as `Xception`."""
    return Xception(num_classes, in_channels, **options)


def xception_digits(num_classes: int = 10, in_channels: int = 3, **options) -> Xception:
    """Not of the paper: an eighth of the width, two modules in the middle flow, for images of 32 pixels."""
    small = {"widths": (8, 16, 24, 32, 64, 96, 128, 160), "middle": 2, "stem_stride": 1}
    return Xception(num_classes, in_channels, **{**small, **options})
