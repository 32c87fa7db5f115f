"""DeepLabv3+: Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation (Chen et al., ECCV 2018, arXiv:1802.02611).

DeepLabv3 enlarges its scores 8 or 16 times at once, and borders blur. Here its pyramid is the encoder; a small decoder enlarges what it says four times,
puts a fine map of the backbone beside it, refines both with two 3x3 convolutions, and enlarges the scores four times more (sec. 3.1, fig. 2).
With the aligned Xception (sec. 3.2, fig. 4) the 3x3 convolutions of pyramid and decoder are separable: a depthwise one with holes, then 1x1.

Batch norm and ReLU follow the depthwise convolutions too, and enlarging is corner on corner, as in the authors' code. `from_official` converts files of the
PyTorch code most used (jfzhang95/pytorch-deeplab-xception, ResNet-101) and leaves timm's Xception, whose names are those here, as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.backbones import headless, load_body
from paperzoo.blocks.dilation import dilate, dilated_backbone
from paperzoo.papers.classification.resnet.model import resnet50, resnet101
from paperzoo.papers.segmentation.deeplab_v3.model import ASPP, ASPPConv, multi_grid, rates_at
from paperzoo.papers.segmentation.deeplabv3_plus.xception import AlignedXception
from paperzoo.papers.segmentation.pspnet.model import SlimResNet

REDUCED = 48
"""Channels that the fine map keeps (table 1: more would outweigh the encoder's 256)."""


class AtrousSeparable(nn.Sequential):
    """A depthwise 3x3 convolution of a rate, then 1x1, each with batch norm and ReLU (sec. 3.1). (B, C, H, W) -> (B, width, H, W)."""

    def __init__(self, in_channels: int, width: int, rate: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, in_channels, 3, padding=rate, dilation=rate, groups=in_channels, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            *ASPPConv(in_channels, width),
        )


class Decoder(nn.Module):
    """Encoder's map (B, C, h, w) and a fine map (B, F, H, W) -> scores (B, num_classes, H, W).

    Args:
        convolution: of the two 3x3 convolutions; makes one from (in_channels, width, rate).
    """

    def __init__(
        self,
        channels: int,
        fine_channels: int,
        num_classes: int,
        reduced: int = REDUCED,
        convolution: type[nn.Module] = ASPPConv,
    ) -> None:
        super().__init__()
        self.reduce = ASPPConv(fine_channels, reduced)
        self.refine = nn.Sequential(convolution(channels + reduced, channels, 1), convolution(channels, channels, 1))
        self.score = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor, fine: Tensor) -> Tensor:
        x = torch.cat([enlarge(x, fine.shape[-2:]), self.reduce(fine)], 1)
        return self.score(self.refine(x))


class DeepLabV3Plus(nn.Module):
    """(B, in_channels, H, W) -> logits (B, num_classes, H, W). Training needs more than one image, as `DeepLabV3` does.

    Args:
        backbone: has `stages(x)` and `stage_channels`; the last map is the encoder's, `fine` the index of the decoder's.
        rates: of the pyramid.
        width: channels of pyramid and decoder.
        separable: whether the 3x3 convolutions of both are.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        rates: Sequence[int],
        drop_rate: float,
        fine: int = 0,
        width: int = 256,
        reduced: int = REDUCED,
        separable: bool = False,
    ) -> None:
        super().__init__()
        channels, self.fine = backbone.stage_channels, fine
        convolution = AtrousSeparable if separable else ASPPConv
        self.backbone = headless(backbone)
        self.aspp = ASPP(channels[-1], rates, width, drop_rate, convolution)
        self.decoder = Decoder(width, channels[fine], num_classes, reduced, convolution)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.backbone.stages(x)
        return enlarge(self.decoder(self.aspp(maps[-1]), maps[self.fine]), x.shape[-2:])

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        """Start from a classifier (its state dict) with the same body.

        Raises:
            ValueError: if something is missing or has another shape.
        """
        load_body(getattr(self.backbone, "body", self.backbone), dict(state))


def enlarge(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


NAMES = (
    (r"^aspp\.aspp(\d)\.atrous_conv\.", lambda m: f"aspp.convs.{int(m[1]) - 1}.0."),
    (r"^aspp\.aspp(\d)\.bn\.", lambda m: f"aspp.convs.{int(m[1]) - 1}.1."),
    (r"^aspp\.global_avg_pool\.", "aspp.convs.4."),
    (r"^aspp\.conv1\.", "aspp.project.0."),
    (r"^aspp\.bn1\.", "aspp.project.1."),
    (r"^decoder\.conv1\.", "decoder.reduce.0."),
    (r"^decoder\.bn1\.", "decoder.reduce.1."),
    (r"^decoder\.last_conv\.([01])\.", r"decoder.refine.0.\1."),
    (r"^decoder\.last_conv\.([45])\.", lambda m: f"decoder.refine.1.{int(m[1]) - 4}."),
    (r"^decoder\.last_conv\.8\.", "decoder.score."),
)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of pytorch-deeplab-xception (with its ResNet) to these."""
    renamed = {}
    for name, value in state.items():
        for pattern, ours in NAMES:
            name, found = re.subn(pattern, ours, name)
            if found:
                break
        renamed[name] = value
    return renamed


# -- variants ----------------------------------------------------------------------------------------------------------


def deeplabv3plus_resnet50(
    num_classes: int = 21,
    in_channels: int = 3,
    drop_rate: float = 0.1,
    backbone: str | None = None,
    output_stride: int = 16,
) -> DeepLabV3Plus:
    """On ResNet-50 with a multi-grid of (1, 2, 4); with `backbone` on another convolutional classifier, without the grid."""
    if backbone is None:
        return _resnet(resnet50(0, in_channels), num_classes, drop_rate, output_stride)
    body = dilated_backbone(backbone, output_stride, in_channels=in_channels)
    if 4 not in body.strides:
        raise ValueError(
            f"backbone {backbone} has maps of strides {', '.join(map(str, body.strides))}, none of stride 4"
        )
    fine = len(body.strides) - 1 - body.strides[::-1].index(4)
    return DeepLabV3Plus(body, num_classes, rates_at(output_stride), drop_rate, fine)


def deeplabv3plus_resnet101(
    num_classes: int = 21, in_channels: int = 3, drop_rate: float = 0.1, output_stride: int = 16
) -> DeepLabV3Plus:
    """On ResNet-101 with a multi-grid of (1, 2, 4) (sec. 4.2)."""
    return _resnet(resnet101(0, in_channels), num_classes, drop_rate, output_stride)


def _resnet(body: nn.Module, num_classes: int, drop_rate: float, output_stride: int) -> DeepLabV3Plus:
    dilate(body, output_stride, whole_stage=True)
    multi_grid(body.layer4, (1, 2, 4))
    return DeepLabV3Plus(body, num_classes, rates_at(output_stride), drop_rate)


def deeplabv3plus_xception65(
    num_classes: int = 21, in_channels: int = 3, drop_rate: float = 0.1, output_stride: int = 16
) -> DeepLabV3Plus:
    """The paper's best: on the aligned Xception-65, with separable convolutions in pyramid and decoder (sec. 4.3)."""
    body = dilate(AlignedXception(in_channels), output_stride)
    return DeepLabV3Plus(body, num_classes, rates_at(output_stride), drop_rate, separable=True)


def deeplabv3plus_slim(num_classes: int = 8, in_channels: int = 3, drop_rate: float = 0.0) -> DeepLabV3Plus:
    """Not of the paper: on a ResNet of three basic blocks of stride 8, for images of 64 pixels; rates for a map of 8."""
    body = dilate(SlimResNet(in_channels), 8, whole_stage=True)
    options = {"width": 48, "reduced": 16, "separable": True}
    return DeepLabV3Plus(body, num_classes, (1, 2, 3), drop_rate, **options)
