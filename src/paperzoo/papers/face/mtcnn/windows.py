"""What the three networks learn from (sec. II-B, III-A): windows of four kinds, and the multi-task loss with its hard samples.

A window is a square; its kind follows from its IoU with the faces. P-Net's are drawn at random, R-Net's are what P-Net takes
for faces, O-Net's what R-Net leaves; landmark windows are drawn around the faces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from paperzoo.papers.face.mtcnn.cascade import cut_windows, normalise, summed

NEGATIVE, PART, POSITIVE, LANDMARK = range(4)
SHARES = (3, 1, 1, 2)  # of negatives, part faces, positives and landmark faces in a batch (sec. III-A)
HARD = 0.7  # the share of samples whose classification is learned from (sec. II-C)
TASKS = {"pnet": (1.0, 0.5, 0.5), "rnet": (1.0, 0.5, 0.5), "onet": (1.0, 0.5, 1.0)}
"""alpha of eq. 4: of the classification, the boxes and the landmarks."""


class Windows(NamedTuple):
    """Cut-out windows of one kind, and what they are to give."""

    pixels: Tensor  # uint8 (N, 3, size, size)
    offsets: Tensor  # float32 (N, 4), of x1 y1 x2 y2 in sides of the window; zeros for negatives
    points: Tensor  # float32 (N, 10), x1 … x5 y1 … y5 in sides of the window; zeros but for landmark windows


def kinds_of(windows: Tensor, faces: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor]:
    """The kind of each window by its largest IoU with a face (sec. III-A), and that face.

    Below 0.3 negative, 0.4 to 0.65 part, above 0.65 positive. Between, and where an ignored face is overlapped by more than
    0.3, none: -1.

    Args:
        windows: (N, 4); faces: (M, 4); ignored: (K, 4).

    Returns:
        int64 (N,) and int64 (N,).
    """
    if not len(faces):
        best, face = windows.new_zeros(len(windows)), torch.zeros(len(windows), dtype=torch.int64)
    else:
        best, face = box_iou(windows, faces).max(1)
    kind = torch.full((len(windows),), -1)
    kind[best < 0.3] = NEGATIVE
    kind[(best >= 0.4) & (best < 0.65)] = PART
    kind[best >= 0.65] = POSITIVE
    if len(ignored):
        kind[(kind == NEGATIVE) & (box_iou(windows, ignored).amax(1) > 0.3)] = -1
    return kind, face


def random_windows(height: int, width: int, count: int, smallest: int, rng: torch.Generator) -> Tensor:
    """Squares anywhere in the picture, from `smallest` to half its shorter side: (count, 4)."""
    largest = max(smallest + 1, min(height, width) // 2)
    side = torch.randint(min(smallest, largest - 1), largest, (count, 1), generator=rng).clamp(max=min(height, width))
    corner = (torch.rand(count, 2, generator=rng) * (torch.tensor([width, height]) - side + 1)).floor()
    return torch.cat([corner, corner + side], dim=1).float()


def windows_around(faces: Tensor, count: int, rng: torch.Generator, shift: float = 0.2) -> Tensor:
    """Squares near each face (M, 4), of 0.8 times its shorter to 1.25 times its longer side: (M * count, 4), whole pixels."""
    size = (faces[:, 2:] - faces[:, :2]).repeat_interleave(count, 0)
    centre = ((faces[:, 2:] + faces[:, :2]) / 2).repeat_interleave(count, 0)
    low, high = 0.8 * size.amin(1, keepdim=True), 1.25 * size.amax(1, keepdim=True)
    side = (low + (high - low) * torch.rand(len(size), 1, generator=rng)).round().clamp(min=2)
    centre = centre + (2 * torch.rand(len(size), 2, generator=rng) - 1) * shift * size
    corner = (centre - side / 2).round()
    return torch.cat([corner, corner + side], dim=1)


class Collector:
    """Windows of many pictures, by kind.

    Args:
        size: of the network's input.
        limits: how many of each kind a picture may give, at most.
        rng: which of too many are taken.
    """

    def __init__(self, size: int, limits: Sequence[int], rng: torch.Generator) -> None:
        self.size, self.limits, self.rng = size, tuple(limits), rng
        self.parts: list[list[Windows]] = [[], [], [], []]

    def add(self, item: dict, windows: Tensor, landmark_windows: Tensor) -> None:
        """The windows of a picture: `windows` (N, 4) of any kind, `landmark_windows` (M, 4) near its marked faces."""
        faces, points = item["boxes"][~item["ignored"]], item["landmarks"][~item["ignored"]]
        marked = item["has_landmarks"][~item["ignored"]]
        table = summed(item["image"][None])
        kind, face = kinds_of(windows, faces, item["boxes"][item["ignored"]])
        for k in (NEGATIVE, PART, POSITIVE):
            rows = self.some((kind == k).nonzero()[:, 0], k)
            self.keep(k, table, windows[rows], None if k == NEGATIVE else faces[face[rows]], None)
        if bool(marked.any()) and len(landmark_windows):
            best, face = box_iou(landmark_windows, faces[marked]).max(1)
            rows = self.some((best >= 0.65).nonzero()[:, 0], LANDMARK)
            self.keep(LANDMARK, table, landmark_windows[rows], None, points[marked][face[rows]])

    def some(self, rows: Tensor, kind: int) -> Tensor:
        return rows[torch.randperm(len(rows), generator=self.rng)[: self.limits[kind]]]

    def keep(self, kind: int, table: Tensor, windows: Tensor, faces: Tensor | None, points: Tensor | None) -> None:
        height, width = table.shape[1] - 1, table.shape[2] - 1
        cut = windows.long().clamp(min=0).minimum(torch.tensor([width, height] * 2))
        rows = (cut[:, 2:] > cut[:, :2]).all(1).nonzero()[:, 0]
        if not len(rows):
            return
        pixels = cut_windows(table, torch.zeros(len(rows), dtype=torch.int64), cut[rows], self.size)
        side, corner = (windows[:, 2:] - windows[:, :2])[rows], windows[rows, :2]
        offsets, marks = torch.zeros(len(rows), 4), torch.zeros(len(rows), 10)
        if faces is not None:
            offsets = (faces[rows] - windows[rows]) / side.repeat(1, 2)
        if points is not None:
            marks = ((points[rows] - corner[:, None]) / side[:, None]).transpose(1, 2).flatten(1)
        self.parts[kind].append(Windows(pixels.round().to(torch.uint8), offsets, marks))

    def finished(self) -> list[Windows]:
        """All windows, a `Windows` for each kind."""
        empty = Windows(
            torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8), torch.zeros(0, 4), torch.zeros(0, 10)
        )
        return [Windows(*(torch.cat(v) for v in zip(*(part or [empty]), strict=True))) for part in self.parts]


def collect(
    data: Sequence[dict],
    size: int,
    rng: torch.Generator,
    found: Callable[[Tensor], Tensor] | None,
    limits: Sequence[int],
    tries: int = 60,
) -> list[Windows]:
    """The windows of a whole data set.

    Args:
        data: items as `data/faces.py` describes them.
        found: a picture (1, 3, H, W) in 0 … 255 -> the boxes (N, 4) that the networks before take for faces; None draws at
            random (P-Net).
        limits: see `Collector`.
        tries: windows that are drawn for each face.
    """
    collector = Collector(size, limits, rng)
    for i in range(len(data)):
        item = data[i]
        height, width = item["image"].shape[1:]
        seen = ~item["ignored"]
        near = windows_around(item["boxes"][seen], tries, rng)
        if found is None:
            anywhere = random_windows(height, width, 4 * limits[NEGATIVE], 12, rng)
            beside = windows_around(item["boxes"][seen], 8, rng, shift=0.8)  # negatives that cut a face
            proposals = torch.cat([anywhere, beside])
        else:
            proposals = found(item["image"][None].float()).cpu()
        marked = windows_around(item["boxes"][seen & item["has_landmarks"]], tries // 3, rng)
        # windows drawn around the faces join the proposals: few pictures give few of these
        collector.add(item, torch.cat([proposals, near]), marked)
    return collector.finished()


def multi_task_loss(
    outputs: tuple[Tensor, ...],
    kind: Tensor,
    offsets: Tensor,
    points: Tensor,
    weights: tuple[float, float, float],
    hard: float = HARD,
) -> dict[str, Tensor]:
    """Eq. 4: the sum over tasks j of alpha_j beta_j L_j, where beta says which kinds a task learns from.

    Faces against negatives by cross entropy (eq. 1), on the 70% of them with the largest loss (sec. II-C); boxes of positives
    and part faces by squared distance (eq. 2); landmarks of landmark faces alike (eq. 3). Each is a mean over its samples.

    Args:
        outputs: logits (N, 2), offsets (N, 4) and, where the network has them, points (N, 10).
        kind: int64 (N,); offsets, points: the targets.
        weights: alpha of classification, boxes, landmarks.
    """
    logits, moved = outputs[0].float(), outputs[1].float()
    judged = (kind == NEGATIVE) | (kind == POSITIVE)
    entropy = F.cross_entropy(logits, (kind == POSITIVE).long(), reduction="none").masked_fill(~judged, 0.0)
    count = (judged.sum() * hard).ceil().long()
    rank = entropy.detach().masked_fill(~judged, -1.0).argsort(descending=True).argsort()
    classification = (entropy * (rank < count)).sum() / count.clamp(min=1)
    boxed = (kind == POSITIVE) | (kind == PART)
    losses = {
        "classification": weights[0] * classification,
        "boxes": weights[1] * mean_square(moved, offsets, boxed),
    }
    if len(outputs) > 2:
        losses["landmarks"] = weights[2] * mean_square(outputs[2].float(), points, kind == LANDMARK)
    return losses


def mean_square(values: Tensor, goals: Tensor, chosen: Tensor) -> Tensor:
    """The mean over the chosen rows of the squared Euclidean distance."""
    return ((values - goals).square().sum(1) * chosen).sum() / chosen.sum().clamp(min=1)


def to_batch(windows: Sequence[Windows], rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """A batch from some rows of each kind: normalised windows, kinds and targets."""
    parts = [Windows(*(v[r] for v in w)) for w, r in zip(windows, rows, strict=True)]
    kind = torch.cat([torch.full((len(p.pixels),), k) for k, p in enumerate(parts)])
    pixels, offsets, points = (torch.cat(v) for v in zip(*parts, strict=True))
    return {"windows": normalise(pixels.float()), "kind": kind, "offsets": offsets, "points": points}
