"""Parity of PWC-Net: golden answers of ptlflow's network, a plain network with literal numbers, warping, cost volumes and losses by loops."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.cost_volume import global_correlation, local_correlation
from paperzoo.blocks.warping import backward_warp
from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.correspondence.pwc_net import golden, model
from paperzoo.papers.correspondence.pwc_net.technique import downsampled, pyramid_loss
from paperzoo.tasks.flow_metrics import FlowMetrics


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    yield from released()
    yield from networks()
    yield from parts()
    yield from losses()


# -- the whole network ---------------------------------------------------------------------------------------------------


def released() -> Iterator[Case]:
    """Answers that were computed with ptlflow, see golden.py."""
    from safetensors.torch import load_file

    answers = load_file(str(golden.FILE))
    ours, against = golden.write_weights(model.pwc_net()).train(), "ptlflow 0.4.2 pwcnet (the authors' PyTorch code)"
    yield Case(
        "parameters",
        lambda: float(sum(p.numel() for p in ours.parameters())),
        lambda: answers["parameters"],
        against=against,
    )
    for kind in golden.SIZES:
        yield Case(
            f"every level, {kind} pictures",
            lambda a, b: dict(enumerate(ours(a, b), 2)),
            lambda a, b, kind=kind: {level: answers[f"{kind}.flow{level}"] for level in range(2, 7)},
            golden.pictures(kind),
            against,
        )

    largest = {name: answers[f"gradient.{name}"].abs().max() for name in golden.GRADIENTS}

    def gradients(first: Tensor, second: Tensor) -> dict[str, Tensor]:
        ours.zero_grad()
        sum(flow.square().sum() for flow in ours(first, second)).backward()
        return {n: ours.get_parameter(n).grad.flatten()[::2] / largest[n] for n in golden.GRADIENTS}

    yield Case(
        "gradients of a training step",
        gradients,
        lambda a, b: {name: answers[f"gradient.{name}"] / largest[name] for name in golden.GRADIENTS},
        golden.pictures("small"),
        against,
        rtol=1e-3,
        atol=1e-3,
        note="each as a share of the parameter's largest; their correlation reads a millionth beside the pixels",
    )


class Plain(nn.Module):
    """The released network line by line: 81 products, a map of ones read along with the features, two passes through the pyramid.

    It has our parameters by name, and none of our code.
    """

    def __init__(self, ours: model.PWCNet, dense: bool = True, third: bool = True, standardise: bool = False) -> None:
        super().__init__()
        for name, child in ours.named_children():
            self.add_module(name, child)
        self.dense, self.third, self.standardise, self.levels = dense, third, standardise, ours.levels
        self.layers, self.context = ours.estimator_layers, ours.context_layers + 1

    def correlation(self, a: Tensor, b: Tensor) -> Tensor:
        if self.standardise:  # as one picture of twice the height
            both = torch.cat([a, b], 2).flatten(2)
            mean, deviation = both.mean(2)[..., None, None], both.std(2)[..., None, None] + 1e-5
            a, b = (a - mean) / deviation, (b - mean) / deviation
        padded = F.pad(b, (4, 4, 4, 4))
        height, width = a.shape[2:]
        costs = [
            (a * padded[:, :, y : y + height, x : x + width]).sum(1) / a.shape[1] for y in range(9) for x in range(9)
        ]
        volume = torch.stack(costs, 1)
        return torch.where(volume > 0, volume, 0.1 * volume)

    def warp(self, x: Tensor, flow: Tensor) -> Tensor:
        height, width = x.shape[2:]
        u = torch.arange(width).view(1, 1, -1) + flow[:, 0]
        v = torch.arange(height).view(1, -1, 1) + flow[:, 1]
        grid = torch.stack([2 * u / max(width - 1, 1) - 1, 2 * v / max(height - 1, 1) - 1], 3)
        mask = F.grid_sample(torch.ones_like(x), grid, align_corners=True)
        return F.grid_sample(x, grid, align_corners=True) * (mask >= 0.999)

    def features(self, x: Tensor) -> list[Tensor]:
        maps = []
        for level in range(1, self.levels + 1):
            names = (["aa", "a", "b"] if level == 6 else ["a", "aa", "b"]) if self.third else ["a", "b"]
            for name in names:
                x = getattr(self, f"conv{level}{name}")(x)
            maps.append(x)
        return maps

    def forward(self, first: Tensor, second: Tensor) -> Tensor | list[Tensor]:
        one, two = self.features(first), self.features(second)
        x, flows = self.correlation(one[-1], two[-1]), []
        for level in range(self.levels, 1, -1):
            if level < self.levels:
                up = getattr(self, f"deconv{level + 1}")(flows[0])
                hint = getattr(self, f"upfeat{level + 1}")(x)
                costs = self.correlation(one[level - 1], self.warp(two[level - 1], up * 20 / 2**level))
                x = torch.cat((costs, one[level - 1], up, hint), 1)
            for i in range(self.layers):
                y = getattr(self, f"conv{level}_{i}")(x)
                x = torch.cat((y, x), 1) if self.dense else y
            flows.insert(0, getattr(self, f"predict_flow{level}")(x))
        for i in range(1, self.context + 1):
            x = getattr(self, f"dc_conv{i}")(x)
        flows[0] = flows[0] + x
        if self.training:
            return flows
        return 20 * F.interpolate(flows[0], scale_factor=4, mode="bilinear")


def networks() -> Iterator[Case]:
    against = "a plain version: 81 products, a map of ones read along"
    for name, size, train, options in (
        ("pwc_net", (64, 128), False, {}),
        ("pwc_net_paper", (128, 64), False, {"third": False}),
        ("pwc_net_small", (64, 64), True, {"third": False, "dense": False}),
        ("pwc_net_slim", (48, 80), True, {"third": False, "standardise": True}),
    ):
        ours = getattr(model, name)()
        for child in ("predict_flow2", "predict_flow3", f"dc_conv{ours.context_layers + 1}"):
            nn.init.normal_(ours.get_submodule(child).weight, std=0.02)
        pictures = torch.rand(2, 3, *size), torch.rand(2, 3, *size)
        yield Case(
            f"{name} {'train' if train else 'eval'} {size}",
            ours.train(train),
            Plain(ours, **options).train(train),
            pictures,
            against,
            gradients=train,
            rtol=1e-3 if train else 1e-4,
            atol=1e-4,
        )
    ours = model.pwc_net_slim().eval()
    yield Case(
        "pictures whose sides leave a remainder: the parts that two sizes share have the same pyramid",
        lambda x: ours.pyramid(x)[1][..., :8, :10],
        lambda x: ours.pyramid(x[..., :50, :66])[1][..., :8, :10],
        (torch.rand(1, 3, 64, 80),),
        "identity",
    )


# -- parts ---------------------------------------------------------------------------------------------------------------


def slow_costs(a: np.ndarray, b: np.ndarray, d: int) -> np.ndarray:
    """Place by place."""
    batch, channels, height, width = a.shape
    out = np.zeros((batch, (2 * d + 1) ** 2, height, width))
    for y, x, dy, dx in np.ndindex(height, width, 2 * d + 1, 2 * d + 1):
        v, u = y + dy - d, x + dx - d
        if 0 <= v < height and 0 <= u < width:
            out[:, dy * (2 * d + 1) + dx, y, x] = (a[:, :, y, x] * b[:, :, v, u]).sum(1) / channels
    return out


def slow_warp(picture: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Pixel by pixel: bilinear inside, zero where a neighbour is missing. (C, H, W), (2, H, W)."""
    channels, height, width = picture.shape
    out = np.zeros((channels, height, width))
    for y, x in np.ndindex(height, width):
        u, v = x + flow[0, y, x], y + flow[1, y, x]
        if not (0 <= u <= width - 1 and 0 <= v <= height - 1):
            continue
        x0, y0 = min(int(u), width - 2), min(int(v), height - 2)
        p, q = u - x0, v - y0
        upper = (1 - p) * picture[:, y0, x0] + p * picture[:, y0, x0 + 1]
        lower = (1 - p) * picture[:, y0 + 1, x0] + p * picture[:, y0 + 1, x0 + 1]
        out[:, y, x] = (1 - q) * upper + q * lower
    return out


def parts() -> Iterator[Case]:
    for shape, d in (((2, 5, 4, 7), 4), ((1, 3, 9, 16), 2), ((1, 2, 3, 1), 1), ((2, 4, 1, 9), 3)):
        yield Case(
            f"cost volume {shape}, displacement {d}",
            lambda a, b, d=d: local_correlation(a, b, d),
            lambda a, b, d=d: torch.from_numpy(slow_costs(a.numpy(), b.numpy(), d)),
            (torch.randn(shape), torch.randn(shape)),
            "eq. (2), place by place in numpy",
        )
    yield Case(
        "local costs are a part of global ones",
        lambda a, b: local_correlation(a, b, 1)[:, 4],
        lambda a, b: torch.diagonal(global_correlation(a, b).flatten(3).flatten(1, 2), dim1=1, dim2=2).unflatten(1, (4, 6)) / 3,
        (torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)),
        "identity: displacement 0",
    )  # fmt: skip
    flow = 3 * torch.randn(2, 2, 7, 9)
    yield Case(
        "warping",
        lambda x, w: torch.mul(*backward_warp(x, w)),
        lambda x, w: torch.stack(
            [torch.from_numpy(slow_warp(a.numpy().astype(float), b.numpy().astype(float))) for a, b in zip(x, w, strict=True)]
        ),
        (torch.randn(2, 3, 7, 9), flow),
        "eq. (1), pixel by pixel in numpy",
    )  # fmt: skip


def losses() -> Iterator[Case]:
    flows = [torch.randn(2, 2, 16 // 2**i, 32 // 2**i) for i in range(3)]
    truth, valid = 20 * torch.randn(2, 2, 64, 128), torch.rand(2, 1, 64, 128) < 0.4
    valid[0, :, :4, :4] = False  # a cell of the finest level in which nothing is known

    def slow(robust: bool) -> float:
        total = 0.0
        for weight, flow, cell in zip((0.02, 0.08, 0.32), flows, (4, 8, 16), strict=True):
            for n, y, x in np.ndindex(2, *flow.shape[2:]):
                window = np.s_[n, :, y * cell : (y + 1) * cell, x * cell : (x + 1) * cell]
                known = valid[window][0].numpy()
                if known.any():
                    target = truth[window].numpy()[:, known].astype(float).mean(1) / 20
                    apart = np.abs(flow[n, :, y, x].numpy() - target)
                    total += weight * ((apart.sum() + 0.01) ** 0.4 if robust else np.sqrt((apart**2).sum()))
        return total / 2

    for robust in (False, True):
        yield Case(
            f"the loss{', robust' if robust else ''}",
            lambda *f, robust=robust: pyramid_loss(f, truth, valid, robust),
            lambda *f, robust=robust: slow(robust),
            tuple(flows),
            "eq. (4), cell by cell in numpy" if robust else "eq. (3), cell by cell in numpy",
        )
    yield Case(
        "a truth that is known everywhere is averaged",
        lambda t: downsampled(t, torch.ones(2, 1, 64, 128, dtype=torch.bool), (16, 32))[0],
        lambda t: F.avg_pool2d(t, 4),
        (truth,),
        "torch avg_pool2d, as ptlflow's multi-scale loss has it",
    )

    def measured(flow: Tensor, truth: Tensor) -> dict[str, float]:
        metrics = FlowMetrics()
        metrics.update(
            flow, truth, torch.tensor([[[True, True, True, False]]]), torch.tensor([[[False, True, False, False]]])
        )
        return metrics.compute()

    yield Case(
        "metrics by hand",
        measured,
        # errors 5, 3.5 and 0: the second is beyond 3 pixels, but not beyond 5% of a speed of 100; the fourth is unknown
        lambda a, b: {"epe": 8.5 / 3, "f1_all": 1 / 3, "epe_visible": 2.5, "epe_occluded": 3.5, "epe_slow": 2.5, "epe_fast": 3.5},
        (torch.tensor([[[3.0, 103.5, 1.0, 9.0]], [[4.0, 0.0, 2.0, 9.0]]]), torch.tensor([[[0.0, 100, 1, 0]], [[0.0, 0, 2, 0]]])),
        "computed by hand",
    )  # fmt: skip


# -- speed ---------------------------------------------------------------------------------------------------------------


def pairs() -> dict[str, Pair]:
    """The released network, against the plain version."""

    def sides(batch: int) -> tuple[Tensor, Tensor]:
        return torch.rand(batch, 3, 128, 192), torch.rand(batch, 3, 128, 192)

    return {
        "pwc_net": Pair(
            model.pwc_net,
            lambda: Plain(model.pwc_net()).eval(),
            sides,
            "plain (81 products, a map of ones)",
            train_batch=2,
        )
    }
