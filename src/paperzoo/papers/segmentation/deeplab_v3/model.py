"""DeepLabv3: Rethinking Atrous Convolution for Semantic Image Segmentation (Chen et al. 2017, arXiv:1706.05587).

A convolution with holes sees far without losing resolution. Two ways to use that, on a ResNet whose last strides are dilations
(sec. 3.1): atrous spatial pyramid pooling, three rates side by side with a 1x1 convolution and an average over the image (sec. 3.3, fig. 5); or in cascade,
copies of the last block with growing rates (sec. 3.2, fig. 3). Within a block the three units have rates of their own, the multi-grid.

- `deeplabv3_resnet50`, `_resnet101`, `_mobilenet_v3_large` are torchvision's networks with its names, so its files load: stride 8 (16 for the
  last), no multi-grid, one more 3x3 convolution before the scores, an auxiliary head.
- `deeplabv3_multigrid` and `deeplabv3_cascade` are the paper's: ResNet-101, multi-grid, scores right after the pyramid, no second head.
  `output_stride` is free: the weights of training at 16 are used at 8, with all rates doubled (sec. 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.backbones import headless, load_body
from paperzoo.blocks.dilation import dilate, dilated_backbone
from paperzoo.papers.classification.resnet.model import Bottleneck, resnet50, resnet101
from paperzoo.papers.segmentation.deeplab_v3.mobilenet_v3 import MobileNetV3Features
from paperzoo.papers.segmentation.fcn.model import Head
from paperzoo.papers.segmentation.pspnet.model import SlimResNet

RATES = (6, 12, 18)
"""Of the pyramid at output stride 16 (sec. 3.3); twice that at 8."""


def rates_at(output_stride: int) -> tuple[int, ...]:
    return tuple(rate * 16 // output_stride for rate in RATES)


def multi_grid(stage: nn.Sequential, grid: Sequence[int]) -> None:
    """Multiplies the rates of the units of a ResNet's stage (sec. 3.2.1): of three units with rate 2 and a grid of (1, 2, 4), rates 2, 4 and 8.

    Raises:
        ValueError: if the stage has another number of units.
    """
    if len(stage) != len(grid):
        raise ValueError(f"multi_grid is {tuple(grid)}; the stage has {len(stage)} units")
    for unit, factor in zip(stage, grid, strict=True):
        conv = unit.conv2
        conv.dilation = tuple(n * factor for n in conv.dilation)
        conv.padding = tuple(n * factor for n in conv.padding)


# -- atrous spatial pyramid pooling ------------------------------------------------------------------------------------


class ASPPConv(nn.Sequential):
    """A 1x1 convolution, or 3x3 of a rate, with batch norm and ReLU. (B, C, H, W) -> (B, width, H, W)."""

    def __init__(self, in_channels: int, width: int, rate: int = 0) -> None:
        kernel = 3 if rate else 1
        super().__init__(
            nn.Conv2d(in_channels, width, kernel, padding=rate, dilation=max(1, rate), bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )


class ASPPPooling(nn.Sequential):
    """The image-level feature: the average over the image through a 1x1 convolution, at every position. (B, C, H, W) -> (B, width, H, W)."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), *ASPPConv(in_channels, width))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).expand(-1, -1, *x.shape[-2:])  # interpolating one pixel is repeating it


class ASPP(nn.Module):
    """Fig. 5: (B, C, H, W) -> (B, width, H, W).

    Args:
        rates: of the 3x3 convolutions.
        convolution: makes a branch from (in_channels, width, rate); `deeplabv3_plus` has another.
    """

    def __init__(
        self,
        in_channels: int,
        rates: Sequence[int],
        width: int = 256,
        drop_rate: float = 0.5,
        convolution: type[nn.Module] = ASPPConv,
    ) -> None:
        super().__init__()
        branches = [ASPPConv(in_channels, width), *(convolution(in_channels, width, rate) for rate in rates)]
        self.convs = nn.ModuleList([*branches, ASPPPooling(in_channels, width)])
        self.project = nn.Sequential(*ASPPConv(len(self.convs) * width, width), nn.Dropout(drop_rate))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.cat([branch(x) for branch in self.convs], 1))


# -- the network -------------------------------------------------------------------------------------------------------


class DeepLabV3(nn.Module):
    """(B, in_channels, H, W) -> logits (B, num_classes, H, W); in training with an auxiliary head {"out": …, "aux": …} of that shape.

    Logits are enlarged, not labels reduced, so that fine annotation stays (sec. 4.1). Training needs more than one image (the average over
    the image is one pixel to batch norm).

    Args:
        backbone: has `stages(x)`; the last map is classified.
        classifier: (B, C, h, w) -> (B, num_classes, h, w).
        aux_classifier: of the map `aux_from` (an index of the stages).
    """

    def __init__(
        self, backbone: nn.Module, classifier: nn.Module, aux_classifier: nn.Module | None = None, aux_from: int = -2
    ) -> None:
        super().__init__()
        self.backbone = headless(backbone)
        self.classifier = classifier
        self.aux_classifier = aux_classifier
        self.aux_from = aux_from

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        maps = self.backbone.stages(x)
        out = enlarge(self.classifier(maps[-1]), x.shape[-2:])
        if not self.training or self.aux_classifier is None:
            return out
        return {"out": out, "aux": enlarge(self.aux_classifier(maps[self.aux_from]), x.shape[-2:])}

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        """Start from a classifier (its state dict) with the same body.

        The copies of a cascade start as the last block of it (sec. 3.2: "duplicate several copies of the last block").

        Raises:
            ValueError: if something is missing or has another shape.
        """
        state = {name.removeprefix("features."): value for name, value in state.items()}
        load_body(getattr(self.backbone, "body", self.backbone), state)
        if isinstance(self.classifier, Cascade):
            self.classifier.copy_from(self.backbone.layer4)


def enlarge(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class Cascade(nn.Sequential):
    """Blocks 5, 6 and 7 (fig. 3b): copies of the last block, each with twice the rates of the one before, then the scores."""

    def __init__(
        self, channels: int, num_classes: int, rate: int, grid: Sequence[int], blocks: int, drop_rate: float
    ) -> None:
        stages = []
        for block in range(blocks):
            rates = [rate * 2 ** (block + 1) * factor for factor in grid]
            stages.append(nn.Sequential(*(Bottleneck(channels, channels // 4, dilation=r) for r in rates)))
        super().__init__(*stages, nn.Dropout(drop_rate), nn.Conv2d(channels, num_classes, 1))

    def copy_from(self, block: nn.Sequential) -> None:
        """Weights of the last block of the backbone; its first unit has other channels in, so its 1x1 convolution stays random."""
        for stage in self:
            if isinstance(stage, nn.Sequential):
                own = stage.state_dict()
                fitting = {k: v for k, v in block.state_dict().items() if k in own and own[k].shape == v.shape}
                stage.load_state_dict(fitting, strict=False)


def tv_head(channels: int, num_classes: int, rates: Sequence[int], drop_rate: float) -> nn.Sequential:
    """torchvision's: a 3x3 convolution between pyramid and scores, which the paper has not."""
    return nn.Sequential(
        ASPP(channels, rates, drop_rate=drop_rate),
        nn.Conv2d(256, 256, 3, padding=1, bias=False),
        nn.BatchNorm2d(256),
        nn.ReLU(inplace=True),
        nn.Conv2d(256, num_classes, 1),
    )


# -- variants ----------------------------------------------------------------------------------------------------------


def _torchvision(
    body: nn.Module, num_classes: int, aux_loss: bool, drop_rate: float, aux_from: int = -2, rates: Sequence[int] = ()
) -> DeepLabV3:
    rates = rates or rates_at(8)  # torchvision's, at stride 16 too
    head = tv_head(body.stage_channels[-1], num_classes, rates, drop_rate)
    aux = Head(body.stage_channels[aux_from], num_classes) if aux_loss else None
    return DeepLabV3(body, head, aux, aux_from)


def deeplabv3_resnet50(
    num_classes: int = 21,
    in_channels: int = 3,
    drop_rate: float = 0.5,
    aux_loss: bool = True,
    backbone: str | None = None,
    output_stride: int = 8,
) -> DeepLabV3:
    """torchvision's, on its ResNet-50; with `backbone` on another convolutional classifier."""
    if backbone is None:
        body = dilate(resnet50(0, in_channels), output_stride)
    else:
        body = dilated_backbone(backbone, output_stride, in_channels=in_channels)
    return _torchvision(body, num_classes, aux_loss, drop_rate, rates=rates_at(output_stride))


def deeplabv3_resnet101(
    num_classes: int = 21, in_channels: int = 3, drop_rate: float = 0.5, aux_loss: bool = True, output_stride: int = 8
) -> DeepLabV3:
    """torchvision's, on its ResNet-101."""
    body = dilate(resnet101(0, in_channels), output_stride)
    return _torchvision(body, num_classes, aux_loss, drop_rate, rates=rates_at(output_stride))


def deeplabv3_mobilenet_v3_large(
    num_classes: int = 21, in_channels: int = 3, drop_rate: float = 0.5, aux_loss: bool = True
) -> DeepLabV3:
    """torchvision's, on MobileNetV3 of stride 16; the auxiliary head is on an early map, the rates are those of stride 8."""
    body = dilate(MobileNetV3Features(in_channels), 16, whole_stage=True)
    return _torchvision(body, num_classes, aux_loss, drop_rate, aux_from=-4)


def deeplabv3_multigrid(
    num_classes: int = 21, in_channels: int = 3, drop_rate: float = 0.1, output_stride: int = 16
) -> DeepLabV3:
    """The paper's best: ResNet-101, multi-grid (1, 2, 4), the pyramid (table 5, 6)."""
    body = dilate(resnet101(0, in_channels), output_stride, whole_stage=True)
    multi_grid(body.layer4, (1, 2, 4))
    head = nn.Sequential(ASPP(2048, rates_at(output_stride), drop_rate=drop_rate), nn.Conv2d(256, num_classes, 1))
    return DeepLabV3(body, head)


def deeplabv3_cascade(
    num_classes: int = 21, in_channels: int = 3, drop_rate: float = 0.1, output_stride: int = 16
) -> DeepLabV3:
    """The paper's best cascade: ResNet-101 up to block 7, multi-grid (1, 2, 1) (table 3, 4)."""
    grid = (1, 2, 1)
    body = dilate(resnet101(0, in_channels), output_stride, whole_stage=True)
    multi_grid(body.layer4, grid)
    return DeepLabV3(body, Cascade(2048, num_classes, 32 // output_stride, grid, 3, drop_rate))


def deeplabv3_slim(num_classes: int = 8, in_channels: int = 3, drop_rate: float = 0.0) -> DeepLabV3:
    """Not of the paper: the pyramid on a ResNet of three basic blocks of stride 4, for images of 64 pixels; rates for a map of 16."""
    body = dilate(SlimResNet(in_channels), 4, whole_stage=True)
    pyramid = ASPP(body.stage_channels[-1], (2, 4, 6), width=32, drop_rate=drop_rate)
    return DeepLabV3(body, nn.Sequential(pyramid, nn.Conv2d(32, num_classes, 1)))
