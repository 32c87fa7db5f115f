"""Interest points: from heat maps to points, descriptors at points, matches between two pictures.

Places are x and y in pixels; the middle of the first pixel is (0, 0).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms


def suppress(heat: Tensor, radius: int, rounds: int | None = None) -> Tensor:
    """Greedy suppression for whole maps: the highest pixel stays and silences all within `radius` along x and y, then the next one, and so on.

    In each round every pixel that is the highest of its surroundings stays; what it silences is out of the next round. Without a limit of rounds this ends
    where taking one pixel after the other ends (equal neighbours both stay).

    Args:
        heat: (B, H, W), not negative.
        rounds: None until nothing changes.

    Returns:
        heat where a pixel stays, else 0.
    """
    left, kept = heat, torch.zeros_like(heat)
    done = 0
    while True:
        peak = (left == highest(left, radius)) & (left > 0)
        kept = torch.where(peak, heat, kept)
        silenced = highest(peak.to(heat.dtype), radius) > 0
        left = torch.where(silenced, 0.0, left)
        done += 1
        if done == rounds or not bool((left > 0).any()):
            return kept


def highest(maps: Tensor, radius: int) -> Tensor:
    """The largest value within `radius` along x and y, (B, H, W): first along one, then along the other."""
    side = 2 * radius + 1
    across = F.max_pool2d(maps[:, None], (1, side), 1, (0, radius))
    return F.max_pool2d(across, (side, 1), 1, (radius, 0))[:, 0]


def suppress_boxes(heat: Tensor, side: float, iou: float = 0.1) -> Tensor:
    """The same by overlap: squares of this side around the points of one map (H, W), greedy."""
    y, x = heat.nonzero(as_tuple=True)
    centres = torch.stack([x, y], 1).to(heat.dtype)
    kept = nms(torch.cat([centres - side / 2, centres + side / 2], 1), heat[y, x], iou)
    out = torch.zeros_like(heat)
    out[y[kept], x[kept]] = heat[y[kept], x[kept]]
    return out


def strongest(heat: Tensor, count: int, least: float = 0.0, border: int = 0) -> tuple[Tensor, Tensor]:
    """The highest pixels above `least` of one map (H, W), at least `border` pixels from its sides: places (N, 2) and values (N,), the highest first."""
    height, width = heat.shape
    inner = heat[border : height - border, border : width - border]
    y, x = (inner > least).nonzero(as_tuple=True)
    values = inner[y, x]
    values, order = values.topk(min(count, len(values)))
    places = torch.stack([x[order], y[order]], 1) + border
    return places.to(heat.dtype), values


def describe(maps: Tensor, places: Tensor, stride: int) -> Tensor:
    """Descriptors of unit length at places (N, 2) of one picture, read between the cells of a map (C, h, w): (N, C).

    Cell (0, 0) has its middle at (stride - 1) / 2.
    """
    height, width = maps.shape[1:]
    cells = (places + 0.5) / stride  # from the border
    grid = 2 * cells / cells.new_tensor([width, height]) - 1
    # beyond the outermost middles the border's own cell, as reading between the corner cells does for what lies inside
    read = F.grid_sample(maps[None], grid[None, None].to(maps.dtype), padding_mode="border", align_corners=False)
    return F.normalize(read[0, :, 0].T, dim=1)


def mutual_nearest(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of descriptors of unit length (N, C), (M, C) that are each other's nearest: int64 (K, 2) and their distances (K,)."""
    if not len(first) or not len(second):
        return torch.zeros(0, 2, dtype=torch.int64, device=first.device), first.new_zeros(0)
    cosine = first @ second.T
    best, there = cosine.max(1)
    mutual = cosine.argmax(0)[there] == torch.arange(len(first), device=first.device)
    distance = (2 - 2 * best.clamp(-1, 1)).sqrt()
    rows = mutual.nonzero()[:, 0]
    return torch.stack([rows, there[rows]], 1), distance[rows]
