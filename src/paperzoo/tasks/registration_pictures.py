"""Registrations as pictures: moving, fixed and warped slices, both in the squares of a checkerboard, and the grid that the map bends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from paperzoo.tasks.registration_measures import read_at
from paperzoo.tasks.volume_pictures import SIDE, limits, slice_picture

SQUARES = 6  # of the checkerboard along the longer side
LINES = 16  # of the grid along the longer side


def best_axis(size: Sequence[int], spacing: Sequence[float]) -> int:
    """Across which a volume is shown: its single slice if it is one, else coronal, which shows right and top."""
    return next((a for a, n in enumerate(size) if n == 1), 1)


def checkerboard(a: Tensor, b: Tensor) -> Tensor:
    """Two volumes (X, Y, Z) in the squares of a board."""
    step = max(1, -(-max(a.shape) // SQUARES))
    parity = sum(torch.arange(n).view([-1 if k == i else 1 for k in range(3)]) // step for i, n in enumerate(a.shape))
    return torch.where(parity % 2 == 0, a, b)


def bent_grid(field: Tensor, spacing: Sequence[float], axis: int, at: int) -> Image.Image:
    """Where the lines of a regular grid on the fixed slice lie in the moving image; field: (3, X, Y, Z), mm. Its part across the slice is not seen."""
    across, up = [a for a in range(3) if a != axis]
    flat = field.select(1 + axis, at)
    extent = [n * s for n, s in zip(flat.shape[1:], (spacing[across], spacing[up]), strict=True)]
    factor = SIDE / max(extent)
    width, height = (max(12, round(factor * e)) for e in extent)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    scale = 4  # points a voxel
    for direction in range(2):
        count = flat.shape[1 + direction]
        step = max(1, round(max(flat.shape[1:]) / LINES))
        for k in range(0, count, step):
            other = torch.linspace(0, flat.shape[2 - direction] - 1, scale * flat.shape[2 - direction])
            fixed = torch.full_like(other, float(k))
            index = torch.stack([fixed, other] if direction == 0 else [other, fixed])
            where = torch.stack([torch.zeros_like(other), *index])[:, :, None, None]
            moved = read_at(flat[:, None], where, padding="border")[:, :, 0, 0]
            x = (index[0] + 0.5) * spacing[across] + moved[across]
            y = (index[1] + 0.5) * spacing[up] + moved[up]
            points = [
                (width - 1 - factor * float(a), height - 1 - factor * float(b)) for a, b in zip(x, y, strict=True)
            ]
            draw.line(points, fill="#1f77b4", width=1)
    return picture


def sheet(
    moving: Tensor,
    fixed: Tensor,
    warped: Tensor,
    field: Tensor,
    spacing: Sequence[float],
    masks: Sequence[Tensor | None] = (),
    title: str = "",
) -> Image.Image:
    """Moving (on the fixed one's voxels), fixed, warped, checkerboards of fixed with moving and with warped, and the grid.

    Args:
        moving, fixed, warped: (C, X, Y, Z) on the same voxels, of which the last channel is shown. field: (3, X, Y, Z), mm.
        masks: of the first three, where they are known.
    """
    a, b, c = moving[-1], fixed[-1], warped[-1]
    axis = best_axis(b.shape, spacing)
    at = b.shape[axis] // 2
    spans = limits(a), limits(b)
    a, b, c = ((x - low) / max(high - low, 1e-8) for x, (low, high) in ((a, spans[0]), (b, spans[1]), (c, spans[0])))
    masks = [*masks, None, None, None][:3]
    parts = [("moving", a, masks[0]), ("fixed", b, masks[1]), ("moved", c, masks[2])]
    parts += [("before", checkerboard(b, a), None), ("after", checkerboard(b, c), None)]
    pictures = [(name, slice_picture(x, m, axis, at, spacing, (0.0, 1.0))) for name, x, m in parts]
    pictures.append(("the map", bent_grid(field, spacing, axis, at)))
    width, height = (max(p.size[i] for _, p in pictures) for i in (0, 1))
    out = Image.new("RGB", (3 * (width + 4), 2 * (height + 16) + 14 * bool(title)), "white")
    draw = ImageDraw.Draw(out)
    for k, (name, picture) in enumerate(pictures):
        left, top = (k % 3) * (width + 4), (k // 3) * (height + 16)
        out.paste(picture, (left, top))
        draw.text((left + 2, top + height + 1), name, fill="black")
    if title:
        draw.text((2, out.height - 13), title, fill="black")
    return out
