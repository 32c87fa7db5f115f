"""Video object detection's metrics: ImageNet VID's mean average precision, also by how fast objects move.

An object's speed is its motion IoU (FGFA, sec. 5.1): the mean IoU of its box with its boxes in the frames up to ten before and after. Slow
objects have more than 0.9, medium ones 0.7 to 0.9, fast ones less than 0.7.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

REACH = 10  # frames to either side
SPEEDS = {"slow": (0.9, 1.0), "medium": (0.7, 0.9), "fast": (0.0, 0.7)}
OVERLAP = 0.5
TOLERANCE = 10  # pixels by which a small object's box may be off, as the challenge has it


def motion_iou(frames: Sequence[int], truth: Sequence[dict[str, Tensor]], reach: int = REACH) -> list[Tensor]:
    """The motion IoU of every object of a video, a tensor (N,) for each of the frames.

    An object that is in no other frame within reach gets 0, as in the authors' file of ImageNet VID.

    Args:
        frames: the numbers of the annotated frames, rising.
        truth: for each {"boxes": (N, 4), "tracks": int64 (N,)}.
    """
    counts = [len(t["tracks"]) for t in truth]
    boxes, tracks = (torch.cat([t[k] for t in truth]) if truth else torch.zeros(0) for k in ("boxes", "tracks"))
    time = torch.repeat_interleave(torch.as_tensor(list(frames)), torch.tensor(counts))
    found = torch.zeros(len(tracks))
    for track in tracks.unique():
        rows = (tracks == track).nonzero()[:, 0]
        apart = (time[rows, None] - time[rows]).abs()
        near = (apart > 0) & (apart <= reach)
        overlap = torch.where(near, box_iou(boxes[rows], boxes[rows]), 0.0)
        found[rows] = overlap.sum(1) / near.sum(1).clamp(min=1)
    return list(found.split(counts))


class VideoAP:
    """ImageNet VID's average precision at IoU 0.5, over all objects, by speed, and in degraded frames.

    As in the challenge's and the authors' released code: in the order of the scores each detection takes the object of its class that it overlaps
    most, of those still free, if by 0.5 (less for objects so small that ten pixels matter); precision is made monotonous and integrated over recall,
    for all frames together. For a speed, detections of other objects count neither way; a false one counts if it
    is nearest to an object of that speed, in empty frames as a part, the part of all objects that have that speed. Where it is equally
    near to both kinds it counts as the part of the frame's objects that are *not* of that speed: so the released code has it.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.frames: list[dict[str, np.ndarray]] = []

    def update(
        self, found: dict[str, Tensor], truth: dict[str, Tensor], motion: Tensor, degraded: bool | None = None
    ) -> None:
        """One frame.

        Args:
            found: boxes (D, 4), scores (D,), labels (D,).
            truth: boxes (N, 4), labels (N,), crowd (N,); crowds are passed over, and so is what lies in them.
            motion: (N,), see `motion_iou`.
        """
        found = {k: v.detach().cpu() for k, v in found.items()}
        order = found["scores"].argsort(descending=True, stable=True)
        boxes, labels, scores = found["boxes"][order].float(), found["labels"][order], found["scores"][order]
        solid = ~truth["crowd"]
        objects, kinds, speed = truth["boxes"][solid], truth["labels"][solid], motion[solid]
        overlap = box_iou(boxes, objects)
        size = objects[:, 2:] - objects[:, :2]
        wanted = (size.prod(1) / (size + TOLERANCE).prod(1)).clamp(max=OVERLAP)
        fits = (overlap >= wanted) & (labels[:, None] == kinds)
        taken = np.full(len(boxes), -1, dtype=np.int16)
        free = np.ones(len(objects), dtype=bool)
        table, possible = overlap.numpy(), fits.numpy()
        for d in np.flatnonzero(possible.any(1)):
            candidates = possible[d] & free
            if candidates.any():
                taken[d] = np.where(candidates, table[d], -1.0).argmax()
                free[taken[d]] = False
        ignored = np.zeros(len(boxes), dtype=bool)
        if (~solid).any() and len(boxes):
            crowd = truth["boxes"][~solid]
            corner = torch.maximum(boxes[:, None, :2], crowd[:, :2])
            shared = (torch.minimum(boxes[:, None, 2:], crowd[:, 2:]) - corner).clamp(min=0).prod(-1)
            part = shared / (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=1e-6)[:, None]
            ignored = (part >= OVERLAP).any(1).numpy() & (taken < 0)
        self.frames.append({
            "labels": labels.numpy().astype(np.int16)[~ignored], "scores": scores.float().numpy()[~ignored], "taken": taken[~ignored],
            "overlap": table[~ignored], "kinds": kinds.numpy(), "speed": speed.double().numpy(),
            "degraded": np.asarray(-1 if degraded is None else int(degraded)),
        })  # fmt: skip

    def compute(self) -> dict[str, float]:
        """vid_mAP; vid_mAP_slow, _medium, _fast where there are such objects; vid_mAP_degraded where frames are known to be."""
        values = {"vid_mAP": self.mean_ap((0.0, 1.0))}
        values |= {f"vid_mAP_{name}": self.mean_ap(limits) for name, limits in SPEEDS.items()}
        values["vid_mAP_degraded"] = self.mean_ap((0.0, 1.0), degraded=True)
        return {name: value for name, value in values.items() if value is not None}

    def mean_ap(self, limits: tuple[float, float], degraded: bool = False) -> float | None:
        """The mean over the classes that have an object of this motion IoU (both limits included); None where none has."""
        frames = [f for f in self.frames if f["degraded"] == 1] if degraded else self.frames
        if not frames:
            return None
        every = np.concatenate([f["speed"] for f in frames])
        inside = (every >= limits[0]) & (every <= limits[1])
        share = float(inside.mean()) if len(every) else 0.0
        kinds = np.concatenate([f["kinds"] for f in frames])
        right, wrong = zip(*(marked(f, limits, share) for f in frames), strict=True)
        right, wrong = np.concatenate(right), np.concatenate(wrong)
        labels, scores = (np.concatenate([f[k] for f in frames]) for k in ("labels", "scores"))
        order = np.argsort(-scores, kind="stable")
        values = []
        for k in range(self.classes):
            count = int((inside & (kinds == k)).sum())
            rows = order[labels[order] == k]
            if count:
                values.append(average_precision(right[rows], wrong[rows], count))
        return float(np.mean(values)) if values else None


def marked(frame: dict[str, np.ndarray], limits: tuple[float, float], share: float) -> tuple[np.ndarray, np.ndarray]:
    """How far each detection of a frame is right, and wrong: (D,) each."""
    outside = (frame["speed"] < limits[0]) | (frame["speed"] > limits[1])
    taken, overlap = frame["taken"], frame["overlap"]
    is_free = taken < 0
    right = np.zeros(len(taken))
    right[~is_free] = ~outside[taken[~is_free]]
    if not len(outside):
        return right, np.where(is_free, share, 0.0)
    of_others = np.where(outside, overlap, -1.0).max(1)
    of_these = np.where(outside, -1.0, overlap).max(1)
    wrong = np.where(of_these > of_others, 1.0, np.where(of_these < of_others, 0.0, outside.mean()))
    return right, np.where(is_free, wrong, 0.0)


def average_precision(right: np.ndarray, wrong: np.ndarray, count: int) -> float:
    """The area under precision, made monotonous, over recall; detections best first, `count` objects."""
    hits, misses = np.cumsum(right), np.cumsum(wrong)
    recall = np.concatenate([[0.0], hits / count, [1.0]])
    precision = np.concatenate([[0.0], hits / np.maximum(hits + misses, np.finfo(np.float64).eps), [0.0]])
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.flatnonzero(recall[1:] != recall[:-1])
    return float(((recall[steps + 1] - recall[steps]) * precision[steps + 1]).sum())
