"""Per-region overlap (PRO): how well heat maps find every connected region of the truth, small and large alike.

At a threshold, the overlap of a region is the part of its pixels whose value reaches the threshold; PRO is the mean over all regions of
all images. The area under PRO against the false positive rate, from 0 to a limit (0.3 by the field's habit) and divided by that limit,
is a number in [0, 1]. Source: Bergmann et al., "Uninformed Students", arXiv 1911.02357, sec. 4; and MVTec's evaluation code for the
details: regions are connected over corners too, the false positive rate counts the normal pixels of all images, good ones included.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def overlap_curve(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """False positive rate and PRO for every threshold that occurs, from the highest on: two float64 (T,), both rising from 0 to 1.

    Args:
        maps: floating-point (N, H, W); larger is more anomalous.
        masks: bool (N, H, W).

    Raises:
        ValueError: if the shapes differ, or there is no defective or no normal pixel.
    """
    from scipy.ndimage import label

    if maps.shape != masks.shape or maps.ndim != 3:
        raise ValueError(f"maps {tuple(maps.shape)} and masks {tuple(masks.shape)} must have one shape (N, H, W)")
    structure = np.zeros((3, 3, 3), bool)
    structure[1] = True  # neighbours within an image, corners too
    regions, count = label(masks.cpu().numpy(), structure)
    regions = torch.from_numpy(regions.astype(np.int64)).flatten()
    sizes = torch.bincount(regions, minlength=count + 1).double()
    if not count or not sizes[0]:
        raise ValueError("masks need at least one defective and one normal pixel")
    weights = 1 / (count * sizes)  # a pixel's share in the mean overlap; normal pixels have none
    weights[0] = 0
    values, order = maps.detach().cpu().double().flatten().sort(descending=True)
    regions = regions[order]
    last = torch.cat([values[1:] != values[:-1], torch.tensor([True])])  # equal values pass a threshold together
    false_positives = (regions == 0).double().cumsum(0)[last] / sizes[0]
    overlap = weights[regions].cumsum(0)[last]
    zero = torch.zeros(1, dtype=torch.float64)
    return torch.cat([zero, false_positives]), torch.cat([zero, overlap])


def area_up_to(x: Tensor, y: Tensor, limit: float) -> Tensor:
    """The area under a curve from 0 to `limit`, divided by it, with y interpolated there: x (T,) rising from 0, y (T,) -> ()."""
    inside = x <= limit
    x_in, y_in = x[inside], y[inside]
    if len(x_in) < len(x):
        at = len(x_in)
        slope = (y[at] - y[at - 1]) / (x[at] - x[at - 1])
        x_in = torch.cat([x_in, x.new_tensor([limit])])
        y_in = torch.cat([y_in, (y[at - 1] + slope * (limit - x[at - 1]))[None]])
    return torch.trapezoid(y_in, x_in) / limit


class RegionOverlap(Metric):
    """PRO over a set, in [0, 1]; 0 where the set has no defective or no normal pixel.

    Args:
        limit: the false positive rate up to which the curve counts, in (0, 1].
    """

    higher_is_better = True
    full_state_update = False

    def __init__(self, limit: float = 0.3) -> None:
        super().__init__()
        if not 0 < limit <= 1:
            raise ValueError(f"limit must be above 0 and at most 1, got {limit}")
        self.limit = limit
        self.add_state("maps", [], dist_reduce_fx="cat")
        self.add_state("masks", [], dist_reduce_fx="cat")

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Maps and masks (B, H, W) of a batch."""
        self.maps.append(maps.detach())
        self.masks.append(masks)

    def compute(self) -> Tensor:
        maps, masks = dim_zero_cat(self.maps), dim_zero_cat(self.masks).bool()
        if not masks.any() or masks.all():
            return torch.tensor(0.0)
        return area_up_to(*overlap_curve(maps, masks), self.limit).float()
