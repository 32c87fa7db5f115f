"""PointNet (Qi et al., CVPR 2017, arXiv:1612.00593): figure 2, the part segmentation network of the supplement, and a port's variants.

Points are rows: (B, N, C), x, y, z first. The paper's shared MLPs are linear layers over all rows of a batch. Parameters are named as in
the PyTorch port that most people use; `from_official` takes its files, whose kernels have one or two axes more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.point_sampling import largest

LAYERS = ((64, 64), (64, 128, 1024))  # figure 2: before and after the feature transform
SHORT = ((64,), (128, 1024))  # the port: one layer before, two after


class SharedMLP(nn.Module):
    """What all parts have: layers `conv1` … with `bn1` …, the same for every point (sec. 4.2)."""

    def add_layers(self, in_channels: int, widths: Sequence[int]) -> None:
        for i, width in enumerate(widths, 1):
            self.add_module(f"conv{i}", nn.Linear(in_channels, width))
            self.add_module(f"bn{i}", nn.BatchNorm1d(width))
            in_channels = width

    def layer(self, i: int, rows: Tensor) -> Tensor:
        """Layer and norm without ReLU: (B * N, C) -> (B * N, C')."""
        return self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(rows))


class TNet(SharedMLP):
    """The alignment network (sec. 4.2): points (B, N, C) -> matrices (B, k, k), the identity at the start.

    Args:
        in_channels: C.
        k: size of the matrix.
        widths: the shared layers; their maximum over the points goes on.
        hidden: fully connected layers before the matrix.
    """

    def __init__(
        self, in_channels: int, k: int, widths: Sequence[int] = (64, 128, 1024), hidden: Sequence[int] = (512, 256)
    ) -> None:
        super().__init__()
        self.k, self.depth, self.hidden = k, len(widths), len(hidden)
        self.add_layers(in_channels, widths)
        for j, (before, after) in enumerate(zip((widths[-1], *hidden), (*hidden, k * k), strict=False), 1):
            self.add_module(f"fc{j}", nn.Linear(before, after))
            if j <= len(hidden):
                self.add_module(f"bn{len(widths) + j}", nn.BatchNorm1d(after))
        last = self.get_submodule(f"fc{len(hidden) + 1}")
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        for i in range(1, self.depth):
            rows = F.relu(self.layer(i, rows))
        # ReLU keeps the order, so it may follow the maximum, of a thousandth of the numbers
        x = F.relu(largest(self.layer(self.depth, rows).view(*x.shape[:2], -1)))
        for j in range(1, self.hidden + 1):
            x = F.relu(self.get_submodule(f"bn{self.depth + j}")(self.get_submodule(f"fc{j}")(x)))
        x = self.get_submodule(f"fc{self.hidden + 1}")(x).view(-1, self.k, self.k)
        return x + torch.eye(self.k, dtype=x.dtype, device=x.device)


def check_columns(x: Tensor, in_channels: int) -> None:
    """Raises: ValueError if points (B, N, C) have not as many columns as a network was made for."""
    if x.ndim != 3 or x.shape[2] != in_channels:
        raise ValueError(f"points must be (batch, points, {in_channels}), x y z first, got {tuple(x.shape)}")


def aligned(x: Tensor, matrix: Tensor) -> Tensor:
    """The first columns of points (B, N, C) times matrices (B, k, k); further columns (normals, colours) as they are."""
    k = matrix.shape[1]
    if x.shape[2] == k:
        return torch.bmm(x, matrix)
    return torch.cat([torch.bmm(x[..., :k], matrix), x[..., k:]], 2)


class PointNetEncoder(SharedMLP):
    """The left half of figure 2: points (B, N, C) -> one feature of the set.

    Args:
        in_channels: C.
        before, after: widths of the shared layers before and after the feature transform.
        transforms: both alignment networks; without them it is the paper's "vanilla" PointNet.
        last_relu: ReLU after the last layer, as published; the port leaves it out.
        alignment: widths and hidden layers of both alignment networks.
    """

    def __init__(
        self,
        in_channels: int = 3,
        before: Sequence[int] = LAYERS[0],
        after: Sequence[int] = LAYERS[1],
        transforms: bool = True,
        last_relu: bool = True,
        alignment: tuple[Sequence[int], Sequence[int]] = ((64, 128, 1024), (512, 256)),
    ) -> None:
        super().__init__()
        self.split, self.depth = len(before), len(before) + len(after)
        self.in_channels, self.transforms, self.last_relu = in_channels, transforms, last_relu
        self.local_features, self.num_features = before[-1], after[-1]
        if transforms:
            self.stn = TNet(in_channels, 3, *alignment)
        self.add_layers(in_channels, (*before, *after))
        if transforms:
            self.fstn = TNet(before[-1], before[-1], *alignment)

    def local(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features of points after the feature transform (B, N, before[-1]), and the transform (B, k, k) or None."""
        check_columns(x, self.in_channels)
        shape = x.shape[:2]
        if self.transforms:
            x = aligned(x, self.stn(x))
        rows = x.flatten(0, 1)
        for i in range(1, self.split + 1):
            rows = F.relu(self.layer(i, rows))
        x = rows.view(*shape, -1)
        if not self.transforms:
            return x, None
        matrix = self.fstn(x)
        return torch.bmm(x, matrix), matrix

    def before_maximum(self, local: Tensor) -> Tensor:
        """h of eq. (1), up to the last ReLU: (B, N, num_features)."""
        rows = local.flatten(0, 1)
        for i in range(self.split + 1, self.depth):
            rows = F.relu(self.layer(i, rows))
        return self.layer(self.depth, rows).view(*local.shape[:2], -1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """-> the set's feature (B, num_features), features of points, transform."""
        local, matrix = self.local(x)
        found = largest(self.before_maximum(local))  # eq. (1): the symmetric function
        return F.relu(found) if self.last_relu else found, local, matrix


def critical_points(encoder: PointNetEncoder, x: Tensor) -> Tensor:
    """The critical set C_S (theorem 2): bool (B, N), the points of which at least one channel has its maximum."""
    winners = encoder.before_maximum(encoder.local(x)[0]).argmax(1)
    return torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, winners, True)


def orthogonality(matrix: Tensor) -> Tensor:
    """Eq. (2): ||I - A A^T||_F^2, the mean over the batch. (B, k, k) -> ()."""
    eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    return (eye - matrix @ matrix.transpose(1, 2)).square().sum((1, 2)).mean()


class JointLinear(nn.Linear):
    """A linear layer over (what all points of a cloud share, what each has), without repeating the shared part for each point."""

    def forward(self, shared: Tensor, own: Tensor) -> Tensor:
        """shared (B, S), own (B, N, C) -> rows (B * N, out_features)."""
        split = shared.shape[1]
        once = F.linear(shared, self.weight[:, :split], self.bias)
        return (F.linear(own, self.weight[:, split:]) + once[:, None]).flatten(0, 1)


def trained(model: nn.Module, out: Tensor, matrix: Tensor | None) -> Tensor | dict[str, Tensor]:
    """What a network returns: logits; in training the feature transform as well, for eq. (2)."""
    return {"out": out, "transform": matrix} if model.training and matrix is not None else out


class PointNetClassifier(nn.Module):
    """Figure 2, above: points (B, N, in_channels) -> logits (B, num_classes).

    `drop_after` is where dropout stands: after the second hidden layer's ReLU (the paper), or before its norm (the port).
    """

    def __init__(
        self,
        num_classes: int,
        encoder: PointNetEncoder,
        hidden: Sequence[int] = (512, 256),
        drop_rate: float = 0.3,
        drop_after: bool = True,
    ) -> None:
        super().__init__()
        self.feat = encoder
        self.fc1 = nn.Linear(encoder.num_features, hidden[0])
        self.bn1 = nn.BatchNorm1d(hidden[0])
        self.fc2 = nn.Linear(hidden[0], hidden[1])
        self.bn2 = nn.BatchNorm1d(hidden[1])
        self.dropout, self.drop_after = nn.Dropout(drop_rate), drop_after
        self.num_features = hidden[1]
        self.fc3 = nn.Linear(hidden[1], num_classes) if num_classes else nn.Identity()

    def head(self, x: Tensor) -> Tensor:
        x = self.fc2(F.relu(self.bn1(self.fc1(x))))
        return self.dropout(F.relu(self.bn2(x))) if self.drop_after else F.relu(self.bn2(self.dropout(x)))

    def embed(self, x: Tensor) -> Tensor:
        """What the last layer sees (B, num_features)."""
        return self.head(self.feat(x)[0])

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        found, _, matrix = self.feat(x)
        return trained(self, self.fc3(self.head(found)), matrix)

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer for another number of classes; 0 leaves none."""
        fresh = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.fc3 = fresh.to(self.fc2.weight)


class PointNetSegmenter(SharedMLP):
    """Figure 2, below: points (B, N, in_channels) -> logits of each (B, N, num_classes), from its own feature and the set's."""

    def __init__(
        self, num_classes: int, encoder: PointNetEncoder, widths: Sequence[int] = (512, 256, 128, 128)
    ) -> None:
        super().__init__()
        self.feat, self.depth = encoder, len(widths)
        self.add_layers(encoder.num_features + encoder.local_features, widths)
        self.conv1 = JointLinear(encoder.num_features + encoder.local_features, widths[0])
        self.add_module(f"conv{len(widths) + 1}", nn.Linear(widths[-1], num_classes))

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        found, local, matrix = self.feat(x)
        rows = F.relu(self.bn1(self.conv1(found, local)))
        for i in range(2, self.depth + 1):
            rows = F.relu(self.layer(i, rows))
        rows = self.get_submodule(f"conv{self.depth + 1}")(rows)
        return trained(self, rows.view(*x.shape[:2], -1), matrix)


class PointNetPartSegmenter(SharedMLP):
    """The supplement's part segmentation network: points (B, N, C), categories int64 (B,) -> logits (B, N, num_classes).

    Every layer's features of a point, the set's feature and the category (one-hot) are put side by side.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        num_categories: int,
        widths: Sequence[int] = (64, 128, 128, 512, 2048),
        head: Sequence[int] = (256, 256, 128),
        stn: tuple[Sequence[int], Sequence[int]] = ((64, 128, 1024), (128, 128)),
        fstn: tuple[Sequence[int], Sequence[int]] = ((256, 1024), (512, 256)),
        last_relu: bool = True,
        drop_rate: float = 0.2,
    ) -> None:
        super().__init__()
        self.in_channels, self.num_categories = in_channels, num_categories
        self.last_relu, self.drop_rate = last_relu, drop_rate
        self.stn = TNet(in_channels, 3, *stn)
        self.add_layers(in_channels, widths)
        self.fstn = TNet(widths[2], widths[2], *fstn)
        own = sum(widths)
        self.convs1 = JointLinear(widths[-1] + num_categories + own, head[0])
        self.convs2 = nn.Linear(head[0], head[1])
        self.convs3 = nn.Linear(head[1], head[2])
        self.convs4 = nn.Linear(head[2], num_classes)
        self.bns1, self.bns2, self.bns3 = (nn.BatchNorm1d(width) for width in head)

    def forward(self, x: Tensor, category: Tensor) -> Tensor | dict[str, Tensor]:
        check_columns(x, self.in_channels)
        shape = x.shape[:2]
        rows = aligned(x, self.stn(x)).flatten(0, 1)
        features = []
        for i in range(1, 4):
            rows = F.relu(self.layer(i, rows))
            features.append(rows.view(*shape, -1))
        matrix = self.fstn(features[-1])
        rows = F.relu(self.layer(4, torch.bmm(features[-1], matrix).flatten(0, 1)))
        features.append(rows.view(*shape, -1))
        last = self.layer(5, rows)
        last = (F.relu(last) if self.last_relu else last).view(*shape, -1)
        one_hot = category[:, None] == torch.arange(self.num_categories, device=x.device)
        shared = torch.cat([largest(last), one_hot.to(last.dtype)], 1)
        rows = F.relu(self.bns1(self.convs1(shared, torch.cat([*features, last], 2))))
        rows = F.dropout(rows, self.drop_rate, self.training)
        rows = F.dropout(F.relu(self.bns2(self.convs2(rows))), self.drop_rate, self.training)
        rows = self.convs4(F.relu(self.bns3(self.convs3(rows))))
        return trained(self, rows.view(*shape, -1), matrix)


# -- variants ------------------------------------------------------------------------------------------------------------


def pointnet_cls(num_classes: int = 40, in_channels: int = 3, drop_rate: float = 0.3) -> PointNetClassifier:
    """The classification network of figure 2."""
    return PointNetClassifier(num_classes, PointNetEncoder(in_channels), drop_rate=drop_rate)


def pointnet_vanilla(num_classes: int = 40, in_channels: int = 3, drop_rate: float = 0.3) -> PointNetClassifier:
    """Without the alignment networks (tables 5 and 6)."""
    return PointNetClassifier(num_classes, PointNetEncoder(in_channels, transforms=False), drop_rate=drop_rate)


def pointnet_cls_small(num_classes: int = 8, in_channels: int = 3, drop_rate: float = 0.3) -> PointNetClassifier:
    """Ours: figure 2 with a quarter of the widths from the third layer on, for small sets and machines."""
    encoder = PointNetEncoder(in_channels, (32, 32), (32, 64, 256), alignment=((32, 64, 256), (128, 64)))
    return PointNetClassifier(num_classes, encoder, (128, 64), drop_rate)


def pointnet_seg(num_classes: int = 13, in_channels: int = 9) -> PointNetSegmenter:
    """The segmentation network of figure 2; by default for S3DIS: x y z, colour, place in the room."""
    return PointNetSegmenter(num_classes, PointNetEncoder(in_channels))


def pointnet_part_seg(num_classes: int = 50, in_channels: int = 3, num_categories: int = 16) -> PointNetPartSegmenter:
    """The part segmentation network of the supplement and the authors' code."""
    return PointNetPartSegmenter(num_classes, in_channels, num_categories)


def pointnet_cls_port(num_classes: int = 40, in_channels: int = 6, drop_rate: float = 0.4) -> PointNetClassifier:
    """The port's classification network, for its weights: three shared layers instead of five, no ReLU before the maximum."""
    encoder = PointNetEncoder(in_channels, *SHORT, last_relu=False)
    return PointNetClassifier(num_classes, encoder, drop_rate=drop_rate, drop_after=False)


def pointnet_sem_seg_port(num_classes: int = 13, in_channels: int = 9) -> PointNetSegmenter:
    """The port's scene segmentation network, for its weights."""
    return PointNetSegmenter(num_classes, PointNetEncoder(in_channels, *SHORT, last_relu=False), (512, 256, 128))


def pointnet_part_seg_port(
    num_classes: int = 50, in_channels: int = 6, num_categories: int = 16
) -> PointNetPartSegmenter:
    """The port's part segmentation network, for its weights: larger alignment networks, no ReLU before the maximum, no dropout."""
    whole = ((64, 128, 1024), (512, 256))
    return PointNetPartSegmenter(
        num_classes, in_channels, num_categories, stn=whole, fstn=whole, last_relu=False, drop_rate=0.0
    )


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The port's file: kernels (out, in, 1) and (out, in, 1, 1) without their last axes."""
    return dict(_flat(state))


def _flat(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        yield name, value.flatten(1) if value.ndim > 2 else value
