"""How good an optical flow is, by the protocols of MPI Sintel and KITTI: means over all pixels of all pairs, not over pairs.

    epe                         end-point error |w - w*|, pixels
    f1_all                      share of pixels that are wrong by more than 3 pixels and by more than 5% of the true speed (KITTI's Fl-all), 0 to 1
    epe_visible, epe_occluded   of pixels that the second picture shows, and that it does not (Sintel's "matched" and "unmatched")
    epe_slow, _middle, _fast    of pixels whose true speed is 0 to 10, 10 to 40, 40 and more pixels (Sintel's s0-10, s10-40, s40+)

Metrics of pixels that there are none of are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

WRONG = 3.0, 0.05
SPEEDS = 10.0, 40.0
PARTS = ("visible", "occluded", "slow", "middle", "fast")


def end_point_error(flow: Tensor, truth: Tensor) -> Tensor:
    """|w - w*|: (…, 2, H, W) twice -> (…, 1, H, W)."""
    return (flow - truth).square().sum(-3, keepdim=True).sqrt()


def wrong(error: Tensor, truth: Tensor) -> Tensor:
    """Which end-point errors (…, 1, H, W) count as wrong on KITTI, given the true flow (…, 2, H, W): bool."""
    speed = truth.square().sum(-3, keepdim=True).sqrt()
    return (error > WRONG[0]) & (error > WRONG[1] * speed)


class FlowMetrics(Metric):
    """Sums over pixels; see the module's docstring."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(2 + len(PARTS), dtype=torch.float64)
        self.add_state("sums", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("counts", zeros.clone(), dist_reduce_fx="sum")

    def update(self, flow: Tensor, truth: Tensor, valid: Tensor, occluded: Tensor | None = None) -> None:
        """flow, truth: (…, 2, H, W). valid, occluded: bool (…, 1, H, W); without `occluded` nothing is said of visible and hidden pixels."""
        error = end_point_error(flow, truth)
        speed = truth.square().sum(-3, keepdim=True).sqrt()
        nothing = torch.zeros_like(valid)
        masks = [valid, valid]
        masks += [nothing, nothing] if occluded is None else [valid & ~occluded, valid & occluded]
        masks += [speed < SPEEDS[0], (speed >= SPEEDS[0]) & (speed < SPEEDS[1]), speed >= SPEEDS[1]]
        values = [error, wrong(error, truth).to(error.dtype)] + [error] * len(PARTS)
        for i, (value, mask) in enumerate(zip(values, masks, strict=True)):
            mask = mask & valid
            self.sums[i] += torch.where(mask, value, 0.0).double().sum()
            self.counts[i] += mask.sum()

    def compute(self) -> dict[str, float]:
        names = ["epe", "f1_all", *(f"epe_{part}" for part in PARTS)]
        return {
            name: float(total / count)
            for name, total, count in zip(names, self.sums, self.counts, strict=True)
            if float(count) > 0
        }
