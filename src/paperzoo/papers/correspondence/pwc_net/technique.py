"""What PWC-Net learns from: one loss on every level of the pyramid (Sun et al., CVPR 2018), eq. (3) and (4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHTS = (0.005, 0.01, 0.02, 0.08, 0.32)  # alpha of the levels 2 … 6 (sec. 4)
EPSILON, Q = 0.01, 0.4  # of the robust loss
SCALE = 20.0


def downsampled(flow: Tensor, valid: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The mean of the known flow in each cell of a coarser level, in the same units.

    (B, 2, H, W), bool (B, 1, H, W) -> (B, 2, h, w), and bool (B, 1, h, w), the cells where any is known.
    """
    share = F.adaptive_avg_pool2d(valid.to(flow.dtype), size)
    mean = F.adaptive_avg_pool2d(torch.where(valid, flow, 0.0), size)
    return mean / share.clamp(min=1e-6), share > 0


def pyramid_loss(
    flows: Sequence[Tensor], truth: Tensor, valid: Tensor, robust: bool = False, weights: Sequence[float] = WEIGHTS
) -> Tensor:
    """sum_l alpha_l sum_x |w_l(x) - w*_l(x)|, the mean over the batch.

    The norm is L2, eq. (3); or, with `robust`, (L1 + epsilon)^q, which minds outliers less, eq. (4). The truth is divided by 20 and reduced to each
    level's size, but not scaled with it.

    Args:
        flows: (B, 2, h, w), finest first; with fewer levels than weights the coarsest keep theirs.
        truth: (B, 2, H, W), pixels. valid: bool (B, 1, H, W).
    """
    total = truth.new_zeros(())
    for weight, flow in zip(weights[len(weights) - len(flows) :], flows, strict=True):
        target, known = downsampled(truth / SCALE, valid, tuple(flow.shape[-2:]))
        apart = flow.float() - target
        if robust:
            error = (apart.abs().sum(1, keepdim=True) + EPSILON) ** Q
        else:
            error = (apart.square().sum(1, keepdim=True) + 1e-12).sqrt()  # a slope of 0, not of NaN, at 0
        total = total + weight * torch.where(known, error, 0.0).sum()
    return total / len(truth)
