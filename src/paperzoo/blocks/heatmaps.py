"""Heat maps of keypoints: Gaussian targets, their maxima to a part of a cell, peaks, mirroring. For whole batches at once.

Places are x and y in cells of the map; the middle of the first cell is (0, 0). A map of stride s and an image share their
first pixel's middle: cell u lies at pixel s * u, as the public pose networks have it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian_heatmaps(
    keypoints: Tensor, weight: Tensor, size: tuple[int, int], sigma: float, rounded: bool = True
) -> tuple[Tensor, Tensor]:
    """Gaussians of height 1 around keypoints, cut off at three deviations.

    Args:
        keypoints: (…, K, 2) in cells.
        weight: (…, K), 0 where a keypoint is not annotated.
        size: height and width of the maps.
        rounded: centred on the nearest cell, as in most released code; else on the place itself ("unbiased").

    Returns:
        float32 (…, K, h, w), zero where the weight is at most 0.5; and the weights, 0 also where no part of the Gaussian
        falls on the map.
    """
    height, width = size
    centre = (keypoints + 0.5).trunc() if rounded else keypoints  # int(x + 0.5), also below zero
    x, y = centre[..., 0, None], centre[..., 1, None]
    reach = 3 * sigma
    dx, dy = torch.arange(width, device=x.device) - x, torch.arange(height, device=x.device) - y
    gx = torch.exp(-dx.square() / (2 * sigma**2)) * (dx.abs() <= reach)
    gy = torch.exp(-dy.square() / (2 * sigma**2)) * (dy.abs() <= reach)
    limit = keypoints.new_tensor([width, height])
    outside = ((centre - reach >= limit) | (centre + reach + 1 < 0)).any(-1)
    weight = weight * ~outside
    shown = (weight > 0.5).to(gx.dtype)[..., None, None]
    return gy[..., :, None] * gx[..., None, :] * shown, weight


def maxima(heatmaps: Tensor) -> tuple[Tensor, Tensor]:
    """The highest cell of each map: (…, h, w) -> places (…, 2), float, and values (…). Maps without a positive value give (0, 0)."""
    value, index = heatmaps.flatten(-2).max(-1)
    width = heatmaps.shape[-1]
    place = torch.stack([index % width, torch.div(index, width, rounding_mode="floor")], -1).to(heatmaps.dtype)
    return place * (value > 0)[..., None], value


def neighbours(heatmaps: Tensor, place: Tensor, dx: int, dy: int) -> Tensor:
    """The values (…) of maps (…, h, w) beside whole places (…, 2); at the border the border's own."""
    height, width = heatmaps.shape[-2:]
    x = (place[..., 0].long() + dx).clamp(0, width - 1)
    y = (place[..., 1].long() + dy).clamp(0, height - 1)
    return heatmaps.flatten(-2).gather(-1, (y * width + x)[..., None])[..., 0]


def quarter_offset(heatmaps: Tensor, place: Tensor) -> Tensor:
    """Maxima moved a quarter cell towards the higher neighbour in x and in y (Newell et al. 2016, sec. 3.1).

    As in the released code, not within the outermost two columns and rows on the upper left, one on the lower right.
    """
    dx = neighbours(heatmaps, place, 1, 0) - neighbours(heatmaps, place, -1, 0)
    dy = neighbours(heatmaps, place, 0, 1) - neighbours(heatmaps, place, 0, -1)
    height, width = heatmaps.shape[-2:]
    limit = place.new_tensor([width - 1, height - 1])
    free = ((place > 1) & (place < limit)).all(-1, keepdim=True)
    return place + 0.25 * torch.stack([dx, dy], -1).sign() * free


def smoothed(heatmaps: Tensor, deviation: float, size: int) -> Tensor:
    """Maps (B, K, h, w) blurred with a Gaussian of `size` (odd) cells, zeros beyond the border."""
    at = torch.arange(size, device=heatmaps.device, dtype=heatmaps.dtype) - size // 2
    kernel = torch.exp(-at.square() / (2 * deviation**2))
    kernel = kernel / kernel.sum()
    flat = heatmaps.flatten(0, 1)[:, None]
    flat = F.conv2d(flat, kernel[None, None, :, None], padding=(size // 2, 0))
    return F.conv2d(flat, kernel[None, None, None, :], padding=(0, size // 2))[:, 0].view_as(heatmaps)


def taylor_offset(heatmaps: Tensor, place: Tensor, size: int = 11) -> Tensor:
    """Maxima moved to where a Gaussian through their surroundings has its peak (DARK, Zhang et al. 2020, eq. 3 to 9).

    Args:
        heatmaps: (B, K, h, w).
        place: (B, K, 2), their maxima.
        size: of the blur in cells; 11 for targets with a deviation of 2, 17 for 3.
    """
    deviation = 0.3 * ((size - 1) * 0.5 - 1) + 0.8  # what OpenCV takes for a kernel of this size
    soft = smoothed(heatmaps, deviation, size)
    peak = heatmaps.amax((-2, -1), keepdim=True)
    soft = (soft * peak / soft.amax((-2, -1), keepdim=True).clamp(min=1e-10)).clamp(min=1e-10).log()
    at = lambda x, y: neighbours(soft, place, x, y)  # noqa: E731
    dx, dy = (at(1, 0) - at(-1, 0)) / 2, (at(0, 1) - at(0, -1)) / 2
    dxx, dyy = (at(2, 0) - 2 * at(0, 0) + at(-2, 0)) / 4, (at(0, 2) - 2 * at(0, 0) + at(0, -2)) / 4
    dxy = (at(1, 1) - at(-1, 1) - at(1, -1) + at(-1, -1)) / 4
    determinant = dxx * dyy - dxy * dxy
    safe = torch.where(determinant == 0, 1.0, determinant)
    offset = (
        torch.stack([dxy * dy - dyy * dx, dxy * dx - dxx * dy], -1) / safe[..., None]
    )  # minus the inverse Hessian times d
    height, width = heatmaps.shape[-2:]
    limit = place.new_tensor([width - 2, height - 2])
    free = ((place > 1) & (place < limit)).all(-1) & (determinant != 0)
    return place + offset * free[..., None]


def flip_back(heatmaps: Tensor, flip: Sequence[int], shift: bool = True) -> Tensor:
    """The maps of mirrored images, (…, K, h, w), as those of the images: mirrored, left and right keypoints exchanged.

    Args:
        flip: K: the keypoint that stands in each one's place.
        shift: moved right by one cell. Mirroring keeps the last pixel of a cell where the map keeps the first, so that
            at stride 4 the mirrored map lies 3/4 of a cell too far left.
    """
    back = heatmaps.flip(-1)[..., list(flip), :, :]
    return torch.cat([back[..., :1], back[..., :-1]], -1) if shift else back


def peaks(heatmaps: Tensor, threshold: float) -> Tensor:
    """bool, as the maps (…, h, w): cells above the threshold that no neighbour in their row or column exceeds."""
    padded = F.pad(heatmaps, (1, 1, 1, 1))
    inner = padded[..., 1:-1, 1:-1]
    higher = [padded[..., 1:-1, :-2], padded[..., 1:-1, 2:], padded[..., :-2, 1:-1], padded[..., 2:, 1:-1]]
    mask = inner > threshold
    for other in higher:
        mask &= inner >= other
    return mask
