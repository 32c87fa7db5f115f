"""Chains of boxes and video metrics written down literally, detection by detection; `parity.py` compares with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from paperzoo.tasks.video_detection_metrics import motion_iou


def literal_chains(frames: Sequence[dict[str, Tensor]]) -> list[list[tuple]]:
    """Seq-NMS class by class with lists: the best chain, its mean, what overlaps it; again."""
    kept: list[list[tuple]] = [[] for _ in frames]
    for k in sorted({int(v) for f in frames for v in f["labels"]}):
        boxes = [f["boxes"][f["labels"] == k] for f in frames]
        scores = [f["scores"][f["labels"] == k].tolist() for f in frames]
        free = [set(range(len(s))) for s in scores]
        while True:
            best: dict[tuple[int, int], tuple[float, tuple | None]] = {}
            for t in range(len(frames)):
                for j in free[t]:
                    before = [
                        (best[t - 1, i][0], (t - 1, i))
                        for i in (free[t - 1] if t else ())
                        if float(box_iou(boxes[t - 1][i][None], boxes[t][j][None])) >= 0.5
                    ]
                    gain, place = max(before) if before else (0.0, None)
                    best[t, j] = (scores[t][j] + gain, place)
            if not best or max(v for v, _ in best.values()) < 0.01:
                break
            place: tuple | None = max(best, key=lambda key: best[key][0])
            total, chain = best[place][0], []
            while place is not None:
                chain.append(place)
                place = best[place][1]
            for t, j in chain:
                kept[t].append((total / len(chain), k, boxes[t][j].tolist()))
                free[t] = {i for i in free[t] if i != j and float(box_iou(boxes[t][i][None], boxes[t][j][None])) < 0.3}
        for t, left in enumerate(free):
            kept[t] += [(scores[t][j], k, boxes[t][j].tolist()) for j in left]
    return [sorted(((round(s, 4), k, b) for s, k, b in rows), reverse=True) for rows in kept]


def as_rows(frames: Sequence[dict[str, Tensor]]) -> list[list[tuple]]:
    rows = [zip(f["scores"].tolist(), f["labels"].tolist(), f["boxes"].tolist(), strict=True) for f in frames]
    return [sorted(((round(s, 4), k, b) for s, k, b in row), reverse=True) for row in rows]


def literal_ap(frames: Sequence[tuple], classes: int, limits: tuple[float, float]) -> float:
    """The released protocol, detection by detection, in the order and with the conditions of its evaluation script."""
    every = [float(s) for *_, speed in frames for s in speed]
    share = sum(limits[0] <= s <= limits[1] for s in every) / len(every)
    marks = []
    count = [0] * classes
    for found, truth, speed in frames:
        outside = [not limits[0] <= float(s) <= limits[1] for s in speed]
        for label, out in zip(truth["labels"].tolist(), outside, strict=True):
            count[label] += not out
        taken = [False] * len(speed)
        for d in sorted(range(len(found["scores"])), key=lambda d: -float(found["scores"][d])):
            most, which, of_others, of_these = -1.0, -1, -1.0, -1.0
            for g in range(len(speed)):
                overlap = float(box_iou(found["boxes"][d][None], truth["boxes"][g][None]))
                width, height = (truth["boxes"][g][2:] - truth["boxes"][g][:2]).tolist()
                wanted = min(0.5, width * height / ((width + 10) * (height + 10)))
                same = int(found["labels"][d]) == int(truth["labels"][g])
                if overlap >= wanted and overlap > most and not taken[g] and same:
                    most, which = overlap, g
                if outside[g]:
                    of_others = max(of_others, overlap)
                else:
                    of_these = max(of_these, overlap)
            right = wrong = 0.0
            if which >= 0:
                taken[which] = True
                right = float(not outside[which])
            elif not outside:
                wrong = share
            else:
                wrong = 1.0 if of_these > of_others else 0.0 if of_others > of_these else sum(outside) / len(outside)
            marks.append((float(found["scores"][d]), int(found["labels"][d]), right, wrong))
    marks.sort(key=lambda m: -m[0])
    values = []
    for k in range(classes):
        if not count[k]:
            continue
        hits, misses, points = 0.0, 0.0, []
        for _, label, right, wrong in marks:
            if label == k:
                hits, misses = hits + right, misses + wrong
                points.append((hits / count[k], hits / max(hits + misses, 1e-12)))
        area, before = 0.0, 0.0
        for n, (recall, _) in enumerate(points):
            if recall > before:
                area += (recall - before) * max(p for _, p in points[n:])
                before = recall
        values.append(area)
    return sum(values) / len(values)


def random_film(frames: int, objects: int, classes: int) -> list[tuple]:
    """Objects that move at different speeds, detections near them and elsewhere."""
    start, step = torch.rand(objects, 2) * 60, torch.rand(objects, 2) * torch.linspace(0, 6, objects)[:, None]
    extent, labels = 15 + 20 * torch.rand(objects, 2), torch.randint(classes, (objects,))
    truth = []
    for t in range(frames):
        corner = start + step * t
        there = torch.rand(objects) < (0.0 if t == 2 else 0.9)
        boxes = torch.cat([corner, corner + extent], 1)[there]
        truth.append(
            {
                "boxes": boxes,
                "labels": labels[there],
                "tracks": torch.arange(objects)[there],
                "crowd": torch.zeros(int(there.sum()), dtype=torch.bool),
            }
        )
    found = []
    for objects_there in truth:
        near = objects_there["boxes"] + 4 * torch.randn_like(objects_there["boxes"])
        corner = torch.rand(6, 2) * 80
        boxes = torch.cat([near, near + 1.5, torch.cat([corner, corner + 5 + 30 * torch.rand(6, 2)], 1)])
        kinds = torch.cat([objects_there["labels"], objects_there["labels"], torch.randint(classes, (6,))])
        found.append({"boxes": boxes, "labels": kinds, "scores": torch.rand(len(boxes))})
    speeds = motion_iou(range(frames), truth)
    return list(zip(found, truth, speeds, strict=True))


def literal_motion(truth: Sequence[dict[str, Tensor]]) -> list[list[float]]:
    result = []
    for t, objects in enumerate(truth):
        row = []
        for box, track in zip(objects["boxes"], objects["tracks"].tolist(), strict=True):
            overlaps = [
                float(box_iou(box[None], truth[u]["boxes"][n][None]))
                for u in range(max(0, t - 10), min(len(truth), t + 11))
                for n, other in enumerate(truth[u]["tracks"].tolist())
                if u != t and other == track
            ]
            row.append(sum(overlaps) / len(overlaps) if overlaps else 0.0)
        result.append(row)
    return result
