"""Intersection over union of parts, by the protocol of ShapeNetPart."""

from __future__ import annotations

import torch
from torch import Tensor


def restricted(scores: Tensor, parts: list[int]) -> Tensor:
    """The best label among those of a category: scores (N, K) -> int64 (N,). Labels of other categories are no answers."""
    allowed = torch.tensor(parts, device=scores.device)
    return allowed[scores[:, allowed].argmax(1)]


def shape_iou(answer: Tensor, truth: Tensor, parts: list[int]) -> float:
    """The mean IoU over the parts of one shape: labels int64 (N,), (N,). A part that neither has counts as 1; points of truth -1 are left out."""
    answer, truth = answer[truth >= 0], truth[truth >= 0]
    part = torch.tensor(parts, device=truth.device)[:, None]
    ours, theirs = answer == part, truth == part
    union = (ours | theirs).sum(1)
    return float(torch.where(union == 0, 1.0, (ours & theirs).sum(1) / union.clamp(min=1)).mean())


class PartIoU:
    """Sums of shapes' IoUs by category, so that ranks can be averaged."""

    def __init__(self, categories: int) -> None:
        self.sums = torch.zeros(2, categories, dtype=torch.float64)
        self.points = torch.zeros(2, dtype=torch.float64)

    def add(self, answer: Tensor, truth: Tensor, category: int, parts: list[int]) -> None:
        self.sums[:, category] += torch.tensor([shape_iou(answer, truth, parts), 1.0], dtype=torch.float64)
        counted = truth >= 0
        self.points += torch.tensor([int((answer == truth)[counted].sum()), int(counted.sum())], dtype=torch.float64)

    def metrics(self, average) -> dict[str, float]:
        """Over shapes (instance), over categories of the means over their shapes (category), and the share of right points.

        `average` takes the mean of a tensor over ranks.
        """
        total, count = average(self.sums.flatten()).view(2, -1)
        hits, points = average(self.points).tolist()
        present = count > 0
        return {
            "instance_miou": float(total.sum() / count.sum()),
            "category_miou": float((total[present] / count[present]).mean()),
            "point_accuracy": hits / points,
        }

    def by_category(self, average) -> list[float]:
        total, count = average(self.sums.flatten()).view(2, -1)
        return (total / count.clamp(min=1)).tolist()
