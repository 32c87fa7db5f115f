"""PatchCore against slow and obvious versions of its parts, and against libraries where they have one.

The authors' code cannot be installed beside current libraries; where it says more than the paper (the order in which patch
features are averaged), the slow versions here follow it step by step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.anomaly.patchcore import model


def cases() -> Iterator[Case]:
    import scipy
    import sklearn
    import torchvision
    from scipy.ndimage import gaussian_filter
    from sklearn.neighbors import NearestNeighbors

    torch.manual_seed(0)
    for channels, dim in ((6, 6), (5, 7), (4, 16), (3, 40)):
        yield Case(
            name=f"locally aware patches, {channels} channels to {dim}",
            ours=lambda x, dim=dim: model.aware_patches(x, dim),
            reference=lambda x, dim=dim: _aware_by_loops(x, dim),
            inputs=(torch.randn(2, channels, 5, 4),),
            against="loops over positions and runs",
            note="more outputs than values repeat them, as adaptive pooling does" if dim == 40 else "",
        )
    yield Case(
        name="two layers joined",
        ours=lambda a, b: model.join_layers([a, b], 10),
        reference=lambda a, b: _joined_by_loops([a, b], 10),
        inputs=(torch.randn(2, 6, 8, 6), torch.randn(2, 12, 4, 3)),
        against="the authors' order: patches resized before they are averaged",
    )

    generator = torch.Generator().manual_seed(1)
    points = torch.randn(150, 6, generator=generator)
    for projected in (128, 3):
        yield Case(
            name=f"greedy coreset, {'no projection' if projected == 128 else 'projected to 3'}",
            ours=lambda x, p=projected: model.greedy_coreset(x, 25, torch.Generator().manual_seed(2), p),
            reference=lambda x, p=projected: _coreset_by_loops(x, 25, torch.Generator().manual_seed(2), p),
            inputs=(points,),
            against="algorithm 1 with all distances anew in every round",
        )
    bank = torch.randn(300, 20, generator=generator)
    queries = torch.randn(40, 20, generator=generator)
    for k, chunk in ((1, 8192), (5, 64), (9, 7)):
        yield Case(
            name=f"{k} nearest in chunks of {chunk}",
            ours=lambda q, b, k=k, chunk=chunk: model.nearest_neighbours(q, b, k, chunk),
            reference=lambda q, b, k=k: tuple(
                torch.from_numpy(part)
                for part in NearestNeighbors(n_neighbors=k, algorithm="brute").fit(b).kneighbors(q)
            ),
            inputs=(queries, bank),
            against=f"scikit-learn {sklearn.__version__} NearestNeighbors",
        )
    patches = torch.randn(3, 16, 20, generator=generator)
    patches[2] *= 40  # exp of these distances overflows in fp32
    for b in (1, 3, 9):
        yield Case(
            name=f"image scores, b = {b}",
            ours=lambda x, y, b=b: _scores(x, y, b),
            reference=lambda x, y, b=b: _scores_by_eq7(x, y, b),
            inputs=(patches, bank),
            against="eq. 6 and 7, image by image in float64",
        )
    for size, sigma in (((24, 31), 4.0), ((9, 12), 2.0)):
        yield Case(
            name=f"Gaussian smoothing {size}",
            ours=lambda x, s=sigma: model.gaussian_smooth(x, s),
            reference=lambda x, s=sigma: torch.stack([torch.from_numpy(gaussian_filter(m.numpy(), s)) for m in x]),
            inputs=(torch.rand(2, *size),),
            against=f"scipy {scipy.__version__} gaussian_filter",
        )

    for name, reference in (
        ("patchcore_resnet18", torchvision.models.resnet18(weights=None)),
        ("patchcore_wide_resnet50_2", torchvision.models.wide_resnet50_2(weights=None)),
    ):
        net = getattr(model, name)(feature_dim=64).eval()
        net.load_backbone(reference.eval().state_dict())
        yield Case(
            name=f"{name}: layer2 and layer3",
            ours=net.maps,
            reference=_Hooked(reference),
            inputs=(torch.randn(1, 3, 64, 96),),
            against=f"torchvision {torchvision.__version__}",
        )
    again = copy.deepcopy(net)
    net.memory_bank = torch.randn(33, 64)
    again.load_state_dict(net.state_dict())
    yield Case(
        name="a bank of any length reloads",
        ours=again,
        reference=net,
        inputs=(torch.randn(2, 3, 64, 64),),
        against="the network that it was saved from",
    )


class _Hooked(nn.Module):
    """layer2 and layer3 of a torchvision ResNet."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        handles = [
            layer.register_forward_hook(lambda _, __, output: found.append(output))
            for layer in (self.network.layer2, self.network.layer3)
        ]
        self.network(x)
        for handle in handles:
            handle.remove()
        return found


def _runs(values: Tensor, count: int) -> Tensor:
    """The means of `count` runs of a vector; run i is [floor(i n / count), ceil((i + 1) n / count))."""
    n = len(values)
    return torch.stack([values[i * n // count : -(-(i + 1) * n // count)].mean() for i in range(count)])


def _neighbourhood(x: Tensor, i: int, j: int) -> Tensor:
    """The (C, 3, 3) values around a position of (C, H, W), zeros beyond the border."""
    out = torch.zeros(len(x), 3, 3, dtype=x.dtype)
    for di in range(3):
        for dj in range(3):
            if 0 <= i + di - 1 < x.shape[1] and 0 <= j + dj - 1 < x.shape[2]:
                out[:, di, dj] = x[:, i + di - 1, j + dj - 1]
    return out


def _aware_by_loops(x: Tensor, dim: int) -> Tensor:
    out = torch.zeros(len(x), dim, *x.shape[2:])
    for b in range(len(x)):
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                out[b, :, i, j] = _runs(_neighbourhood(x[b], i, j).flatten(), dim)
    return out


def _joined_by_loops(maps: list[Tensor], dim: int) -> Tensor:
    """As the authors' code: neighbourhoods, resized as fields, then averaged for each layer, then over both layers."""
    size = maps[0].shape[-2:]
    out = torch.zeros(len(maps[0]), dim, *size)
    fields = []
    for x in maps:
        rows = [
            [torch.stack([_neighbourhood(x[b], i, j) for b in range(len(x))]) for j in range(x.shape[3])]
            for i in range(x.shape[2])
        ]
        field = torch.stack([torch.stack(row, -1) for row in rows], -2).flatten(1, 3)  # (B, C * 9, H, W)
        fields.append(nn.functional.interpolate(field, size=size, mode="bilinear", align_corners=False))
    for b in range(len(out)):
        for i in range(size[0]):
            for j in range(size[1]):
                out[b, :, i, j] = _runs(torch.cat([_runs(f[b, :, i, j], dim) for f in fields]), dim)
    return out


def _coreset_by_loops(x: Tensor, count: int, generator: torch.Generator, projected: int) -> Tensor:
    if projected < x.shape[1]:
        x = x @ (torch.randn(x.shape[1], projected, generator=generator) / projected**0.5)
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    while len(chosen) < count:
        gaps = [min(float((x[i] - x[j]).double().norm()) for j in chosen) for i in range(len(x))]
        chosen.append(max(range(len(x)), key=gaps.__getitem__))
    return torch.tensor(chosen)


def _scores(patches: Tensor, bank: Tensor, b: int) -> Tensor:
    distances, rows = model.nearest_neighbours(patches.flatten(0, 1), bank)
    return model.image_scores(distances.view(patches.shape[:2]), rows.view(patches.shape[:2]), patches, bank, b)


def _scores_by_eq7(patches: Tensor, bank: Tensor, b: int) -> Tensor:
    patches, bank, scores = patches.double(), bank.double(), []
    for image in patches:
        gaps = torch.tensor([[float((p - m).norm()) for m in bank] for p in image], dtype=torch.float64)
        nearest, rows = gaps.min(1)
        worst = int(nearest.argmax())
        score, star = nearest[worst], bank[rows[worst]]
        if b > 1:
            around = (bank - star).norm(dim=1).argsort()[:b]
            score = (1 - score.exp() / (image[worst] - bank[around]).norm(dim=1).exp().sum()) * score
        scores.append(score)
    return torch.stack(scores)
