"""What comes before YOLOv3's training: priors from the boxes of a data set (sec. 2.1; "dimension clusters" of YOLOv2)."""

from __future__ import annotations

import torch
from torch import Tensor


def shape_iou(sizes: Tensor, others: Tensor) -> Tensor:
    """IoU of boxes that lie on the same corner: widths and heights (N, 2) and (K, 2) -> (N, K)."""
    shared = torch.minimum(sizes[:, None], others[None]).prod(-1)
    return shared / (sizes.prod(1)[:, None] + others.prod(1)[None] - shared)


def kmeans_anchors(sizes: Tensor, count: int = 9, seed: int = 0, iterations: int = 100) -> Tensor:
    """Clusters of box shapes under the distance 1 - IoU, which does not let large boxes decide everything.

    Args:
        sizes: widths and heights (N, 2), positive.
        count: how many clusters.
        seed: of the first centres, which are chosen as k-means++ does, with this distance.
        iterations: at most; it ends when no box changes its cluster.

    Returns:
        (count, 2), by area, the smallest first.

    Raises:
        ValueError: if there are fewer different shapes than clusters, or a size is not positive.
    """
    sizes = sizes.double()
    if not bool((sizes > 0).all()):
        raise ValueError("sizes has entries that are not positive; boxes without area have no shape")
    different = sizes.unique(dim=0)
    if len(different) < count:
        raise ValueError(f"{count} clusters need as many different shapes; there are {len(different)}")
    rng = torch.Generator().manual_seed(seed)
    centres = different[torch.randint(len(different), (1,), generator=rng)]
    while len(centres) < count:
        distance = 1 - shape_iou(different, centres).amax(1)
        chosen = torch.multinomial(distance.clamp(min=0).square(), 1, generator=rng)
        centres = torch.cat([centres, different[chosen]])
    nearest = None
    for _ in range(iterations):
        overlap = shape_iou(sizes, centres)
        before, nearest = nearest, overlap.argmax(1)
        if before is not None and torch.equal(before, nearest):
            break
        members = torch.bincount(nearest, minlength=count)
        sums = torch.zeros_like(centres).index_add(0, nearest, sizes)
        # a cluster that lost all its boxes starts again at the one that fits worst
        worst = sizes[overlap.amax(1).argmin()]
        centres = torch.where((members > 0)[:, None], sums / members.clamp(min=1)[:, None], worst)
    return centres[centres.prod(1).argsort()].float()


def mean_iou(sizes: Tensor, anchors: Tensor) -> float:
    """How well the priors fit: the mean over boxes (N, 2) of the IoU with the best of them (K, 2)."""
    return float(shape_iou(sizes.double(), anchors.double()).amax(1).mean())
