"""Wide ResNet: Wide Residual Networks (Zagoruyko and Komodakis, BMVC 2016, arXiv:1605.07146).

Two families, as in the paper: WRN-depth-widening for small images (table 1), and ResNet-50 with a wider bottleneck for
ImageNet (sec. 3.4), which is built from the parts in `classification/resnet`.

Parameter names of the small-image family are ours; `from_official` converts the authors' PyTorch checkpoints
(`group0.block1.conv0`, with batch norm as `group0.block1.bn0.weight`) and pytorchcv's. The ImageNet network has
torchvision's and timm's names and needs no conversion.
"""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.classifier import last_layer
from paperzoo.papers.classification.resnet.model import Bottleneck, ResNet


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv, dropout, BN-ReLU-conv, and a shortcut (figure 1d). (B, in, H, W) -> (B, out, H / stride, W / stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.dropout = nn.Dropout(drop_rate) if drop_rate else nn.Identity()  # between the convolutions (sec. 2.4)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        # where the shape changes, the shortcut starts from the activated input (released code; the paper does not say)
        shortcut = x if self.shortcut is None else self.shortcut(active)
        y = F.relu(self.bn2(self.conv1(active)))
        return self.conv2(self.dropout(y)) + shortcut


class WideResNet(nn.Module):
    """WRN-`depth`-`widening` (table 1). (B, in_channels, H, W) -> logits (B, num_classes); H and W from 4 up, 32 in the paper.

    Args:
        depth: layers with weights, 6 n + 4 for n blocks in each of the three stages.
        widening: the factor k by which every stage is wider than 16, 32, 64 channels.
        drop_rate: dropout between the convolutions of a block; 0.3 on CIFAR, 0.4 on SVHN where the paper uses it.

    Raises:
        ValueError: if the depth is not 6 n + 4.
    """

    def __init__(
        self, depth: int, widening: int, num_classes: int = 10, in_channels: int = 3, drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth {depth} is not 6 n + 4; 10, 16, 22, 28 and 40 are")
        self.stage_channels, self.stage_strides = [16 * widening, 32 * widening, 64 * widening], [1, 2, 4]
        self.num_features = self.stage_channels[-1]
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        stages, channels = [], 16
        for width, stride in zip(self.stage_channels, (1, 2, 2), strict=True):
            first = PreActivationBlock(channels, width, stride, drop_rate)
            rest_of_stage = [PreActivationBlock(width, width, 1, drop_rate) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(first, *rest_of_stage))
            channels = width
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = nn.BatchNorm2d(self.num_features)
        self.fc = last_layer(self.num_features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # sec. 3: "MSR init", on the fan out as in the released code
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if num_classes:
            nn.init.zeros_(self.fc.bias)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The outputs of the three stages, strides 1, 2, 4; the last one after the final BN-ReLU."""
        first = self.layer1(self.conv1(x))
        second = self.layer2(first)
        return [first, second, F.relu(self.bn(self.layer3(second)))]

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 64 k, H / 4, W / 4)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))  # not stages: each is freed when it was read
        return F.relu(self.bn(x))

    def embed(self, x: Tensor) -> Tensor:
        """Pooled features (B, num_features)."""
        return self.forward_features(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.embed(x))

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for another number of classes; 0 for none."""
        self.fc = last_layer(self.num_features, num_classes).to(self.conv1.weight)


def wide_resnet10_2(**arguments) -> WideResNet:
    """WRN-10-2: one block a stage; not in the paper, for tests and quick runs."""
    return WideResNet(10, 2, **arguments)


def wide_resnet16_2(**arguments) -> WideResNet:
    return WideResNet(16, 2, **arguments)


def wide_resnet16_4(**arguments) -> WideResNet:
    return WideResNet(16, 4, **arguments)


def wide_resnet16_8(**arguments) -> WideResNet:
    return WideResNet(16, 8, **arguments)


def wide_resnet16_10(**arguments) -> WideResNet:
    return WideResNet(16, 10, **arguments)


def wide_resnet22_8(**arguments) -> WideResNet:
    return WideResNet(22, 8, **arguments)


def wide_resnet28_2(**arguments) -> WideResNet:
    """WRN-28-2: the network of the semi-supervised literature."""
    return WideResNet(28, 2, **arguments)


def wide_resnet28_10(**arguments) -> WideResNet:
    return WideResNet(28, 10, **arguments)


def wide_resnet28_20(**arguments) -> WideResNet:
    return WideResNet(28, 20, **arguments)


def wide_resnet40_4(**arguments) -> WideResNet:
    return WideResNet(40, 4, **arguments)


def wide_resnet40_8(**arguments) -> WideResNet:
    return WideResNet(40, 8, **arguments)


def wide_resnet50_2(**arguments) -> ResNet:
    """WRN-50-2-bottleneck (table 8): ResNet-50 whose 3x3 convolutions are twice as wide, for 224 x 224 images."""
    return ResNet(Bottleneck, [3, 4, 6, 3], width_per_group=128, **arguments)


def wide_resnet101_2(**arguments) -> ResNet:
    """The same at 101 layers; not in the paper, published by torchvision."""
    return ResNet(Bottleneck, [3, 4, 23, 3], width_per_group=128, **arguments)


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts the authors' PyTorch checkpoints and pytorchcv's; anything else is returned as it is."""
    return {new_name(name): tensor for name, tensor in state.items()}


def new_name(name: str) -> str:
    rules = [
        # the authors'
        (r"^conv0$", "conv1.weight"),
        (r"^group(\d)\.block(\d+)\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}."),
        (r"\.bn0\.", ".bn1.__"),
        (r"\.bn1\.(?!__)", ".bn2."),
        (r"\.conv1$", ".conv2.weight"),
        (r"\.conv0$", ".conv1.weight"),
        (r"\.convdim$", ".shortcut.weight"),
        # pytorchcv's
        (r"^features\.init_block\.", "conv1."),
        (r"^features\.stage(\d)\.unit(\d+)\.", lambda m: f"layer{m[1]}.{int(m[2]) - 1}."),
        (r"\.body\.conv(\d)\.bn\.", r".bn\1."),
        (r"\.body\.conv(\d)\.conv\.", r".conv\1."),
        (r"\.identity_conv\.", ".shortcut."),
        (r"^features\.post_activ\.bn\.", "bn."),
        (r"^output\.", "fc."),
    ]
    official = name.startswith(("group", "conv0"))
    for pattern, replacement in rules[:7] if official else rules[7:]:
        name = re.sub(pattern, replacement, name)
    return name.replace("__", "")
