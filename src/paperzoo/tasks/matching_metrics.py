"""How well points are carried from one picture to another: the percentage of correct keypoints (PCK), a mean over pairs, as PF-PASCAL is measured.

pck             share of a pair's points that end within `alpha` times a length of where they belong, 0 to 1; the mean over pairs
pck_05, _10, _15    the same at 0.05, 0.1 and 0.15
pck_points      at `alpha`, the mean over all points of all pairs
mean_error      distance in lengths, the mean over pairs
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

ALPHAS = {"pck_05": 0.05, "pck_10": 0.1, "pck_15": 0.15}


class MatchingMetrics(Metric):
    """Sums over pairs; see the module's docstring."""

    full_state_update = False

    def __init__(self, alpha: float = 0.1) -> None:
        super().__init__()
        self.alphas = {"pck": alpha} | ALPHAS
        self.add_state("shares", torch.zeros(len(self.alphas), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("error", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("right", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("points", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, found: Tensor, truth: Tensor, length: float) -> None:
        """Places (N, 2) in pixels of the source, N >= 1, and the length that counts as 1; a pair of no extent is left out."""
        if not len(truth) or not length > 0:
            return
        distance = (found - truth).double().norm(dim=1) / length
        for i, alpha in enumerate(self.alphas.values()):
            self.shares[i] += (distance <= alpha).double().mean()
        self.error += distance.mean()
        self.pairs += 1
        self.right += (distance <= self.alphas["pck"]).sum()
        self.points += len(truth)

    def compute(self) -> dict[str, float]:
        if not float(self.pairs):
            return {}
        found = {name: float(value / self.pairs) for name, value in zip(self.alphas, self.shares, strict=True)}
        return found | {"pck_points": float(self.right / self.points), "mean_error": float(self.error / self.pairs)}
