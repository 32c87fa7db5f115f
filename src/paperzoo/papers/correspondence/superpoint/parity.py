"""Parity of SuperPoint: the network and its points with transformers, homographies with scikit-image, labels, losses and suppression by loops."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks import homography as planes
from paperzoo.blocks.interest_points import describe, strongest, suppress
from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.correspondence.superpoint import model, technique
from paperzoo.tasks.point_matching_metrics import average_precision


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    yield from networks()
    yield from suppression()
    yield from geometry()
    yield from labels()
    yield from losses()


# -- the network ---------------------------------------------------------------------------------------------------------


def theirs() -> nn.Module:
    """The transformers library's model, without weights; it keeps every pixel's score."""
    from transformers import SuperPointConfig, SuperPointForKeypointDetection

    return SuperPointForKeypointDetection(SuperPointConfig(nms_radius=0)).eval()


class Theirs(nn.Module):
    """transformers' layers, called as far as ours go: everything before suppression."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.whole.encoder(x).last_hidden_state
        points, describer = self.whole.keypoint_decoder, self.whole.descriptor_decoder
        descriptors = describer.conv_descriptor_b(torch.relu(describer.conv_descriptor_a(maps)))
        logits = points.conv_score_b(torch.relu(points.conv_score_a(maps)))
        descriptors = descriptors / descriptors.norm(dim=1, keepdim=True)
        if self.training:
            return logits, descriptors
        probability = torch.softmax(logits, 1)[:, :64].permute(0, 2, 3, 1)
        batch, height, width, _ = probability.shape
        probability = probability.reshape(batch, height, width, 8, 8).permute(0, 1, 3, 2, 4)
        return probability.reshape(batch, 8 * height, 8 * width), descriptors


def networks() -> Iterator[Case]:
    import transformers

    against = f"transformers {transformers.__version__} SuperPointForKeypointDetection"
    reference, ours = theirs(), model.superpoint()
    for name, parameter in reference.named_parameters():
        if "score_b" in name and name.endswith("weight"):
            nn.init.normal_(parameter, std=0.05)  # else all pixels are about equally likely
    ours.load_state_dict(model.from_official(reference.state_dict()))
    wrapped = Theirs(reference)
    for size, batch in (((64, 96), 2), ((120, 160), 1)):
        yield Case(f"heat and descriptors {size}", ours.eval(), wrapped.eval(), (torch.rand(batch, 1, *size),), against)

    def gradients(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
        network.train().zero_grad()
        sum(output.square().mean() for output in network(x)).backward()
        inner = network.whole if isinstance(network, Theirs) else network
        found = {k: p.grad for k, p in inner.named_parameters()}
        return model.from_official(found) if inner is reference else found

    yield Case(
        "gradients of a training step",
        lambda x: gradients(ours, x),
        lambda x: gradients(wrapped, x),
        (torch.rand(2, 1, 48, 64),),
        against,
    )

    # The whole way to points. They read descriptors with a formula that is a little off away from the middle (their cells reach from 3.5 to 8 w - 1):
    # we are asked for the places that the formula means.
    reference.keypoint_decoder.nms_radius = 4
    picture = torch.rand(1, 1, 96, 128)

    def our_points(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heat, maps = ours.eval()(x)
        places, scores = strongest(suppress(heat, 4, rounds=3)[0], 10_000, 0.005)
        kept = (places >= 4).all(1)
        places, scores = places[kept], scores[kept]
        order = (1000 * places[:, 1] + places[:, 0]).argsort()  # equal scores come in any order
        places, scores = places[order], scores[order]
        limit = places.new_tensor([128.0, 96.0])
        meant = (places - 3.5) / (limit - 4.5) * (limit / 8 - 1) * 8 + 3.5
        return places, scores, describe(maps[0], meant, 8)

    def their_points(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            found = reference.eval()(x.expand(-1, 3, -1, -1))
        places = (found.keypoints[0] * found.keypoints.new_tensor([128.0, 96.0])).round()
        order = (1000 * places[:, 1] + places[:, 0]).argsort()
        return places[order], found.scores[0][order], found.descriptors[0][order]

    yield Case(
        "points, scores and descriptors",
        our_points,
        their_points,
        (picture,),
        against,
        atol=1e-4,
        note="their border is kept free on the left and above alone: the sizes are taken eightfold once too often",
    )


def suppression() -> Iterator[Case]:
    def slow(heat: np.ndarray, radius: int) -> np.ndarray:
        """The authors' rule: one pixel after the other, the highest first."""
        out, free = np.zeros_like(heat), heat > 0
        for place in np.argsort(-heat, axis=None):
            y, x = np.unravel_index(place, heat.shape)
            if free[y, x]:
                out[y, x] = heat[y, x]
                free[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1] = False
        return out

    for radius in (1, 4):
        yield Case(
            f"greedy suppression within {radius}",
            lambda h, r=radius: suppress(h, r),
            lambda h, r=radius: torch.stack([torch.from_numpy(slow(x.numpy(), r)) for x in h]),
            (torch.rand(2, 40, 56),),
            "one pixel after the other in numpy",
        )


# -- geometry ------------------------------------------------------------------------------------------------------------


def geometry() -> Iterator[Case]:
    import skimage
    from skimage import transform as reference

    against = f"scikit-image {skimage.__version__}"
    rng = np.random.default_rng(0)
    square = np.array([[0, 0], [60, 0], [60, 40], [0, 40.0]])
    shaken = square + rng.normal(0, 6, (5, 4, 2))

    def estimated(a: np.ndarray, b: np.ndarray) -> Tensor:
        kind = reference.ProjectiveTransform
        found = kind.from_estimate(a, b) if hasattr(kind, "from_estimate") else None
        if found is None:
            found = kind()
            found.estimate(a, b)
        return torch.from_numpy(found.params / found.params[2, 2])

    yield Case(
        "homographies from four corners",
        lambda a, b: planes.from_corners(a.expand(5, 4, 2), b),
        lambda a, b: torch.stack([estimated(a.numpy(), x.numpy()) for x in b]),
        (torch.from_numpy(square), torch.from_numpy(shaken)),
        f"{against} ProjectiveTransform",
    )
    many = rng.uniform(0, 100, (30, 2))
    matrix = np.array([[1.1, 0.1, 5], [-0.2, 0.9, 3], [1e-3, -5e-4, 1]])
    noisy = reference.ProjectiveTransform(matrix)(many) + rng.normal(0, 0.5, (30, 2))
    yield Case(
        "homographies from many points",
        lambda a, b: planes.fit(a, b),
        lambda a, b: estimated(a.numpy(), b.numpy()),
        (torch.from_numpy(many), torch.from_numpy(noisy)),
        f"{against} ProjectiveTransform (direct linear transform)",
        rtol=1e-3,
    )
    wild = noisy.copy()
    wild[::3] = rng.uniform(0, 100, (10, 2))
    good = np.setdiff1d(np.arange(30), np.arange(0, 30, 3))
    yield Case(
        "RANSAC finds the two thirds that agree",
        lambda a, b: planes.estimate(a, b, 3.0),
        lambda a, b: (planes.fit(a[good], b[good]), torch.tensor([i in good for i in range(30)])),
        (torch.from_numpy(many), torch.from_numpy(wild)),
        "the fit of the known ones",
    )
    picture = torch.rand(1, 1, 40, 60, dtype=torch.float64)
    moves = planes.random_homographies(3, (40, 60), planes.HomographyRange(), torch.Generator().manual_seed(0)).double()
    yield Case(
        "warped pictures",
        lambda x, h: torch.mul(*planes.warp(x.expand(3, -1, -1, -1), h, (40, 60)))[:, 0],
        lambda x, h: torch.stack([warped(x[0, 0].numpy(), m.numpy()) for m in h]),
        (picture, moves),
        f"{against} warp (bilinear)",
        atol=1e-6,
    )


def warped(picture: np.ndarray, matrix: np.ndarray) -> Tensor:
    """By scikit-image, zero wherever a neighbour would lie outside."""
    from skimage.transform import ProjectiveTransform, warp

    inverse = ProjectiveTransform(np.linalg.inv(matrix))
    value = warp(picture, inverse, order=1, mode="constant", cval=np.nan)
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]]
    at = inverse(np.stack([x.ravel(), y.ravel()], 1)).reshape(*picture.shape, 2)
    inside = (at >= 0).all(2) & (at <= [picture.shape[1] - 1, picture.shape[0] - 1]).all(2)
    return torch.from_numpy(np.where(inside, np.nan_to_num(value), 0.0))


# -- labels --------------------------------------------------------------------------------------------------------------


def labels() -> Iterator[Case]:
    points = torch.zeros(2, 24, 32, dtype=torch.bool)
    for b, y, x in ((0, 0, 0), (0, 7, 7), (0, 9, 3), (1, 23, 31), (1, 16, 8)):
        points[b, y, x] = True
    points[0, 7, 7] = False
    expected = torch.full((2, 3, 4), 64)
    expected[0, 0, 0], expected[0, 1, 0], expected[1, 2, 3], expected[1, 2, 1] = 0, 8 + 3, 63, 0
    yield Case("classes of cells", technique.cell_labels, lambda p: expected, (points,), "computed by hand")
    for cell in (8, 4):
        yield Case(
            f"cells of {cell} and pixels are one layout: the class of a pixel lights it",
            lambda p, c=cell: (
                model.heat(F.one_hot(technique.cell_labels(p, c), c * c + 1).permute(0, 3, 1, 2) * 50.0) > 0.5
            ),
            lambda p: p,
            (points,),
            "identity: eq. (2) after sec. 3.2",
        )

    def spots(x: Tensor) -> Tensor:  # any map from pictures to heat
        return F.avg_pool2d(x.square(), 3, 1, 1)[:, 0]

    picture, size = torch.rand(1, 40, 56), (40, 56)
    ranges = planes.HomographyRange(patch=0.8, perspective=0.2, zoom=0.2, outside=True)

    def slow(x: Tensor) -> Tensor:
        views = planes.random_homographies(5, size, ranges, torch.Generator().manual_seed(3))
        total, seen = torch.zeros(2, *size)
        for matrix in (torch.eye(3), *views):
            shown, inside = planes.warp(x[None], matrix[None], size)
            inside = 1 - F.max_pool2d(F.pad(1 - inside.float(), (3, 3, 3, 3)), 7, 1)  # three pixels less on each side
            heat = spots(shown)[:, None] * inside
            back = torch.linalg.inv(matrix)[None]
            total += planes.warp(heat, back, size)[0][0, 0]
            seen += planes.warp(inside, back, size)[0][0, 0]
        return total / seen.clamp(min=1e-3)

    yield Case(
        "homographic adaptation",
        lambda x: technique.homographic_adaptation(spots, x, 6, rng=torch.Generator().manual_seed(3), chunk=4),
        slow,
        (picture,),
        "eq. (10), one homography after the other",
        atol=1e-4,
    )


# -- losses --------------------------------------------------------------------------------------------------------------


def losses() -> Iterator[Case]:
    height, width = 3, 4
    views = planes.random_homographies(2, (24, 32), planes.HomographyRange(), torch.Generator().manual_seed(1))
    first, second = (F.normalize(torch.randn(2, 6, height, width), dim=1) for _ in range(2))
    valid = torch.rand(2, height, width) < 0.7

    def slow(a: Tensor, b: Tensor, masked: bool) -> float:
        total, count = 0.0, 0
        for n, y, x, v, u in np.ndindex(2, height, width, height, width):
            if masked and not bool(valid[n, v, u]):
                continue
            place = views[n].double() @ torch.tensor([8 * x + 3.5, 8 * y + 3.5, 1.0]).double()
            place = place[:2] / place[2]
            near = float((place - torch.tensor([8 * u + 3.5, 8 * v + 3.5])).norm()) <= 8
            alike = float(a[n, :, y, x].double() @ b[n, :, v, u].double())
            total += 250 * max(0.0, 1 - alike) if near else max(0.0, alike - 0.2)
            count += 1
        return total / count

    for masked in (False, True):
        yield Case(
            f"descriptor loss{', masked' if masked else ''}",
            lambda a, b, m=masked: technique.descriptor_loss(a, b, views, valid if m else None),
            lambda a, b, m=masked: slow(a, b, m),
            (first, second),
            "eq. (5) and (6), pair by pair",
        )
    logits, classes = torch.randn(2, 65, height, width), torch.randint(65, (2, height, width))

    def entropy(x: Tensor, empty: float) -> float:
        total = 0.0
        for n, v, u in np.ndindex(2, height, width):
            if bool(valid[n, v, u]):
                scores, kind = x[n, :, v, u].double().exp(), int(classes[n, v, u])
                total -= (empty if kind == 64 else 1.0) * float((scores[kind] / scores.sum()).log())
        return total / int(valid.sum())

    classes[:, 1] = 64
    for empty in (1.0, 0.2):
        yield Case(
            f"detector loss{'' if empty == 1 else ', empty cells count less'}",
            lambda x, e=empty: technique.detector_loss(x, classes, valid, e),
            lambda x, e=empty: entropy(x, e),
            (logits,),
            "eq. (2) and (3), cell by cell",
        )
    from sklearn.metrics import average_precision_score

    distance, right = torch.rand(50), torch.rand(50) < 0.4
    yield Case(
        "average precision",
        lambda d: average_precision(d, right, int(right.sum())),
        lambda d: float(average_precision_score(right.numpy(), -d.numpy())),
        (distance,),
        "scikit-learn average_precision_score",
    )


# -- speed ---------------------------------------------------------------------------------------------------------------


def pairs() -> dict[str, Pair]:
    return {
        "superpoint": Pair(
            model.superpoint,
            lambda: Theirs(theirs()),
            lambda batch: (torch.rand(batch, 1, 120, 160),),
            "transformers SuperPointForKeypointDetection, before suppression",
            train_batch=4,
        )
    }
