"""How well two masks agree: Dice, and the distances between their surfaces in mm; and the loss that optimises the Dice coefficient.

Distances are measured between the outermost voxels of each mask (those with a neighbour outside across a face, the volume's end included), with the
voxel spacing: an error of one voxel counts more along thick slices. A volume of one slice is measured as a picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255


def overlap_counts(prediction: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Voxels in both, in the prediction, in the truth, of each class: float64 (classes, 3). Voxels of truth 255 do not count."""
    counted = truth != IGNORE
    joint = truth[counted].long() * classes + prediction[counted].long()
    table = torch.bincount(joint, minlength=classes * classes).view(classes, classes).double()
    return torch.stack([table.diag(), table.sum(0), table.sum(1)], 1)


def dice_of(counts: Tensor) -> Tensor:
    """2 |A and B| / (|A| + |B|) from (…, 3) counts: (…), NaN where a class is on neither side."""
    return 2 * counts[..., 0] / (counts[..., 1] + counts[..., 2])


def surface(mask: np.ndarray) -> np.ndarray:
    """The outermost voxels of a bool mask."""
    from scipy.ndimage import binary_erosion

    return mask & ~binary_erosion(mask)


def surface_distances(
    prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray] | None:
    """From each surface voxel of either mask to the nearest of the other, mm: (prediction to truth, truth to prediction). None if a mask is empty.

    Args:
        prediction, truth: bool (X, Y, Z).
        spacing: mm along the three axes.
    """
    from scipy.ndimage import distance_transform_edt

    either = prediction | truth
    if not prediction.any() or not truth.any():
        return None
    box = tuple(  # what lies outside of both masks tells nothing
        slice(int(where.min()), int(where.max()) + 1) for where in np.nonzero(either)
    )
    flat = tuple(0 if n == 1 else slice(None) for n in prediction.shape)
    spacing = [s for s, n in zip(spacing, prediction.shape, strict=True) if n > 1] or [1.0]
    edges = [surface(np.atleast_1d(mask[box][flat])) for mask in (prediction, truth)]
    to_truth, to_prediction = (distance_transform_edt(~edge, sampling=spacing) for edge in edges[::-1])
    return to_truth[edges[0]], to_prediction[edges[1]]


def hausdorff_95(distances: tuple[np.ndarray, np.ndarray]) -> float:
    """The larger of the two 95th percentiles, mm."""
    return float(max(np.percentile(part, 95) for part in distances))


def average_surface_distance(distances: tuple[np.ndarray, np.ndarray]) -> float:
    """The mean over the surface voxels of both masks, mm."""
    return float(np.concatenate(distances).mean())


def diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Of a volume, mm: what is counted for a structure that is on one side only."""
    return math.hypot(*(n * s for n, s in zip(shape, spacing, strict=True)))


def soft_dice(
    probabilities: Tensor, truth: Tensor, squares: bool = True, smooth: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of the soft Dice coefficient of every sample and class but the background: (B, K - 1) each.

    2 sum(p g) and sum(p^2) + sum(g^2), as V-Net defines it (sec. 3); without `squares` sum(p) + sum(g), as most code has it. `smooth` is in both.

    Args:
        probabilities: (B, K, …); truth: int64 (B, …), 255 does not count.
    """
    counted = (truth != IGNORE).unsqueeze(1)
    wanted = F.one_hot(truth.where(truth != IGNORE, 0), probabilities.shape[1]).movedim(-1, 1)
    p = (probabilities * counted)[:, 1:].flatten(2)
    g = (wanted * counted)[:, 1:].flatten(2).to(p.dtype)
    below = (p * p).sum(2) + g.sum(2) if squares else p.sum(2) + g.sum(2)  # g is 0 or 1: its square is itself
    return 2 * (p * g).sum(2) + smooth, below + smooth
