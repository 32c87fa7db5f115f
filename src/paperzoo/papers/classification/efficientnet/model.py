"""EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks (Tan and Le, ICML 2019, arXiv:1905.11946).

B0 (table 1) is a chain of mobile inverted bottlenecks with squeeze-and-excitation, found by a search; B1 to B7 are B0 made
wider, deeper and fed larger images in fixed proportions (sec. 3.3).

Parameter names are torchvision's (`features.2.0.block.1.0.weight`), whose `state_dict`s load unchanged; `from_official`
converts timm's, among them the authors' own weights (`tf_efficientnet_b0`). What differs from the paper:

- Convolutions with stride 2 pad the same number of pixels on every side, as torchvision and timm train. The authors'
  framework pads an even image at its right and lower edge: `same_padding=True, norm_eps=1e-3` for their weights.
- B0 to B4 have PyTorch's constants of batch norm (1e-5, 0.1), as the weights in torchvision; the authors' are 1e-3 and
  0.01, which B5 to B7 have in torchvision too. Both are arguments.

Dropout before the head (0.2 for B0 to 0.5 for B7) and stochastic depth (0.2) are on in training mode, as in the paper.
"""

from __future__ import annotations

import math
import re
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from paperzoo.papers.classification.senet.model import SqueezeExcitation

# Table 1, stages 2 to 8: expansion, kernel, stride, channels, blocks.
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
STEM, TOP = 32, 1280  # channels of stages 1 and 9
LEVELS = (1, 2, 3, 5, 7)  # the last layer of each resolution: strides 2, 4, 8, 16, 32


def compound(phi: float, alpha: float = 1.2, beta: float = 1.1, gamma: float = 1.15) -> tuple[float, float, float]:
    """Eq. (3): how much deeper, wider and finer a network is that may cost 2^phi times as much.

    The released networks round these factors by hand: B1 to B7 have the `width`, `depth` and image size of their functions.
    """
    return alpha**phi, beta**phi, gamma**phi


def scaled_channels(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor`, but never less than nine tenths of `channels`."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


class SamePadded(nn.Conv2d):
    """A convolution that pads as TensorFlow: of an odd number of missing pixels, the larger half goes right and below."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: int, groups: int, bias: bool) -> None:
        super().__init__(inputs, outputs, kernel_size, stride, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        half = self.kernel_size[0] // 2
        before = [half - 1 + n % 2 for n in x.shape[-2:]]  # stride 2
        return super().forward(F.pad(x, (before[1], half, before[0], half)))


class ConvNormAct(nn.Sequential):
    """Convolution without bias, batch norm and, unless told otherwise, SiLU.

    (B, inputs, H, W) -> (B, outputs, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        activation: type[nn.Module] | None = nn.SiLU,
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
        same_padding: bool = False,
    ) -> None:
        if same_padding and stride == 2:  # at stride 1 the two paddings are the same one
            conv = SamePadded(inputs, outputs, kernel_size, stride, groups, bias=False)
        else:
            conv = nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        layers = [conv, nn.BatchNorm2d(outputs, norm_eps, norm_momentum)]
        super().__init__(*layers, *([] if activation is None else [activation(inplace=True)]))


class MBConv(nn.Module):
    """Expand by 1x1, filter each channel, weigh the channels, project by 1x1 without activation; added to the input if shapes allow.

    (B, inputs, H, W) -> (B, outputs, ceil(H / stride), ceil(W / stride)).

    Args:
        inputs, outputs: channels.
        kernel_size, stride: of the depthwise convolution.
        expand_ratio: its channels, in multiples of `inputs`; 1 leaves the expansion out.
        squeeze_ratio: width of the squeeze-and-excitation, of `inputs` (not of the expanded channels); 0 for none.
        drop_path: the probability that the branch is left out of a training sample.
        activation: a module class that takes `inplace`.
        layer: what makes convolution, norm and activation; `ConvNormAct` with other options.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int = 3,
        stride: int = 1,
        expand_ratio: float = 6,
        squeeze_ratio: float = 0.25,
        drop_path: float = 0.0,
        activation: type[nn.Module] = nn.SiLU,
        layer: type[ConvNormAct] | partial = ConvNormAct,
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        hidden = scaled_channels(inputs * expand_ratio)
        layers: list[nn.Module] = []
        if hidden != inputs:
            layers.append(layer(inputs, hidden, 1, activation=activation))
        layers.append(layer(hidden, hidden, kernel_size, stride, groups=hidden, activation=activation))
        if squeeze_ratio:
            squeeze = max(1, int(inputs * squeeze_ratio))
            layers.append(SqueezeExcitation(hidden, squeeze, partial(activation, inplace=True)))
        layers.append(layer(hidden, outputs, 1, activation=None))
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs
        self.stochastic_depth = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return self.stochastic_depth(y) + x if self.residual else y


class EfficientNet(nn.Module):
    """Table 1, scaled: images (B, in_channels, H, W) of any size, normalised, -> logits (B, num_classes).

    Args:
        width: factor of all channels (beta^phi), rounded to multiples of 8.
        depth: factor of the blocks in each stage (alpha^phi), rounded up.
        num_classes: columns of the logits; 0 for no head.
        in_channels: channels of the image.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth, growing from 0 in the first block towards this share after the last.
        stem_stride: of the first convolution; 1 keeps small images large.
        norm_eps, norm_momentum: of the batch norms.
        same_padding: pad as TensorFlow.
    """

    def __init__(
        self,
        width: float = 1.0,
        depth: float = 1.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_rate: float = 0.2,
        drop_path_rate: float = 0.2,
        stem_stride: int = 2,
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
        same_padding: bool = False,
    ) -> None:
        super().__init__()
        if width <= 0 or depth <= 0:
            raise ValueError(f"width and depth must be above 0 (1 and 1 for B0), got {width} and {depth}")
        layer = partial(ConvNormAct, norm_eps=norm_eps, norm_momentum=norm_momentum, same_padding=same_padding)
        channels = scaled_channels(STEM * width)
        repeats = [math.ceil(blocks * depth) for *_, blocks in STAGES]
        features: list[nn.Module] = [layer(in_channels, channels, 3, stem_stride)]
        number = 0
        for (expand, kernel, stride, outputs, _), blocks in zip(STAGES, repeats, strict=True):
            outputs, stage = scaled_channels(outputs * width), []
            for i in range(blocks):
                rate = drop_path_rate * number / sum(repeats)
                step = stride if i == 0 else 1
                stage.append(MBConv(channels, outputs, kernel, step, expand, drop_path=rate, layer=layer))
                channels, number = outputs, number + 1
            features.append(nn.Sequential(*stage))
        self.in_channels = in_channels
        self.stage_channels = [features[i][-1].block[-1][0].out_channels for i in LEVELS]
        self.stage_strides = [stem_stride << i for i in range(5)]
        self.num_features = scaled_channels(TOP * width)
        features.append(layer(channels, self.num_features, 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(drop_rate), nn.Identity())
        self.reset_classifier(num_classes)
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d):  # the authors': variance 2 / fan-out of each group
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The outputs at the five resolutions, before the 1x1 convolution of stage 9."""
        maps = []
        for i, layer in enumerate(self.features[:-1]):
            x = layer(x)
            if i in LEVELS:
                maps.append(x)
        return maps

    def embed(self, x: Tensor) -> Tensor:
        """Pooled features (B, num_features) of stage 9. Not by `stages`, so that each map is freed when it was read."""
        return self.features(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.embed(x))

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer for another number of classes; 0 for none."""
        if not num_classes:
            self.classifier[1] = nn.Identity()
            return
        linear = nn.Linear(self.num_features, num_classes)
        nn.init.uniform_(linear.weight, -(num_classes**-0.5), num_classes**-0.5)
        nn.init.zeros_(linear.bias)
        self.classifier[1] = linear.to(self.features[0][0].weight)


# -- variants: the released factors and dropout; image sizes are the published ones, any other works -----------------------

AUTHORS_NORM = {"norm_eps": 1e-3, "norm_momentum": 0.01}


def efficientnet_b0(num_classes: int = 1000, in_channels: int = 3, drop_rate: float = 0.2, **options) -> EfficientNet:
    """B0, 5.3M parameters, 224 pixels; `options` as `EfficientNet`."""
    return EfficientNet(1.0, 1.0, num_classes, in_channels, drop_rate, **options)


def efficientnet_b1(num_classes: int = 1000, in_channels: int = 3, drop_rate: float = 0.2, **options) -> EfficientNet:
    """B1, 7.8M parameters, 240 pixels."""
    return EfficientNet(1.0, 1.1, num_classes, in_channels, drop_rate, **options)


def efficientnet_b2(num_classes: int = 1000, in_channels: int = 3, drop_rate: float = 0.3, **options) -> EfficientNet:
    """B2, 9.1M parameters, 260 pixels."""
    return EfficientNet(1.1, 1.2, num_classes, in_channels, drop_rate, **options)


def efficientnet_b3(num_classes: int = 1000, in_channels: int = 3, drop_rate: float = 0.3, **options) -> EfficientNet:
    """B3, 12.2M parameters, 300 pixels."""
    return EfficientNet(1.2, 1.4, num_classes, in_channels, drop_rate, **options)


def efficientnet_b4(num_classes: int = 1000, in_channels: int = 3, drop_rate: float = 0.4, **options) -> EfficientNet:
    """B4, 19.3M parameters, 380 pixels."""
    return EfficientNet(1.4, 1.8, num_classes, in_channels, drop_rate, **options)


def efficientnet_b5(num_classes: int = 1000, in_channels: int = 3, drop_rate: float = 0.4, **options) -> EfficientNet:
    """B5, 30.4M parameters, 456 pixels; the authors' batch norm."""
    return EfficientNet(1.6, 2.2, num_classes, in_channels, drop_rate, **{**AUTHORS_NORM, **options})


def efficientnet_b6(num_classes: int = 1000, in_channels: int = 3, drop_rate: float = 0.5, **options) -> EfficientNet:
    """B6, 43.0M parameters, 528 pixels; the authors' batch norm."""
    return EfficientNet(1.8, 2.6, num_classes, in_channels, drop_rate, **{**AUTHORS_NORM, **options})


def efficientnet_b7(num_classes: int = 1000, in_channels: int = 3, drop_rate: float = 0.5, **options) -> EfficientNet:
    """B7, 66.3M parameters, 600 pixels; the authors' batch norm."""
    return EfficientNet(2.0, 3.1, num_classes, in_channels, drop_rate, **{**AUTHORS_NORM, **options})


def efficientnet_digits(num_classes: int = 10, in_channels: int = 3, **options) -> EfficientNet:
    """Not in the paper: B0 scaled down instead of up, for 32 x 32 images, for seconds on a CPU."""
    options = {"drop_rate": 0.0, "drop_path_rate": 0.0, "stem_stride": 1, **options}
    return EfficientNet(0.25, 0.34, num_classes, in_channels, **options)


# -- checkpoints ---------------------------------------------------------------------------------------------------------

# timm's parts of a block -> place in `MBConv.block` and in its layer; without an expansion, places move one to the front.
EXPANDED = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1", "conv_pwl": "3.0", "bn3": "3.1"}
PLAIN = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "2.0", "bn2": "2.1"}
SQUEEZE = {"se.conv_reduce": "fc1", "se.conv_expand": "fc2"}
OUTER = {
    "conv_stem": "features.0.0",
    "bn1": "features.0.1",
    "conv_head": "features.8.0",
    "bn2": "features.8.1",
    "classifier": "classifier.1",
}


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's weights to these names; torchvision's come through unchanged.

    timm's `tf_efficientnet_…` are the authors' and need `same_padding=True, norm_eps=1e-3`.
    """
    renamed = {}
    for name, value in state_dict.items():
        part, _, kind = name.rpartition(".")
        if found := re.match(r"blocks\.(\d+)\.(\d+)\.(.+)$", part):
            stage, block, part = int(found[1]), found[2], found[3]
            places = EXPANDED if f"blocks.{stage}.{block}.conv_pwl.weight" in state_dict else PLAIN
            place = f"{2 if places is EXPANDED else 1}.{SQUEEZE[part]}" if part in SQUEEZE else places[part]
            name = f"features.{stage + 1}.{block}.block.{place}.{kind}"
        elif part in OUTER:
            name = f"{OUTER[part]}.{kind}"
        renamed[name] = value
    return renamed
