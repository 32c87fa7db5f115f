"""MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications (Howard et al., 2017, arXiv:1704.04861).

A chain of depthwise separable convolutions (sec. 3.1, table 1) with two knobs: `width`, the paper's alpha, and the size of
the image, its rho, which needs no code because the network ends in a global mean.

Parameter names are those of timm's `mobilenetv1_100` (`conv_stem`, `blocks.3.5.conv_pw`), whose `state_dict`s load
unchanged; `from_official` converts the authors' TensorFlow weights in the form in which `transformers` publishes them.
What differs from the paper:

- The activation is ReLU6, as in the authors' released code and all public weights; the paper says ReLU, which is
  `activation=nn.ReLU`.
- Convolutions with stride 2 pad one pixel on each side. The authors' framework pads an even image at its right and lower
  edge alone, and its batch norm has epsilon 1e-3: `same_padding=True, norm_eps=1e-3` for their weights.
- The paper does not state how weights start; here from a normal distribution with variance 2 / fan-out of each group.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512, 1024)  # table 1, one a resolution: strides 2, 4, 8, 16, 32
DEPTHS = (1, 2, 2, 6, 2)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution without bias. `same_padding` pads as TensorFlow: the missing pixels go right and below first."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1, same_padding: bool = False) -> None:
        # at stride 1 the two paddings are the same one
        self.uneven = same_padding and stride > 1
        super().__init__(inputs, outputs, 3, stride, padding=0 if self.uneven else 1, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.uneven:
            (top, bottom), (left, right) = ((n % 2, 1) for n in x.shape[-2:])
            x = F.pad(x, (left, right, top, bottom))
        return super().forward(x)


class DepthwiseSeparable(nn.Module):
    """One 3x3 filter a channel, then 1x1 across channels, each with batch norm and activation (fig. 3 right; eq. 3 and 5).

    (B, inputs, H, W) -> (B, outputs, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int = 1,
        activation: Callable[..., nn.Module] = nn.ReLU6,
        norm_eps: float = 1e-5,
        same_padding: bool = False,
    ) -> None:
        super().__init__()
        self.conv_dw = Conv3x3(inputs, inputs, stride, groups=inputs, same_padding=same_padding)
        self.bn1 = nn.BatchNorm2d(inputs, eps=norm_eps)
        self.conv_pw = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs, eps=norm_eps)
        self.act = activation(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv_dw(x)))
        return self.act(self.bn2(self.conv_pw(x)))


class FullConvolution(nn.Module):
    """What the separable block stands for (fig. 3 left): one 3x3 convolution over all channels. Same arguments and shapes."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int = 1,
        activation: Callable[..., nn.Module] = nn.ReLU6,
        norm_eps: float = 1e-5,
        same_padding: bool = False,
    ) -> None:
        super().__init__()
        self.conv = Conv3x3(inputs, outputs, stride, same_padding=same_padding)
        self.bn1 = nn.BatchNorm2d(outputs, eps=norm_eps)
        self.act = activation(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn1(self.conv(x)))


class MobileNetV1(nn.Module):
    """Table 1: images (B, in_channels, H, W) of any size, normalised -> logits (B, num_classes).

    Args:
        width: alpha, which thins every layer (eq. 6); a layer keeps at least 8 channels.
        depths: blocks at each of the five resolutions.
        separable: False replaces every separable block by a full 3x3 convolution (the baseline of table 4).
        num_classes: columns of the logits; 0 for no head.
        in_channels: channels of the image.
        drop_rate: dropout before the head.
        stem_stride: of the first convolution; 1 keeps small images large.
        activation: a module class that takes `inplace`.
        norm_eps, same_padding: 1e-3 and True for the authors' TensorFlow weights.
    """

    def __init__(
        self,
        width: float = 1.0,
        depths: Sequence[int] = DEPTHS,
        separable: bool = True,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_rate: float = 0.0,
        stem_stride: int = 2,
        activation: Callable[..., nn.Module] = nn.ReLU6,
        norm_eps: float = 1e-5,
        same_padding: bool = False,
    ) -> None:
        super().__init__()
        if width <= 0:
            raise ValueError(f"width must be above 0 (the paper has 1, 0.75, 0.5 and 0.25), got {width}")
        if len(depths) != 5 or min(depths) < 1:
            raise ValueError(f"depths has five entries of at least 1, one a resolution, got {tuple(depths)}")
        block = DepthwiseSeparable if separable else FullConvolution
        channels = max(8, int(32 * width))
        self.stage_channels = [max(8, int(w * width)) for w in WIDTHS]
        self.stage_strides = [stem_stride << i for i in range(5)]
        self.num_features = self.stage_channels[-1]
        self.in_channels = in_channels
        self.conv_stem = Conv3x3(in_channels, channels, stem_stride, same_padding=same_padding)
        self.bn1 = nn.BatchNorm2d(channels, eps=norm_eps)
        self.act = activation(inplace=True)
        stages = []
        for i, (outputs, depth) in enumerate(zip(self.stage_channels, depths, strict=True)):
            first = block(channels, outputs, 1 if i == 0 else 2, activation, norm_eps, same_padding)
            rest = [block(outputs, outputs, 1, activation, norm_eps, same_padding) for _ in range(depth - 1)]
            stages.append(nn.Sequential(first, *rest))
            channels = outputs
        self.blocks = nn.Sequential(*stages)
        self.dropout = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The outputs at the five resolutions."""
        x = self.act(self.bn1(self.conv_stem(x)))
        maps = []
        for stage in self.blocks:
            x = stage(x)
            maps.append(x)
        return maps

    def embed(self, x: Tensor) -> Tensor:
        """Pooled features (B, num_features). Not by `stages`, so that each map is freed when it was read."""
        return self.blocks(self.act(self.bn1(self.conv_stem(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.embed(x)))

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer for another number of classes; 0 for none."""
        weight = self.conv_stem.weight
        self.classifier = nn.Linear(self.num_features, num_classes).to(weight) if num_classes else nn.Identity()


# -- variants ------------------------------------------------------------------------------------------------------------


def mobilenetv1_100(num_classes: int = 1000, in_channels: int = 3, **options) -> MobileNetV1:
    """1.0 MobileNet (table 1), 4.2M parameters; `options` as `MobileNetV1`."""
    return MobileNetV1(1.0, num_classes=num_classes, in_channels=in_channels, **options)


def mobilenetv1_075(num_classes: int = 1000, in_channels: int = 3, **options) -> MobileNetV1:
    """0.75 MobileNet (table 6), 2.6M parameters."""
    return MobileNetV1(0.75, num_classes=num_classes, in_channels=in_channels, **options)


def mobilenetv1_050(num_classes: int = 1000, in_channels: int = 3, **options) -> MobileNetV1:
    """0.5 MobileNet (table 6), 1.3M parameters."""
    return MobileNetV1(0.5, num_classes=num_classes, in_channels=in_channels, **options)


def mobilenetv1_025(num_classes: int = 1000, in_channels: int = 3, **options) -> MobileNetV1:
    """0.25 MobileNet (table 6), 0.5M parameters."""
    return MobileNetV1(0.25, num_classes=num_classes, in_channels=in_channels, **options)


def mobilenetv1_shallow(num_classes: int = 1000, in_channels: int = 3, **options) -> MobileNetV1:
    """The shallow network of table 5, without the five blocks of 512 channels that keep the size; 2.9M parameters."""
    return MobileNetV1(1.0, (1, 2, 2, 1, 2), num_classes=num_classes, in_channels=in_channels, **options)


def mobilenetv1_conv(num_classes: int = 1000, in_channels: int = 3, **options) -> MobileNetV1:
    """Conv MobileNet (table 4): the same chain of full convolutions, 29.3M parameters."""
    return MobileNetV1(1.0, separable=False, num_classes=num_classes, in_channels=in_channels, **options)


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' weights as `transformers` publishes them (`mobilenet_v1.layer.4.convolution`) to these names.

    They need `same_padding=True, norm_eps=1e-3`, and `num_classes=1001`: class 0 is the background. timm's come through
    unchanged.
    """
    place = [(stage, block) for stage, depth in enumerate(DEPTHS) for block in range(depth)]
    renamed = {}
    for name, value in state_dict.items():
        name = name.removeprefix("mobilenet_v1.")
        if name.startswith("conv_stem.convolution.") or name.startswith("conv_stem.normalization."):
            name = name.replace("conv_stem.normalization", "bn1").replace("conv_stem.convolution", "conv_stem")
        elif found := re.match(r"layer\.(\d+)\.(convolution|normalization)\.(.+)", name):
            layer, pointwise = divmod(int(found[1]), 2)
            parts = {"convolution": ("conv_dw", "conv_pw"), "normalization": ("bn1", "bn2")}[found[2]]
            name = "blocks.{}.{}.".format(*place[layer]) + f"{parts[pointwise]}.{found[3]}"
        renamed[name] = value
    return renamed
