"""PointNet++ against plain versions of its operators and the PyTorch port's networks: a loop of samples, whole matrices sorted, convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks import point_sampling
from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.three_d.pointnet2 import model as pointnet2

PORT = "the PyTorch port's layers over sorted distance matrices"

# -- the operators, plainly ----------------------------------------------------------------------------------------------


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared, of all pairs, by the binomial formula."""
    product = -2 * torch.matmul(a, b.transpose(1, 2))
    product += (a**2).sum(-1)[:, :, None]
    product += (b**2).sum(-1)[:, None, :]
    return product


def rows_at(values: Tensor, index: Tensor) -> Tensor:
    batch = torch.arange(len(values), device=values.device).view(-1, *[1] * (index.ndim - 1)).expand_as(index)
    return values[batch, index]


def sample_farthest(xyz: Tensor, count: int) -> Tensor:
    """One sample after the other, beginning with the first point (the port begins anywhere)."""
    sets, size, _ = xyz.shape
    chosen = torch.zeros(sets, count, dtype=torch.long, device=xyz.device)
    nearest = torch.full((sets, size), 1e10, dtype=xyz.dtype, device=xyz.device)
    latest, every = torch.zeros(sets, dtype=torch.long, device=xyz.device), torch.arange(sets, device=xyz.device)
    for i in range(count):
        chosen[:, i] = latest
        centre = xyz[every, latest].view(sets, 1, 3)
        away = ((xyz - centre) ** 2).sum(-1)
        closer = away < nearest
        nearest[closer] = away[closer]
        latest = nearest.max(-1)[1]
    return chosen


def query_balls(radius: float, count: int, xyz: Tensor, centres: Tensor) -> Tensor:
    """Numbers of points beyond the radius are made too large, then each row is sorted."""
    sets, size, _ = xyz.shape
    number = torch.arange(size, device=xyz.device).view(1, 1, size).repeat(sets, centres.shape[1], 1)
    number[distances(centres, xyz) > radius**2] = size
    number = number.sort(dim=-1)[0][:, :, :count]
    first = number[:, :, :1].repeat(1, 1, number.shape[2])
    number[number == size] = first[number == size]
    return number


def carry(fine: Tensor, coarse: Tensor, features: Tensor) -> Tensor:
    """The three nearest by a sorted matrix, weighted by inverse squares."""
    if coarse.shape[1] == 1:
        return features.repeat(1, fine.shape[1], 1)
    away, index = distances(fine, coarse).sort(dim=-1)
    away, index = away[:, :, :3], index[:, :, :3]
    inverse = 1.0 / (away + 1e-8)
    weight = inverse / inverse.sum(2, keepdim=True)
    return (rows_at(features, index) * weight[..., None]).sum(2)


# -- the port's layers, channels first -----------------------------------------------------------------------------------


def stack(kind: type, norm: type, channels: int, widths: Sequence[int]) -> tuple[nn.ModuleList, nn.ModuleList]:
    sizes = list(zip((channels, *widths), widths, strict=False))
    return nn.ModuleList(kind(a, b, 1) for a, b in sizes), nn.ModuleList(norm(b) for _, b in sizes)


def through(x: Tensor, convs: nn.ModuleList, norms: nn.ModuleList) -> Tensor:
    for conv, norm in zip(convs, norms, strict=True):
        x = F.relu(norm(conv(x)))
    return x


class PortAbstraction(nn.Module):
    def __init__(self, ours: pointnet2.SetAbstraction) -> None:
        super().__init__()
        self.settings = (ours.centres, ours.radius, ours.group_size)
        widths = [layer.out_features for layer in ours.mlp_convs]
        self.mlp_convs, self.mlp_bns = stack(nn.Conv2d, nn.BatchNorm2d, ours.mlp_convs[0].in_features, widths)

    def forward(self, xyz: Tensor, points: Tensor | None) -> tuple[Tensor, Tensor]:
        centres, radius, size = self.settings
        if centres is None:
            middle = torch.zeros_like(xyz[:, :1])
            groups = xyz[:, None] if points is None else torch.cat([xyz[:, None], points[:, None]], 3)
        else:
            middle = rows_at(xyz, sample_farthest(xyz, centres))
            index = query_balls(radius, size, xyz, middle)
            groups = rows_at(xyz, index) - middle[:, :, None]
            if points is not None:
                groups = torch.cat([groups, rows_at(points, index)], 3)
        return middle, through(groups.permute(0, 3, 2, 1), self.mlp_convs, self.mlp_bns).max(2)[0].transpose(1, 2)


class PortMultiScale(nn.Module):
    def __init__(self, ours: pointnet2.MultiScaleSetAbstraction) -> None:
        super().__init__()
        self.centres, self.scales = ours.centres, list(zip(ours.radii, ours.group_sizes, strict=True))
        parts = [
            stack(nn.Conv2d, nn.BatchNorm2d, b[0].in_features, [layer.out_features for layer in b])
            for b in ours.conv_blocks
        ]
        self.conv_blocks, self.bn_blocks = (nn.ModuleList(p[i] for p in parts) for i in (0, 1))

    def forward(self, xyz: Tensor, points: Tensor | None) -> tuple[Tensor, Tensor]:
        middle = rows_at(xyz, sample_farthest(xyz, self.centres))
        found = []
        for (radius, size), convs, norms in zip(self.scales, self.conv_blocks, self.bn_blocks, strict=True):
            index = query_balls(radius, size, xyz, middle)
            groups = rows_at(xyz, index) - middle[:, :, None]
            if points is not None:
                groups = torch.cat([rows_at(points, index), groups], 3)
            found.append(through(groups.permute(0, 3, 2, 1), convs, norms).max(2)[0])
        return middle, torch.cat(found, 1).transpose(1, 2)


class PortPropagation(nn.Module):
    def __init__(self, ours: pointnet2.FeaturePropagation) -> None:
        super().__init__()
        widths = [layer.out_features for layer in ours.mlp_convs]
        self.mlp_convs, self.mlp_bns = stack(nn.Conv1d, nn.BatchNorm1d, ours.mlp_convs[0].in_features, widths)

    def forward(self, fine: Tensor, coarse: Tensor, own: Tensor | None, features: Tensor) -> Tensor:
        x = carry(fine, coarse, features)
        x = x if own is None else torch.cat([own, x], 2)
        return through(x.transpose(1, 2), self.mlp_convs, self.mlp_bns).transpose(1, 2)


def ported(module: nn.Module) -> nn.Module:
    """The port's layer for one of ours."""
    kinds = {
        pointnet2.SetAbstraction: PortAbstraction,
        pointnet2.MultiScaleSetAbstraction: PortMultiScale,
        pointnet2.FeaturePropagation: PortPropagation,
    }
    return kinds[type(module)](module)


class PortClassifier(nn.Module):
    def __init__(self, ours: pointnet2.PointNet2Classifier) -> None:
        super().__init__()
        self.sa1, self.sa2, self.sa3 = (ported(level) for level in (ours.sa1, ours.sa2, ours.sa3))
        for name in ("fc1", "fc2", "fc3"):
            layer = getattr(ours, name)
            self.add_module(name, nn.Linear(layer.in_features, layer.out_features))
        self.bn1, self.bn2 = nn.BatchNorm1d(ours.bn1.num_features), nn.BatchNorm1d(ours.bn2.num_features)
        self.drop1, self.drop2 = nn.Dropout(ours.drop1.p), nn.Dropout(ours.drop2.p)

    def forward(self, x: Tensor) -> Tensor:
        xyz, points = x[..., :3], x[..., 3:] if x.shape[2] > 3 else None
        for level in (self.sa1, self.sa2, self.sa3):
            xyz, points = level(xyz, points)
        y = self.drop1(F.relu(self.bn1(self.fc1(points.reshape(len(x), -1)))))
        return self.fc3(self.drop2(F.relu(self.bn2(self.fc2(y)))))


class PortSegmenter(nn.Module):
    def __init__(self, ours: pointnet2.PointNet2Segmenter) -> None:
        super().__init__()
        self.depth, self.categories = ours.depth, ours.num_categories
        for i in range(1, ours.depth + 1):
            self.add_module(f"sa{i}", ported(ours.get_submodule(f"sa{i}")))
            self.add_module(f"fp{i}", ported(ours.get_submodule(f"fp{i}")))
        width, classes = ours.conv1.out_features, ours.conv2.out_features
        self.conv1, self.bn1 = nn.Conv1d(width, width, 1), nn.BatchNorm1d(width)
        self.drop1, self.conv2 = nn.Dropout(ours.drop1.p), nn.Conv1d(width, classes, 1)

    def forward(self, x: Tensor, category: Tensor | None = None) -> Tensor:
        xyz = [x[..., :3]]
        points: list[Tensor | None] = [x]
        for i in range(1, self.depth + 1):
            place, found = self.get_submodule(f"sa{i}")(xyz[-1], points[-1])
            xyz.append(place)
            points.append(found)
        points[0] = None
        if self.categories:
            one_hot = F.one_hot(category, self.categories).to(x)[:, None].repeat(1, x.shape[1], 1)
            points[0] = torch.cat([one_hot, x[..., :3], x], 2)
        y = points[-1]
        for i in range(self.depth, 0, -1):
            y = self.get_submodule(f"fp{i}")(xyz[i - 1], xyz[i], points[i - 1], y)
        y = self.drop1(F.relu(self.bn1(self.conv1(y.transpose(1, 2)))))
        return self.conv2(y).transpose(1, 2)


def port_of(network: nn.Module) -> nn.Module:
    return (PortClassifier if isinstance(network, pointnet2.PointNet2Classifier) else PortSegmenter)(network)


# -- cases ---------------------------------------------------------------------------------------------------------------


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    yield from operators()
    for name, points, channels, arguments in (
        ("pointnet2_cls_ssg", 600, 3, {}),
        ("pointnet2_cls_ssg", 520, 6, {"in_channels": 6}),
        ("pointnet2_cls_msg", 520, 3, {}),
        ("pointnet2_part_seg_ssg", 540, 3, {}),
        ("pointnet2_part_seg_msg", 520, 6, {"in_channels": 6}),
        ("pointnet2_sem_seg", 1030, 9, {}),
        ("pointnet2_sem_seg_msg", 1030, 9, {}),
    ):
        ours, port = same_weights(name, arguments)
        yield Case(f"{name}, {channels} channels", ours.eval(), port.eval(), inputs(name, 2, points, channels), PORT,
                   rtol=1e-3, atol=1e-4)  # fmt: skip
    for name in ("pointnet2_cls_small", "pointnet2_part_seg_small"):
        ours, port = same_weights(name, {"drop_rate": 0.0})
        given = tuple(x.double() if x.is_floating_point() else x for x in inputs(name, 4, 150, 3))
        yield Case(f"{name}, a training step", step_of(ours.double(), given), step_of(port.double(), given), (),
                   f"{PORT}, cross-entropy", rtol=1e-6, atol=1e-8)  # fmt: skip


def inputs(name: str, batch: int, points: int, channels: int) -> tuple:
    x = torch.rand(batch, points, channels) * 2 - 1
    x[..., :3] = F.normalize(x[..., :3], dim=2) * torch.rand(batch, points, 1) ** (1 / 3)
    return (x, torch.arange(batch) % 3) if "part" in name else (x,)


def same_weights(name: str, arguments: dict) -> tuple[nn.Module, nn.Module]:
    """The port's network with lively norms; ours with its weights, through `from_official`."""
    ours = getattr(pointnet2, name)(**arguments)
    port = port_of(ours)
    for key, p in port.named_parameters():
        if "bn" in key:
            nn.init.uniform_(p, 0.5, 1.5) if key.endswith("weight") else nn.init.normal_(p, std=0.2)
        elif p.ndim > 1:
            nn.init.kaiming_normal_(
                p
            )  # else what the points say fades layer by layer, and a bias is all that is compared
    for key, b in port.named_buffers():
        if key.endswith("running_var"):
            nn.init.uniform_(b, 0.5, 1.5)
    ours.load_state_dict(pointnet2.from_official(port.state_dict()))
    return ours, port


def step_of(network: nn.Module, given: tuple) -> Callable:
    """The loss of a training step, every parameter's gradient and the running statistics after it."""

    def step() -> dict:
        logits = network.train()(*given).flatten(0, -2)
        loss = F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1])
        names, parameters = zip(*network.named_parameters(), strict=True)
        found = dict(
            zip(names, (g.flatten(1) if g.ndim > 1 else g for g in torch.autograd.grad(loss, parameters)), strict=True)
        )
        return {"loss": loss.detach(), **found, **{k: v for k, v in network.named_buffers() if "running" in k}}

    return step


def operators() -> Iterator[Case]:
    wide = {"dtype": torch.float64}
    for sets, size, count in ((3, 50, 20), (1, 200, 200), (2, 7, 12)):
        yield Case(f"farthest points, {count} of {size}", lambda p, n=count: point_sampling.farthest_point_sampling(p, n),
                   lambda p, n=count: sample_farthest(p, n), (torch.randn(sets, size, 3, **wide),),
                   "a loop of samples", rtol=0, atol=0)  # fmt: skip
    for radius, count in ((0.3, 8), (0.8, 16), (3.0, 60)):
        points = torch.randn(2, 60, 3, **wide)
        yield Case(f"balls of radius {radius}",
                   lambda p, r=radius, n=count: point_sampling.ball_query(p, p[:, :9], r, n),
                   lambda p, r=radius, n=count: query_balls(r, n, p, p[:, :9]), (points,),
                   "a distance matrix, sorted", rtol=0, atol=0)  # fmt: skip
    for coarse in (1, 3, 30):
        fine, few = torch.randn(2, 40, 3, **wide), torch.randn(2, coarse, 3, **wide)
        yield Case(f"interpolation from {coarse} points", lambda a, b, f: point_sampling.interpolate(b, f, a),
                   lambda a, b, f: carry(a, b, f), (fine, few, torch.randn(2, coarse, 5, **wide)),
                   "eq. (2) by a sorted matrix", gradients=True, rtol=1e-7, atol=1e-8)  # fmt: skip
    level = pointnet2.SetAbstraction(3 + 4, (8, 16), 10, 0.9, 12).double().train()
    x, f = torch.randn(2, 40, 3, **wide), torch.randn(2, 40, 4, **wide)

    def by_group(x: Tensor, f: Tensor) -> list[Tensor]:
        """One group after the other, in a first pass for the norms' statistics, layer by layer."""
        centres = [x[b, sample_farthest(x, 10)[b]] for b in range(2)]
        rows = []
        for b in range(2):
            for c in centres[b]:
                inside = [i for i in range(40) if float((x[b, i] - c).detach().square().sum()) <= 0.81][:12]
                inside += [inside[0]] * (12 - len(inside))
                rows.append(torch.stack([torch.cat([x[b, i] - c, f[b, i]]) for i in inside]))
        y = torch.stack(rows)
        for layer, norm in zip(level.mlp_convs, level.mlp_bns, strict=True):
            y = y @ layer.weight.T + layer.bias
            mean, variance = y.mean((0, 1)), y.var((0, 1), unbiased=False)
            y = F.relu((y - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias)
        return [torch.stack(centres), y.max(1)[0].view(2, 10, -1)]

    yield Case("set abstraction in training", lambda x, f: list(level(x, f)), by_group, (x, f),
               "sec. 3.2, group by group", gradients=True, rtol=1e-7, atol=1e-8)  # fmt: skip
    whole = pointnet2.SetAbstraction(3, (8, 16)).eval()
    yield Case("one group of all points does not mind their order", lambda x: whole(x, None)[1],
               lambda x: whole(x[:, torch.randperm(30)], None)[1], (torch.randn(2, 30, 3),), "sec. 3.1")  # fmt: skip


# -- speed ---------------------------------------------------------------------------------------------------------------


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: whole networks, with sampling, grouping and interpolation."""

    def pair(name: str, points: int, **arguments) -> Pair:
        make = getattr(pointnet2, name)
        return Pair(
            lambda: make(**arguments),
            lambda: port_of(make(**arguments)),
            lambda batch: inputs(name, batch, points, 3),
            "the PyTorch port's layers",
            train_batch=4,
        )

    return {
        "pointnet2_cls_ssg": pair("pointnet2_cls_ssg", 1024),
        "pointnet2_part_seg_ssg": pair("pointnet2_part_seg_ssg", 1024),
    }
