"""Panoptic maps as pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from paperzoo.blocks.panoptic import PanopticMap, numbered
from paperzoo.tasks.instance_segmentation import with_legend
from paperzoo.tasks.segmentation import palette


def drawn_map(image: Tensor, panoptic: PanopticMap, labels: Sequence[str], least: int = 240) -> Image.Image:
    """A uint8 image (3, H, W) tinted with a colour for each segment, with borders, and a legend of the categories below.

    Things of one category have shades of its colour. Pixels without a segment stay as they are.
    """
    factor = max(1, -(-least // max(image.shape[1:])))
    colours = palette().float()
    _, rows = numbered(panoptic)
    base, seen = [torch.zeros(3)], {}
    for segment in panoptic.segments:
        turn = seen[segment.category] = seen.get(segment.category, -1) + 1
        base.append(colours[(segment.category + 1) % 256] * (1 - 0.22 * (turn % 4)))
    rows, pixels = (t.repeat_interleave(factor, -2).repeat_interleave(factor, -1) for t in (rows, image.float()))
    tint = torch.stack(base)[rows].permute(2, 0, 1)
    pixels = torch.where(rows > 0, 0.35 * pixels + 0.65 * tint, pixels)
    border = torch.zeros_like(rows, dtype=torch.bool)
    border[1:] |= rows[1:] != rows[:-1]
    border[:, 1:] |= rows[:, 1:] != rows[:, :-1]
    pixels = torch.where(border, 255.0, pixels)
    picture = Image.fromarray(pixels.round().to(torch.uint8).permute(1, 2, 0).numpy())
    named = [(labels[c], "#{:02x}{:02x}{:02x}".format(*map(int, colours[(c + 1) % 256]))) for c in sorted(seen)]
    return with_legend(picture, [name for name, _ in named], [colour for _, colour in named])
