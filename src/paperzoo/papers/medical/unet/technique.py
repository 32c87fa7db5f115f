"""What U-Net is trained with: the weight map that makes touching cells separate (eq. 2), and elastic deformations (sec. 3.1)."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def border_weights(
    mask: Tensor, class_weights: Tensor, w0: float = 10.0, sigma: float = 5.0, ignore: int = 255
) -> Tensor:
    """w(x) = w_c(x) + w_0 exp(-(d_1(x) + d_2(x))^2 / (2 sigma^2)) (eq. 2), float32 (H, W).

    d_1 and d_2 are the distances to the nearest and the second nearest cell. A cell is a connected part (by edges) of one class, so touching cells
    must be divided by background, as in the paper. The second term is for the background between cells and for pixels inside none of them alone;
    inside a cell it is left out, and with fewer than two cells there is none.

    Args:
        mask: int64 (H, W), class ids, 0 the background; `ignore` has the weight 0.
        class_weights: float32 (K,), w_c of each class.
    """
    from scipy.ndimage import distance_transform_edt, label

    ids = mask.numpy()
    cells = []
    for k in np.unique(ids):
        if k not in (0, ignore):
            parts, count = label(ids == k)
            cells += [parts == n for n in range(1, count + 1)]
    weights = class_weights[mask.where(mask != ignore, 0)].numpy().astype(np.float32)
    if len(cells) >= 2 and w0:
        nearest = np.full(ids.shape, np.inf)
        second = np.full(ids.shape, np.inf)
        for cell in cells:
            distance = distance_transform_edt(~cell)
            second = np.minimum(second, np.maximum(nearest, distance))
            nearest = np.minimum(nearest, distance)
        between = w0 * np.exp(-((nearest + second) ** 2) / (2 * sigma**2))
        weights = weights + np.where(ids == 0, between, 0).astype(np.float32)
    weights[ids == ignore] = 0
    return torch.from_numpy(weights)


def balancing(counts: Tensor) -> Tensor:
    """w_c from the pixels of each class (K,): inversely proportional, 1 on average over the pixels; 0 for a class without any."""
    counts = counts.double()
    present = counts > 0
    weights = counts.sum() / (present.sum() * counts.clamp(min=1))
    return (weights * present).float()


def elastic_places(size: tuple[int, int], deviation: float, grid: int, degrees: float, mirror: bool) -> Tensor:
    """Where the pixels of a patch are read, from its centre: (height, width, 2) in pixels (row, column).

    Random vectors on a coarse `grid` x `grid`, from a Gaussian of `deviation` pixels, are interpolated bicubically to a displacement of every pixel
    (sec. 3.1); then a random turn of up to `degrees`, and a mirror image by a coin's toss. Drawn from torch's global generator.
    """
    lines = [torch.arange(n) - (n - 1) / 2 for n in size]
    places = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).float()
    if deviation:
        vectors = torch.randn(1, 2, grid, grid) * deviation
        places = places + F.interpolate(vectors, size=size, mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    if mirror and float(torch.rand(())) < 0.5:
        places = places * torch.tensor([1.0, -1.0])
    if degrees:
        angle = math.radians(degrees) * (2 * float(torch.rand(())) - 1)
        cos, sin = math.cos(angle), math.sin(angle)
        places = places @ torch.tensor([[cos, sin], [-sin, cos]])
    return places


def read(values: Tensor, places: Tensor, nearest: bool) -> Tensor:
    """(C, H, W) read at places (h, w, 2) in pixels, beyond the border in the mirror image (edge pixels once): (C, h, w)."""
    last = torch.tensor([max(1, n - 1) for n in values.shape[1:]], dtype=torch.float32)
    grid = (2 * places / last - 1).flip(-1)[None]
    mode = "nearest" if nearest else "bilinear"
    return F.grid_sample(values[None].float(), grid, mode=mode, padding_mode="reflection", align_corners=True)[0]
