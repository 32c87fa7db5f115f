"""DenseDepth's loss (Alhashim & Wonka, 2018, sec. 3.2): distance, slopes and structure of the reciprocal depth y = m / depth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RANGE = 100.0  # y lies in 1 … 100: depths between a hundredth of m and m
WINDOW, SIGMA = 11, 1.5  # of SSIM, as in its paper and in TensorFlow
DISTANCE_WEIGHT = 0.1  # lambda, eq. (1)


def reciprocal(depth: Tensor, max_depth: float) -> Tensor:
    """y = m / depth of depths held between m / 100 and m; 0 where the depth is unknown (0)."""
    y = max_depth / depth.clamp(max_depth / RANGE, max_depth)
    return torch.where(depth > 0, y, 0.0)


def depth_of(y: Tensor, max_depth: float) -> Tensor:
    """The inverse, between m / 100 and m, whatever the network says."""
    return max_depth / y.clamp(1.0, RANGE)


def reduced(y: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Reciprocal depth (B, 1, H, W) at the size of the network's answer: means over the known pixels below each, and where there are any."""
    known = F.adaptive_avg_pool2d((y > 0).to(y.dtype), size)
    return F.adaptive_avg_pool2d(y, size) / known.clamp(min=1e-6), known > 0


def slopes(y: Tensor) -> tuple[Tensor, Tensor]:
    """Forward differences down and to the right, (B, 1, H - 1, W) and (B, 1, H, W - 1)."""
    return y[..., 1:, :] - y[..., :-1, :], y[..., 1:] - y[..., :-1]


def gaussian(size: int, like: Tensor) -> Tensor:
    """Weights of a window, with sum 1."""
    away = torch.arange(size, dtype=like.dtype, device=like.device) - size // 2
    weights = torch.exp(-away.square() / (2 * SIGMA**2))
    return weights / weights.sum()


def ssim(one: Tensor, other: Tensor, value_range: float = RANGE) -> Tensor:
    """Mean structural similarity of maps (B, 1, H, W): Gaussian windows of 11 pixels (or the whole map if smaller), inside the map alone."""
    rows, columns = (gaussian(min(WINDOW, n), one) for n in one.shape[-2:])
    stacked = torch.cat([one, other, one * one, other * other, one * other], 1).flatten(0, 1)[:, None]
    means = F.conv2d(F.conv2d(stacked, rows.view(1, 1, -1, 1)), columns.view(1, 1, 1, -1))
    a, b, aa, bb, ab = means.unflatten(0, (len(one), 5)).unbind(1)
    c1, c2 = (0.01 * value_range) ** 2, (0.03 * value_range) ** 2
    above = (2 * a * b + c1) * (2 * (ab - a * b) + c2)
    return (above / ((a * a + b * b + c1) * (aa - a * a + bb - b * b + c2))).mean()


@dataclass(frozen=True)
class Parts:
    """L = 0.1 distance + edges + structure, eq. (1); scalars."""

    distance: Tensor
    edges: Tensor
    structure: Tensor

    @property
    def total(self) -> Tensor:
        return DISTANCE_WEIGHT * self.distance + self.edges + self.structure


def densedepth_loss(y: Tensor, truth: Tensor, known: Tensor | None = None) -> Parts:
    """The three losses between predicted and true reciprocal depth, (B, 1, H, W) each.

    Args:
        known: bool (B, 1, H, W), where the truth is known; None: everywhere, as in the paper, whose depth was filled in. Elsewhere the
            prediction stands in for the truth, so that nothing is learned there.

    The distance is a mean over known pixels, eq. (3); slopes are a mean over all pixels, the last row and column having none, eq. (4)
    as TensorFlow counts; the structure is (1 - SSIM) / 2, eq. (5).
    """
    if known is None:
        known = torch.ones_like(truth, dtype=torch.bool)
    truth = torch.where(known, truth, y.detach())
    count = known.sum().clamp(min=1)
    distance = (y - truth).abs().sum() / count
    apart = y - truth
    both = (known[..., 1:, :] & known[..., :-1, :], known[..., 1:] & known[..., :-1])
    edges = sum((s.abs() * b).sum() for s, b in zip(slopes(apart), both, strict=True)) / count
    structure = ((1 - ssim(y, truth)) / 2).clamp(0, 1)
    return Parts(distance, edges, structure)
