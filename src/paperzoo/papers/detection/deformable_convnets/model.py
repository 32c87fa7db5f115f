"""Deformable Convolutional Networks (Dai et al., ICCV 2017, arXiv:1703.06211).

Two operators that sample where they learned to look: deformable convolution (sec. 2.1) and deformable RoI pooling (sec. 2.2);
ResNets with the first in their last stage, to stand in wherever a backbone is asked for; and Faster R-CNN with both (sec. 3.2).

Parameter names are those of mmdetection (`layer4.0.conv2.conv_offset.weight`); plain ResNet weights load too, their offsets
then start at zero, where the network is its plain version. What differs from the paper:

- RoI pooling averages 4 x 4 bilinear samples of each bin, placed as RoIAlign places them; the released code starts at the
  bin's corner and rounds regions to whole pixels.
- The offsets' learning rate is that of all layers (sec. 4.2 finds that it matters little).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from paperzoo.blocks.backbones import headless, load_body
from paperzoo.blocks.boxes import AnchorGenerator
from paperzoo.papers.classification.resnet.model import ResNet, resnet50, resnet101
from paperzoo.papers.detection.fast_rcnn.model import RoIHeads, TwoMLPHead, exact
from paperzoo.papers.detection.faster_rcnn.model import FasterRCNN, RegionProposalNetwork
from paperzoo.papers.detection.fpn.model import TinyBody

# -- deformable convolution (sec. 2.1) -------------------------------------------------------------------------------


class DeformableConv2d(nn.Conv2d):
    """Eq. 2: y(p0) = sum_n w(p_n) x(p0 + p_n + dp_n); a convolution of the same shape predicts the offsets dp.

    (B, in_channels, H, W) -> (B, out_channels, H', W') as nn.Conv2d. Offsets are (B, 2 k k groups, H', W') in pixels, row
    before column for each tap, taps row by row; they start at zero. Outside of the map there are zeros.

    Args:
        deformable_groups: groups of input channels with offsets of their own.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        bias: bool = True,
        deformable_groups: int = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=bias)
        if in_channels % deformable_groups:
            raise ValueError(f"deformable_groups is {deformable_groups}; it must divide {in_channels} channels")
        self.deformable_groups = deformable_groups
        taps = self.kernel_size[0] * self.kernel_size[1]
        self.conv_offset = nn.Conv2d(in_channels, 2 * taps * deformable_groups, kernel_size, stride, padding, dilation)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        offset = exact(self.conv_offset(x))
        if torch.compiler.is_compiling() or x.is_meta:  # torchvision's operator is in no exported program
            return self.sampled(exact(x), offset).to(x.dtype)
        bias = None if self.bias is None else exact(self.bias)
        weight = exact(self.weight)
        with torch.autocast(x.device.type, enabled=False):
            y = deform_conv2d(exact(x), offset, weight, bias, self.stride, self.padding, self.dilation)
        return y.to(x.dtype)

    def sampled(self, x: Tensor, offset: Tensor) -> Tensor:
        """The same by sampling the map at every tap and one matrix product."""
        b, c, height, width = x.shape
        rows, columns = offset.shape[-2:]
        k, groups = self.kernel_size, self.deformable_groups
        at = lambda n, axis: torch.arange(n, device=x.device, dtype=x.dtype) * self.stride[axis] - self.padding[axis]  # noqa: E731
        tap = lambda axis: torch.arange(k[axis], device=x.device, dtype=x.dtype) * self.dilation[axis]  # noqa: E731
        y0 = tap(0)[:, None, None, None] + at(rows, 0)[:, None]  # (k, 1, H', 1)
        x0 = tap(1)[None, :, None, None] + at(columns, 1)  # (1, k, 1, W')
        offset = offset.reshape(b, groups, k[0], k[1], 2, rows, columns)
        grid_y = (offset[:, :, :, :, 0] + y0) * (2 / max(height - 1, 1)) - 1
        grid_x = (offset[:, :, :, :, 1] + x0) * (2 / max(width - 1, 1)) - 1
        grid = torch.stack([grid_x, grid_y], dim=-1).reshape(b * groups, k[0] * k[1] * rows, columns, 2)
        maps = x.reshape(b * groups, c // groups, height, width)
        seen = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
        seen = seen.reshape(b, c, k[0] * k[1], rows, columns)
        y = torch.einsum("bcthw,oct->bohw", seen, exact(self.weight).flatten(2))
        return y if self.bias is None else y + exact(self.bias)[:, None, None]


def deform(network: ResNet, stages: Sequence[int] = (4,), dilate: bool = True, groups: int = 1) -> ResNet:
    """A ResNet whose 3x3 convolutions in the given stages are deformable, in place (sec. 3.2, 4.2: those of res5).

    Args:
        stages: 1 to 4, layer1 to layer4.
        dilate: the last stage keeps the resolution of the one before, with a dilation of 2 ("effective stride 16").
        groups: of channels with offsets of their own.

    Raises:
        ValueError: for a stage that does not exist.
    """
    if dilate:
        for block in network.layer4:
            convolution = block.conv2
            convolution.stride, convolution.dilation, convolution.padding = (1, 1), (2, 2), (2, 2)
            block.stride = 1
        if network.layer4[0].downsample is not None:
            network.layer4[0].downsample[0].stride = (1, 1)
        network.stage_strides = [*network.stage_strides[:-1], network.stage_strides[-2]]
    for stage in stages:
        if not hasattr(network, f"layer{stage}"):
            raise ValueError(f"stages is {tuple(stages)}; a ResNet has stages 1 to 4")
        for block in getattr(network, f"layer{stage}"):
            plain = block.conv2
            block.conv2 = DeformableConv2d(
                plain.in_channels,
                plain.out_channels,
                plain.kernel_size[0],
                plain.stride[0],
                plain.padding[0],
                plain.dilation[0],
                bias=False,
                deformable_groups=groups,
            )
            block.conv2.weight = plain.weight
    return network


# -- deformable RoI pooling (sec. 2.2) -------------------------------------------------------------------------------


def pool_shifted(
    features: Tensor, regions: Tensor, offsets: Tensor | None, output_size: int, scale: float, samples: int = 4
) -> Tensor:
    """Eq. 5 and 6: each bin of each region averages the map around a place of its own.

    Args:
        features: (B, C, H, W).
        regions: (R, 5), the image's number before x1 y1 x2 y2 in pixels of the image.
        offsets: (R, 2, k, k), row before column, in pixels of the image; None for none: then this is RoIAlign.
        output_size: k.
        scale: pixels of the map for one of the image.
        samples: s; each bin is looked at in s x s places.

    Returns:
        (R, C, k, k).
    """
    b, c, height, width = features.shape
    k, count = output_size, regions.shape[0]
    x1, y1, x2, y2 = (regions[:, 1:].to(features.dtype) * scale - 0.5).unbind(1)
    step = (torch.arange(k * samples, device=features.device, dtype=features.dtype) + 0.5) / (k * samples)
    y = (y1[:, None] + step * (y2 - y1)[:, None]).reshape(count, k, 1, samples, 1)
    x = (x1[:, None] + step * (x2 - x1)[:, None]).reshape(count, 1, k, 1, samples)
    if offsets is not None:
        y, x = y + offsets[:, 0, :, :, None, None] * scale, x + offsets[:, 1, :, :, None, None] * scale
    shape = (count, k, k, samples, samples)
    y, x = y.expand(shape), x.expand(shape)
    inside = ((y >= -1) & (y <= height) & (x >= -1) & (x <= width)).to(features.dtype) / samples**2
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = y.detach().floor(), x.detach().floor()
    dy, dx = y - top, x - left
    first = regions[:, 0].long()[:, None, None, None, None] * height * width
    places, weights = [], []
    for down in (0, 1):
        for right in (0, 1):
            row, column = (top.long() + down).clamp(max=height - 1), (left.long() + right).clamp(max=width - 1)
            places.append(first + row * width + column)
            weights.append(inside * (dy if down else 1 - dy) * (dx if right else 1 - dx))
    bins = count * k * k
    place = torch.stack(places, -1).reshape(bins, -1)
    weight = torch.stack(weights, -1).reshape(bins, -1)
    table = features.permute(0, 2, 3, 1).reshape(b * height * width, c)
    if torch.compiler.is_compiling() or features.is_meta:
        pooled = torch.einsum("nsc,ns->nc", table[place], weight)
    else:  # the same sum, without a copy of what it looks at
        pooled = F.embedding_bag(place, table, per_sample_weights=weight, mode="sum")
    return pooled.reshape(count, k, k, c).permute(0, 3, 1, 2)


class DeformableRoIPool(nn.Module):
    """Fig. 3: RoI pooling, from its result the offsets of the bins, and pooling again with these.

    Levels, of which the last is looked at, (B, C, H, W), and regions (R, 5) -> (R, C, k, k).

    Args:
        channels: C.
        output_size: k.
        stride: pixels of the image for one of the map.
        gain: gamma of sec. 2.2, from normalised offsets to parts of the region's size (0.1).
    """

    def __init__(
        self, channels: int, output_size: int = 7, stride: int = 16, gain: float = 0.1, samples: int = 4
    ) -> None:
        super().__init__()
        self.output_size, self.scale, self.gain, self.samples = output_size, 1 / stride, gain, samples
        self.offset_fc = nn.Linear(channels * output_size**2, 2 * output_size**2)
        nn.init.zeros_(self.offset_fc.weight)
        nn.init.zeros_(self.offset_fc.bias)

    def offsets(self, features: Tensor, regions: Tensor) -> Tensor:
        """(R, 2, k, k) in pixels of the image: the layer's normalised offsets times gain and the region's height and width."""
        pooled = pool_shifted(features, regions, None, self.output_size, self.scale, self.samples)
        normalised = exact(self.offset_fc(pooled.flatten(1))).unflatten(1, (2, self.output_size, self.output_size))
        size = (regions[:, 3:] - regions[:, 1:3]).flip(1).to(normalised.dtype)  # height, width
        return self.gain * size[:, :, None, None] * normalised

    def forward(self, levels: Sequence[Tensor], regions: Tensor) -> Tensor:
        features = exact(levels[-1])
        regions = regions.to(features.dtype)
        offsets = self.offsets(features, regions)
        return pool_shifted(features, regions, offsets, self.output_size, self.scale, self.samples).to(levels[-1].dtype)


# -- the detector (sec. 3.2) -----------------------------------------------------------------------------------------


class SharedMaps(nn.Module):
    """Images -> [C4 for the proposals, C5 brought to `channels` for the regions], both of one stride."""

    def __init__(self, body: nn.Module, channels: int = 256) -> None:
        super().__init__()
        self.body = headless(body)
        self.reduce = nn.Conv2d(body.stage_channels[-1], channels, 1)
        nn.init.normal_(self.reduce.weight, std=0.01)
        nn.init.zeros_(self.reduce.bias)
        self.proposal_channels, self.out_channels = body.stage_channels[-2], channels

    def forward(self, images: Tensor) -> list[Tensor]:
        *_, c4, c5 = self.body.stages(images)
        return [c4, F.relu(self.reduce(c5))]

    def load_body(self, state_dict: dict[str, Tensor]) -> None:
        """A plain or deformable classifier's weights; where they have no offsets, these are zero."""
        load_body(self.body, with_offsets(state_dict, self.body))


class FirstMapRPN(RegionProposalNetwork):
    """Proposals from the first of the maps alone."""

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self.head(levels[:1])


def with_offsets(state_dict: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Weights of a plain network, with zero offsets for the deformable one."""
    missing = {k: torch.zeros_like(v) for k, v in network.state_dict().items() if ".conv_offset." in k}
    return missing | dict(state_dict)


# -- variants --------------------------------------------------------------------------------------------------------


def deformable_resnet50(num_classes: int = 1000, in_channels: int = 3, dilate: bool = True, **options) -> ResNet:
    """ResNet-50 with three deformable layers in res5, of stride 16 unless `dilate` is False; `options` as `ResNet`."""
    return deform(resnet50(num_classes, in_channels, **options), dilate=dilate)


def deformable_resnet101(num_classes: int = 1000, in_channels: int = 3, dilate: bool = True, **options) -> ResNet:
    """ResNet-101 with three deformable layers in res5 (sec. 4.2); `options` as `ResNet`."""
    return deform(resnet101(num_classes, in_channels, **options), dilate=dilate)


def _detector(body: nn.Module, num_classes: int, options: dict[str, float]) -> FasterRCNN:
    maps = SharedMaps(body)
    rpn = FirstMapRPN(maps.proposal_channels, AnchorGenerator((16,), [(32, 64, 128, 256, 512)]))
    pool = DeformableRoIPool(maps.out_channels)
    settings = {"least": 0.0, "sampled": 128, **options}
    heads = RoIHeads(pool, TwoMLPHead(maps.out_channels * 49, 1024), num_classes, **settings)
    return FasterRCNN(maps, rpn, heads, (6000, 6000), (2000, 300))


def deformable_faster_rcnn_resnet50(num_classes: int = 80, **options: float) -> FasterRCNN:
    """Faster R-CNN with deformable layers in res5 and deformable RoI pooling, on ResNet-50. `options` as `RoIHeads`."""
    return _detector(deformable_resnet50(), num_classes, options)


def deformable_faster_rcnn_resnet101(num_classes: int = 80, **options: float) -> FasterRCNN:
    """Faster R-CNN with deformable layers in res5 and deformable RoI pooling, on ResNet-101 (table 5). `options` as `RoIHeads`."""
    return _detector(deformable_resnet101(), num_classes, options)


def deformable_faster_rcnn_tiny(num_classes: int = 10, deformable: bool = True, **options: float) -> FasterRCNN:
    """Not of the paper: the same in small for objects of 15 to 50 pixels. `deformable=False` is its plain version."""
    body = TinyBody((16, 32, 64, 64))
    body.maxpool = nn.Identity()
    body.stage_strides = [2, 4, 8, 8]
    last = body.layer4[0]
    last.conv1.stride, last.conv1.dilation, last.conv1.padding = (1, 1), (2, 2), (2, 2)
    last.downsample[0].stride = (1, 1)
    if deformable:
        last.conv2 = DeformableConv2d(64, 64, 3, padding=2, dilation=2, bias=False)
        nn.init.kaiming_normal_(last.conv2.weight, mode="fan_out", nonlinearity="relu")
    maps = SharedMaps(body, 64)
    nn.init.kaiming_normal_(maps.reduce.weight)
    rpn = FirstMapRPN(maps.proposal_channels, AnchorGenerator((8,), [(24, 40)], (1.0, 1.4, 2.0)), sampled=64)
    pool = DeformableRoIPool(64, 4, 8, samples=2) if deformable else PlainRoIPool(4, 8, samples=2)
    heads = RoIHeads(pool, TwoMLPHead(64 * 16, 128), num_classes, **{"least": 0.0, "sampled": 32} | options)
    return FasterRCNN(maps, rpn, heads, (200, 200), (64, 32))


class PlainRoIPool(nn.Module):
    """The same pooling without offsets, to compare with."""

    def __init__(self, output_size: int, stride: int, samples: int = 4) -> None:
        super().__init__()
        self.output_size, self.scale, self.samples = output_size, 1 / stride, samples

    def forward(self, levels: Sequence[Tensor], regions: Tensor) -> Tensor:
        features = exact(levels[-1])
        return pool_shifted(features, regions, None, self.output_size, self.scale, self.samples).to(levels[-1].dtype)


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A plain classifier's weights (torchvision, timm): offsets are added where ResNet-50 or 101 has them here, as zeros."""
    blocks = sorted(
        {name.split(".conv2.")[0] for name in state_dict if name.startswith("layer4.") and ".conv2.w" in name}
    )
    added = {}
    for block in blocks:
        width = state_dict[f"{block}.conv2.weight"].shape[1]
        added[f"{block}.conv2.conv_offset.weight"] = torch.zeros(18, width, 3, 3)
        added[f"{block}.conv2.conv_offset.bias"] = torch.zeros(18)
    return added | dict(state_dict)
