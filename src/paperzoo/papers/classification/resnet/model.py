"""ResNet: Deep Residual Learning for Image Recognition (He et al., CVPR 2016, arXiv:1512.03385).

Two families, as in the paper: the ImageNet networks (table 1) and the thin CIFAR networks (sec. 4.2).

Parameter names are those of torchvision and timm, so their `state_dict`s load unchanged. What differs from the paper:

- The stride of a downsampling bottleneck sits on its 3x3 convolution, not on the first 1x1 (as torchvision, timm and the
  authors' successors do; known as "v1.5", about half a percent more accurate at the same size).
- The final batch norm of a block starts at weight 1 as in the paper; `zero_init_residual=True` starts it at 0 so that every
  block begins as the identity (Goyal et al., arXiv:1706.02677).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.classifier import last_layer

Norm = Callable[[int], nn.Module]


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size at stride 1; no bias, as batch norm follows."""
    return nn.Conv2d(
        in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False
    )


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


# -- blocks: y = relu(F(x) + shortcut(x)), eq. (1) and (2) ---------------------------------------------------------------


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (fig. 5 left). (B, inplanes, H, W) -> (B, planes, H/stride, W/stride).

    A paper that acts on the residual before the addition overrides `residual`.

    Args:
        inplanes: channels in.
        planes: channels out.
        stride: of the first convolution.
        downsample: the shortcut where the shape changes; None is the identity.
        groups, base_width, dilation: of the bottleneck; here only 1, 64 and 1 exist, as in torchvision.
        norm_layer: makes a normalisation from a number of channels.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if (groups, base_width, dilation) != (1, 64, 1):
            raise ValueError(
                f"BasicBlock has groups=1, base_width=64 and dilation=1, got {groups}, {base_width}, {dilation}; "
                "use Bottleneck (resnet50 and deeper)"
            )
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    @property
    def last_norm(self) -> nn.Module:
        """The normalisation that ends the residual branch."""
        return self.bn2

    def residual(self, x: Tensor) -> Tensor:
        """F(x): what the block adds to its input."""
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.residual(x) + shortcut)


class Bottleneck(nn.Module):
    """1x1 reduce, 3x3, 1x1 expand (fig. 5 right). (B, inplanes, H, W) -> (B, 4 * planes, H/stride, W/stride).

    Args:
        inplanes: channels in.
        planes: a quarter of the channels out.
        stride: of the 3x3 convolution.
        downsample: the shortcut where the shape changes; None is the identity.
        groups, base_width: the 3x3 convolution has `planes * base_width / 64 * groups` channels in `groups` groups.
        dilation: of the 3x3 convolution.
        norm_layer: makes a normalisation from a number of channels.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        width = int(planes * (base_width / 64)) * groups
        self.conv1 = conv1x1(inplanes, width)  # paper: the stride is here; see the module's docstring
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    @property
    def last_norm(self) -> nn.Module:
        """The normalisation that ends the residual branch."""
        return self.bn3

    def residual(self, x: Tensor) -> Tensor:
        """F(x): what the block adds to its input."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.residual(x) + shortcut)


class PaddedShortcut(nn.Module):
    """Option A (sec. 3.3): the identity with extra zero channels, no parameters; every `stride`-th pixel is kept.

    (B, C, H, W) -> (B, out_channels, ceil(H/stride), ceil(W/stride)). The paper does not say where the zeros go; here half
    of them before and half after, as in the public CIFAR checkpoints.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


# -- the networks --------------------------------------------------------------------------------------------------------


class ResNet(nn.Module):
    """The ImageNet network (table 1): images (B, in_channels, H, W), normalised, -> logits (B, num_classes).

    Args:
        block: BasicBlock, Bottleneck, or a block with their signature.
        layers: blocks in each of the four stages.
        num_classes: columns of the logits; 0 for features.
        in_channels: channels of the image.
        zero_init_residual: start the last batch norm of every block at 0.
        groups, width_per_group: passed on to the block (as `base_width`).
        replace_stride_with_dilation: for stages 2, 3, 4: keep the resolution and dilate instead of striding, for dense
            prediction (torchvision's meaning: a stage's first block still has the dilation of the stage before).
        norm_layer: makes a normalisation from a number of channels.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] = (False, False, False),
        norm_layer: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if len(replace_stride_with_dilation) != 3:
            raise ValueError(
                "replace_stride_with_dilation has one entry for each of stages 2, 3 and 4, "
                f"got {tuple(replace_stride_with_dilation)}"
            )
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        make = partial(block, groups=groups, base_width=width_per_group, norm_layer=norm_layer)
        dilation = 1
        inplanes, total = 64, 4
        self.stage_strides: list[int] = []
        for i, (planes, depth) in enumerate(zip((64, 128, 256, 512), layers, strict=True)):
            stride, before = (1 if i == 0 else 2), dilation
            if i > 0 and replace_stride_with_dilation[i - 1]:
                dilation, stride = dilation * stride, 1
            total *= stride
            self.stage_strides.append(total)
            outplanes = planes * block.expansion
            downsample = None
            if stride != 1 or inplanes != outplanes:  # option B: a projection only where the shape changes
                downsample = nn.Sequential(conv1x1(inplanes, outplanes, stride), norm_layer(outplanes))
            blocks = [make(inplanes, planes, stride, downsample, dilation=before)]
            blocks += [make(outplanes, planes, dilation=dilation) for _ in range(1, depth)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            inplanes = outplanes
        self.stage_channels = [planes * block.expansion for planes in (64, 128, 256, 512)]
        self.num_features = inplanes
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = last_layer(inplanes, num_classes)
        initialise(self, zero_init_residual)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The outputs of the four stages (C2 to C5), strides 4, 8, 16, 32 unless dilated."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        c2 = self.layer1(x)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return [c2, c3, c4, self.layer4(c4)]

    def embed(self, x: Tensor) -> Tensor:
        """Pooled features (B, num_features). Not by `stages`, so that each map is freed when it was read."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.embed(x))

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer for another number of classes; 0 for none."""
        self.fc = last_layer(self.num_features, num_classes).to(self.conv1.weight)


class CifarResNet(nn.Module):
    """The CIFAR network of sec. 4.2, 6n + 2 layers: images (B, in_channels, 32, 32) -> logits (B, num_classes).

    A 3x3 convolution and three stages of n blocks with 16, 32 and 64 channels at 32, 16 and 8 pixels; the shortcuts have no
    parameters (option A). Any image size works.

    Args:
        block: BasicBlock or a block with its signature.
        depth: weighted layers, 6n + 2.
        num_classes: columns of the logits; 0 for features.
        in_channels: channels of the image.
        norm_layer: makes a normalisation from a number of channels.
    """

    def __init__(
        self,
        block: type[BasicBlock],
        depth: int,
        num_classes: int = 10,
        in_channels: int = 3,
        norm_layer: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, 32, …), got {depth}")
        self.conv1 = conv3x3(in_channels, 16)
        self.bn1 = norm_layer(16)
        self.relu = nn.ReLU(inplace=True)
        inplanes = 16
        for i, planes in enumerate((16, 32, 64)):
            blocks = []
            for j in range((depth - 2) // 6):
                stride = 2 if i > 0 and j == 0 else 1
                shortcut = None if inplanes == planes else PaddedShortcut(inplanes, planes, stride)
                blocks.append(block(inplanes, planes, stride, shortcut, norm_layer=norm_layer))
                inplanes = planes
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.stage_channels, self.stage_strides = [16, 32, 64], [1, 2, 4]
        self.num_features = 64
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = last_layer(64, num_classes)
        initialise(self)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The outputs of the three stages, strides 1, 2, 4."""
        x = self.relu(self.bn1(self.conv1(x)))
        outputs = []
        for layer in (self.layer1, self.layer2, self.layer3):
            x = layer(x)
            outputs.append(x)
        return outputs

    def embed(self, x: Tensor) -> Tensor:
        """Pooled features (B, 64)."""
        return self.avgpool(self.stages(x)[-1]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.embed(x))

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer for another number of classes; 0 for none."""
        self.fc = last_layer(self.num_features, num_classes).to(self.conv1.weight)


def initialise(network: nn.Module, zero_init_residual: bool = False) -> None:
    """Normal weights with variance 2 / fan_out for convolutions (the paper's [13], with fan-out as torchvision); norms 1, 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm) and module.affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    if zero_init_residual:
        for module in network.modules():
            if isinstance(module, BasicBlock | Bottleneck):
                nn.init.zeros_(module.last_norm.weight)


# -- variants ------------------------------------------------------------------------------------------------------------


def resnet18(num_classes: int = 1000, in_channels: int = 3, **options) -> ResNet:
    """18 layers, 11.7M parameters; `options` as `ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, in_channels, **options)


def resnet34(num_classes: int = 1000, in_channels: int = 3, **options) -> ResNet:
    """34 layers, 21.8M parameters; `options` as `ResNet`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, in_channels, **options)


def resnet50(num_classes: int = 1000, in_channels: int = 3, **options) -> ResNet:
    """50 layers, 25.6M parameters; `options` as `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels, **options)


def resnet101(num_classes: int = 1000, in_channels: int = 3, **options) -> ResNet:
    """101 layers, 44.5M parameters; `options` as `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, in_channels, **options)


def resnet152(num_classes: int = 1000, in_channels: int = 3, **options) -> ResNet:
    """152 layers, 60.2M parameters; `options` as `ResNet`."""
    return ResNet(Bottleneck, (3, 8, 36, 3), num_classes, in_channels, **options)


def resnet20_cifar(num_classes: int = 10, in_channels: int = 3, **options) -> CifarResNet:
    """20 layers for 32x32 images, 0.27M parameters (table 6)."""
    return CifarResNet(BasicBlock, 20, num_classes, in_channels, **options)


def resnet32_cifar(num_classes: int = 10, in_channels: int = 3, **options) -> CifarResNet:
    """32 layers for 32x32 images, 0.46M parameters (table 6)."""
    return CifarResNet(BasicBlock, 32, num_classes, in_channels, **options)


def resnet44_cifar(num_classes: int = 10, in_channels: int = 3, **options) -> CifarResNet:
    """44 layers for 32x32 images, 0.66M parameters (table 6)."""
    return CifarResNet(BasicBlock, 44, num_classes, in_channels, **options)


def resnet56_cifar(num_classes: int = 10, in_channels: int = 3, **options) -> CifarResNet:
    """56 layers for 32x32 images, 0.85M parameters (table 6)."""
    return CifarResNet(BasicBlock, 56, num_classes, in_channels, **options)


def resnet110_cifar(num_classes: int = 10, in_channels: int = 3, **options) -> CifarResNet:
    """110 layers for 32x32 images, 1.7M parameters (table 6)."""
    return CifarResNet(BasicBlock, 110, num_classes, in_channels, **options)


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Public checkpoints to these names: `module.` prefixes go; `linear` of the CIFAR checkpoints is `fc` here.

    torchvision's and timm's files come through unchanged.
    """
    renamed = {}
    for name, value in state_dict.items():
        name = name.removeprefix("module.")
        renamed["fc" + name.removeprefix("linear") if name.startswith("linear.") else name] = torch.as_tensor(value)
    return renamed
