"""Parity of the simple baseline: with pytorchcv for the networks, with loops over joints and pixels for what surrounds them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from paperzoo.blocks.heatmaps import flip_back, gaussian_heatmaps, maxima, quarter_offset, taylor_offset
from paperzoo.data.skeletons import COCO
from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.pose.simple_baseline_pose import model, technique
from paperzoo.tasks.pose_crops import apply, centre_and_scale, crop, crop_matrix, inverse
from paperzoo.tasks.pose_metrics import oks_nms

LOOPS = "the released code's steps as loops"


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    yield from networks()
    yield from targets_and_decoding()
    yield from crops()
    yield from tracking()


# -- networks ------------------------------------------------------------------------------------------------------------


def networks() -> Iterator[Case]:
    import pytorchcv
    from pytorchcv.models import simplepose_coco

    version = f"pytorchcv {pytorchcv.__version__}" if hasattr(pytorchcv, "__version__") else "pytorchcv"
    for depth, size, batch, train in ((50, (256, 192), 1, False), (50, (64, 32), 3, True), (101, (64, 64), 2, False)):
        ours = getattr(model, f"pose_resnet{depth}")(num_keypoints=17)
        spread(ours)
        name = f"simplepose_resnet{depth}b_coco"
        reference = getattr(simplepose_coco, name)(return_heatmap=True)
        same_order = zip(reference.state_dict(), ours.state_dict().values(), strict=True)
        reference.load_state_dict(dict(same_order))
        x = torch.randn(batch, 3, *size)
        if train:  # double precision: gradients through 50 batch norms of a small batch carry rounding otherwise
            ours, reference, x = ours.double(), reference.double(), x.double()
        yield Case(
            f"pose_resnet{depth}, {'training' if train else 'eval'}, {batch} x {size}",
            ours.train(train),
            Named(reference.train(train), ours),
            (x,),
            f"{version} {name}",
            gradients=train,
            note="in double precision" if train else "",
        )
        del ours, reference
    plain, general = (
        model.pose_resnet50(num_keypoints=5).eval(),
        model.simple_baseline("resnet50", num_keypoints=5).eval(),
    )
    spread(plain)
    body = {f"backbone.body.{k}": v for k, v in plain.state_dict().items()}
    head = {k: v for k, v in plain.state_dict().items() if k.startswith(("deconv", "final"))}
    general.load_state_dict({k: v for k, v in (body | head).items() if k in general.state_dict()})
    yield Case(
        "simple_baseline on resnet50 is pose_resnet50",
        general,
        plain,
        (torch.randn(2, 3, 64, 64),),
        "the fixed network",
    )


class Named(nn.Module):
    """A network whose parameters carry the names of another's, in the same order, so that gradients can be compared."""

    def __init__(self, network: nn.Module, like: nn.Module) -> None:
        super().__init__()
        self.network, self.names = network, [name for name, _ in like.named_parameters()]

    def named_parameters(self, *args, **kwargs):
        return zip(self.names, self.network.parameters(), strict=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def spread(network: nn.Module) -> None:
    """Weights for which small errors show: the head's start at 0.001, statistics at 0 and 1."""
    for layer in network.modules():
        if isinstance(layer, nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        elif isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.8, 1.2)
    nn.init.normal_(network.final_layer.weight, std=0.05)


# -- targets, loss, decoding -----------------------------------------------------------------------------------------------


def targets_and_decoding() -> Iterator[Case]:
    points = torch.rand(4, 17, 2) * torch.tensor([64.0, 80.0]) - 8
    weight = (torch.rand(4, 17) < 0.8).float()
    for sigma in (2, 3):
        yield Case(
            f"targets of deviation {sigma}",
            lambda p, w, s=sigma: gaussian_heatmaps(p, w, (64, 48), float(s)),
            lambda p, w, s=sigma: slow_targets(p, w, (64, 48), s),
            (points, weight),
            LOOPS,
        )
    maps = torch.randn(3, 17, 16, 12)
    maps[0, :2] = -maps[0, :2].abs()  # nothing above 0
    maps[0, 2, 0, 3], maps[0, 3, 15, 11], maps[0, 4, 1, 1], maps[0, 5, 14, 10], maps[0, 6, 2, 2] = (9.0,) * 5
    yield Case(
        "maxima with a quarter offset",
        lambda m: quarter_offset(m, maxima(m)[0]),
        slow_maxima,
        (maps,),
        LOOPS,
    )
    yield Case("mirrored maps, shifted", lambda m: flip_back(m, COCO.flip), slow_flip, (maps,), LOOPS)

    real = torch.rand(2, 6, 2) * torch.tensor([30.0, 40.0]) + 8
    gaussians, _ = gaussian_heatmaps(real, torch.ones(2, 6), (64, 48), 2.0, rounded=False)
    yield Case(
        "the Taylor offset finds the middle of an unbiased Gaussian",
        lambda g: taylor_offset(g, maxima(g)[0]),
        lambda g: real,
        (gaussians,),
        "the place it was made from",
        rtol=0.0,
        atol=0.02,
        note="the Gaussian is cut off, blurred and differentiated by finite differences",
    )
    output = torch.randn(2, 17, 8, 6, requires_grad=True)
    batch = {"images": torch.zeros(2, 3, 32, 24), "keypoints": torch.rand(2, 17, 2) * 24, "weight": weight[:2]}
    yield Case(
        "loss",
        lambda o: recipe_loss(o, batch),
        lambda o: slow_loss(o, batch),
        (output.detach(),),
        LOOPS,
        gradients=True,
    )


def recipe_loss(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    from types import SimpleNamespace

    from paperzoo.tasks.pose import PoseRecipe

    config = SimpleNamespace(sigma=2.0, rounded_targets=True, weighted=True)
    recipe = SimpleNamespace(model=SimpleNamespace(), stride=4, config=config)
    recipe.targets = lambda b: PoseRecipe.targets(recipe, b)
    return PoseRecipe.losses(recipe, output, batch)["heatmap"]


def slow_loss(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    maps, weight = slow_targets(batch["keypoints"] / 4, batch["weight"], (8, 6), 2)
    loss, criterion = torch.zeros(()), nn.MSELoss()
    for k in range(output.shape[1]):
        found, true, w = output[:, k].flatten(1), maps[:, k].flatten(1), weight[:, k, None]
        loss = loss + 0.5 * criterion(found * w, true * w)
    return loss / output.shape[1]


def slow_targets(points: Tensor, weight: Tensor, size: tuple[int, int], sigma: int) -> tuple[Tensor, Tensor]:
    height, width = size
    maps, weight = torch.zeros(*points.shape[:2], height, width), weight.clone()
    for b in range(points.shape[0]):
        for k in range(points.shape[1]):
            mx, my = int(float(points[b, k, 0]) + 0.5), int(float(points[b, k, 1]) + 0.5)
            left, top, right, bottom = mx - 3 * sigma, my - 3 * sigma, mx + 3 * sigma + 1, my + 3 * sigma + 1
            if left >= width or top >= height or right < 0 or bottom < 0:
                weight[b, k] = 0
                continue
            if weight[b, k] > 0.5:
                for y in range(max(top, 0), min(bottom, height)):
                    for x in range(max(left, 0), min(right, width)):
                        maps[b, k, y, x] = math.exp(-((x - mx) ** 2 + (y - my) ** 2) / (2 * sigma**2))
    return maps, weight


def slow_maxima(maps: Tensor) -> Tensor:
    height, width = maps.shape[-2:]
    found = torch.zeros(*maps.shape[:2], 2)
    for b, sample in enumerate(maps.tolist()):
        for k, rows in enumerate(sample):
            value, y, x = max((v, -y, -x) for y, row in enumerate(rows) for x, v in enumerate(row))
            x, y = (-x, -y) if value > 0 else (0, 0)
            place = [float(x), float(y)]
            if 1 < x < width - 1 and 1 < y < height - 1:
                place[0] += 0.25 * np.sign(rows[y][x + 1] - rows[y][x - 1])
                place[1] += 0.25 * np.sign(rows[y + 1][x] - rows[y - 1][x])
            found[b, k] = torch.tensor(place)
    return found


def slow_flip(maps: Tensor) -> Tensor:
    pairs = [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16)]
    maps = maps.flip(3)
    for a, b in pairs:
        kept = maps[:, a].clone()
        maps[:, a], maps[:, b] = maps[:, b], kept
    moved = maps.clone()
    moved[:, :, :, 1:] = maps[:, :, :, :-1]
    return moved


# -- crops -----------------------------------------------------------------------------------------------------------------


def crops() -> Iterator[Case]:
    box = torch.tensor([[10.0, 20, 50, 44], [5, 3, 20, 60]])
    yield Case(
        "boxes to centres and scales",
        lambda b: centre_and_scale(b, (256, 192)),
        lambda b: (torch.tensor([[29.5, 31.5], [12, 31]]), torch.tensor([[0.25, 1 / 3], [57 * 0.75 / 160, 57 / 160]])),
        (box,),
        "computed by hand",
    )
    centre, scale, degrees = torch.tensor([[20.0, 17.0]]), torch.tensor([[0.15, 0.2]]), torch.tensor([25.0])
    image = torch.rand(3, 37, 43)
    matrix = crop_matrix(centre, scale, degrees, (16, 12))
    points = torch.rand(1, 5, 2) * 40
    yield Case(
        "the affine map from three points",
        lambda p: apply(inverse(matrix), p),
        lambda p: torch.from_numpy(np.stack([slow_map(q, centre[0], 0.15, 25.0) for q in p[0].numpy()]))[None],
        (points,),
        "the released code's three points, solved",
    )
    yield Case(
        "a turned crop", lambda x: crop(x, matrix, (16, 12))[0], lambda x: slow_crop(x, matrix[0]), (image,), LOOPS
    )


def three_points(centre: Tensor, scale: float, degrees: float) -> np.ndarray:
    """(2, 3): the map from the image to a crop of 12 by 16 pixels, from the middle, the point above it and a third one."""
    turn, width = math.radians(degrees), scale * 200
    source = [centre.numpy(), centre.numpy() + np.array([width * 0.5 * math.sin(turn), -width * 0.5 * math.cos(turn)])]
    target = [np.array([6.0, 8.0]), np.array([6.0, 8.0 - 6.0])]
    for points in (source, target):
        a, b = points
        points.append(b + np.array([-(a - b)[1], (a - b)[0]]))
    left = np.concatenate([np.stack(source), np.ones((3, 1))], 1)
    return np.linalg.solve(left, np.stack(target)).T


def slow_map(point: np.ndarray, centre: Tensor, scale: float, degrees: float) -> np.ndarray:
    return (three_points(centre, scale, degrees) @ np.array([*point, 1.0])).astype(np.float32)


def slow_crop(image: Tensor, matrix: Tensor) -> Tensor:
    height, width = image.shape[1:]
    out = torch.zeros(3, 16, 12)
    for v in range(16):
        for u in range(12):
            x, y = (matrix[:, :2] @ torch.tensor([float(u), float(v)]) + matrix[:, 2]).tolist()
            for j in (math.floor(y), math.floor(y) + 1):
                for i in (math.floor(x), math.floor(x) + 1):
                    if 0 <= i < width and 0 <= j < height:
                        out[:, v, u] += image[:, j, i] * (1 - abs(x - i)) * (1 - abs(y - j))
    return out


# -- similarity and tracking -----------------------------------------------------------------------------------------------


def tracking() -> Iterator[Case]:
    poses = torch.rand(4, 17, 2) * 60
    poses = torch.cat([poses, poses + torch.randn(4, 17, 2), poses + 3 * torch.randn(4, 17, 2)])
    scores, area = torch.rand(12), 2000 + 2000 * torch.rand(12)
    yield Case(
        "suppression of alike poses",
        lambda p, s, a: torch.tensor(oks_nms(p, s, a, COCO.sigmas, 0.9)),
        slow_nms,
        (poses, scores, area),
        LOOPS,
    )
    flow = torch.randn(2, 9, 13)
    yield Case(
        "joints carried by the flow",
        technique.propagate,
        slow_flow,
        (torch.rand(3, 17, 2) * torch.tensor([11.9, 7.9]), flow),
        "bilinear interpolation in loops",
    )
    yield Case("who is who, with a person hidden for a frame", walk, slow_walk, (), "algorithm 1 in loops over pairs")


def slow_nms(poses: Tensor, scores: Tensor, area: Tensor) -> Tensor:
    order, kept = sorted(range(len(scores)), key=lambda i: -float(scores[i])), []
    while order:
        best = order.pop(0)
        kept.append(best)
        order = [i for i in order if slow_oks(poses[best], poses[i], float(area[best] + area[i]) / 2) <= 0.9]
    return torch.tensor(kept)


def slow_oks(a: Tensor, b: Tensor, area: float, counted: list[bool] | None = None) -> float:
    total, count = 0.0, 0
    for k, sigma in enumerate(COCO.sigmas):
        if counted is None or counted[k]:
            square = float((a[k].double() - b[k].double()).square().sum())
            total, count = total + math.exp(-square / (2 * sigma) ** 2 / area / 2), count + 1
    return total / count


def slow_flow(points: Tensor, flow: Tensor) -> Tensor:
    moved = points.clone()
    for n in range(points.shape[0]):
        for k in range(points.shape[1]):
            x, y = points[n, k].tolist()
            i, j = math.floor(x), math.floor(y)
            for dy in (0, 1):
                for dx in (0, 1):
                    share = (1 - abs(x - i - dx)) * (1 - abs(y - j - dy))
                    moved[n, k] += share * flow[:, min(j + dy, 8), min(i + dx, 12)]
    return moved


def sequence() -> list[tuple[Tensor, Tensor]]:
    """Five frames of three people who drift by a constant flow; the second one is hidden in the third frame."""
    rng = torch.Generator().manual_seed(3)
    start = torch.rand(3, 17, 2, generator=rng) * 40 + torch.tensor([[[0.0, 0.0]], [[60.0, 0.0]], [[0.0, 60.0]]])
    frames = []
    for t in range(5):
        poses = start + t * torch.tensor([6.0, 3.0]) + torch.randn(3, 17, 2, generator=rng)
        order = torch.randperm(3, generator=rng)
        frames.append((poses[order[order != 1]] if t == 2 else poses[order], order))
    return frames


def walk() -> list[list[int]]:
    flow = torch.tensor([6.0, 3.0])[:, None, None].expand(2, 128, 128)
    tracker, found = technique.FlowTracker(COCO.sigmas, length=2), []
    for t, (poses, _) in enumerate(sequence()):
        tracker.boxes(flow if t else None)
        found.append(tracker.update(poses, torch.ones(poses.shape[:2]), torch.full((len(poses),), 1600.0)))
    return found


def slow_walk() -> list[list[int]]:
    memory: list[tuple[Tensor, list[int]]] = []
    found, count = [], 0
    for poses, _ in sequence():
        memory = [(p + torch.tensor([6.0, 3.0]), ids) for p, ids in memory]
        mine: dict[int, int] = {}
        for there, ids in reversed(memory):
            pairs = [(slow_oks(there[m], poses[n], 1600.0), m, n) for m in range(len(there)) for n in range(len(poses))]
            for similarity, m, n in sorted(pairs, reverse=True):
                if similarity > 0.2 and n not in mine and ids[m] not in mine.values():
                    mine[n] = ids[m]
        for n in range(len(poses)):
            if n not in mine:
                mine[n], count = count, count + 1
        found.append([mine[n] for n in range(len(poses))])
        memory = [*memory, (poses, found[-1])][-2:]
    return found


def pairs() -> dict[str, Pair]:
    from pytorchcv.models.simplepose_coco import simplepose_resnet50b_coco

    return {
        "pose_resnet50": Pair(
            lambda: model.pose_resnet50(num_keypoints=17),
            lambda: simplepose_resnet50b_coco(return_heatmap=True),
            lambda batch: (torch.randn(batch, 3, 256, 192),),
            "pytorchcv simplepose_resnet50b_coco",
        )
    }
