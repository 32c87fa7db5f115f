"""FPN: Feature Pyramid Networks for Object Detection (Lin et al., CVPR 2017, arXiv:1612.03144).

The pyramid (sec. 3), the rule that gives a region its level (eq. 1), and the region proposal network of
`faster_rcnn` over the pyramid (sec. 4.1). Parameter names are torchvision's. What differs from the paper:

- Regions of interest get their level as in torchvision, with 1e-6 added before rounding down in eq. 1, so that a region
  of exactly 224 pixels is safely on level 4.
- Convolutions of the pyramid start as in torchvision and Detectron (uniform, variance 1 / (3 fan_in), zero bias); the paper
  does not say how.
- The ResNet backbone strides on its 3x3 convolutions (see `classification/resnet`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from paperzoo.blocks.backbones import at_strides, headless, load_body
from paperzoo.blocks.boxes import AnchorGenerator
from paperzoo.papers.classification.resnet.model import BasicBlock, ResNet, conv3x3, initialise, resnet50
from paperzoo.papers.detection.fast_rcnn.model import RoIHeads, SingleLevel, TwoMLPHead, exact
from paperzoo.papers.detection.faster_rcnn.model import FasterRCNN, RegionProposalNetwork

# -- the pyramid (sec. 3) --------------------------------------------------------------------------------------------


class FeaturePyramidNetwork(nn.Module):
    """The top-down pathway with lateral connections (fig. 3).

    Features C_l (B, in_channels[l], H_l, W_l), finest first -> pyramid P_l (B, out_channels, H_l, W_l), finest first, and
    behind it the levels that `extra_blocks` adds.

    Args:
        in_channels: channels of each feature map.
        out_channels: d, the channels of every level (paper: 256).
        extra_blocks: `LastLevelMaxPool`, `LastLevelP6P7`, or a module that takes (pyramid, features) and returns the
            coarser levels; None adds none.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: int = 256, extra_blocks: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        # each convolution is alone in a Sequential, because the public checkpoints' names say so
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(c, out_channels, 1)) for c in in_channels)
        self.layer_blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(out_channels, out_channels, 3, padding=1)) for _ in in_channels
        )
        for convolution in [*self.inner_blocks, *self.layer_blocks]:
            start(convolution[0])
        self.extra_blocks = extra_blocks

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        if len(features) != len(self.inner_blocks):
            raise ValueError(f"features has {len(features)} levels; this pyramid is made for {len(self.inner_blocks)}")
        merged: list[Tensor] = []
        for lateral, feature in zip(reversed(self.inner_blocks), reversed(features), strict=True):
            level = lateral(feature)
            if merged:  # nearest neighbour "for simplicity"; to the size of the finer map, which may be odd
                level = level + F.interpolate(merged[0], size=level.shape[-2:], mode="nearest")
            merged.insert(0, level)
        # "a 3x3 convolution on each merged map … to reduce the aliasing effect of upsampling"; no non-linearity
        pyramid = [smooth(level) for smooth, level in zip(self.layer_blocks, merged, strict=True)]
        return pyramid if self.extra_blocks is None else pyramid + self.extra_blocks(pyramid, features)


class LastLevelMaxPool(nn.Module):
    """P6 of sec. 4.1: every second pixel of P5. (pyramid, features) -> [P6]."""

    def forward(self, pyramid: Sequence[Tensor], features: Sequence[Tensor]) -> list[Tensor]:
        return [F.max_pool2d(pyramid[-1], kernel_size=1, stride=2)]


class LastLevelP6P7(nn.Module):
    """P6 and P7 of RetinaNet (arXiv:1708.02002, sec. 4): (pyramid, features) -> [P6, P7].

    P6 is a strided convolution on C5, or on P5 where `in_channels == out_channels` (as torchvision decides it).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        start(self.p6)
        start(self.p7)
        self.from_pyramid = in_channels == out_channels

    def forward(self, pyramid: Sequence[Tensor], features: Sequence[Tensor]) -> list[Tensor]:
        p6 = self.p6(pyramid[-1] if self.from_pyramid else features[-1])
        return [p6, self.p7(F.relu(p6))]


def start(convolution: nn.Conv2d) -> None:
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    nn.init.zeros_(convolution.bias)


class BackboneWithFPN(nn.Module):
    """A convolutional hierarchy and the pyramid on some of its stages: images (B, 3, H, W) -> the pyramid's levels.

    Args:
        body: has `stages(x)` and `stage_channels`; a classifier's pooling and last layer are dropped.
        stages: which stages the pyramid stands on, counted from 0 (1, 2, 3 is C3 to C5).
        out_channels, extra_blocks: as `FeaturePyramidNetwork`.
    """

    def __init__(
        self,
        body: nn.Module,
        stages: Sequence[int] = (0, 1, 2, 3),
        out_channels: int = 256,
        extra_blocks: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.body = headless(body)
        self.taken = tuple(stages)
        self.fpn = FeaturePyramidNetwork([body.stage_channels[i] for i in stages], out_channels, extra_blocks)
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.body.stages(images)
        return self.fpn([features[i] for i in self.taken])

    def load_body(self, state_dict: dict[str, Tensor]) -> None:
        """Weights of a classifier with the same body; its last layer is left out."""
        load_body(self.body, state_dict)


# -- regions of interest (sec. 4.2) ----------------------------------------------------------------------------------


def assign_levels(
    boxes: Tensor, lowest: int = 2, highest: int = 5, canonical_size: float = 224.0, canonical_level: int = 4
) -> Tensor:
    """Eq. 1: k = floor(k0 + log2(sqrt(w h) / 224)), held between the lowest and the highest level.

    Args:
        boxes: (N, 4) in pixels of the network's input.

    Returns:
        int64 (N,), the level of each box, `lowest` to `highest`.
    """
    size = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    level = torch.floor(canonical_level + torch.log2(size / canonical_size) + 1e-6)
    return level.clamp(lowest, highest).to(torch.int64)


class PyramidPool(nn.Module):
    """RoI features, each from the level that eq. 1 gives it (RoIAlign, where the paper of 2016 had RoI pooling).

    Levels P_l (B, C, H_l, W_l), of which those with a stride here are looked at, and regions (R, 5), the image's number
    before x1 y1 x2 y2 -> (R, C, output_size, output_size).
    """

    def __init__(self, output_size: int = 7, strides: Sequence[int] = (4, 8, 16, 32), sampling_ratio: int = 2) -> None:
        super().__init__()
        self.output_size, self.strides, self.sampling_ratio = output_size, tuple(strides), sampling_ratio

    def forward(self, levels: Sequence[Tensor], regions: Tensor) -> Tensor:
        lowest, highest = (int(s).bit_length() - 1 for s in (self.strides[0], self.strides[-1]))
        number = assign_levels(regions[:, 1:], lowest, highest) - lowest
        whole = torch.compiler.is_compiling() or regions.is_meta  # sizes must not depend on the data
        size, pooled = self.output_size, None
        for i, (level, stride) in enumerate(zip(levels, self.strides, strict=False)):
            features, here = exact(level), number == i  # pixels do not fit into 16 bits
            rows = None if whole else here.nonzero()[:, 0]
            asked = regions if whole else regions[rows]
            found = roi_align(features, asked.to(features.dtype), size, 1 / stride, self.sampling_ratio)
            if pooled is None:
                pooled = found.new_zeros(len(regions), level.shape[1], size, size)
            if whole:
                pooled = torch.where(here[:, None, None, None], found, pooled)
            else:
                pooled = pooled.index_put((rows,), found)
        return pooled.to(levels[0].dtype)


# -- region proposals (sec. 4.1) -------------------------------------------------------------------------------------


class ProposalNetwork(nn.Module):
    """A backbone and a region proposal network, as a detector of one class ("an object"): see `tasks/detection.py`.

    `forward(images)` gives objectness logits (B, A) and box deltas (B, A, 4); with targets, the losses.
    """

    num_classes = 1

    def __init__(self, backbone: nn.Module, rpn: RegionProposalNetwork, before: int = 1000, after: int = 1000) -> None:
        super().__init__()
        self.backbone, self.rpn = backbone, rpn
        self.before, self.after = before, after

    def load_backbone(self, state_dict: dict[str, Tensor]) -> None:
        """Start from a classifier's weights."""
        self.backbone.load_body(state_dict)

    def forward(
        self, images: Tensor, targets: Sequence[dict[str, Tensor]] | None = None
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        outputs = self.rpn(self.backbone(images))
        return outputs if targets is None else self.rpn.loss(outputs, targets, tuple(images.shape[-2:]))

    def postprocess(
        self, outputs: tuple[Tensor, Tensor], sizes: Tensor, canvas: tuple[int, int]
    ) -> list[dict[str, Tensor]]:
        found = self.rpn.proposals(outputs, sizes, canvas, self.before, self.after)
        return [{"boxes": b, "scores": s, "labels": torch.zeros_like(s, dtype=torch.int64)} for b, s in found]


# -- variants --------------------------------------------------------------------------------------------------------


def rpn_resnet50_fpn(num_classes: int = 1) -> ProposalNetwork:
    """Table 1 (c): proposals from P2 to P6 of ResNet-50; anchors of 32 to 512 pixels, one size a level, three ratios."""
    only_objects(num_classes)
    backbone = BackboneWithFPN(resnet50(), extra_blocks=LastLevelMaxPool())
    return ProposalNetwork(backbone, RegionProposalNetwork(256, pyramid_anchors()))


def faster_rcnn_resnet50_fpn(num_classes: int = 90, backbone: str | None = None, **options: float) -> FasterRCNN:
    """Faster R-CNN on the pyramid (sec. 4.2): 41.8M parameters on ResNet-50, as torchvision's `fasterrcnn_resnet50_fpn`.

    90 classes are COCO's category numbers less 1, as torchvision's checkpoint has them. `options` as `RoIHeads`.
    `backbone`: another classifier by name, its maps of strides 4, 8, 16 and 32.
    """
    body = resnet50() if backbone is None else at_strides(backbone, (4, 8, 16, 32))
    pyramid = BackboneWithFPN(body, extra_blocks=LastLevelMaxPool())
    rpn = RegionProposalNetwork(256, pyramid_anchors())
    options = {"least": 0.0, "sampled": 512, "box_beta": 1 / 9, "nms_threshold": 0.5} | options
    heads = RoIHeads(PyramidPool(), TwoMLPHead(256 * 7 * 7, 1024), num_classes, **options)
    return FasterRCNN(pyramid, rpn, heads, (2000, 1000), (2000, 1000))


def pyramid_anchors() -> AnchorGenerator:
    """Sec. 4.1: areas from 32^2 on P2 to 512^2 on P6, one size a level, three ratios."""
    return AnchorGenerator((4, 8, 16, 32, 64), [(size,) for size in (32, 64, 128, 256, 512)])


def rpn_resnet50_c4(num_classes: int = 1) -> ProposalNetwork:
    """Table 1 (a): the baseline, proposals from C4 alone; all five sizes at each of its cells."""
    only_objects(num_classes)
    backbone = SingleLevel(resnet50())
    anchors = AnchorGenerator((16,), [(32, 64, 128, 256, 512)])
    return ProposalNetwork(backbone, RegionProposalNetwork(backbone.out_channels, anchors))


def rpn_tiny_fpn(num_classes: int = 1) -> ProposalNetwork:
    """`rpn_resnet50_fpn` in small, for images of about 100 pixels: anchors of 8 to 128 pixels."""
    only_objects(num_classes)
    backbone = BackboneWithFPN(TinyBody(), out_channels=48, extra_blocks=LastLevelMaxPool())
    anchors = AnchorGenerator((4, 8, 16, 32, 64), [(size,) for size in (8, 16, 32, 64, 128)])
    return ProposalNetwork(backbone, RegionProposalNetwork(48, anchors), before=200, after=100)


def rpn_tiny_c4(num_classes: int = 1) -> ProposalNetwork:
    """`rpn_resnet50_c4` in small, on the same backbone as `rpn_tiny_fpn`."""
    only_objects(num_classes)
    backbone = SingleLevel(TinyBody())
    anchors = AnchorGenerator((16,), [(8, 16, 32, 64, 128)])
    return ProposalNetwork(backbone, RegionProposalNetwork(backbone.out_channels, anchors), before=200, after=100)


def only_objects(num_classes: int) -> None:
    if num_classes != 1:
        raise ValueError(f"num_classes is {num_classes}; a proposal network knows one class, an object")


class TinyBody(nn.Module):
    """A thin residual hierarchy with ResNet's strides (4, 8, 16, 32), for pictures of about 100 pixels.

    One basic block a stage; the stem is a strided 3x3 convolution and ResNet's max pool.
    """

    def __init__(self, channels: Sequence[int] = (32, 48, 64, 96), in_channels: int = 3) -> None:
        super().__init__()
        self.stage_channels, self.stage_strides = list(channels), [4, 8, 16, 32]
        self.conv1 = conv3x3(in_channels, channels[0] // 2, stride=2)
        self.bn1 = nn.BatchNorm2d(channels[0] // 2)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inplanes = channels[0] // 2
        for i, planes in enumerate(channels):
            stride = 1 if i == 0 else 2
            shortcut = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
            self.add_module(f"layer{i + 1}", nn.Sequential(BasicBlock(inplanes, planes, stride, shortcut)))
            inplanes = planes
        initialise(self)

    stages = ResNet.stages
    relu = staticmethod(F.relu)


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's published Faster R-CNN weights to these names and to our batch norm.

    The file of 2021 (37.0 AP) has convolutions without the Sequential around them, and was trained with a frozen batch norm
    without epsilon. With nn.BatchNorm2d's epsilon the same scale follows from a variance that is smaller by that epsilon.
    """
    old, renamed = "rpn.head.conv.weight" in state_dict, {}
    for name, value in state_dict.items():
        parts = name.split(".")
        if old and name.startswith("rpn.head.conv."):
            name = f"rpn.head.conv.0.0.{parts[-1]}"
        elif old and parts[-3].endswith("_blocks"):
            name = ".".join([*parts[:-1], "0", parts[-1]])  # backbone.fpn.inner_blocks.0.weight
        is_variance = name.endswith("running_var")
        renamed[name] = value - 1e-5 if old and is_variance else value
        if is_variance:
            renamed.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    return renamed
