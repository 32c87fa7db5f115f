"""R-FCN's second stage (Dai et al., NeurIPS 2016, arXiv:1605.06409), which FGFA builds on (sec. 4.1): no layer after the regions.

1x1 convolutions make k x k score maps for each class and for the box; bin (p, q) of a region is the mean of its part of the maps
number (p, q), and the bins vote.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, ps_roi_pool

from paperzoo.blocks.boxes import (
    IGNORED,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    join_boxes,
    sample_anchors,
)
from paperzoo.papers.detection.fast_rcnn.model import exact, match_regions, with_image_number
from paperzoo.papers.detection.fast_rcnn.pooling import parts
from paperzoo.papers.detection.fast_rcnn.proposals import as_rows


def region_votes(maps: Tensor, regions: Tensor, bins: int, scale: float) -> Tensor:
    """Score maps (B, C * bins^2, H, W) and regions (R, 5), the image's number before x1 y1 x2 y2 -> the bins' mean (R, C).

    `torchvision.ops.ps_roi_pool` never reads a map's last row and column; with one of padding behind them it does.
    """
    maps = exact(maps)
    regions = regions.to(maps.dtype)
    if torch.compiler.is_compiling() or maps.is_meta:
        return plain_pool(maps, regions, bins, scale).mean((2, 3))
    return ps_roi_pool(F.pad(maps, (0, 1, 0, 1)), regions, bins, scale).mean((2, 3))


def plain_pool(maps: Tensor, regions: Tensor, bins: int, scale: float) -> Tensor:
    """The same in plain tensor operations, for exported programs: means of rectangles from sums over everything above and left of them."""
    channels, height, width = maps.shape[1:]
    x1, y1, x2, y2 = (regions[:, 1:] * scale + 0.5).floor().unbind(1)
    top, bottom = parts(y1, y2 - 1, bins, height)  # (R, bins) each
    left, right = parts(x1, x2 - 1, bins, width)
    sums = F.pad(maps.cumsum(2).cumsum(3), (1, 0, 1, 0)).flatten()
    channel = torch.arange(channels, device=maps.device).reshape(1, -1, bins, bins)
    first = (regions[:, 0].long()[:, None, None, None] * channels + channel) * (height + 1)

    def corner(y: Tensor, x: Tensor) -> Tensor:
        return sums[(first + y[:, None, :, None]) * (width + 1) + x[:, None, None, :]]

    total = corner(bottom, right) - corner(top, right) - corner(bottom, left) + corner(top, left)
    area = ((bottom - top)[:, :, None] * (right - left)[:, None, :])[:, None]
    return torch.where(area > 0, total / area.clamp(min=1), 0.0)


class RFCNHeads(nn.Module):
    """Regions of one map to classes and boxes; boxes move alike whatever the class.

    Args:
        in_channels: of the map.
        num_classes: without background.
        bins: k.
        stride: of the map.
        high, low: IoU from which a region is an object, and below which it is background.
        hard: so many regions of an image with the largest loss are learned from (online hard example mining); None: a
            random `sampled`, of which at most the part `positive` are objects.
        weights: what box deltas are multiplied with.
        score_threshold, nms_threshold, detections: of `postprocess`.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        bins: int = 7,
        stride: int = 16,
        *,
        high: float = 0.5,
        low: float = 0.5,
        hard: int | None = 128,
        sampled: int = 128,
        positive: float = 0.25,
        weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
        score_threshold: float = 0.001,
        nms_threshold: float = 0.3,
        detections: int = 300,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be 1 or more")
        self.bins, self.scale = bins, 1 / stride
        self.rfcn_cls = score_maps(in_channels, bins, num_classes + 1)
        self.rfcn_bbox = score_maps(in_channels, bins, 4)
        self.high, self.low, self.hard, self.sampled, self.positive = high, low, hard, sampled, positive
        self.weights = tuple(weights)
        self.score_threshold, self.nms_threshold, self.detections = score_threshold, nms_threshold, detections

    @property
    def num_classes(self) -> int:
        return self.rfcn_cls.out_channels // self.bins**2 - 1

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh score maps for another number of classes."""
        fresh = score_maps(self.rfcn_cls.in_channels, self.bins, num_classes + 1)
        self.rfcn_cls = fresh.to(self.rfcn_cls.weight)

    def look(self, features: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Regions (R, 5) -> logits (R, K + 1), deltas (R, 4)."""
        logits = region_votes(self.rfcn_cls(features), regions, self.bins, self.scale)
        return logits, region_votes(self.rfcn_bbox(features), regions, self.bins, self.scale)

    def forward(self, features: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Regions of each image, boxes (B, R, 4) -> logits (B, R, K + 1), deltas (B, R, 4); 0 for empty boxes."""
        logits, deltas = self.look(features, with_image_number(boxes))
        real = (boxes[..., 2:] > boxes[..., :2]).all(-1)[..., None]
        shape = boxes.shape[:2]
        return logits.reshape(*shape, logits.shape[-1]) * real, deltas.reshape(*shape, 4) * real

    def loss(self, features: Tensor, proposals: Tensor, targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Cross-entropy, and smooth L1 on the boxes of objects, both divided by the number of regions (Fast R-CNN, eq. 1).

        Args:
            proposals: (B, P, 4), filled up with empty boxes. The true boxes join them.
            targets: for each image {"boxes": (N, 4), "labels": int64 (N,)}.
        """
        boxes, owner = join_boxes(targets)
        regions = torch.cat([proposals, as_rows(targets)], dim=1)
        matched = match_regions(boxes, owner, regions, self.high, self.low)
        if self.hard is None:
            positive, negative = sample_anchors(matched, self.sampled, self.positive)
            usable = positive | negative
        else:
            usable = matched != IGNORED
        image, row = usable.nonzero(as_tuple=True)
        picked, box = regions[image, row], matched[image, row]
        logits, deltas = self.look(features, torch.cat([image[:, None].to(picked.dtype), picked], dim=1))
        labels = torch.cat([t["labels"] for t in targets])
        is_object = box >= 0
        wanted = torch.zeros_like(box)  # background
        wanted[is_object] = labels[box[is_object]] + 1
        target = torch.zeros_like(picked)
        target[is_object] = encode_boxes(boxes[box[is_object]], picked[is_object], self.weights)
        classification = F.cross_entropy(exact(logits), wanted, reduction="none")
        distance = F.smooth_l1_loss(exact(deltas), target, reduction="none").sum(1) * is_object
        if self.hard is not None:
            kept = hardest((classification + distance).detach(), image, row, tuple(matched.shape), self.hard)
            classification, distance = classification[kept], distance[kept]
        count = max(1, len(classification))
        return {"classification": classification.sum() / count, "boxes": distance.sum() / count}

    @torch.no_grad()
    def postprocess(
        self, boxes: Tensor, logits: Tensor, deltas: Tensor, sizes: Tensor, suppress: bool = True
    ) -> list[dict[str, Tensor]]:
        """The regions moved to their boxes, a box and score for each class, and non-maximum suppression within each class.

        Args:
            boxes: the regions (B, R, 4), filled up with empty boxes.
            logits, deltas: of `forward`.
            sizes: (B, 2) height and width of each image inside the canvas.
            suppress: False leaves overlapping boxes in.
        """
        scores = exact(logits).softmax(-1)[..., 1:]  # (B, R, K)
        moved = clip_boxes(decode_boxes(exact(deltas), boxes, self.weights), sizes)
        real = (boxes[..., 2:] > boxes[..., :2]).all(-1) & (moved[..., 2:] - moved[..., :2] >= 1e-2).all(-1)
        usable = (scores > self.score_threshold) & real[..., None]
        result = []
        for b, s, ok in zip(moved, scores, usable, strict=True):
            region, label = ok.nonzero(as_tuple=True)
            b, s = b[region], s[region, label]
            keep = batched_nms(b, s, label, self.nms_threshold) if suppress else s.argsort(descending=True)
            keep = keep[: self.detections]
            result.append({"boxes": b[keep], "scores": s[keep], "labels": label[keep]})
        return result


def score_maps(in_channels: int, bins: int, groups: int) -> nn.Conv2d:
    """A 1x1 convolution to bins^2 maps for each of `groups`."""
    layer = nn.Conv2d(in_channels, groups * bins**2, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


def hardest(loss: Tensor, image: Tensor, row: Tensor, shape: tuple[int, int], count: int) -> Tensor:
    """Which regions have one of the `count` largest losses of their image: bool (N,) for losses (N,) of regions at (image, row)."""
    table = loss.new_full(shape, -torch.inf)
    table[image, row] = loss
    best = table.topk(min(count, shape[1]), dim=1).indices
    return torch.zeros(shape, dtype=torch.bool, device=loss.device).scatter(1, best, True)[image, row]
