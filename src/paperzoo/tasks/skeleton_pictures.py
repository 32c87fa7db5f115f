"""Clips of skeletons as film strips: a few moments side by side, people in different colours."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from paperzoo.blocks.skeleton_graphs import Layout

MOMENTS, SIDE, LINE = 6, 84, 14  # pictures of a strip; pixels of each; of the line of text
COLOURS = ((31, 119, 180), (214, 90, 40), (44, 140, 44), (130, 90, 170))


def strip(joints: Tensor, layout: Layout, flat: bool, text: str) -> Image.Image:
    """(M, T, V, C) as six moments with a line of text. Of three-dimensional joints x and y are shown, y up."""
    joints = joints.float()
    frames = torch.linspace(0, joints.shape[1] - 1, MOMENTS).round().long()
    seen = (joints != 0).any(3)
    places = joints[..., :2] * torch.tensor([1.0, 1.0 if flat else -1.0])
    known = places[seen] if bool(seen.any()) else torch.zeros(1, 2)
    low, high = known.quantile(0.01, 0), known.quantile(0.99, 0)
    middle, extent = (low + high) / 2, float((high - low).max().clamp(min=1e-3)) * 1.1
    at = (places - middle) / extent * SIDE + SIDE / 2
    sheet = Image.new("RGB", (MOMENTS * (SIDE + 2) - 2, SIDE + LINE), "white")
    for k, frame in enumerate(frames.tolist()):
        picture = Image.new("RGB", (SIDE, SIDE), (246, 246, 246))
        draw = ImageDraw.Draw(picture)
        for person in range(len(joints)):
            colour, there, points = COLOURS[person % len(COLOURS)], seen[person, frame], at[person, frame]
            for a, b in layout.inward:
                if there[a] and there[b]:
                    draw.line([*points[a].tolist(), *points[b].tolist()], fill=colour, width=2)
            for x, y in points[there].tolist():
                draw.ellipse((x - 1, y - 1, x + 1, y + 1), fill=colour)
        sheet.paste(picture, (k * (SIDE + 2), 0))
    ImageDraw.Draw(sheet).text((2, SIDE + 1), text, fill="black")
    return sheet
