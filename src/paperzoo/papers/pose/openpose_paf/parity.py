"""Parity of OpenPose: with a public conversion (stored answers) for network and assembly, with loops for targets and scores."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from paperzoo.data.skeletons import CROWDPOSE, OPENPOSE
from paperzoo.data.stick_figures import stick_figures
from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.pose.openpose_paf import golden, model, technique

CONVERSION = "controlnet-aux 0.0.10 open_pose"


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    yield from stored()
    yield from networks()
    yield from targets()
    yield from people()


# -- the public conversion -----------------------------------------------------------------------------------------------------


def stored() -> Iterator[Case]:
    from safetensors.torch import load_file

    answers = load_file(golden.FILE)
    network = golden.write_weights(model.openpose_coco18())
    saved = {
        name.split(".", 1)[1]: value for name, value in network.state_dict().items()
    }  # as body_pose_model.pth has them

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        again = model.openpose_coco18().eval()
        again.load_state_dict(model.from_official(saved))
        with torch.no_grad():
            fields, maps = again(x)
        return fields, maps.clamp(min=0)

    yield Case(
        "the network, from the public names",
        ours,
        lambda x: (answers["fields"], answers["maps"]),
        (golden.picture(),),
        f"{CONVERSION}: bodypose_model",
        note="the conversion ends its last confidence branch with a ReLU, which the authors' network does not have",
    )
    for count in golden.CROWDS:
        yield Case(
            f"{count} people, peaks",
            lambda n=count: found(n)[0],
            lambda n=count: answers[f"candidates {n}"][:, :3],
            (),
            f"{CONVERSION}: Body",
            note="float64",
        )
        yield Case(
            f"{count} people, assembled",
            lambda n=count: found(n)[1:],
            lambda n=count: expected(answers[f"candidates {n}"], answers[f"people {n}"]),
            (),
            f"{CONVERSION}: Body",
        )


def found(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Candidates, keypoints, scores and counts of a crowd."""
    fields, maps = golden.crowd(count)
    parts = technique.candidates(maps[None, :-1], 0.1, 3.0)[0]
    return torch.cat(parts), *technique.assemble(parts, fields, OPENPOSE.limbs, technique.COCO_ORDER)


def expected(candidates: Tensor, subset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The conversion's rows of candidates as keypoints (N, 18, 3), scores and counts."""
    points = torch.zeros(len(subset), 18, 3)
    for n, row in enumerate(subset[:, :18].long().tolist()):
        for k, index in enumerate(row):
            if index >= 0:
                points[n, k] = candidates[index, :3]
    return points, subset[:, 18].float(), subset[:, 19]


# -- the network ---------------------------------------------------------------------------------------------------------------


def plain(state: dict[str, Tensor], x: Tensor, stages: int) -> tuple[Tensor, Tensor]:
    """All stages from a state_dict, layer by layer."""
    layer = lambda x, name: F.conv2d(  # noqa: E731
        x, state[f"{name}.weight"], state[f"{name}.bias"], padding=state[f"{name}.weight"].shape[-1] // 2
    )
    x = torch.stack([x[:, 2], x[:, 1], x[:, 0]], 1)
    for block, depth in ((1, 2), (2, 2), (3, 4), (4, 2)):
        for number in range(1, depth + 1):
            x = layer(x, f"model0.conv{block}_{number}").relu()
        x = F.max_pool2d(x, 2) if block < 4 else x
    features = layer(layer(x, "model0.conv4_3_CPM").relu(), "model0.conv4_4_CPM").relu()
    fields, maps, x = [], [], features
    for stage in range(1, stages + 1):
        for branch, kept in ((1, fields), (2, maps)):
            y = x
            names = [f"conv5_{i}_CPM_L{branch}" for i in range(1, 6)] if stage == 1 else []
            names = names or [f"Mconv{i}_stage{stage}_L{branch}" for i in range(1, 8)]
            for i, name in enumerate(names):
                y = layer(y, f"model{stage}_{branch}.{name}")
                y = y.relu() if i < len(names) - 1 else y
            kept.append(y)
        x = torch.cat([fields[-1], maps[-1], features], 1)
    return torch.stack(fields, 1), torch.stack(maps, 1)


def networks() -> Iterator[Case]:
    for batch, size, stages, train in ((2, (32, 48), 2, True), (1, (40, 32), 6, False)):
        network = model.OpenPose(stages=stages).train(train)
        state = dict(network.named_parameters())
        yield Case(
            f"{stages} stages, {'all of them' if train else 'the last'}, {batch} x {size}",
            network,
            Plain(state, stages, train),
            (torch.randn(batch, 3, *size),),
            "figure 3 layer by layer",
            gradients=train,
        )


class Plain(torch.nn.Module):
    """`plain` with the same parameters, under their names."""

    def __init__(self, state: dict[str, Tensor], stages: int, every: bool) -> None:
        super().__init__()
        self.state, self.stages, self.every = state, stages, every

    def named_parameters(self, *args, **kwargs):
        return iter(self.state.items())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outputs = plain(self.state, x, self.stages)
        return outputs if self.every else tuple(y[:, -1] for y in outputs)


# -- targets and loss ------------------------------------------------------------------------------------------------------------


def targets() -> Iterator[Case]:
    points = torch.rand(2, 3, 4, 2) * 64
    weight = (torch.rand(2, 3, 4) < 0.8).float()
    limbs = [(0, 1), (1, 2), (0, 3)]
    yield Case(
        "confidence maps",
        lambda p, w: technique.confidence_maps(p, w, (8, 10), 8, 7.0),
        slow_maps,
        (points, weight),
        "eq. 6 and 7 in loops",
    )
    yield Case(
        "affinity fields",
        lambda p, w: technique.affinity_fields(p, w, limbs, (8, 10), 8, 1.0),
        lambda p, w: slow_fields(p, w, limbs),
        (points, weight),
        "eq. 8 to 10 in loops",
    )
    mask = torch.rand(2, 8, 10) < 0.7
    yield Case(
        "masked loss",
        lambda f: technique.masked_loss(f, torch.ones(2, 4, 8, 10), mask),
        lambda f: sum(
            0.5 * (f[b, t, c][mask[b]] - 1).square().sum() / 2 for b in range(2) for t in range(3) for c in range(4)
        ),
        (torch.randn(2, 3, 4, 8, 10),),
        "eq. 5 in loops",
        gradients=True,
    )


def slow_maps(points: Tensor, weight: Tensor) -> Tensor:
    maps = torch.zeros(2, 5, 8, 10)
    for b in range(2):
        for y in range(8):
            for x in range(10):
                for k in range(4):
                    for p in range(3):
                        if weight[b, p, k] > 0:
                            square = (8 * x + 3.5 - float(points[b, p, k, 0])) ** 2 + (
                                8 * y + 3.5 - float(points[b, p, k, 1])
                            ) ** 2
                            maps[b, k, y, x] = max(float(maps[b, k, y, x]), math.exp(-square / 98))
                maps[b, 4, y, x] = 1 - maps[b, :4, y, x].max()
    return maps


def slow_fields(points: Tensor, weight: Tensor, limbs: list[tuple[int, int]]) -> Tensor:
    fields = torch.zeros(2, 6, 8, 10)
    for b in range(2):
        for c, (i, j) in enumerate(limbs):
            for y in range(8):
                for x in range(10):
                    total, count = torch.zeros(2), 0
                    for p in range(3):
                        if weight[b, p, i] > 0 and weight[b, p, j] > 0:
                            start, along = points[b, p, i], points[b, p, j] - points[b, p, i]
                            unit = along / along.norm()
                            to = torch.tensor([8 * x + 3.5, 8 * y + 3.5]) - start
                            ahead, aside = float(unit @ to), float(unit[1] * to[0] - unit[0] * to[1])
                            if -8 <= ahead <= float(along.norm()) + 8 and abs(aside) <= 8:
                                total, count = total + unit, count + 1
                    if count:
                        fields[b, 2 * c : 2 * c + 2, y, x] = total / count
    return fields


# -- people ------------------------------------------------------------------------------------------------------------------------


def people() -> Iterator[Case]:
    field = torch.randn(2, 20, 30)
    first, second = (torch.rand(n, 2) * torch.tensor([29.0, 19.0]) for n in (4, 5))
    yield Case(
        "line integrals",
        lambda f, a, b: technique.line_integrals(f, a.round(), b.round())[0].mean(2),
        lambda f, a, b: slow_integrals(f, a.round(), b.round()),
        (field, first, second),
        "eq. 11 in loops over pairs and samples",
    )
    yield Case(
        "limbs that close a circle",
        lambda: torch.tensor(sorted(technique.tree_first(OPENPOSE.limbs, technique.COCO_ORDER)[1])),
        lambda: torch.tensor([9, 13]),
        (),
        "the two between shoulder and ear, by hand",
    )
    for s, scene in enumerate(stick_figures(6, size=128, max_people=4, scale=(0.4, 0.6))[2:5]):
        there = (scene["visible"] > 0).any(1)
        points, weight = scene["keypoints"][there][None], (scene["visible"][there] > 0).float()[None]
        maps = technique.confidence_maps(points, weight, (128, 128), 1, 2.5)
        fields = technique.affinity_fields(points, weight, CROWDPOSE.limbs, (128, 128), 1, 2.0)[0]
        parts = technique.candidates(maps[:, :-1], 0.1, 0.0)[0]
        yield Case(
            f"a crowd of {int(there.sum())} drawn figures ({s})",
            lambda p=parts, f=fields: technique.assemble(p, f, CROWDPOSE.limbs)[:2],
            lambda p=parts, f=fields: slow_assembly(p, f),
            (),
            "the released code's rules over lists of pairs",
        )


def slow_integral(field: Tensor, a: list[float], b: list[float]) -> list[float]:
    length = max(math.dist(a, b), 1e-3)
    ux, uy = (b[0] - a[0]) / length, (b[1] - a[1]) / length
    values = []
    for i in range(10):
        x, y = (round(a[k] + (b[k] - a[k]) * i / 9) for k in (0, 1))
        values.append(ux * float(field[0, y, x]) + uy * float(field[1, y, x]))
    return values


def slow_integrals(field: Tensor, first: Tensor, second: Tensor) -> Tensor:
    rows = [[sum(slow_integral(field, a, b)) / 10 for b in second.tolist()] for a in first.tolist()]
    return torch.tensor(rows)


def slow_assembly(parts: list[Tensor], fields: Tensor) -> tuple[Tensor, Tensor]:
    """People as dicts from keypoint to candidate, limb after limb."""
    crowd: list[dict] = []
    for c, (i, j) in enumerate(CROWDPOSE.limbs):
        pairs = []
        for m, a in enumerate(parts[i].tolist()):
            for n, b in enumerate(parts[j].tolist()):
                values = slow_integral(fields[2 * c : 2 * c + 2], a[:2], b[:2])
                score = sum(values) / 10 + min(0.5 * 128 / max(math.dist(a[:2], b[:2]), 1e-3) - 1, 0)
                if sum(v > 0.05 for v in values) > 8 and score > 0:
                    pairs.append((score, m, n))
        pairs.sort(key=lambda pair: -pair[0])
        used: tuple[set, set] = (set(), set())
        for score, m, n in pairs:
            if m in used[0] or n in used[1]:
                continue
            used[0].add(m)
            used[1].add(n)
            holders = [p for p in crowd if p["has"].get(i) == m or p["has"].get(j) == n]
            value = float(parts[j][n, 2])
            if not holders:
                crowd.append({"has": {i: m, j: n}, "score": float(parts[i][m, 2]) + value + score, "count": 2})
            elif len(holders) > 1 and not holders[0]["has"].keys() & holders[1]["has"].keys():
                one, two = holders[:2]
                one["has"] |= two["has"]
                one["score"] += two["score"] + score
                one["count"] += two["count"]
                crowd.remove(two)
            elif len(holders) > 1 or holders[0]["has"].get(j) != n:
                holders[0]["has"][j] = n
                holders[0]["score"] += value + score
                holders[0]["count"] += 1
    crowd = [p for p in crowd if p["count"] >= 4 and p["score"] / p["count"] >= 0.4]
    points = torch.zeros(len(crowd), 14, 3)
    for row, person in enumerate(crowd):
        for k, index in person["has"].items():
            points[row, k] = parts[k][index]
    return points, torch.tensor([p["score"] for p in crowd])


def pairs() -> dict[str, Pair]:
    def reference() -> torch.nn.Module:
        network = model.openpose_coco18()
        return Whole(network)

    return {
        "openpose_coco18": Pair(
            lambda: model.openpose_coco18().eval(),
            reference,
            lambda batch: (torch.randn(batch, 3, 184, 184),),
            "figure 3 layer by layer",
            train_batch=2,
        )
    }


class Whole(torch.nn.Module):
    """`plain` around a network's own parameters."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outputs = plain(dict(self.network.named_parameters()), x, self.network.stages)
        return outputs if self.training else tuple(y[:, -1] for y in outputs)
