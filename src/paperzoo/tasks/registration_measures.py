"""What registration is made of and measured by: warping, similarity of images, smoothness of a field, agreement of warped labels.

Displacements are (B, D, *size) in voxels, D = 2 or 3, in the order of the spatial axes: voxel x of the fixed image shows what lies at x + u(x) in the
moving one. Sampling places count from the centres of the corner voxels (`align_corners=True`); outside of an image everything is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from paperzoo.data.registration_pairs import jacobians
from paperzoo.data.volumes import Volume


def warp(image: Tensor, displacement: Tensor, mode: str = "bilinear", padding: str = "zeros") -> Tensor:
    """(B, C, *size) read at x + u(x): (B, C, *size), linearly or with mode "nearest". Places are computed in full precision."""
    size, device = displacement.shape[2:], displacement.device
    kind = torch.promote_types(displacement.dtype, torch.float32)
    with torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext():
        moved = []
        for axis, n in enumerate(size):
            line = torch.arange(n, device=device, dtype=kind)
            at = displacement[:, axis].to(kind) + line.view(-1, *[1] * (len(size) - 1 - axis))
            moved.append(2 * at / max(n - 1, 1) - 1)
        grid = torch.stack(moved[::-1], -1)  # grid_sample counts from the last axis
        return F.grid_sample(image.to(kind), grid, mode, padding, align_corners=True).to(image.dtype)


def integrate(velocity: Tensor, steps: int) -> Tensor:
    """The displacement of a stationary velocity field (B, D, *size) after unit time, by scaling and squaring; `steps` 0 gives it as it is."""
    if steps == 0:
        return velocity
    field = velocity / 2**steps
    for _ in range(steps):
        field = field + warp(field, field)
    return field


# -- losses --------------------------------------------------------------------------------------------------------------


def mean_square(fixed: Tensor, warped: Tensor) -> Tensor:
    """Mean squared difference of two images (B, C, *size)."""
    return (fixed - warped).square().mean()


def local_correlation(fixed: Tensor, warped: Tensor, window: int = 9) -> Tensor:
    """Squared local cross-correlation, averaged over voxels and channels: a number in [0, 1], 1 for images that agree up to local gain and offset.

    Sums over windows of `window` voxels an axis (zeros outside) are box filters, one axis after the other, on all five products at once.
    """
    axes = fixed.ndim - 2
    kind = torch.promote_types(fixed.dtype, torch.float32)
    i, j = fixed.to(kind).flatten(0, 1)[:, None], warped.to(kind).flatten(0, 1)[:, None]
    sums = torch.cat([i, j, i * i, j * j, i * j], 1)
    average = F.avg_pool2d if axes == 2 else F.avg_pool3d
    for axis in range(axes):
        kernel = [1] * axes
        kernel[axis] = window
        pad = [window // 2 if a == axis else 0 for a in range(axes)]
        sums = average(sums, kernel, 1, pad) * window  # the border counts as zeros, as a convolution has it
    si, sj, sii, sjj, sij = sums.unbind(1)
    count = window**axes
    cross = sij - si * sj / count
    spread = (sii - si * si / count) * (sjj - sj * sj / count)
    return (cross * cross / (spread + 1e-5)).mean()


def roughness(field: Tensor) -> Tensor:
    """Mean squared difference of neighbouring displacements (B, D, *size), averaged over the axes: the diffusion regulariser."""
    parts = [torch.diff(field, dim=axis).square().mean() for axis in range(2, field.ndim) if field.shape[axis] > 1]
    return sum(parts) / (field.ndim - 2) if parts else field.sum() * 0


# -- agreement -----------------------------------------------------------------------------------------------------------


def folds(displacement: Tensor, spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> tuple[float, float]:
    """Of one field (3, X, Y, Z): the share of voxels where the determinant of its Jacobian is not positive, in percent; std of log J where it is.

    Central differences, one-sided at the border. A field in mm needs the spacing of its voxels.
    """
    found = jacobians(displacement.double(), spacing)
    inside = found > 0
    spread = float(found[inside].log().std(correction=0)) if inside.any() else 0.0
    return 100 * float((~inside).double().mean()), spread


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of two images over all voxels; 0 where one is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / scale) if scale > 0 else 0.0


# -- volumes in the world ------------------------------------------------------------------------------------------------


def places(matrix: Tensor, size: Sequence[int]) -> Tensor:
    """What an affine (4, 4) makes of every index (i, j, k) of a grid: (3, *size)."""
    out = matrix[:3, 3].view(3, 1, 1, 1).expand(3, *size).clone()
    for axis, n in enumerate(size):
        shape = [1, 1, 1, 1]
        shape[1 + axis] = n
        out += matrix[:3, axis].view(3, 1, 1, 1) * torch.arange(n, dtype=matrix.dtype).view(shape)
    return out


def read_at(image: Tensor, at: Tensor, mode: str = "bilinear", padding: str = "zeros") -> Tensor:
    """(C, X, Y, Z) read at indices (3, *size), which need not be whole: (C, *size), float32."""
    extent = torch.tensor(image.shape[1:], dtype=at.dtype).view(3, 1, 1, 1)
    grid = ((2 * at + 1) / extent - 1).flip(0).movedim(0, -1)[None].float()
    return F.grid_sample(image[None].float(), grid, mode, padding, align_corners=False)[0]


def inverse(affine) -> Tensor:
    return torch.linalg.inv(torch.as_tensor(affine, dtype=torch.float64))


def from_fixed(pair_fixed: Volume, pair_moving: Volume) -> Tensor:
    """From indices of the fixed volume to those of the moving one, through mm: float64 (4, 4)."""
    return inverse(pair_moving.affine) @ torch.as_tensor(pair_fixed.affine, dtype=torch.float64)
