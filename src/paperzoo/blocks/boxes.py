"""Boxes and anchors: what torchvision.ops lacks. Boxes are x1 y1 x2 y2 in pixels, x2 and y2 exclusive.

`box_iou`, `nms`, `batched_nms`, `roi_align` and the like are in `torchvision.ops`; use them from there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

BACKGROUND, IGNORED = -1, -2
"""What `match_anchors` says of an anchor that is matched to no box."""

LARGEST_LOG_SCALE = math.log(1000 / 16)
"""A predicted box is at most this factor (in log) larger than its anchor; keeps exp() finite, as in Detectron."""


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Boxes (…, 4) relative to anchors (…, 4): dx, dy in anchor sizes and log dw, dh (R-CNN, appendix C).

    Args:
        boxes, anchors: x1 y1 x2 y2, of positive width and height; shapes broadcast.
        weights: factors on dx, dy, dw, dh.
    """
    size, target = anchors[..., 2:] - anchors[..., :2], boxes[..., 2:] - boxes[..., :2]
    shift = (boxes[..., :2] + 0.5 * target - anchors[..., :2] - 0.5 * size) / size
    return torch.cat([shift, torch.log(target / size)], dim=-1) * boxes.new_tensor(weights)


def decode_boxes(
    deltas: Tensor,
    anchors: Tensor,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    largest: float = LARGEST_LOG_SCALE,
) -> Tensor:
    """The inverse of `encode_boxes`: deltas (…, 4) and anchors (…, 4) -> boxes (…, 4)."""
    deltas = deltas / deltas.new_tensor(weights)
    size = anchors[..., 2:] - anchors[..., :2]
    centre = anchors[..., :2] + 0.5 * size + deltas[..., :2] * size
    half = 0.5 * size * deltas[..., 2:].clamp(max=largest).exp()
    return torch.cat([centre - half, centre + half], dim=-1)


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (B, N, 4) cut to their images: sizes (B, 2), height and width."""
    limit = sizes.flip(-1).to(boxes.dtype)[:, None]  # (B, 1, 2): x, y
    return torch.cat([boxes[..., :2].clamp(min=0).minimum(limit), boxes[..., 2:].clamp(min=0).minimum(limit)], dim=-1)


class AnchorGenerator:
    """Anchors at every cell of every level of a pyramid (Faster R-CNN sec. 3.1.1; FPN sec. 4.1). Holds no state.

    Args:
        strides: one for each level, powers of two; a level of stride s has ceil(H / s) by ceil(W / s) cells.
        sizes: for each level, the square roots of the anchors' areas.
        ratios: height / width, the same at each level.
    """

    def __init__(
        self,
        strides: Sequence[int],
        sizes: Sequence[Sequence[float]],
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
    ) -> None:
        if len(strides) != len(sizes):
            raise ValueError(f"sizes has {len(sizes)} levels and strides {len(strides)}; give one entry for each level")
        self.strides = tuple(strides)
        self.cells = [self._cell(level, ratios) for level in sizes]
        self.per_cell = [len(cell) for cell in self.cells]
        self._kept: dict[tuple, Tensor] = {}

    @staticmethod
    def _cell(sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
        size, stretch = torch.tensor(sizes, dtype=torch.float32), torch.tensor(ratios, dtype=torch.float32).sqrt()
        width, height = (size / stretch[:, None]).flatten(), (size * stretch[:, None]).flatten()
        return (torch.stack([-width, -height, width, height], dim=1) / 2).round()  # rounded, as the released code

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Rows and columns of each level for an image of this size."""
        return [(-(-height // s), -(-width // s)) for s in self.strides]

    def counts(self, height: int, width: int) -> list[int]:
        """How many anchors each level has for an image of this size."""
        grids = self.grids(height, width)
        return [rows * columns * n for (rows, columns), n in zip(grids, self.per_cell, strict=True)]

    def __call__(self, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
        """All anchors (A, 4) float32 for an image of this size: level by level, row by row, cell by cell."""
        key = (height, width, str(device))
        if key not in self._kept:
            if len(self._kept) >= 32:
                self._kept.clear()
            self._kept[key] = self._make(height, width).to(device)
        return self._kept[key]

    def _make(self, height: int, width: int) -> Tensor:
        levels = []
        for (rows, columns), cell in zip(self.grids(height, width), self.cells, strict=True):
            # as torchvision: the step is size // cells, a little less than the stride where that does not divide the size
            y, x = torch.arange(rows) * (height // rows), torch.arange(columns) * (width // columns)
            y, x = torch.meshgrid(y, x, indexing="ij")
            corner = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
            levels.append((corner + cell).reshape(-1, 4))
        return torch.cat(levels)


def join_boxes(targets: Sequence[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """The boxes of all images in one tensor (T, 4), and the image that each belongs to, int64 (T,)."""
    boxes = torch.cat([t["boxes"] for t in targets])
    counts = torch.tensor([len(t["boxes"]) for t in targets])
    return boxes, torch.repeat_interleave(torch.arange(len(targets)), counts).to(boxes.device)


def match_anchors(
    boxes: Tensor, owner: Tensor, images: int, anchors: Tensor, high: float, low: float, keep_best: bool = True
) -> Tensor:
    """Which box each anchor of each image is to predict (Faster R-CNN sec. 3.1.2), for the whole batch at once.

    Args:
        boxes: (T, 4), all boxes of all images.
        owner: int64 (T,), the image of each box.
        images: how many images B there are.
        anchors: (A, 4), the same for each image.
        high: an anchor with at least this IoU with a box is matched to the box with which it has most.
        low: an anchor with less than this IoU with every box is background; between the two it is ignored.
        keep_best: the anchors that overlap a box most are matched as well, however little that is.

    Returns:
        int64 (B, A): a row of `boxes`, or BACKGROUND, or IGNORED.
    """
    shape = (images, len(anchors))
    if not len(boxes):
        return torch.full(shape, BACKGROUND, device=anchors.device)
    overlap = box_iou(boxes, anchors)  # (T, A)
    segment = owner[:, None].expand_as(overlap)
    best = overlap.new_zeros(shape).scatter_reduce(0, segment, overlap, "amax")
    rows = torch.arange(len(boxes), device=boxes.device)[:, None]
    candidates = torch.where(overlap == best[owner], rows, len(boxes))
    nearest = candidates.new_full(shape, len(boxes)).scatter_reduce(0, segment, candidates, "amin")
    matched = torch.where(best >= high, nearest, torch.where(best < low, BACKGROUND, IGNORED))
    if keep_best:
        most = overlap.amax(1, keepdim=True)
        row, anchor = ((overlap == most) & (most > 0)).nonzero(as_tuple=True)
        matched[owner[row], anchor] = nearest[owner[row], anchor]
    return matched


def sample_anchors(matched: Tensor, count: int, positive: float) -> tuple[Tensor, Tensor]:
    """A random `count` of each image's anchors, at most the part `positive` of them matched ones (Faster R-CNN sec. 3.1.3).

    Args:
        matched: what `match_anchors` returned, (B, A).

    Returns:
        two bool (B, A): the chosen matched anchors, and the chosen background anchors.
    """
    is_object, is_background = matched >= 0, matched == BACKGROUND
    objects = is_object.sum(1).clamp(max=int(count * positive))
    return _random_rows(is_object, objects, count), _random_rows(is_background, count - objects, count)


def _random_rows(allowed: Tensor, quota: Tensor, most: int) -> Tensor:
    """Of the allowed columns of each row of a bool (B, A), a random `quota` (B,), which is at most `most`."""
    noise = torch.where(allowed, torch.rand(allowed.shape, device=allowed.device), -1.0)
    value, column = noise.topk(min(most, allowed.shape[1]), dim=1)
    chosen = (torch.arange(value.shape[1], device=value.device) < quota[:, None]) & (value >= 0)
    return torch.zeros_like(allowed).scatter(1, column, chosen)


def flatten_predictions(maps: Sequence[Tensor], columns: int) -> Tensor:
    """Convolutional predictions, one (B, n * columns, H, W) for each level -> (B, all anchors, columns)."""
    return torch.cat([m.permute(0, 2, 3, 1).reshape(m.shape[0], -1, columns) for m in maps], dim=1)


def pad_images(images: Sequence[Tensor], multiple: int = 32) -> Tensor:
    """Images (C, H_i, W_i), zero-padded right and below to a common size that `multiple` divides: (B, C, H, W)."""
    height, width = (-(-max(x.shape[i] for x in images) // multiple) * multiple for i in (1, 2))
    return torch.stack([F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in images])
