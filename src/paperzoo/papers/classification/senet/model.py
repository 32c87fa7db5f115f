"""SENet: Squeeze-and-Excitation Networks (Hu et al., CVPR 2018, arXiv:1709.01507).

The part is `SqueezeExcitation` (sec. 3); the networks are ResNet's with the part at the end of every residual branch, before
the addition (fig. 3). Nothing of ResNet is copied: a block's `residual` is what it recalibrates.

Parameter names are timm's (`layer1.0.se.fc1.weight`, the two fully connected layers as 1x1 convolutions), so timm's
`seresnet50` loads unchanged. As in ResNet's folder, and timm, the stride of a bottleneck is on its 3x3 convolution; the
authors' own release has it on the 1x1.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from paperzoo.papers.classification.resnet.model import BasicBlock, Bottleneck, CifarResNet, ResNet


class SqueezeExcitation(nn.Module):
    """Per-channel gates from the whole image (eq. 2 to 4): (B, C, H, W) -> the same shape.

    Args:
        input_channels: C.
        squeeze_channels: width of the bottleneck between the two layers; the paper has C / 16.
        activation: delta, between the layers.
        scale_activation: sigma, the gate.
    """

    def __init__(
        self,
        input_channels: int,
        squeeze_channels: int,
        activation: Callable[[], nn.Module] = nn.ReLU,
        scale_activation: Callable[[], nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        if squeeze_channels < 1:
            raise ValueError(f"squeeze_channels must be at least 1, got {squeeze_channels}")
        self.fc1 = nn.Conv2d(input_channels, squeeze_channels, 1)
        self.activation = activation()
        self.fc2 = nn.Conv2d(squeeze_channels, input_channels, 1)
        self.scale_activation = scale_activation()

    def forward(self, x: Tensor) -> Tensor:
        z = x.mean((2, 3), keepdim=True)  # squeeze, eq. (2)
        s = self.scale_activation(self.fc2(self.activation(self.fc1(z))))  # excitation, eq. (3)
        return x * s  # eq. (4)


class SEBasicBlock(BasicBlock):
    """ResNet's two-convolution block, recalibrated. `reduction` is the paper's r."""

    reduction = 16

    def __init__(self, inplanes: int, planes: int, *args, **options) -> None:
        super().__init__(inplanes, planes, *args, **options)
        channels = planes * self.expansion
        self.se = SqueezeExcitation(channels, channels // self.reduction)

    def residual(self, x: Tensor) -> Tensor:
        return self.se(super().residual(x))


class SEBottleneck(Bottleneck):
    """ResNet's bottleneck, recalibrated. `reduction` is the paper's r."""

    reduction = 16

    def __init__(self, inplanes: int, planes: int, *args, **options) -> None:
        super().__init__(inplanes, planes, *args, **options)
        channels = planes * self.expansion
        self.se = SqueezeExcitation(channels, channels // self.reduction)

    def residual(self, x: Tensor) -> Tensor:
        return self.se(super().residual(x))


def seresnet50(num_classes: int = 1000, in_channels: int = 3, **options) -> ResNet:
    """SE-ResNet-50, 28.1M parameters; `options` as `ResNet`."""
    return ResNet(SEBottleneck, (3, 4, 6, 3), num_classes, in_channels, **options)


def seresnet101(num_classes: int = 1000, in_channels: int = 3, **options) -> ResNet:
    """SE-ResNet-101, 49.3M parameters; `options` as `ResNet`."""
    return ResNet(SEBottleneck, (3, 4, 23, 3), num_classes, in_channels, **options)


def seresnet152(num_classes: int = 1000, in_channels: int = 3, **options) -> ResNet:
    """SE-ResNet-152, 66.8M parameters; `options` as `ResNet`."""
    return ResNet(SEBottleneck, (3, 8, 36, 3), num_classes, in_channels, **options)


def seresnet20_cifar(num_classes: int = 10, in_channels: int = 3, **options) -> CifarResNet:
    """SE-ResNet-20 for 32x32 images: a small sister of the paper's CIFAR networks, for seconds on a CPU."""
    return CifarResNet(SEBasicBlock, 20, num_classes, in_channels, **options)


def seresnet110_cifar(num_classes: int = 10, in_channels: int = 3, **options) -> CifarResNet:
    """SE-ResNet-110 for 32x32 images (sec. 5.2)."""
    return CifarResNet(SEBasicBlock, 110, num_classes, in_channels, **options)
