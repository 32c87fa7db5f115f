"""PSPNet: Pyramid Scene Parsing Network (Zhao et al., CVPR 2017, arXiv:1612.01105).

A boat is labelled a car where the network does not see that it lies in a river. The map of a dilated ResNet is therefore averaged over the whole
image and over grids of 2 x 2, 3 x 3 and 6 x 6 regions; each result is reduced, enlarged to the map's size again and put beside it
(sec. 3.2, fig. 3). A second classifier on the stage before gives the deep network a gradient of its own (sec. 3.3).

The ResNet is the authors': three 3x3 convolutions in place of the 7x7 one, every block of the last two stages dilated by 2 and by 4. Files of their
PyTorch code (`layer0.0.weight`, …) convert with `from_official`; the names of `ppm`, `cls` and `aux` are theirs. With `backbone` any convolutional classifier of
the catalogue takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.backbones import headless, load_body
from paperzoo.blocks.dilation import dilate, dilated_backbone
from paperzoo.papers.classification.resnet.model import (
    BasicBlock,
    Bottleneck,
    ResNet,
    conv1x1,
    conv3x3,
    initialise,
)

BINS = (1, 2, 3, 6)
STEM = {
    "layer0.0": "conv1.0",
    "layer0.1": "conv1.1",
    "layer0.3": "conv1.3",
    "layer0.4": "conv1.4",
    "layer0.6": "conv1.6",
    "layer0.7": "bn1",
}
"""The stem of the authors' PSPNet -> here."""

CLASSIFIER = {
    "conv1": "conv1.0",
    "bn1": "conv1.1",
    "conv2": "conv1.3",
    "bn2": "conv1.4",
    "conv3": "conv1.6",
    "bn3": "bn1",
}
"""The stem of the authors' ImageNet classifiers -> here; timm's names (`resnet50s`) are ours."""


def deep_stem(in_channels: int, width: int, out_channels: int) -> nn.Sequential:
    """Three 3x3 convolutions, the first of stride 2, in place of a 7x7 one; the last one's norm and activation follow outside."""
    return nn.Sequential(
        conv3x3(in_channels, width, 2),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        conv3x3(width, width),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        conv3x3(width, out_channels),
    )


class DeepStemResNet(ResNet):
    """A ResNet of bottlenecks with a stem of 64, 64 and 128 channels, as the authors'; arguments as `ResNet`."""

    def __init__(self, layers: Sequence[int], num_classes: int = 1000, in_channels: int = 3, **options) -> None:
        super().__init__(Bottleneck, layers, num_classes, in_channels, **options)
        self.conv1, self.bn1 = deep_stem(in_channels, 64, 128), nn.BatchNorm2d(128)
        shortcut = nn.Sequential(conv1x1(128, 256), nn.BatchNorm2d(256))
        self.layer1[0] = Bottleneck(128, 64, 1, shortcut)
        initialise(self)


class SlimResNet(nn.Module):
    """Not of the paper: one basic block a stage, no max pool, for small images and learning from scratch. Strides 4, 8, 16."""

    def __init__(self, in_channels: int = 3, widths: Sequence[int] = (16, 24, 32, 48, 64)) -> None:
        super().__init__()
        first, stem, *stages = widths
        self.conv1, self.bn1 = deep_stem(in_channels, first, stem), nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        for i, (before, width) in enumerate(zip([stem, *stages], stages, strict=False), 1):
            shortcut = nn.Sequential(conv1x1(before, width, 2), nn.BatchNorm2d(width))
            self.add_module(f"layer{i}", nn.Sequential(BasicBlock(before, width, 2, shortcut)))
        self.stage_channels, self.stage_strides = stages, [4 << i for i in range(len(stages))]
        initialise(self)

    def stages(self, x: Tensor) -> list[Tensor]:
        x = self.relu(self.bn1(self.conv1(x)))
        maps = []
        for i in range(len(self.stage_channels)):
            x = getattr(self, f"layer{i + 1}")(x)
            maps.append(x)
        return maps


class GridAverage(nn.Module):
    """The averages over n x n regions: (B, C, H, W) -> (B, C, n, n); what `nn.AdaptiveAvgPool2d(n)` gives, for maps of any size in an exported graph.

    Region i of n along H pixels reaches from floor(i H / n) to ceil((i + 1) H / n), so neighbours may share a pixel. One product with the matrix of
    each region's share of each pixel, in either memory format without a copy.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        if self.count == 1:
            return x.mean((2, 3), keepdim=True)
        rows, columns = self.averaging(x, 2), self.averaging(x, 3)
        shares = (rows[:, None, :, None] * columns[None, :, None, :]).flatten(2).flatten(0, 1)  # (n * n, H * W)
        return (x.flatten(2) @ shares.mT).unflatten(2, (self.count, self.count))

    def averaging(self, x: Tensor, axis: int) -> Tensor:
        """(count, extent of the axis), rows sum to 1."""
        extent = x.shape[axis]
        region = torch.arange(self.count, device=x.device)[:, None]
        start, end = region * extent // self.count, ((region + 1) * extent + self.count - 1) // self.count
        at = torch.arange(extent, device=x.device)
        return ((at >= start) & (at < end)).to(x.dtype) / (end - start).to(x.dtype)


class PyramidPooling(nn.Module):
    """(B, C, H, W) -> (B, 2C, H, W): the map, and its averages over grids of regions, each reduced to a share of C channels (fig. 3c)."""

    def __init__(self, channels: int, bins: Sequence[int] = BINS) -> None:
        super().__init__()
        if channels % len(bins):
            raise ValueError(f"channels is {channels}; it must be a multiple of the {len(bins)} grids")
        reduced = channels // len(bins)
        self.features = nn.ModuleList(
            nn.Sequential(GridAverage(n), conv1x1(channels, reduced), nn.BatchNorm2d(reduced), nn.ReLU(inplace=True))
            for n in bins
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, *(enlarge(branch(x), x.shape[-2:]) for branch in self.features)], 1)


def enlarge(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, corner on corner, as the authors' networks are."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def scores(in_channels: int, hidden: int, num_classes: int, drop_rate: float) -> nn.Sequential:
    """3x3 convolution, dropout of channels, a score for each class."""
    return nn.Sequential(
        conv3x3(in_channels, hidden),
        nn.BatchNorm2d(hidden),
        nn.ReLU(inplace=True),
        nn.Dropout2d(drop_rate),
        nn.Conv2d(hidden, num_classes, 1),
    )


class PSPNet(nn.Module):
    """(B, in_channels, H, W) -> logits (B, num_classes, H, W); in training with the auxiliary head {"out": …, "aux": …} of that shape.

    Training needs more than one image (the average over the image is one pixel to batch norm).

    Args:
        backbone: has `stages(x)` and `stage_channels`; the last two maps are used, of one size in the paper.
        hidden: channels before the scores, and in the auxiliary head.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        drop_rate: float = 0.1,
        aux_loss: bool = True,
        hidden: tuple[int, int] = (512, 256),
    ) -> None:
        super().__init__()
        *_, aux_channels, channels = backbone.stage_channels
        self.backbone = headless(backbone)
        self.ppm = PyramidPooling(channels)
        self.cls = scores(2 * channels, hidden[0], num_classes, drop_rate)
        self.aux = scores(aux_channels, hidden[1], num_classes, drop_rate) if aux_loss else None

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        *_, middle, last = self.backbone.stages(x)
        out = enlarge(self.cls(self.ppm(last)), x.shape[-2:])
        if not self.training or self.aux is None:
            return out
        return {"out": out, "aux": enlarge(self.aux(middle), x.shape[-2:])}

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        """Start from an ImageNet classifier (its state dict) with the same body, the authors' for one.

        Raises:
            ValueError: if something is missing or has another shape.
        """
        load_body(getattr(self.backbone, "body", self.backbone), classifier_names(state))


def classifier_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet classifier of the authors' (`conv1`, `conv2` and `conv3` are its stem) under our names; others as they are."""
    if "conv3.weight" not in state:
        return dict(state)
    return {
        ".".join([CLASSIFIER.get((parts := name.split("."))[0], parts[0]), *parts[1:]]): t for name, t in state.items()
    }


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' PyTorch files to these names: the stages move into `backbone`, the stem is renamed."""
    renamed = {}
    for name, value in state.items():
        layer, _, rest = name.partition(".")
        if layer == "layer0":
            index, _, rest = rest.partition(".")
            renamed[f"backbone.{STEM[f'layer0.{index}']}.{rest}"] = value
        else:
            renamed[f"backbone.{name}" if layer.startswith("layer") else name] = value
    return renamed


# -- variants ----------------------------------------------------------------------------------------------------------


def _pspnet(
    layers: Sequence[int], num_classes: int, in_channels: int, backbone: str | None, output_stride: int, **options
) -> PSPNet:
    if backbone is None:
        body = dilate(DeepStemResNet(layers, 0, in_channels), output_stride, whole_stage=True)
    else:
        body = dilated_backbone(backbone, output_stride, whole_stage=True, in_channels=in_channels)
    return PSPNet(body, num_classes, **options)


def pspnet_resnet50(
    num_classes: int = 150,
    in_channels: int = 3,
    drop_rate: float = 0.1,
    aux_loss: bool = True,
    backbone: str | None = None,
    output_stride: int = 8,
) -> PSPNet:
    """On the authors' ResNet-50, or on another classifier by name."""
    return _pspnet(
        (3, 4, 6, 3), num_classes, in_channels, backbone, output_stride, drop_rate=drop_rate, aux_loss=aux_loss
    )


def pspnet_resnet101(
    num_classes: int = 150,
    in_channels: int = 3,
    drop_rate: float = 0.1,
    aux_loss: bool = True,
    backbone: str | None = None,
    output_stride: int = 8,
) -> PSPNet:
    """On the authors' ResNet-101, or on another classifier by name."""
    return _pspnet(
        (3, 4, 23, 3), num_classes, in_channels, backbone, output_stride, drop_rate=drop_rate, aux_loss=aux_loss
    )


def pspnet_slim(num_classes: int = 8, in_channels: int = 3, drop_rate: float = 0.0, aux_loss: bool = True) -> PSPNet:
    """Not of the paper: on `SlimResNet` of stride 4, for images of 64 pixels."""
    body = dilate(SlimResNet(in_channels), 4, whole_stage=True)
    return PSPNet(body, num_classes, drop_rate, aux_loss, hidden=(48, 32))
