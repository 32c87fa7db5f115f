"""Pictures of a map between two pictures: the source laid over the target, and lines between what matches."""

from __future__ import annotations

import colorsys

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from paperzoo.engine.pictures import tile

SHOWN = 200  # pixels of a drawn picture's shorter side, about
TRUE, FOUND = (60, 200, 80), (240, 200, 30)
OUTSIDE = 96  # grey where the source shows nothing


def to_pil(picture: Tensor) -> Image.Image:
    """uint8 (3, H, W)."""
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def enlarged(picture: Tensor) -> tuple[Image.Image, float]:
    """A picture uint8 (3, H, W) as it is drawn, and by how much it was enlarged."""
    image = to_pil(picture)
    factor = SHOWN / min(image.size)
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BILINEAR), factor


def overlay(target: Tensor, warped: Tensor, inside: Tensor) -> Tensor:
    """Both pictures half and half, the target alone where the source shows nothing: uint8 (3, H, W)."""
    mixed = ((target.int() + warped.int()) // 2).to(torch.uint8)
    return torch.where(inside, mixed, target)


def hue(share: float) -> tuple[int, int, int]:
    return tuple(round(255 * v) for v in colorsys.hsv_to_rgb(share, 0.85, 1.0))


def draw_matches(source: Tensor, target: Tensor, there: Tensor, here: Tensor) -> Image.Image:
    """Source and target side by side, coloured lines from places `there` (M, 2) in the source to `here` (M, 2) in the target."""
    (a, factor), (b, other) = enlarged(source), enlarged(target)
    sheet = tile([a, b], 2, gap=4)
    shift = max(a.width, b.width) + 4
    pen = ImageDraw.Draw(sheet)
    starts, ends = ((there + 0.5) * factor).tolist(), ((here + 0.5) * other).tolist()
    for k, ((x, y), (u, v)) in enumerate(zip(starts, ends, strict=True)):
        colour = hue(k / max(1, len(starts)))
        if 0 <= x <= a.width and 0 <= y <= a.height:
            pen.line((x, y, u + shift, v), fill=colour, width=1)
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
        pen.ellipse((u + shift - 2, v - 2, u + shift + 2, v + 2), fill=colour)
    return sheet


def draw_transfer(source: Tensor, truth: Tensor, found: Tensor) -> Image.Image:
    """The source with true places (N, 2) in green, found ones in yellow, and lines between the two."""
    image, factor = enlarged(source)
    pen = ImageDraw.Draw(image)
    for (x, y), (u, v) in zip(((truth + 0.5) * factor).tolist(), ((found + 0.5) * factor).tolist(), strict=True):
        pen.line((x, y, u, v), fill=FOUND, width=1)
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), outline=TRUE, width=2)
        pen.ellipse((u - 2, v - 2, u + 2, v + 2), fill=FOUND)
    return image


def draw_points(picture: Tensor, places: Tensor) -> Image.Image:
    """A picture with places (N, 2) in green."""
    image, factor = enlarged(picture)
    pen = ImageDraw.Draw(image)
    for x, y in ((places + 0.5) * factor).tolist():
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), outline=TRUE, width=2)
    return image
