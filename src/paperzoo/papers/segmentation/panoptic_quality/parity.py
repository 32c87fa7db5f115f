"""PQ against torchmetrics, against the released evaluation's steps one segment at a time, and by hand; the merge likewise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from paperzoo.blocks.panoptic import PanopticMap, panoptic_map
from paperzoo.engine.parity import Case
from paperzoo.papers.segmentation.panoptic_quality.technique import PanopticQuality, match_segments, merge

THINGS, CATEGORIES = {0, 1, 2}, 5
SIZE = 40


def scene(seed: int, void: bool = True, crowds: bool = True) -> PanopticMap:
    """Random discs of things over bands of stuff; the first disc may be a crowd, a corner void."""
    rng = torch.Generator().manual_seed(seed)
    y, x = torch.arange(SIZE)[:, None], torch.arange(SIZE)
    ids = torch.where(y + torch.randint(-4, 5, (SIZE,), generator=rng) > SIZE // 2, 1, 2).long()
    categories, crowd = {1: 3, 2: 4}, []
    for k in range(7):
        middle, radius = torch.rand(2, generator=rng) * SIZE, 3 + 8 * float(torch.rand((), generator=rng))
        ids[(y - middle[0]).square() + (x - middle[1]).square() < radius**2] = 10 + k
        categories[10 + k] = int(torch.randint(3, (), generator=rng))
    if crowds:
        crowd.append(10)
    if void:
        ids[: SIZE // 4, : SIZE // 3] = 0
    return panoptic_map(ids, categories, THINGS, crowd)


def shaken(truth: PanopticMap, seed: int, void: bool = True) -> PanopticMap:
    """A prediction: the truth moved by some pixels, some segments split in two, others under another category."""
    rng = torch.Generator().manual_seed(1000 + seed)
    move = torch.randint(-2, 3, (2,), generator=rng).tolist()
    ids = torch.roll(truth.ids, move, (0, 1))
    categories = {s.id: s.category for s in truth.segments}
    for segment in truth.segments:
        chance = float(torch.rand((), generator=rng))
        if chance < 0.25 and segment.thing:  # the right half is an object of its own
            ids[:, SIZE // 2 :][ids[:, SIZE // 2 :] == segment.id] = segment.id + 100
            categories[segment.id + 100] = segment.category
        elif chance > 0.85:
            categories[segment.id] = (segment.category + 1) % 3 if segment.thing else segment.category
    if not void:
        ids[ids == 0], categories[2] = 2, 4
    return panoptic_map(ids, categories, THINGS)


def one_by_one(predictions: list[PanopticMap], truths: list[PanopticMap]) -> dict[str, float]:
    """The released evaluation's steps: dictionaries of intersections, matches, false negatives, false positives."""
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])  # IoU, hits, wrong, missed
    for prediction, truth in zip(predictions, truths, strict=True):
        shared: dict[tuple[int, int], int] = defaultdict(int)
        for pair in zip(truth.ids.flatten().tolist(), prediction.ids.flatten().tolist(), strict=True):
            shared[pair] += 1
        there, found = {s.id: s for s in truth.segments}, {s.id: s for s in prediction.segments}
        matched_there, matched_found = set(), set()
        for (t, p), area in shared.items():
            if t not in there or p not in found or there[t].crowd or there[t].category != found[p].category:
                continue
            iou = area / (there[t].area + found[p].area - area - shared.get((0, p), 0))
            if iou > 0.5:
                sums[there[t].category][0] += iou
                sums[there[t].category][1] += 1
                matched_there.add(t)
                matched_found.add(p)
        crowds = defaultdict(list)
        for t, segment in there.items():
            if segment.crowd:
                crowds[segment.category].append(t)
            elif t not in matched_there:
                sums[segment.category][3] += 1
        for p, segment in found.items():
            if p not in matched_found:
                ignored = shared.get((0, p), 0) + sum(shared.get((t, p), 0) for t in crowds[segment.category])
                if ignored / segment.area <= 0.5:
                    sums[segment.category][2] += 1
    result = {}
    for ending, kept in (("", range(CATEGORIES)), ("_things", THINGS), ("_stuff", set(range(CATEGORIES)) - THINGS)):
        rows = [sums[k] for k in kept if sum(sums[k][1:])]
        totals = [hits + wrong / 2 + missed / 2 for _, hits, wrong, missed in rows]
        count = len(rows)
        result[f"PQ{ending}"] = sum(r[0] / t for r, t in zip(rows, totals, strict=True)) / count
        result[f"SQ{ending}"] = sum(r[0] / r[1] if r[1] else 0.0 for r in rows) / count
        result[f"RQ{ending}"] = sum(r[1] / t for r, t in zip(rows, totals, strict=True)) / count
    return result


def ours(predictions: list[PanopticMap], truths: list[PanopticMap]) -> dict[str, float]:
    metric = PanopticQuality(CATEGORIES, THINGS)
    for prediction, truth in zip(predictions, truths, strict=True):
        metric.update([prediction], [truth])
    return metric.compute()


def torchmetrics_of(predictions: list[PanopticMap], truths: list[PanopticMap]) -> Tensor:
    """(K, 3): PQ, SQ, RQ of each category."""
    from torchmetrics.detection import PanopticQuality as Theirs

    def coded(panoptic: PanopticMap) -> Tensor:
        return torch.stack([panoptic.semantic, panoptic.ids], dim=-1)

    metric = Theirs(THINGS, set(range(CATEGORIES)) - THINGS, True, return_sq_and_rq=True, return_per_class=True)
    metric.update(torch.stack([coded(p) for p in predictions]), torch.stack([coded(t) for t in truths]))
    return metric.compute()


def merged_one_by_one(
    masks: list[set],
    scores: list[float],
    labels: list[int],
    semantic: dict,
    confidence: float,
    overlap: float,
    least: int,
) -> list[tuple[int, set]]:
    """The released merging on sets of pixels: (category, pixels) of each segment, in their order."""
    used: set = set()
    result = []
    for mask, score, label in sorted(zip(masks, scores, labels, strict=True), key=lambda entry: -entry[1]):
        if score < confidence or not mask or len(mask & used) / len(mask) > overlap:
            continue
        if mask - used:
            result.append((label, mask - used))
        used |= mask
    for category in sorted(set(semantic.values())):
        left = {pixel for pixel, k in semantic.items() if k == category} - used
        if category >= 0 and category not in THINGS and len(left) >= max(1, least):
            result.append((category, left))
    return result


def merging(seed: int, confidence: float, overlap: float, least: int) -> Case:
    rng = torch.Generator().manual_seed(seed)
    masks = torch.rand(9, 5, 6, generator=rng).repeat_interleave(3, 1).repeat_interleave(3, 2) < 0.3
    scores, labels = torch.rand(9, generator=rng).double(), torch.randint(3, (9,), generator=rng)
    semantic = torch.randint(-1, CATEGORIES, (5, 6), generator=rng).repeat_interleave(3, 0).repeat_interleave(3, 1)

    def slow() -> list:
        pixels = [set(map(tuple, mask.nonzero().tolist())) for mask in masks]
        places = {(y, x): int(semantic[y, x]) for y in range(15) for x in range(18)}
        found = merged_one_by_one(pixels, scores.tolist(), labels.tolist(), places, confidence, overlap, least)
        ids = torch.zeros(15, 18)
        for number, (_, segment) in enumerate(found, 1):
            for y, x in segment:
                ids[y, x] = number
        return [ids, [float(category) for category, _ in found], [float(len(segment)) for _, segment in found]]

    def quick() -> list:
        found = merge(masks, scores, labels, semantic, THINGS, confidence, overlap, least)
        segments = found.segments
        return [found.ids.float(), [float(s.category) for s in segments], [float(s.area) for s in segments]]

    return Case(
        f"merging, confidence {confidence}, overlap {overlap}, stuff of {least} pixels or more",
        quick,
        slow,
        against="the released code's steps on sets of pixels",
        rtol=0,
        atol=0,
    )


def cases() -> Iterator[Case]:
    truths = [scene(seed) for seed in range(12)]
    predictions = [shaken(truth, seed) for seed, truth in enumerate(truths)]
    yield Case(
        "PQ, SQ, RQ with void and crowds, of all, things and stuff",
        lambda: ours(predictions, truths),
        lambda: one_by_one(predictions, truths),
        against="the released evaluation's steps, one segment at a time",
        rtol=1e-9,
        atol=1e-12,
    )
    plain = [scene(seed, crowds=False) for seed in range(8)]
    full = [shaken(truth, seed, void=False) for seed, truth in enumerate(plain)]
    metric = PanopticQuality(CATEGORIES, THINGS)
    metric.update(full, plain)
    yield Case(
        "PQ, SQ, RQ of each category",
        lambda: torch.stack(list(metric.by_category().values()), dim=1),
        lambda: torchmetrics_of(full, plain),
        against="torchmetrics 1.x PanopticQuality",
        rtol=1e-6,
        atol=1e-12,
        note="without crowds, which it does not know, and without void in predictions, where it leaves the released evaluation",
    )
    yield Case(
        "no segment has two matches (theorem 1)",
        lambda: float(max(count for p, t in zip(predictions, truths, strict=True) for count in most_matches(p, t))),
        lambda: 1.0,
        against="sec. 4.1",
    )

    # two true objects of 8 and 4 pixels, stuff of 4; found: 6 of the 8 (IoU 3/4), nothing of the 4, stuff with 2 wrong pixels
    ids = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]])
    truth = panoptic_map(ids, {1: 0, 2: 0, 3: 3}, THINGS)
    ids = torch.tensor([[5, 5, 5, 0], [5, 5, 5, 0], [6, 6, 7, 7], [6, 6, 6, 6]])
    found = panoptic_map(ids, {5: 0, 6: 3, 7: 1}, THINGS)
    yield Case(
        "a worked example",
        lambda: ours([found], [truth]),
        lambda: {
            "PQ": ((3 / 4) / 1.5 + 4 / 6 + 0) / 3,
            "SQ": (3 / 4 + 4 / 6 + 0) / 3,
            "RQ": (1 / 1.5 + 1 + 0) / 3,
            "PQ_things": ((3 / 4) / 1.5 + 0) / 2,
            "SQ_things": (3 / 4 + 0) / 2,
            "RQ_things": (1 / 1.5 + 0) / 2,
            "PQ_stuff": 4 / 6,
            "SQ_stuff": 4 / 6,
            "RQ_stuff": 1.0,
        },
        against="counted by hand",
        note="category 0: one match, one missed; category 1: one wrong",
    )
    yield Case(
        "the truth itself",
        lambda: ours(truths, truths),
        lambda: {f"{name}{ending}": 1.0 for name in ("PQ", "SQ", "RQ") for ending in ("", "_things", "_stuff")},
        against="identity",
        note="the crowds, found as such, are no false positives",
    )
    for seed, thresholds in enumerate([(0.0, 1.0, 0), (0.3, 0.5, 0), (0.5, 0.25, 10), (0.2, 0.75, 25)]):
        yield merging(seed, *thresholds)


def most_matches(prediction: PanopticMap, truth: PanopticMap) -> list[int]:
    pairs = match_segments(prediction, truth).pairs
    return [int(torch.bincount(pairs[:, i]).max()) for i in (0, 1) if len(pairs)]
