"""How SuperPoint gets its labels and what it learns from: homographic adaptation and the joint loss (DeTone et al., 2018), sec. 3.4 and 5."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from paperzoo.blocks.cost_volume import global_correlation
from paperzoo.blocks.homography import HomographyRange, random_homographies, transform, warp
from paperzoo.blocks.warping import pixel_grid

CELL = 8
POSITIVE, NEGATIVE, BALANCE = 1.0, 0.2, 250.0  # m_p, m_n, lambda_d (sec. 6)


# -- labels --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def homographic_adaptation(
    detector: Callable[[Tensor], Tensor],
    picture: Tensor,
    count: int = 100,
    ranges: HomographyRange | None = None,
    rng: torch.Generator | None = None,
    chunk: int = 16,
) -> Tensor:
    """F(I) = mean over H of H^-1 f(H I), eq. (10), the picture itself among them; each pixel averaged over the views that show it.

    Args:
        detector: grey pictures (B, 1, H, W) -> heat (B, H, W).
        picture: (1, H, W).
        count: N_h, the views in all; from about 100 on more change little (sec. 5.2).
        ranges: of the random homographies.
        chunk: views that go through the detector together.

    Returns:
        heat (H, W).
    """
    size = tuple(picture.shape[-2:])
    ranges = HomographyRange(patch=0.8, perspective=0.2, zoom=0.2, outside=True) if ranges is None else ranges
    views = torch.eye(3)[None]
    if count > 1:
        views = torch.cat([views, random_homographies(count - 1, size, ranges, rng)])
    total, seen = torch.zeros(2, *size, device=picture.device)
    for matrices in views.to(picture.device).split(chunk):
        pictures, inside = warp(picture.expand(len(matrices), -1, -1, -1), matrices, size)
        # an edge of the picture inside a view looks like a corner: pixels near it do not count
        inside = -F.max_pool2d(-inside.float(), 7, 1, 3)
        heat = detector(pictures)[:, None] * inside
        back = torch.linalg.inv(matrices)
        total += warp(heat, back, size)[0][:, 0].sum(0)
        seen += warp(inside, back, size)[0][:, 0].sum(0)
    return total / seen.clamp(min=1e-3)


def cell_labels(points: Tensor, cell: int = CELL) -> Tensor:
    """A class for each cell: which of its pixels is a point, row by row, or the last one, 64, for none; of several a random one (sec. 3.4).

    bool (B, H, W) -> int64 (B, H / cell, W / cell).
    """
    cells = F.pixel_unshuffle(points[:, None].float(), cell)
    chosen = (cells * (1 + torch.rand_like(cells))).argmax(1)
    return torch.where(cells.amax(1) > 0, chosen, cell**2)


# -- losses --------------------------------------------------------------------------------------------------------------


def detector_loss(logits: Tensor, labels: Tensor, valid: Tensor | None = None, empty: float = 1.0) -> Tensor:
    """L_p, eq. (2) and (3): cross-entropy of each cell, the mean over cells.

    Args:
        logits: (B, 65, h, w). labels: int64 (B, h, w).
        valid: bool (B, h, w), cells that count; None: all.
        empty: weight of cells without a point. 1 in the paper; where nearly all are empty, less lets a network that learns briefly say anything else.
    """
    error = F.cross_entropy(logits.float(), labels, reduction="none")
    if empty != 1:
        error = torch.where(labels == logits.shape[1] - 1, empty * error, error)
    return error.mean() if valid is None else (error * valid).sum() / valid.sum().clamp(min=1)


def correspondences(homographies: Tensor, size: tuple[int, int], cell: int = CELL) -> Tensor:
    """s, eq. (4): which cells lie within a cell's side, 8 pixels, of each other after the homography.

    homographies (B, 3, 3), (h, w) in cells -> bool (B, h, w, h, w): cell of the picture, cell of the warped one.
    """
    middles = pixel_grid(*size, homographies).flatten(1).T * cell + (cell - 1) / 2
    moved = transform(homographies, middles.expand(len(homographies), -1, 2))
    apart = torch.cdist(moved, middles.expand(len(homographies), -1, 2), compute_mode="donot_use_mm_for_euclid_dist")
    return (apart <= cell).unflatten(2, size).unflatten(1, size)


def descriptor_loss(
    first: Tensor,
    second: Tensor,
    homographies: Tensor,
    valid: Tensor | None = None,
    balance: float = BALANCE,
    positive: float = POSITIVE,
    negative: float = NEGATIVE,
    cell: int = CELL,
) -> Tensor:
    """L_d, eq. (5) and (6): a hinge loss over every pair of cells of a picture and its warped self, the mean over pairs.

    lambda_d s max(0, m_p - d^T d') + (1 - s) max(0, d^T d' - m_n).

    Args:
        first, second: descriptors (B, D, h, w).
        homographies: (B, 3, 3), from pixels of the picture to pixels of the warped one.
        valid: bool (B, h, w), cells of the warped picture that show the picture; None: all.
    """
    size = tuple(first.shape[-2:])
    likeness = global_correlation(first.float(), second.float())
    same = correspondences(homographies, size, cell)
    sign, margin = torch.where(same, -1.0, 1.0), torch.where(same, positive, -negative)
    error = torch.where(same, balance, 1.0) * F.relu(margin + sign * likeness)
    if valid is None:
        return error.mean()
    return (error * valid[:, None, None]).sum() / (valid.sum().clamp(min=1) * size[0] * size[1])


# -- pictures ------------------------------------------------------------------------------------------------------------


def relit(pictures: Tensor) -> Tensor:
    """Grey pictures (B, 1, H, W) in other light: brightness, contrast, Gaussian noise, and half of them moved while they were taken (sec. 6)."""
    count = len(pictures)
    draw = torch.rand(4, count, 1, 1, 1, device=pictures.device)
    mean = pictures.mean((1, 2, 3), keepdim=True)
    x = (pictures - mean) * (0.6 + 0.8 * draw[0]) + mean + 0.3 * (draw[1] - 0.5)
    across, along = ((x + x.roll(1, axis) + x.roll(-1, axis)) / 3 for axis in (3, 2))
    x = torch.where(draw[2] < 0.25, across, torch.where(draw[2] < 0.5, along, x))
    return (x + 0.04 * draw[3] * torch.randn_like(x)).clamp(0, 1)
