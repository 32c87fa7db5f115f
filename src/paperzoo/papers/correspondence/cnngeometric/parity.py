"""Parity of CNNGeo: stored answers of the released code, a plain network with literal numbers, maps by scipy and by hand, PCK by hand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.homography import from_corners, transform
from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.classification.spatial_transformer.technique import Affine, output_points
from paperzoo.papers.correspondence.cnngeometric import golden, model
from paperzoo.papers.correspondence.cnngeometric.technique import (
    MAPS,
    FourPoints,
    Spline,
    bent,
    grid_loss,
    training_pairs,
)
from paperzoo.tasks.geometric_matching import nearest_affine, read_places, to_pixels, to_unit
from paperzoo.tasks.matching_metrics import MatchingMetrics

RELEASED = "the released code (ignacio-rocco/cnngeometric_pytorch, 7e7cbc8)"


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    yield from released()
    yield from networks()
    yield from maps()
    yield from metrics()


# -- stored answers ------------------------------------------------------------------------------------------------------


def released() -> Iterator[Case]:
    from safetensors.torch import load_file

    answers = load_file(str(golden.FILE))

    def one_stage(kind: str) -> model.CNNGeometric:
        return golden.write_weights(model.cnngeo(kind)).eval()

    states = [one_stage(kind).state_dict() for kind in ("affine", "tps")]
    counts = [float(sum(p.numel() for p in one_stage(kind).parameters())) for kind in ("affine", "tps")]
    yield Case("parameters", lambda: torch.tensor(counts), lambda: answers["parameters"], against=RELEASED)
    both = model.cnngeo().eval()
    both.load_state_dict(
        model.combined(states[0], states[0] | {k: v for k, v in states[1].items() if "Regression" in k})
    )
    # the released evaluation runs each network with features of its own; the golden rule fills both alike

    @torch.no_grad()
    def whole(source: Tensor, target: Tensor) -> dict[str, Tensor]:
        thetas = both.estimate(source, target)
        carried = read_places(both.grid(thetas), answers["points"].mT)
        return {"affine": thetas[0], "tps": thetas[1], "carried": carried.mT}

    yield Case(
        "both stages at 240 pixels, and points that they carry",
        whole,
        lambda a, b: {"affine": answers["theta.affine"], "tps": answers["theta.tps"], "carried": answers["carried"]},
        golden.pictures(),
        RELEASED,
        atol=2e-4,
        note="points are read from the map at every pixel here; the released code puts them into the map",
    )
    regression = model.FeatureRegression(golden.SIDE, (7, 5), (128, 64), Affine.identity)
    golden.write_weights(regression).train()

    def training(here: Tensor, there: Tensor) -> dict[str, Tensor]:
        here, there = here.clone().requires_grad_(True), there.clone()
        regression.zero_grad()
        matches = model.correlation(here, there)
        theta = regression(matches)
        loss = grid_loss(Affine(), theta, golden.parameters("affine"))
        loss.backward()
        found = {"correlation": golden.thinned(matches), "trained.theta": theta, "trained.loss": loss}
        found |= {f"gradient.{n}": golden.thinned(regression.get_parameter(n).grad) for n in golden.GRADIENTS}
        return {k: v.detach() for k, v in found.items()} | {"gradient.features": golden.thinned(here.grad)}

    names = ["correlation", "trained.theta", "trained.loss", "gradient.features"]
    names += [f"gradient.{n}" for n in golden.GRADIENTS]
    yield Case(
        "matches, regression and loss in training, with gradients",
        training,
        lambda a, b: {name: answers[name] for name in names},
        golden.features(),
        RELEASED,
        rtol=1e-3,
        atol=1e-4,
        note="a batch of two in batch norm: gradients pass through differences of nearly equal numbers",
    )
    for kind, make in MAPS.items():
        truth = golden.parameters(kind)
        moved = truth + 0.2 * (golden.noise(tuple(truth.shape), 7.0) - 0.5)
        yield Case(
            f"the loss on the grid, {kind}",
            lambda a, b, make=make: grid_loss(make(), a, b),
            lambda a, b, kind=kind: answers[f"loss.{kind}"],
            (moved, truth),
            RELEASED,
            atol=2e-5,
            note="the released homography adds 0.00001 to what it divides by" if kind == "homography" else "",
        )
        yield Case(
            f"pairs bent by {kind}",
            lambda x, make=make, truth=truth: dict(zip(("source", "target"), _pair(x, make(), truth), strict=True)),
            lambda x, kind=kind: {"source": answers["pair.source"], "target": answers[f"pair.{kind}"]},
            (golden.photograph(),),
            RELEASED,
        )


def _pair(x: Tensor, transform: nn.Module, truth: Tensor) -> tuple[Tensor, Tensor]:
    source, targets = training_pairs(x, [transform], [truth], 24)
    return source, targets[0]


# -- networks ------------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """The two-stage network line by line: one picture after the other, matches by loops over the source, literal exponents. It has our parameters."""

    def __init__(self, ours: model.CNNGeometric) -> None:
        super().__init__()
        for name, child in ours.named_children():
            if name != "maps":
                self.add_module(name, child)
        self.size, self.centred = ours.image_size, ours.FeatureExtraction.centred
        self.stages = len(ours.maps)

    def features(self, x: Tensor) -> Tensor:
        x = self.FeatureExtraction.model(x)
        if self.centred:
            x = x - x.flatten(2).mean(2)[:, :, None, None]
        return x / (x.pow(2).sum(1, keepdim=True) + 1e-6).pow(0.5)

    def matches(self, a: Tensor, b: Tensor) -> Tensor:
        rows = [
            (a[:, :, row, column, None, None] * b).sum(1) for column in range(a.shape[3]) for row in range(a.shape[2])
        ]
        c = torch.stack(rows, 1)
        c = torch.where(c > 0, c, 0.0)
        return c / (c.pow(2).sum(1, keepdim=True) + 1e-6).pow(0.5)

    def affine_grid(self, theta: Tensor) -> Tensor:
        return F.affine_grid(theta.view(-1, 2, 3), [len(theta), 3, self.size, self.size], align_corners=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        if self.training:  # batch norm sees both pictures together
            here, there = self.features(torch.cat([source, target])).chunk(2)
        else:
            here, there = self.features(source), self.features(target)
        theta = self.FeatureRegression(self.matches(here, there))
        grid = self.affine_grid(theta)
        if self.stages == 1:
            return grid
        again = self.features(F.grid_sample(source, grid, align_corners=True))
        moves = self.FeatureRegression2(self.matches(again, there))
        bent = spline(moves, output_points(self.size, self.size, source)).unflatten(1, (self.size, self.size))
        linear = theta.view(-1, 2, 3)
        x = linear[:, 0, 0, None, None] * bent[..., 0] + linear[:, 0, 1, None, None] * bent[..., 1]
        y = linear[:, 1, 0, None, None] * bent[..., 0] + linear[:, 1, 1, None, None] * bent[..., 1]
        return torch.stack([x + linear[:, 0, 2, None, None], y + linear[:, 1, 2, None, None]], 3)


def spline(moves: Tensor, points: Tensor) -> Tensor:
    """The thin-plate spline by its linear system, solved anew for each map: moves (B, 18), points (N, 2) -> (B, N, 2)."""
    control = torch.tensor([[x, y] for x in (-1.0, 0, 1) for y in (-1.0, 0, 1)])

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        square = (a[:, None, 0] - b[None, :, 0]).pow(2) + (a[:, None, 1] - b[None, :, 1]).pow(2)
        return torch.where(square == 0, 0.0, square * torch.where(square == 0, 1.0, square).log())

    flat = torch.cat([torch.ones(9, 1), control], 1)
    system = torch.zeros(12, 12)
    system[:9, :9], system[:9, 9:], system[9:, :9] = kernel(control, control), flat, flat.T
    values = torch.cat([moves.view(-1, 2, 9).mT, torch.zeros(len(moves), 3, 2)], 1)
    weights = torch.linalg.solve(system.double(), values.double()).float()
    return torch.cat([kernel(points, control), torch.ones(len(points), 1), points], 1) @ weights


def networks() -> Iterator[Case]:
    for name, batch, train, options in (
        ("cnngeo_slim", 2, False, {}),
        ("cnngeo_slim", 3, True, {}),
        ("cnngeo_slim", 1, False, {"transform": "affine", "image_size": 80, "centred": False}),
        ("cnngeo", 1, False, {"backbone": "resnet18", "image_size": 176}),
    ):
        ours = getattr(model, name)(**options)
        size = ours.image_size
        source = F.interpolate(torch.randn(batch, 3, size // 8, size // 8), (size, size), mode="bilinear")
        against = "a plain version: loops over the source's places, the spline's system solved anew"
        pictures = source, source.roll((4, -3), (2, 3))
        plain = Plain(ours)
        yield Case(f"{name} {options or ''}, batch {batch}", ours.train(train), plain.train(train), pictures, against)
        if train:
            yield Case(
                f"{name}: gradients of the mean square place",
                lambda a, b, ours=ours: learned(ours, a, b),
                lambda a, b, plain=plain: learned(plain, a, b),
                pictures,
                against,
                rtol=1e-3,
                atol=1e-4,
            )


def learned(network: nn.Module, source: Tensor, target: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    network(source, target).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


# -- maps ----------------------------------------------------------------------------------------------------------------


def maps() -> Iterator[Case]:
    points = 2 * torch.rand(40, 2) - 1
    for kind, make in MAPS.items():
        yield Case(
            f"{kind}: its identity moves nothing",
            lambda p, make=make: make()(torch.tensor(make().identity)[None], p)[0],
            lambda p: p,
            (points,),
            "identity",
        )
    moves = torch.tensor(Spline().identity) + 0.3 * torch.randn(3, 18)

    def by_scipy(theta: Tensor, at: Tensor) -> Tensor:
        from scipy.interpolate import RBFInterpolator

        control = np.array([[x, y] for x in (-1.0, 0, 1) for y in (-1.0, 0, 1)])
        return torch.stack([
            torch.from_numpy(RBFInterpolator(control, t.view(2, 9).T.double().numpy(), kernel="thin_plate_spline", degree=1)(at.double().numpy()))
            for t in theta
        ])  # fmt: skip

    yield Case("spline", Spline(), by_scipy, (moves, points), "scipy RBFInterpolator, thin_plate_spline", atol=1e-4)
    corners = torch.tensor([[-1.0, -1], [-1, 1], [1, -1], [1, 1]])
    wanted = corners + 0.35 * (2 * torch.rand(4, 4, 2) - 1)
    yield Case(
        "homography in closed form",
        lambda w, p: FourPoints()(w.mT.flatten(1), p),
        lambda w, p: transform(from_corners(corners.expand_as(w), w), p.expand(len(w), -1, 2)),
        (wanted, points),
        "its linear system, solved",
        gradients=True,
    )
    yield Case(
        "pictures beyond their border",
        lambda x: bent(x, 1.9 * output_points(9, 11, x).expand(1, -1, 2).unflatten(1, (9, 11)), 0.8),
        by_padding,
        (torch.rand(1, 2, 8, 12),),
        "the mirror image put around, then read",
    )


def by_padding(x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    wide = torch.cat([x[..., : width // 2].flip(3), x, x[..., width - width // 2 :].flip(3)], 3)
    whole = torch.cat([wide[:, :, : height // 2].flip(2), wide, wide[:, :, height - height // 2 :].flip(2)], 2)
    grid = F.affine_grid(torch.tensor([[[1.0, 0, 0], [0, 1, 0]]]), [1, 1, 9, 11], align_corners=True)
    return F.grid_sample(whole, 0.5 * 0.8 * 1.9 * grid, align_corners=True)


# -- metrics -------------------------------------------------------------------------------------------------------------


def metrics() -> Iterator[Case]:
    def measured(*pairs: Tensor) -> dict[str, float]:
        found = MatchingMetrics(0.2)
        for away, length in zip(pairs, (10.0, 50.0), strict=True):
            found.update(away, torch.zeros_like(away), length)
        return found.compute()

    yield Case(
        "PCK by hand",
        measured,
        # distances 0.5, 1, 2, 5 of 10 and 5, 13 of 50: shares of the length 0.05, 0.1, 0.2, 0.5 and 0.1, 0.26
        lambda a, b: {"pck": (0.75 + 0.5) / 2, "pck_05": 0.125, "pck_10": 0.5, "pck_15": 0.5, "pck_points": 4 / 6,
                      "mean_error": (0.85 / 4 + 0.36 / 2) / 2},
        (torch.tensor([[0.5, 0.0], [0, -1], [2, 0], [3, 4]]), torch.tensor([[3.0, 4.0], [5, 12]])),
        "computed by hand",
    )  # fmt: skip
    points = 60 * torch.rand(1, 9, 2)
    linear = torch.tensor([[0.9, 0.2, 3.0], [-0.1, 1.1, -2.0]])

    def carried(at: Tensor) -> Tensor:
        y, x = torch.meshgrid(torch.arange(40.0), torch.arange(70.0), indexing="ij")
        places = torch.stack([x, y, torch.ones(40, 70)], 2) @ linear.T
        return to_pixels(read_places(to_unit(places, (48, 64))[None], to_unit(at, (40, 70))), (48, 64))

    yield Case(
        "points of a target of 70 x 40 pixels, in a source of 64 x 48",
        carried,
        lambda at: torch.cat([at, torch.ones(1, 9, 1)], 2) @ linear.T,
        (points * torch.tensor([1.0, 0.6]),),
        "the affine map itself",
    )
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    yield Case(
        "the nearest affine map of an affine map",
        lambda m: torch.tensor(nearest_affine(torch.stack([x, y, torch.ones(20, 30)], 2) @ m.T)).view(2, 3),
        lambda m: m,
        (linear,),
        "identity",
    )


# -- speed ---------------------------------------------------------------------------------------------------------------


def pairs() -> dict[str, Pair]:
    """The paper's network on VGG-16, against the plain version."""

    def sides(batch: int) -> tuple[Tensor, Tensor]:
        return torch.rand(batch, 3, 240, 240), torch.rand(batch, 3, 240, 240)

    return {
        "cnngeo": Pair(
            model.cnngeo,
            lambda: Plain(model.cnngeo()).eval(),
            sides,
            "plain (loops over the source's places)",
            train_batch=2,
        )
    }
