"""Panoptic Segmentation (Kirillov et al., CVPR 2019, arXiv:1801.00868).

The panoptic quality (sec. 4) with its rules for void and crowds (sec. 4.3), and the heuristic that merges the outputs of
an instance and a semantic network (sec. 7). A map is a `paperzoo.blocks.panoptic.PanopticMap`. What differs from the paper:

- Small regions of stuff are dropped from a merged map, as the released code does; the paper does not mention it.
- The area of an unmatched prediction that lies in crowds is that in all crowds of its class; the released code, for data with
  at most one crowd a class and image, looks at the last.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from paperzoo.blocks.panoptic import PanopticMap, Segment, numbered

# -- segment matching (sec. 4.1) ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matches:
    """What two maps of an image have in common.

    pairs: int64 (M, 2), rows of the truth's and the prediction's segments; iou: float64 (M,), each above 1/2.
    missed: bool (T,), true segments that count as false negatives; wrong: bool (P,), predicted false positives.
    """

    pairs: Tensor
    iou: Tensor
    missed: Tensor
    wrong: Tensor


def match_segments(prediction: PanopticMap, truth: PanopticMap) -> Matches:
    """Segments of one category match if their IoU is above 1/2; then no segment has two matches (theorem 1).

    Void of the truth is taken out of predictions before the IoU. A crowd is no false negative; an unmatched prediction that lies
    for more than half in void and in crowds of its category is no false positive (sec. 4.3).

    Raises:
        ValueError: if the maps have different sizes, or ids that no segment describes.
    """
    if prediction.ids.shape != truth.ids.shape:
        raise ValueError(f"the maps have the sizes {tuple(prediction.ids.shape)} and {tuple(truth.ids.shape)}")
    rows, columns = numbered(truth)[1], numbered(prediction)[1]
    there, found = len(truth.segments) + 1, len(prediction.segments) + 1
    shared = torch.bincount((rows * found + columns).flatten(), minlength=there * found).reshape(there, found)
    area_true, area_found = shared[1:].sum(1), shared[:, 1:].sum(0)
    in_void, inside = shared[0, 1:], shared[1:, 1:]
    union = area_true[:, None] + area_found - inside - in_void
    same = categories(truth)[:, None] == categories(prediction)
    crowd = torch.tensor([s.crowd for s in truth.segments], dtype=torch.bool, device=shared.device)
    match = same & ~crowd[:, None] & (2 * inside > union)  # IoU > 1/2, in whole numbers
    pairs = match.nonzero()
    iou = inside[match].double() / union[match]
    forgiven = in_void + (inside * (same & crowd[:, None])).sum(0)
    return Matches(pairs, iou, ~match.any(1) & ~crowd, ~match.any(0) & (2 * forgiven <= area_found))


def categories(panoptic: PanopticMap) -> Tensor:
    return torch.tensor([s.category for s in panoptic.segments], dtype=torch.int64, device=panoptic.ids.device)


# -- the quality (sec. 4.2) --------------------------------------------------------------------------------------------


class PanopticQuality(Metric):
    """PQ = sum of IoU over matches / (TP + FP / 2 + FN / 2) for each category, over all images that `update` has seen.

    PQ = SQ · RQ: segmentation quality, the mean IoU of matches; recognition quality, an F1 score.

    Args:
        num_categories: K.
        things: the categories that are countable.
    """

    full_state_update = False
    higher_is_better = True
    iou: Tensor
    hits: Tensor
    wrong: Tensor
    missed: Tensor

    def __init__(self, num_categories: int, things: Collection[int] = (), **options: Any) -> None:
        super().__init__(**options)
        self.num_categories, self.things = num_categories, frozenset(things)
        for name in ("iou", "hits", "wrong", "missed"):
            kind = torch.float64 if name == "iou" else torch.int64
            self.add_state(name, default=torch.zeros(num_categories, dtype=kind), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[PanopticMap], truths: Sequence[PanopticMap]) -> None:
        """Count the segments of some images.

        Raises:
            ValueError: if a category is not below `num_categories`; and as `match_segments`.
        """
        for prediction, truth in zip(predictions, truths, strict=True):
            for segment in (*prediction.segments, *truth.segments):
                if not 0 <= segment.category < self.num_categories:
                    raise ValueError(
                        f"segment {segment.id} has the category {segment.category} of {self.num_categories}"
                    )
            found = match_segments(prediction, truth)
            of_truth, of_prediction = categories(truth), categories(prediction)
            matched = of_truth[found.pairs[:, 0]]
            self.iou.index_add_(0, matched.to(self.iou.device), found.iou.to(self.iou.device))
            for count, who in ((self.hits, matched), (self.missed, of_truth[found.missed])):
                count += torch.bincount(who, minlength=self.num_categories).to(count.device)
            self.wrong += torch.bincount(of_prediction[found.wrong], minlength=self.num_categories).to(
                self.wrong.device
            )

    def by_category(self) -> dict[str, Tensor]:
        """PQ, SQ and RQ of each category, float64 (K,) in [0, 1]; NaN for one that was neither there nor found."""
        total = self.hits + 0.5 * self.wrong + 0.5 * self.missed
        rq = self.hits / total.double()
        sq = torch.where(total > 0, self.iou / self.hits.clamp(min=1), torch.nan)
        return {"PQ": self.iou / total, "SQ": sq, "RQ": rq}

    def compute(self) -> dict[str, float]:
        """PQ, SQ, RQ, averaged over the categories that were there or found; and of things ("PQ_things") and stuff alone."""
        each = self.by_category()
        thing = torch.tensor([k in self.things for k in range(self.num_categories)], device=self.iou.device)
        numbers = {}
        for ending, kept in (("", torch.ones_like(thing)), ("_things", thing), ("_stuff", ~thing)):
            values = {f"{name}{ending}": float(value[kept].nanmean()) for name, value in each.items()}
            numbers |= {name: value for name, value in values.items() if value == value}
        return numbers


# -- merging (sec. 7) --------------------------------------------------------------------------------------------------


def merge(
    masks: Tensor,
    scores: Tensor,
    labels: Tensor,
    semantic: Tensor,
    things: Collection[int],
    confidence: float = 0.5,
    overlap: float = 0.5,
    smallest: float = 64 * 64,
) -> PanopticMap:
    """A panoptic map from overlapping instances and a semantic map.

    From the most confident instance on each takes the pixels that are still free, or none if too few of its own are; what is
    left goes to stuff. Conflicts between things and stuff are thus decided for the thing.

    Args:
        masks: bool (N, H, W). scores: (N,). labels: int64 (N,), categories.
        semantic: int64 (H, W), categories; those of things, and negative ones, leave their pixels in no segment.
        things: the countable categories.
        confidence: instances with a lower score are not looked at.
        overlap: an instance is dropped if more than this part of it was taken before.
        smallest: regions of stuff with fewer pixels are dropped.
    """
    ids = torch.zeros(semantic.shape, dtype=torch.int64, device=semantic.device)
    segments: list[Segment] = []
    order = scores.argsort(descending=True, stable=True)
    # one after the other, as each depends on those before it
    for i in order[scores[order] >= confidence].tolist():
        area, taken = (int(v) for v in torch.stack([masks[i].sum(), (masks[i] & (ids > 0)).sum()]))
        if area == 0 or taken > overlap * area:
            continue
        free = masks[i] & (ids == 0)
        left = int(free.sum())
        if left:
            number = len(segments) + 1
            ids[free] = number
            segments.append(Segment(number, int(labels[i]), True, left, score=float(scores[i])))
    rest = torch.where(ids == 0, semantic, -1)
    found, counts = rest.unique(return_counts=True)
    for category, area in zip(found.tolist(), counts.tolist(), strict=True):
        if category >= 0 and category not in things and area >= smallest:
            number = len(segments) + 1
            ids[rest == category] = number
            segments.append(Segment(number, category, False, area))
    return PanopticMap(ids, tuple(segments))
