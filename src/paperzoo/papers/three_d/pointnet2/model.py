"""PointNet++ (Qi et al., NeurIPS 2017, arXiv:1706.02413): set abstraction at one scale or several, feature propagation.

Points are rows: coordinates (B, N, 3), features (B, N, C). Parameters are named as in the PyTorch port that most people use, whose files
`from_official` takes; its kernels have one or two axes more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.point_sampling import ball_query, farthest_point_sampling, gather_points, interpolate, largest
from paperzoo.papers.three_d.pointnet.model import check_columns
from paperzoo.papers.three_d.pointnet.model import from_official as from_official


def shared_mlp(in_channels: int, widths: Sequence[int]) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Layers and batch norms of a small PointNet."""
    sizes = list(zip((in_channels, *widths), widths, strict=False))
    return nn.ModuleList(nn.Linear(a, b) for a, b in sizes), nn.ModuleList(nn.BatchNorm1d(b) for _, b in sizes)


def apply_mlp(rows: Tensor, layers: nn.ModuleList, norms: nn.ModuleList) -> Tensor:
    """(R, C) -> (R, C'); the last ReLU is left to the caller, who may take a maximum before it."""
    for i, (layer, norm) in enumerate(zip(layers, norms, strict=True)):
        rows = norm(layer(F.relu(rows) if i else rows))
    return rows


def encode_groups(groups: Tensor, layers: nn.ModuleList, norms: nn.ModuleList) -> Tensor:
    """The PointNet layer (sec. 3.2): groups (B, S, K, C) -> one feature each (B, S, C')."""
    rows = apply_mlp(groups.flatten(0, 2), layers, norms)
    return F.relu(largest(rows.view(-1, groups.shape[2], rows.shape[1]))).view(*groups.shape[:2], -1)


class SetAbstraction(nn.Module):
    """Sampling, grouping and encoding at one scale (sec. 3.2): (B, N, 3), (B, N, C) or None -> (B, S, 3), (B, S, widths[-1]).

    Args:
        in_channels: of each grouped row: 3 for the place relative to the centre, and C.
        widths: of the encoder.
        centres: S, chosen by farthest point sampling; None takes all points as one group around the origin, S = 1.
        radius, group_size: of the ball query.
    """

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int],
        centres: int | None = None,
        radius: float = 0.0,
        group_size: int = 0,
    ) -> None:
        super().__init__()
        self.centres, self.radius, self.group_size = centres, radius, group_size
        self.mlp_convs, self.mlp_bns = shared_mlp(in_channels, widths)

    def forward(self, points: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.centres is None:
            rows = points if features is None else torch.cat([points, features], 2)
            return torch.zeros_like(points[:, :1]), encode_groups(rows[:, None], self.mlp_convs, self.mlp_bns)
        middle = gather_points(points, farthest_point_sampling(points, self.centres))
        index = ball_query(points, middle, self.radius, self.group_size)
        groups = gather_points(points, index) - middle[:, :, None]
        if features is not None:
            groups = torch.cat([groups, gather_points(features, index)], 3)
        return middle, encode_groups(groups, self.mlp_convs, self.mlp_bns)


class MultiScaleSetAbstraction(nn.Module):
    """Multi-scale grouping (sec. 3.3): balls of several radii around the same centres, their features side by side.

    (B, N, 3), (B, N, C) or None -> (B, S, 3), (B, S, sum of the last widths). Grouped rows are features first, then places, as in the
    authors' code; at one scale it is the other way round.
    """

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[Sequence[int]],
        centres: int,
        radii: Sequence[float],
        group_sizes: Sequence[int],
    ) -> None:
        super().__init__()
        self.centres, self.radii, self.group_sizes = centres, tuple(radii), tuple(group_sizes)
        parts = [shared_mlp(in_channels + 3, scale) for scale in widths]
        self.conv_blocks, self.bn_blocks = (nn.ModuleList(p[i] for p in parts) for i in (0, 1))

    def forward(self, points: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        middle = gather_points(points, farthest_point_sampling(points, self.centres))
        scales = []
        for i, (radius, size) in enumerate(zip(self.radii, self.group_sizes, strict=True)):
            index = ball_query(points, middle, radius, size)
            groups = gather_points(points, index) - middle[:, :, None]
            if features is not None:
                groups = torch.cat([gather_points(features, index), groups], 3)
            scales.append(encode_groups(groups, self.conv_blocks[i], self.bn_blocks[i]))
        return middle, torch.cat(scales, 2)


class FeaturePropagation(nn.Module):
    """Features of few points to many (sec. 3.4): interpolated by eq. (2), beside the many points' own, through a unit PointNet."""

    def __init__(self, in_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.mlp_convs, self.mlp_bns = shared_mlp(in_channels, widths)

    def forward(self, fine: Tensor, coarse: Tensor, own: Tensor | None, features: Tensor) -> Tensor:
        """Places (B, N, 3) and (B, S, 3), features (B, N, C1) or None and (B, S, C2) -> (B, N, widths[-1])."""
        carried = interpolate(coarse, features, fine)
        rows = carried if own is None else torch.cat([own, carried], 2)
        return F.relu(apply_mlp(rows.flatten(0, 1), self.mlp_convs, self.mlp_bns)).view(*fine.shape[:2], -1)


class PointNet2Classifier(nn.Module):
    """Three levels and three fully connected layers: points (B, N, in_channels) -> logits (B, num_classes).

    levels: the set abstractions, the last of which takes all points together. Columns after x, y, z are the first level's features.
    """

    def __init__(
        self, levels: Sequence[nn.Module], num_classes: int, in_channels: int = 3, width: int = 1024,
        hidden: Sequence[int] = (512, 256), drop_rate: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_channels = in_channels
        self.sa1, self.sa2, self.sa3 = levels
        self.fc1, self.bn1 = nn.Linear(width, hidden[0]), nn.BatchNorm1d(hidden[0])
        self.drop1 = nn.Dropout(drop_rate)
        self.fc2, self.bn2 = nn.Linear(hidden[0], hidden[1]), nn.BatchNorm1d(hidden[1])
        self.drop2 = nn.Dropout(drop_rate)
        self.num_features = hidden[1]
        self.fc3 = nn.Linear(hidden[1], num_classes) if num_classes else nn.Identity()

    def embed(self, x: Tensor) -> Tensor:
        """What the last layer sees (B, num_features)."""
        check_columns(x, self.in_channels)
        points, features = x[..., :3], x[..., 3:] if self.in_channels > 3 else None
        for level in (self.sa1, self.sa2, self.sa3):
            points, features = level(points, features)
        found = self.drop1(F.relu(self.bn1(self.fc1(features.flatten(1)))))
        return self.drop2(F.relu(self.bn2(self.fc2(found))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.embed(x))

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer for another number of classes; 0 leaves none."""
        fresh = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.fc3 = fresh.to(self.fc2.weight)


class PointNet2Segmenter(nn.Module):
    """Down by set abstraction, up by feature propagation: points (B, N, in_channels) -> logits of each point (B, N, num_classes).

    Args:
        down: set abstractions, finest first, named `sa1` ….
        up: as many feature propagations, coarsest first, named `fp4` … `fp1`.
        num_categories: with it, `forward` takes the category int64 (B,) as well, and the finest propagation sees it one-hot, with the
            places and the network's input; without it that one sees what is carried up alone.
        width: of the finest propagation's output, and of the layer before the last.
    """

    def __init__(
        self,
        down: Sequence[nn.Module],
        up: Sequence[nn.Module],
        num_classes: int,
        in_channels: int = 3,
        num_categories: int = 0,
        width: int = 128,
        drop_rate: float = 0.5,
    ) -> None:
        super().__init__()
        self.depth, self.in_channels, self.num_categories = len(down), in_channels, num_categories
        for i, (level, back) in enumerate(zip(down, reversed(up), strict=True), 1):
            self.add_module(f"sa{i}", level)
            self.add_module(f"fp{i}", back)
        self.conv1, self.bn1 = nn.Linear(width, width), nn.BatchNorm1d(width)
        self.drop1 = nn.Dropout(drop_rate)
        self.conv2 = nn.Linear(width, num_classes)

    def forward(self, x: Tensor, category: Tensor | None = None) -> Tensor:
        check_columns(x, self.in_channels)
        places, features = [x[..., :3]], [x]
        for i in range(1, self.depth + 1):
            place, found = self.get_submodule(f"sa{i}")(places[-1], features[-1])
            places.append(place)
            features.append(found)
        features[0] = None  # scenes: the finest level has no features of its own
        if self.num_categories:
            one_hot = category[:, None] == torch.arange(self.num_categories, device=x.device)
            features[0] = torch.cat([one_hot[:, None].expand(-1, x.shape[1], -1).to(x.dtype), x[..., :3], x], 2)
        found = features[-1]
        for i in range(self.depth, 0, -1):
            found = self.get_submodule(f"fp{i}")(places[i - 1], places[i], features[i - 1], found)
        rows = self.drop1(F.relu(self.bn1(self.conv1(found.flatten(0, 1)))))
        return self.conv2(rows).view(*x.shape[:2], -1)


# -- variants ------------------------------------------------------------------------------------------------------------


def pointnet2_cls_ssg(num_classes: int = 40, in_channels: int = 3, drop_rate: float = 0.5) -> PointNet2Classifier:
    """Single-scale grouping. The port's file was trained with drop_rate 0.4, which its weights do not tell."""
    levels = [
        SetAbstraction(in_channels, (64, 64, 128), 512, 0.2, 32),
        SetAbstraction(128 + 3, (128, 128, 256), 128, 0.4, 64),
        SetAbstraction(256 + 3, (256, 512, 1024)),
    ]
    return PointNet2Classifier(levels, num_classes, in_channels, drop_rate=drop_rate)


def pointnet2_cls_msg(num_classes: int = 40, in_channels: int = 3, drop_rate: float = 0.5) -> PointNet2Classifier:
    """Multi-scale grouping, three radii a level."""
    levels = [
        MultiScaleSetAbstraction(
            in_channels - 3, ((32, 32, 64), (64, 64, 128), (64, 96, 128)), 512, (0.1, 0.2, 0.4), (16, 32, 128)
        ),
        MultiScaleSetAbstraction(
            320, ((64, 64, 128), (128, 128, 256), (128, 128, 256)), 128, (0.2, 0.4, 0.8), (32, 64, 128)
        ),
        SetAbstraction(640 + 3, (256, 512, 1024)),
    ]
    return PointNet2Classifier(levels, num_classes, in_channels, drop_rate=drop_rate)


def pointnet2_part_seg_ssg(
    num_classes: int = 50, in_channels: int = 3, num_categories: int = 16, drop_rate: float = 0.5
) -> PointNet2Segmenter:
    """Parts of shapes at one scale. The first level sees places twice, relative and in the shape, as in the port."""
    down = [
        SetAbstraction(3 + in_channels, (64, 64, 128), 512, 0.2, 32),
        SetAbstraction(128 + 3, (128, 128, 256), 128, 0.4, 64),
        SetAbstraction(256 + 3, (256, 512, 1024)),
    ]
    up = [
        FeaturePropagation(1024 + 256, (256, 256)),
        FeaturePropagation(256 + 128, (256, 128)),
        FeaturePropagation(128 + num_categories + 3 + in_channels, (128, 128, 128)),
    ]
    return PointNet2Segmenter(down, up, num_classes, in_channels, num_categories, drop_rate=drop_rate)


def pointnet2_part_seg_msg(
    num_classes: int = 50, in_channels: int = 3, num_categories: int = 16, drop_rate: float = 0.5
) -> PointNet2Segmenter:
    """Parts of shapes at several scales."""
    down = [
        MultiScaleSetAbstraction(
            in_channels, ((32, 32, 64), (64, 64, 128), (64, 96, 128)), 512, (0.1, 0.2, 0.4), (32, 64, 128)
        ),
        MultiScaleSetAbstraction(320, ((128, 128, 256), (128, 196, 256)), 128, (0.4, 0.8), (64, 128)),
        SetAbstraction(512 + 3, (256, 512, 1024)),
    ]
    up = [
        FeaturePropagation(1024 + 512, (256, 256)),
        FeaturePropagation(256 + 320, (256, 128)),
        FeaturePropagation(128 + num_categories + 3 + in_channels, (128, 128)),
    ]
    return PointNet2Segmenter(down, up, num_classes, in_channels, num_categories, drop_rate=drop_rate)


def pointnet2_sem_seg(num_classes: int = 13, in_channels: int = 9, drop_rate: float = 0.5) -> PointNet2Segmenter:
    """Scenes at one scale, four levels; radii in metres."""
    down = [
        SetAbstraction(3 + in_channels, (32, 32, 64), 1024, 0.1, 32),
        SetAbstraction(64 + 3, (64, 64, 128), 256, 0.2, 32),
        SetAbstraction(128 + 3, (128, 128, 256), 64, 0.4, 32),
        SetAbstraction(256 + 3, (256, 256, 512), 16, 0.8, 32),
    ]
    up = [
        FeaturePropagation(512 + 256, (256, 256)),
        FeaturePropagation(256 + 128, (256, 256)),
        FeaturePropagation(256 + 64, (256, 128)),
        FeaturePropagation(128, (128, 128, 128)),
    ]
    return PointNet2Segmenter(down, up, num_classes, in_channels, drop_rate=drop_rate)


def pointnet2_sem_seg_msg(num_classes: int = 13, in_channels: int = 9, drop_rate: float = 0.5) -> PointNet2Segmenter:
    """Scenes at several scales."""
    down = [
        MultiScaleSetAbstraction(in_channels, ((16, 16, 32), (32, 32, 64)), 1024, (0.05, 0.1), (16, 32)),
        MultiScaleSetAbstraction(32 + 64, ((64, 64, 128), (64, 96, 128)), 256, (0.1, 0.2), (16, 32)),
        MultiScaleSetAbstraction(128 + 128, ((128, 196, 256), (128, 196, 256)), 64, (0.2, 0.4), (16, 32)),
        MultiScaleSetAbstraction(256 + 256, ((256, 256, 512), (256, 384, 512)), 16, (0.4, 0.8), (16, 32)),
    ]
    up = [
        FeaturePropagation(1024 + 512, (256, 256)),
        FeaturePropagation(256 + 256, (256, 256)),
        FeaturePropagation(256 + 96, (256, 128)),
        FeaturePropagation(128, (128, 128, 128)),
    ]
    return PointNet2Segmenter(down, up, num_classes, in_channels, drop_rate=drop_rate)


def pointnet2_cls_small(num_classes: int = 8, in_channels: int = 3, drop_rate: float = 0.3) -> PointNet2Classifier:
    """Ours: single-scale grouping for a few hundred points, a quarter of the widths."""
    levels = [
        SetAbstraction(in_channels, (16, 16, 32), 64, 0.35, 16),
        SetAbstraction(32 + 3, (32, 32, 64), 16, 0.7, 16),
        SetAbstraction(64 + 3, (64, 128, 256)),
    ]
    return PointNet2Classifier(levels, num_classes, in_channels, 256, (128, 64), drop_rate)


def pointnet2_part_seg_small(
    num_classes: int = 11, in_channels: int = 3, num_categories: int = 5, drop_rate: float = 0.3
) -> PointNet2Segmenter:
    """Ours: parts of shapes from a few hundred points, a quarter of the widths."""
    down = [
        SetAbstraction(3 + in_channels, (16, 16, 32), 64, 0.3, 16),
        SetAbstraction(32 + 3, (32, 32, 64), 16, 0.6, 16),
        SetAbstraction(64 + 3, (64, 128, 128)),
    ]
    up = [
        FeaturePropagation(128 + 64, (64, 64)),
        FeaturePropagation(64 + 32, (64, 32)),
        FeaturePropagation(32 + num_categories + 3 + in_channels, (32, 32)),
    ]
    return PointNet2Segmenter(down, up, num_classes, in_channels, num_categories, 32, drop_rate)
