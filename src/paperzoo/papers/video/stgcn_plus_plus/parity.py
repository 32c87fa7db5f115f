"""Parity of ST-GCN++: every part against loops over subsets, joints and frames; the released parameter count; streams and samples by hand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.skeleton_graphs import LAYOUTS, spatial_graph
from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.video.stgcn_plus_plus import golden, model
from paperzoo.tasks.skeleton_actions import Streams
from paperzoo.tasks.skeleton_samples import normalised, stream

PLAIN = "the released steps, written out in plain torch"


class Unit(nn.Module):
    """A convolution and what follows it, under the released names."""

    def __init__(
        self, inside: int, out: int, kernel: int = 1, stride: int = 1, dilation: int = 1, norm: bool = True
    ) -> None:
        super().__init__()
        pad = (kernel + (kernel - 1) * (dilation - 1) - 1) // 2
        self.conv = nn.Conv2d(inside, out, (kernel, 1), (stride, 1), (pad, 0), (dilation, 1))
        if norm:
            self.bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.bn(x) if hasattr(self, "bn") else x


class Space(nn.Module):
    def __init__(self, inside: int, out: int, graph: Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(graph.clone())
        self.conv = nn.Conv2d(inside, out * len(graph), 1)
        self.bn = nn.BatchNorm2d(out)
        if inside != out:
            self.down = nn.Sequential(nn.Conv2d(inside, out, 1), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        b, _, t, v = x.shape
        parts = self.conv(x).view(b, len(self.A), -1, t, v)
        y = sum(torch.matmul(parts[:, k], self.A[k]) for k in range(len(self.A)))
        return F.relu(self.bn(y) + (self.down(x) if hasattr(self, "down") else x))


class Time(nn.Module):
    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        each, branches = width // 6, []
        for kind in (1, 2, 3, 4, "max", "1x1"):
            own = width - 5 * each if kind == 1 else each
            if kind == "1x1":
                branches.append(nn.Conv2d(width, own, 1, stride=(stride, 1)))
                continue
            last = (
                nn.MaxPool2d((3, 1), (stride, 1), (1, 0))
                if kind == "max"
                else Unit(own, own, 3, stride, kind, norm=False)
            )
            branches.append(nn.Sequential(nn.Conv2d(width, own, 1), nn.BatchNorm2d(own), nn.ReLU(), last))
        self.branches = nn.ModuleList(branches)
        self.transform = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 1))
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.transform(torch.cat([b(x) for b in self.branches], dim=1)))


class Step(nn.Module):
    def __init__(self, inside: int, out: int, graph: Tensor, stride: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.gcn, self.tcn = Space(inside, out, graph), Time(out, stride)
        if not first and (inside != out or stride > 1):
            self.residual = Unit(inside, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        rest = 0 if self.first else self.residual(x) if hasattr(self, "residual") else x
        return F.relu(self.tcn(self.gcn(x)) + rest)


class Plain(nn.Module):
    def __init__(
        self,
        classes: int = 60,
        channels: int = 3,
        layout: str = "ntu",
        width: int = 64,
        stages: int = 10,
        doubled=(5, 8),
    ) -> None:
        super().__init__()
        graph = spatial_graph(LAYOUTS[layout])
        self.backbone = nn.Module()
        self.backbone.data_bn = nn.BatchNorm1d(channels * graph.shape[1])
        steps, inside = [], channels
        for i in range(1, stages + 1):
            width = width * 2 if i in doubled else width
            steps.append(Step(inside, width, graph, 2 if i in doubled else 1, i == 1))
            inside = width
        self.backbone.gcn = nn.ModuleList(steps)
        self.cls_head = nn.Module()
        self.cls_head.fc_cls = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        n, m, t, v, c = x.shape
        x = x.permute(0, 1, 3, 4, 2).contiguous().view(n * m, v * c, t)
        x = self.backbone.data_bn(x).view(n, m, v, c, t).permute(0, 1, 3, 4, 2).contiguous().view(n * m, c, t, v)
        for step in self.backbone.gcn:
            x = step(x)
        x = F.adaptive_avg_pool2d(x, 1).view(n, m, -1).mean(1)
        return self.cls_head.fc_cls(x)


def take(plain: Plain, ours: nn.Module) -> Plain:
    plain.load_state_dict(ours.state_dict())
    return plain.train(ours.training)


def roughened(net: nn.Module) -> nn.Module:
    """Statistics and graphs that are not those of the start."""
    for name, buffer in net.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    for name, parameter in net.named_parameters():
        if name.endswith((".A", ".PA")):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return net


def slow_graph(layout: str) -> Tensor:
    """From the tree: for each joint itself, its inward neighbour, the mean of its outward ones."""
    body = LAYOUTS[layout]
    found = torch.zeros(3, body.joints, body.joints)
    for joint in range(body.joints):
        found[0, joint, joint] = 1
        nearer = [b for a, b in body.inward if a == joint]
        farther = [a for a, b in body.inward if b == joint]
        for kind, others in ((1, nearer), (2, farther)):
            for other in others:
                found[kind, other, joint] = 1 / len(others)
    return found


def slow_space(layer: nn.Module, x: Tensor) -> Tensor:
    """Joint by joint and subset by subset, in eval."""
    graph, weight, bias = layer.graph(), layer.conv.weight[:, :, 0, 0], layer.conv.bias
    out = layer.bn.num_features
    y = x.new_zeros(len(x), out, x.shape[2], x.shape[3])
    for k in range(len(graph)):
        w, b = weight[k * out : (k + 1) * out], bias[k * out : (k + 1) * out]
        for v in range(x.shape[3]):
            seen = torch.einsum("oc,bct->bot", w, x[..., v]) + b[None, :, None]
            for target in range(x.shape[3]):
                y[..., target] += seen * graph[k, v, target]
    y = layer.bn(y)
    return torch.relu(y + (x if layer.down is None else layer.down(x)))


def slow_bones(joints: Tensor, layout: str) -> Tensor:
    found = torch.zeros_like(joints)
    for v, other in enumerate(LAYOUTS[layout].bones):
        found[:, :, v] = joints[:, :, v] - joints[:, :, other]
    return found


def slow_upright(joints: Tensor) -> Tensor:
    """With rotations about an axis by half angles (Euler and Rodrigues), as the code of 2s-AGCN has them."""
    values = joints.double().numpy()
    values = values - values[0, 0, 1]

    def turned(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        axis = np.cross(start, end)
        axis = axis / np.linalg.norm(axis)
        half = np.arccos(start @ end / np.linalg.norm(start) / np.linalg.norm(end)) / 2
        a, (b, c, d) = np.cos(half), -axis * np.sin(half)
        matrix = np.array(
            [
                [a * a + b * b - c * c - d * d, 2 * (b * c + a * d), 2 * (b * d - a * c)],
                [2 * (b * c - a * d), a * a + c * c - b * b - d * d, 2 * (c * d + a * b)],
                [2 * (b * d + a * c), 2 * (c * d - a * b), a * a + d * d - b * b - c * c],
            ]
        )
        return np.einsum("mtvc,kc->mtvk", points, matrix)

    values = turned(values, values[0, 0, 1] - values[0, 0, 0], np.array([0.0, 0.0, 1.0]))
    values = turned(values, values[0, 0, 8] - values[0, 0, 4], np.array([1.0, 0.0, 0.0]))
    return torch.from_numpy(values).float()


def golden_cases() -> Iterator[Case]:
    """Answers that were computed with mmaction2, see golden.py."""
    from safetensors.torch import load_file

    answers, against = load_file(str(golden.FILE)), "mmaction2 1.2.0 STGCN"
    for name, (_, joints) in golden.LAYOUTS.items():
        yield Case(
            f"golden graph of {name}",
            lambda n: spatial_graph(LAYOUTS[n]),
            lambda n: answers[f"{n}.graph"],
            (name,),
            against,
        )
        if f"{name}.eval" not in answers:
            continue
        net = golden.write_weights(model.stgcn_plus_plus(layout=name).backbone).eval()
        yield Case(
            f"golden eval, {name}",
            lambda x, net=net: (net(x)[:, ::4], float(sum(p.numel() for p in net.parameters()))),
            lambda x, name=name: (answers[f"{name}.eval"], answers[f"{name}.parameters"].reshape(())),
            (golden.skeletons(joints),),
            against,
            note="a backbone's maps, and how many parameters it has",
        )
        if name != "ntu":
            continue

        def gradients(x: Tensor, net: nn.Module = net) -> dict[str, Tensor]:
            net.zero_grad()
            net.double().train()(x.double()).square().mean().backward()
            return {n: scaled(net.get_parameter(n).grad.flatten()[::3], n) for n in golden.GRADIENTS}

        def scaled(value: Tensor, n: str) -> Tensor:
            return value / answers[f"gradient.{n}"].abs().max()

        yield Case(
            "golden gradients in training",
            gradients,
            lambda x: {n: scaled(answers[f"gradient.{n}"], n) for n in golden.GRADIENTS},
            (golden.skeletons(joints),),
            against,
            note="in double precision, each divided by its largest value",
        )


def cases() -> Iterator[Case]:
    yield from golden_cases()
    torch.manual_seed(0)
    full = roughened(model.stgcn_plus_plus()).eval()
    yield Case("stgcn_plus_plus eval, NTU", full, take(Plain(), full), (torch.randn(2, 2, 20, 25, 3),), PLAIN)
    yield Case("an odd number of frames, one person", full, take(Plain(), full), (torch.randn(1, 1, 13, 25, 3),), PLAIN)
    del full
    flat = roughened(model.stgcn_plus_plus(layout="coco", num_classes=7)).eval()
    yield Case("COCO's joints", flat, take(Plain(7, layout="coco"), flat), (torch.randn(2, 2, 12, 17, 3),), PLAIN)
    del flat
    small = roughened(model.stgcn_plus_plus_tiny(num_classes=5)).train().double()
    plain = take(Plain(5, width=24, stages=2, doubled=(2,)).double(), small)
    yield Case(
        "train, loss and gradients",
        small,
        plain,
        (torch.randn(4, 2, 8, 25, 3).double(),),
        PLAIN,
        gradients=True,
        atol=1e-6,
        note="in double precision",
    )
    for adaptive in ("init", "importance"):
        layer = roughened(model.GraphConvolution(4, 6, spatial_graph(LAYOUTS["ntu"]), adaptive)).eval()
        yield Case(
            f"space, {adaptive}",
            layer,
            lambda x, layer=layer: slow_space(layer, x),
            (torch.randn(2, 4, 3, 25),),
            "joint by joint",
        )
    for layout in LAYOUTS:
        yield Case(
            f"the graph of {layout}",
            lambda name: spatial_graph(LAYOUTS[name]),
            slow_graph,
            (layout,),
            "the tree, joint by joint",
        )
    joints = torch.randn(2, 6, 25, 3)
    yield Case(
        "bones",
        lambda x: stream(x, "bone", LAYOUTS["ntu"], False),
        lambda x: slow_bones(x, "ntu"),
        (joints,),
        "joint by joint",
    )
    yield Case(
        "bones in motion",
        lambda x: stream(x, "bone_motion", LAYOUTS["ntu"], False),
        lambda x: torch.from_numpy(
            np.diff(slow_bones(x, "ntu").numpy(), axis=1, append=slow_bones(x, "ntu")[:, -1:].numpy())
        ),
        (joints,),
        f"numpy {np.__version__} diff",
    )
    yield Case(
        "pre-normalised",
        lambda x: normalised(x, LAYOUTS["ntu"]),
        slow_upright,
        (joints,),
        "rotations by half angles",
        atol=1e-4,
    )
    networks = [roughened(model.stgcn_plus_plus_tiny(num_classes=4)).eval() for _ in range(4)]
    both = Streams(networks, [1 / 3, 1 / 3, 1 / 6, 1 / 6]).eval()
    yield Case(
        "four streams",
        lambda x: both(x).softmax(1),
        lambda x: sum(w * n(p).softmax(1) for w, n, p in zip((2, 2, 1, 1), networks, x.chunk(4, 4), strict=True)) / 6,
        (torch.randn(3, 2, 8, 25, 12),),
        "probabilities mixed 2 : 2 : 1 : 1",
    )


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: NTU's skeletons, 100 frames."""
    return {
        "stgcn_plus_plus": Pair(
            model.stgcn_plus_plus, Plain, lambda batch: (torch.randn(batch, 2, 100, 25, 3),), PLAIN, train_batch=2
        )
    }
