"""Seq-NMS (Han et al. 2016, arXiv:1602.08465): boxes of a video are chosen as chains through its frames, not frame by frame.

Boxes of one class in consecutive frames are linked where they overlap. The chain whose scores have the largest sum is taken; each of its
boxes gets the chain's mean score; boxes that overlap it in its frames are dropped; and again, until no chain is worth it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou


def sequence_nms(
    frames: Sequence[dict[str, Tensor]], link: float = 0.5, overlap: float = 0.3, least: float = 0.01
) -> list[dict[str, Tensor]]:
    """A video's detections, chained.

    Args:
        frames: for each frame {"boxes": (N, 4), "scores": (N,), "labels": int64 (N,)}, before non-maximum suppression or after it.
        link: boxes of neighbouring frames with at least this IoU may follow each other.
        overlap: boxes with at least this IoU with the chain's box of their frame are dropped.
        least: above 0; chains with a smaller sum of scores are not looked for, their boxes keep their own scores.

    Returns:
        the frames with what is left, best first.
    """
    if least <= 0:
        raise ValueError(f"least is {least}; it must be above 0")
    scores = [f["scores"].detach().cpu().double().numpy().copy() for f in frames]
    kept = [np.ones(len(s), dtype=bool) for s in scores]
    labels = [f["labels"].cpu().numpy() for f in frames]
    for k in np.unique(np.concatenate(labels)) if frames else ():
        rows = [np.flatnonzero(own == k) for own in labels]
        boxes = [f["boxes"].detach().cpu().double()[torch.from_numpy(r)] for f, r in zip(frames, rows, strict=True)]
        chains = Chains(boxes, [s[r] for s, r in zip(scores, rows, strict=True)], link, overlap)
        while chains.take_best(least):
            pass
        for s, keep, row, new, dropped in zip(scores, kept, rows, chains.scores, chains.dropped, strict=True):
            s[row], keep[row] = new, ~dropped
    return [left(frame, s, keep) for frame, s, keep in zip(frames, scores, kept, strict=True)]


class Chains:
    """The boxes of one class in a video, and for each the best chain that ends in it.

    Args:
        boxes, scores: of each frame, (N_t, 4) and (N_t,).
    """

    def __init__(self, boxes: Sequence[Tensor], scores: list[np.ndarray], link: float, overlap: float) -> None:
        self.scores = [s.copy() for s in scores]
        self.own = [s.copy() for s in scores]  # 0 once taken or dropped
        self.dropped = [np.zeros(len(s), dtype=bool) for s in scores]
        self.follows = [(box_iou(a, b) >= link).numpy() for a, b in zip(boxes[:-1], boxes[1:], strict=True)]
        self.close = [(box_iou(b, b) >= overlap).numpy() for b in boxes]
        self.total, self.before = [np.zeros(len(s)) for s in scores], [np.full(len(s), -1) for s in scores]
        self.top = np.zeros(len(scores))  # the best chain that ends in each frame
        for t in range(len(scores)):
            self.renew(t)

    def renew(self, t: int) -> bool:
        """The sums of the chains that end in frame t, from those of the frame before; whether any of them is another."""
        own = self.own[t]
        total, before = own.copy(), np.full(len(own), -1)
        if t and len(own) and len(self.own[t - 1]):
            gains = np.where(self.follows[t - 1], self.total[t - 1][:, None], 0.0)
            row = gains.argmax(0)
            gain = np.where(own > 0, gains[row, np.arange(len(own))], 0.0)
            total, before = own + gain, np.where(gain > 0, row, -1)
        same = np.array_equal(total, self.total[t]) and np.array_equal(before, self.before[t])
        self.total[t], self.before[t] = total, before
        self.top[t] = total.max(initial=0.0)
        return not same

    def take_best(self, least: float) -> bool:
        """Take the chain with the largest sum out and drop what overlaps it; False if none has at least `least`."""
        last = int(self.top.argmax()) if len(self.top) else 0
        if not len(self.top) or self.top[last] < least:
            return False
        row, sum_of = int(self.total[last].argmax()), self.top[last]
        chain = []
        t = last
        while row >= 0:
            chain.append((t, row))
            t, row = t - 1, int(self.before[t][row])
        for t, row in chain:
            gone = self.close[t][row] & (self.own[t] > 0)
            gone[row] = False
            self.dropped[t] |= gone
            self.own[t][gone], self.own[t][row] = 0.0, 0.0
            self.scores[t][row] = sum_of / len(chain)
        # nothing before the chain depends on it, and soon after it nothing does
        for t in range(chain[-1][0], len(self.own)):
            if not self.renew(t) and t > last:
                break
        return True


def left(frame: dict[str, Tensor], scores: np.ndarray, kept: np.ndarray) -> dict[str, Tensor]:
    """A frame's boxes that are kept, with their new scores, best first."""
    rows = np.flatnonzero(kept)
    rows = torch.from_numpy(rows[np.argsort(-scores[rows], kind="stable")]).to(frame["boxes"].device)
    new = torch.from_numpy(scores).to(frame["scores"])
    return {"boxes": frame["boxes"][rows], "scores": new[rows], "labels": frame["labels"][rows]}
