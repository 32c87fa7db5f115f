"""Warping by a flow: the second picture read where each pixel of the first one has gone.

A flow is (B, 2, H, W) in pixels, x to the right and y down; pixels have whole coordinates at their middles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

INSIDE = 0.999  # how much of a bilinear reading must come from inside the picture


def pixel_grid(height: int, width: int, like: Tensor) -> Tensor:
    """The pixels' own places, x and y: (2, H, W), of the dtype and device of `like`."""
    y = torch.arange(height, dtype=like.dtype, device=like.device)
    x = torch.arange(width, dtype=like.dtype, device=like.device)
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])


def read_maps(maps: Tensor, places: Tensor, padding: str = "zeros", mode: str = "bilinear") -> Tensor:
    """Maps (B, C, H, W) at places (B, 2, h, w), x and y in pixels: (B, C, h, w).

    Args:
        padding: "zeros" or "border", what lies outside.
        mode: "bilinear" or "nearest".
    """
    height, width = maps.shape[-2:]
    x, y = places[:, 0], places[:, 1]
    # in whole pixels measured from border to border: no division by a width of 1 less 1
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    return F.grid_sample(maps, grid.to(maps.dtype), mode, padding, align_corners=False)


def inside(places: Tensor, height: int, width: int, least: float = INSIDE) -> Tensor:
    """Whether places (B, 2, h, w) lie in a picture, up to a thousandth of a pixel: bool (B, 1, h, w).

    The weight that a bilinear reading gives to pixels of the picture, as reading a map of ones would find it.
    """
    x, y = places[:, :1], places[:, 1:]
    of_x = torch.minimum(x + 1, width - x).clamp(0, 1)
    of_y = torch.minimum(y + 1, height - y).clamp(0, 1)
    return of_x * of_y >= least


def backward_warp(
    second: Tensor, flow: Tensor, padding: str = "zeros", mode: str = "bilinear"
) -> tuple[Tensor, Tensor]:
    """The first picture, built from the second one: second (B, C, H, W) read at x + flow(x).

    Returns:
        the reading (B, C, H, W), with `padding` outside; and where it came from inside the picture, bool (B, 1, H, W).
    """
    height, width = second.shape[-2:]
    places = pixel_grid(height, width, flow) + flow
    return read_maps(second, places, padding, mode), inside(places, height, width)
