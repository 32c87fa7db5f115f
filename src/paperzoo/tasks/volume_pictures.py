"""Volumes as pictures: slices through the three planes, at the right proportions in mm, tinted with the classes.

Slices are shown as radiologists hold them: axial ones from below and coronal ones from the front, so the patient's right is on the left; sagittal
ones with the front on the left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw
from torch import Tensor

PLANES = ("sagittal", "coronal", "axial")  # across the first, second, third axis
SIDE = 170  # pixels of the longest edge of a slice
COLOURS = ("#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#17becf", "#e377c2", "#bcbd22", "#1f77b4", "#8c564b", "#7fff7f")


def colours(count: int) -> Tensor:
    """uint8 (count, 3): black for the background, then ten colours in turn."""
    shown = [ImageColor.getrgb(COLOURS[k % len(COLOURS)]) for k in range(count - 1)]
    return torch.tensor([(0, 0, 0), *shown], dtype=torch.uint8)


def focus(mask: Tensor | None, size: Sequence[int]) -> tuple[int, int, int]:
    """The slices to show: through the middle of what is not background, each where most of it is; without any, the volume's middle."""
    if mask is None or not ((mask > 0) & (mask != 255)).any():
        return tuple(n // 2 for n in size)
    inside = (mask > 0) & (mask != 255)
    return tuple(int(inside.sum(tuple(a for a in range(3) if a != axis)).argmax()) for axis in range(3))


def grey(slice_: Tensor, low: float, high: float) -> Tensor:
    return ((slice_.nan_to_num() - low) / max(high - low, 1e-8)).clamp(0, 1)


def limits(channel: Tensor) -> tuple[float, float]:
    """Values shown as black and white: the 1st and 99th percentile of some of the voxels."""
    some = channel.flatten()
    some = some[:: max(1, len(some) // 100_000)].numpy()
    some = some[np.isfinite(some)]
    return tuple(float(v) for v in np.percentile(some, (1, 99))) if some.size else (0.0, 1.0)


def slice_picture(
    channel: Tensor, mask: Tensor | None, axis: int, at: int, spacing: Sequence[float], span: tuple
) -> Image.Image:
    """One slice (X, Y, Z) -> picture, with the top (or the front) above."""
    values = grey(channel.select(axis, at), *span)
    across, up = [a for a in range(3) if a != axis]
    rgb = values[..., None].expand(-1, -1, 3) * 255
    if mask is not None:
        ids = mask.select(axis, at).long()
        tint = colours(256)[ids].float()
        shown = ((ids > 0) & (ids != 255))[..., None]
        rgb = torch.where(shown, 0.5 * rgb + 0.5 * tint, rgb)
    pixels = (
        rgb.round().to(torch.uint8).transpose(0, 1).flip(0, 1)
    )  # rows from the top; columns from the right or the front
    size = [n * s for n, s in zip(values.shape, (spacing[across], spacing[up]), strict=True)]
    factor = SIDE / max(size)
    wanted = tuple(max(12, round(factor * s)) for s in size)
    return Image.fromarray(pixels.contiguous().numpy()).resize(wanted, Image.Resampling.NEAREST)


def three_planes(
    image: Tensor,
    mask: Tensor | None,
    spacing: Sequence[float],
    labels: Sequence[str],
    at: Sequence[int] | None = None,
    title: str = "",
) -> Image.Image:
    """Axial, coronal and sagittal slices side by side, with the names of the classes that appear.

    Args:
        image: (C, X, Y, Z), of which the last channel is shown; axes run right, front, top.
        mask: (X, Y, Z) class ids, or None for the plain image.
        at: the slices, one an axis; `focus(mask)` unless given.
    """
    channel = image[-1]
    at = focus(mask, channel.shape) if at is None else at
    span = limits(channel)
    pictures = [(PLANES[axis], slice_picture(channel, mask, axis, at[axis], spacing, span)) for axis in (2, 1, 0)]
    height = max(p.height for _, p in pictures)
    sheet = Image.new("RGB", (3 * (SIDE + 4), height + 30), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, picture) in enumerate(pictures):
        left = i * (SIDE + 4)
        sheet.paste(picture, (left, (height - picture.height) // 2))
        marks = "A" if name == "sagittal" else "R"
        draw.text((left + 2, (height - picture.height) // 2), marks, fill="yellow")
        draw.text((left + 2, height + 1), f"{name} {at[2 - i] + 1}/{channel.shape[2 - i]}", fill="black")
    x = 2
    if title:
        draw.text((x, height + 15), title, fill="black")
        x += int(draw.textlength(title)) + 10
    for k in [] if mask is None else [k for k in mask.unique().tolist() if 0 < k < len(labels)]:
        draw.rectangle((x, height + 18, x + 7, height + 25), fill=tuple(colours(256)[k].tolist()))
        draw.text((x + 10, height + 15), labels[k], fill="black")
        x += 18 + int(draw.textlength(labels[k]))
    return sheet
