"""The networks of ArcFace: IResNet, and any classifier of the catalogue with the same head (Deng et al., CVPR 2019, arXiv:1801.07698).

A residual network for faces of 112 x 112 (sec. 3.1): its first convolution keeps the size, a block is BN, convolution, BN,
PReLU, convolution, BN with the stride on the second convolution, and the map of 7 x 7 becomes an embedding by BN, dropout, a
linear layer and BN, instead of a mean over places.

Parameter names are those of the authors' PyTorch release (`iresnet`), whose files load unchanged. What the paper does not
say is as there: kernels start from N(0, 0.1), and the last batch norm has no scale to learn (it stays at 1).

Embeddings come out as the last batch norm leaves them; whoever compares them normalises them to length 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paperzoo.blocks.backbones import create_backbone
from paperzoo.blocks.precision import full_precision


class IBasicBlock(nn.Module):
    """BN, 3x3, BN, PReLU, 3x3 with the stride, BN, plus the shortcut. (B, inplanes, H, W) -> (B, planes, ceil(H/stride), …)."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.prelu = nn.PReLU(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(x)) + shortcut


class EmbeddingHead(nn.Module):
    """A map (B, C, H, W) of a known size -> embeddings (B, num_features): BN, dropout, linear, BN (sec. 3.1).

    A base class, so that the layers keep their names at the top of a network: bn2, dropout, fc, features.
    """

    def add_head(self, channels: int, places: int, num_features: int, drop_rate: float) -> None:
        """Make the layers for a map of `places` = H * W."""
        self.num_features = num_features
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(drop_rate, inplace=True)
        self.fc = nn.Linear(channels * places, num_features)
        self.features = nn.BatchNorm1d(num_features)
        self.features.weight.requires_grad_(False)

    def head(self, x: Tensor) -> Tensor:
        x = self.dropout(torch.flatten(self.bn2(x), 1))
        # the last layers in full precision: what is learned from are angles between their outputs
        with full_precision(x):
            return self.features(self.fc(x.to(self.fc.weight.dtype)))


class IResNet(EmbeddingHead):
    """Images (B, in_channels, image_size, image_size) -> embeddings (B, num_features), not normalised.

    Args:
        layers: blocks of the four stages.
        widths: their channels.
        num_features: D, the size of an embedding. Paper: 512.
        image_size: pixels; the linear layer is made for this size, as it reads every place of the last map.
        drop_rate: before the linear layer. The authors' MXNet release has 0.4, the PyTorch one 0.
    """

    def __init__(
        self,
        layers: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        num_features: int = 512,
        image_size: int = 112,
        in_channels: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.stage_channels, self.stage_strides = list(widths), [2, 4, 8, 16]
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.prelu = nn.PReLU(widths[0])
        inplanes = widths[0]
        for i, (blocks, planes) in enumerate(zip(layers, widths, strict=True), 1):
            first = IBasicBlock(inplanes, planes, 2)
            setattr(self, f"layer{i}", nn.Sequential(first, *(IBasicBlock(planes, planes) for _ in range(blocks - 1))))
            inplanes = planes
        self.add_head(inplanes, (-(-image_size // 16)) ** 2, num_features, drop_rate)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.1)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The maps after each stage, finest first."""
        x = self.prelu(self.bn1(self.conv1(x)))
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x)[-1])


class FaceBackbone(EmbeddingHead):
    """Any classifier's last map with the head of sec. 3.1: images (B, in_channels, image_size, image_size) -> (B, num_features).

    Args:
        backbone: the classifier's name.
        backbone_weights: a file or folder of the whole classifier's weights, to start from.
        arguments: what else the classifier's function takes.
    """

    def __init__(
        self,
        backbone: str,
        num_features: int = 512,
        image_size: int = 112,
        in_channels: int = 3,
        drop_rate: float = 0.0,
        backbone_weights: str | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.backbone = create_backbone(
            backbone, in_channels=in_channels, out_indices=(-1,), weights=backbone_weights, **arguments
        )
        with torch.device("meta"):  # the size of the last map, without computing it
            twin = create_backbone(backbone, in_channels=in_channels, out_indices=(-1,), **arguments).eval()
            with torch.no_grad():
                shape = twin(torch.empty(1, in_channels, image_size, image_size))[0].shape
        self.add_head(shape[1], shape[2] * shape[3], num_features, drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)[-1])


def iresnet18(**arguments: Any) -> IResNet:
    return IResNet((2, 2, 2, 2), **arguments)


def iresnet34(**arguments: Any) -> IResNet:
    return IResNet((3, 4, 6, 3), **arguments)


def iresnet50(**arguments: Any) -> IResNet:
    return IResNet((3, 4, 14, 3), **arguments)


def iresnet100(**arguments: Any) -> IResNet:
    return IResNet((3, 13, 30, 3), **arguments)


def iresnet10_thin(num_features: int = 128, image_size: int = 48, **arguments: Any) -> IResNet:
    """A block a stage and a quarter of the channels: for small faces and short runs."""
    return IResNet((1, 1, 1, 1), (16, 32, 64, 128), num_features=num_features, image_size=image_size, **arguments)


def face_backbone(backbone: str = "resnet50", **arguments: Any) -> FaceBackbone:
    return FaceBackbone(backbone, **arguments)
