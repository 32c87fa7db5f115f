"""ST-GCN++, of PYSKL: Towards Good Practices for Skeleton Action Recognition (Duan et al., ACM MM 2022, arXiv:2205.09443).

Joints of a moving body are the nodes of a graph. A block mixes neighbours in space, then moments in time:

- space: y = relu(bn(sum over k of A_k W_k x) + res(x)). The three A_k are the body's graph at first (each joint itself, its neighbour nearer to the
  body's middle, those farther away), then free parameters; ST-GCN has a mask on a fixed graph, and no residual link;
- time: six branches, 3-frame convolutions with dilations 1 to 4, a 3-frame maximum and a 1x1 convolution, joined and mixed. ST-GCN has one
  convolution over 9 frames.

Parameter names are those of the authors' released code, whose files load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.skeleton_graphs import LAYOUTS, spatial_graph

Adaptive = Literal["init", "importance"]


class GraphConvolution(nn.Module):
    """(B, in, T, V) -> (B, out, T, V): each subset of neighbours has a 1x1 convolution of its own. The input is added before the ReLU, through a 1x1
    convolution where the channels differ.

    Args:
        graph: (K, V, V), what joint w takes from joint v.
        adaptive: "init": the graph is where free parameters start; "importance": it stays, and is multiplied with a learned mask.
    """

    def __init__(self, in_channels: int, out_channels: int, graph: Tensor, adaptive: Adaptive) -> None:
        super().__init__()
        self.subsets = len(graph)
        self.bn = nn.BatchNorm2d(out_channels)
        if adaptive == "init":
            self.A = nn.Parameter(graph.clone())
        elif adaptive == "importance":
            self.register_buffer("A", graph.clone())
            self.PA = nn.Parameter(torch.ones_like(graph))
        else:
            raise ValueError(f"adaptive is '{adaptive}'; it must be 'init' or 'importance'")
        self.conv = nn.Conv2d(in_channels, out_channels * self.subsets, 1)
        self.down = None
        if in_channels != out_channels:
            self.down = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels))

    def graph(self) -> Tensor:
        return self.A * self.PA if hasattr(self, "PA") else self.A

    def forward(self, x: Tensor) -> Tensor:
        parts = self.conv(x).unflatten(1, (self.subsets, -1))
        y = self.bn(torch.einsum("bkctv,kvw->bctw", parts, self.graph()))
        return F.relu(y + (x if self.down is None else self.down(x)))


class TemporalConvolution(nn.Module):
    """A convolution over frames alone; batch norm behind it unless `norm` is False. (B, in, T, V) -> (B, out, ceil(T / stride), V)."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, dilation: int = 1, norm: bool = True
    ) -> None:
        super().__init__()
        padding = dilation * (kernel - 1) // 2
        self.conv = nn.Conv2d(in_channels, out_channels, (kernel, 1), (stride, 1), (padding, 0), dilation=(dilation, 1))
        self.bn = nn.BatchNorm2d(out_channels) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class MultiBranch(nn.Module):
    """Six looks at time side by side (fig. 3 of the paper): dilations 1 to 4, a maximum, a 1x1 convolution. (B, C, T, V) -> (B, C, ceil(T / stride), V)."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        each = channels // 6
        widths = [channels - 5 * each, *[each] * 4]

        def reduced(width: int, then: nn.Module) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(channels, width, 1), nn.BatchNorm2d(width), nn.ReLU(), then)

        branches: list[nn.Module] = [
            reduced(width, TemporalConvolution(width, width, 3, stride, dilation, norm=False))
            for dilation, width in enumerate(widths[:4], 1)
        ]
        branches.append(reduced(each, nn.MaxPool2d((3, 1), (stride, 1), (1, 0))))
        branches.append(nn.Conv2d(channels, each, 1, (stride, 1)))
        self.branches = nn.ModuleList(branches)
        self.transform = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 1))
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.transform(torch.cat([branch(x) for branch in self.branches], 1)))


class Block(nn.Module):
    """Space, then time, and the input added. (B, in, T, V) -> (B, out, ceil(T / stride), V)."""

    def __init__(
        self, in_channels: int, out_channels: int, graph: Tensor, stride: int, residual: bool, adaptive: Adaptive
    ) -> None:
        super().__init__()
        self.gcn = GraphConvolution(in_channels, out_channels, graph, adaptive)
        self.tcn = MultiBranch(out_channels, stride)
        self.skips = residual
        self.residual = None
        if residual and (in_channels != out_channels or stride != 1):
            self.residual = TemporalConvolution(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tcn(self.gcn(x))
        if self.skips:
            y = y + (x if self.residual is None else self.residual(x))
        return F.relu(y)


class Backbone(nn.Module):
    """Skeletons (B, M, T, V, C) -> (B * M, features, ceil(T / 4), V); widths double and frames halve at the blocks 5 and 8."""

    def __init__(
        self, graph: Tensor, in_channels: int, width: int, stages: int, doubled: Sequence[int], adaptive: Adaptive
    ) -> None:
        super().__init__()
        self.data_bn = nn.BatchNorm1d(in_channels * graph.shape[1])
        blocks, have = [], in_channels
        for i in range(1, stages + 1):
            width *= 1 + (i in doubled)
            blocks.append(Block(have, width, graph, 1 + (i in doubled), i > 1, adaptive))
            have = width
        self.gcn = nn.ModuleList(blocks)
        self.num_features = have

    def forward(self, skeletons: Tensor) -> Tensor:
        people, moments, joints, channels = skeletons.shape[1:]
        x = skeletons.permute(0, 1, 3, 4, 2).flatten(0, 1).flatten(1, 2)  # (B * M, V * C, T)
        x = self.data_bn(x).unflatten(1, (joints, channels)).permute(0, 2, 3, 1).contiguous()
        for block in self.gcn:
            x = block(x)
        return x


class Head(nn.Module):
    """Features of every person averaged over frames and joints, then over the people -> logits."""

    def __init__(self, features: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(drop_rate)
        self.fc_cls = nn.Linear(features, num_classes) if num_classes else nn.Identity()
        if num_classes:
            nn.init.normal_(self.fc_cls.weight, std=0.01)
            nn.init.zeros_(self.fc_cls.bias)


class SkeletonNetwork(nn.Module):
    """Skeletons float32 (B, M, T, V, C) of up to M people -> logits (B, num_classes).

    Args:
        num_classes: 0 gives the features.
        in_channels: coordinates of a joint: x, y, z; or x, y and how sure they are.
        layout: whose joints: "ntu", "coco", "openpose".
        drop_rate: before the last layer.
        width, stages, doubled: channels of the first block, blocks, and those that double the channels and halve the frames (counted from 1).
        adaptive: see `GraphConvolution`.
    """

    channels_last = False  # kernels of one column, and a product over joints, are a quarter faster without

    def __init__(
        self,
        num_classes: int = 60,
        in_channels: int = 3,
        layout: str = "ntu",
        drop_rate: float = 0.0,
        width: int = 64,
        stages: int = 10,
        doubled: Sequence[int] = (5, 8),
        adaptive: Adaptive = "init",
    ) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"layout is '{layout}'; it must be one of {', '.join(LAYOUTS)}")
        graph = spatial_graph(LAYOUTS[layout])
        self.backbone = Backbone(graph, in_channels, width, stages, doubled, adaptive)
        self.cls_head = Head(self.backbone.num_features, num_classes, drop_rate)
        self.num_features = self.backbone.num_features

    def embed(self, skeletons: Tensor) -> Tensor:
        """(B, M, T, V, C) -> (B, num_features)."""
        x = self.backbone(skeletons).mean((2, 3))
        return x.unflatten(0, (-1, skeletons.shape[1])).mean(1)

    def forward(self, skeletons: Tensor) -> Tensor:
        return self.cls_head.fc_cls(self.cls_head.dropout(self.embed(skeletons)))

    def reset_classifier(self, num_classes: int) -> None:
        self.cls_head = Head(self.num_features, num_classes, self.cls_head.dropout.p)


def stgcn_plus_plus(**arguments: Any) -> SkeletonNetwork:
    """The paper's: 10 blocks of 64, 128, 256 channels."""
    return SkeletonNetwork(**arguments)


def stgcn_plus_plus_tiny(**arguments: Any) -> SkeletonNetwork:
    """Not of the paper: two narrow blocks, for short gestures."""
    return SkeletonNetwork(**{"width": 24, "stages": 2, "doubled": (2,), **arguments})
