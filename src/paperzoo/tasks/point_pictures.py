"""Point clouds as pictures: seen from above the side, near points over far ones, darker with distance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

AXES = {"x": 0, "y": 1, "z": 2}
# distinct colours for labels; grey for points without one
COLOURS = [
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75), (227, 119, 194), (188, 189, 34),
    (23, 190, 207), (90, 90, 220), (250, 190, 60), (0, 120, 110), (170, 20, 90), (120, 170, 60), (70, 60, 120), (200, 140, 120),
]  # fmt: skip
GREY = (150, 155, 165)


def label_colour(label: int) -> tuple[int, int, int]:
    return GREY if label < 0 else COLOURS[label % len(COLOURS)]


def coloured(labels: Tensor) -> Tensor:
    """Labels int64 (N,) -> colours float32 (N, 3) in [0, 1]; -1 is grey."""
    table = torch.tensor([*COLOURS, GREY], dtype=torch.float32) / 255
    return table[torch.where(labels < 0, len(COLOURS), labels % len(COLOURS))]


def cloud_picture(
    points: Tensor,
    colours: Tensor | None = None,
    up: str = "z",
    size: int = 224,
    azimuth: float = 35.0,
    elevation: float = 25.0,
    sizes: Tensor | None = None,
) -> Image.Image:
    """A cloud (N, 3) in parallel projection on white, size x size pixels.

    Args:
        colours: float32 (N, 3) in [0, 1]; None: grey-blue.
        azimuth, elevation: of the eye, degrees.
        sizes: radius of each point in pixels (N,); None: the same for all, smaller where there are many.
    """
    values = points.detach().cpu().double().numpy()
    values = values[np.isfinite(values).all(1)]
    axis = AXES[up]
    values = np.roll(values, 2 - axis, axis=1)  # the axis that points up comes last
    values = values - (values.max(0) + values.min(0)) / 2
    a, e = math.radians(azimuth), math.radians(elevation)
    right = np.array([-math.sin(a), math.cos(a), 0.0])
    toward = np.array([math.cos(a) * math.cos(e), math.sin(a) * math.cos(e), math.sin(e)])
    over = np.cross(toward, right)
    x, y, depth = values @ right, values @ over, values @ toward
    reach = max(float(np.sqrt((values**2).sum(1).max())), 1e-12)
    radius = np.full(len(values), size / 75 if len(values) <= 1500 else 1.2 if len(values) <= 10_000 else 0.6)
    if sizes is not None:
        radius = sizes.cpu().numpy()
    base = np.tile([0.35, 0.45, 0.62], (len(values), 1)) if colours is None else colours.detach().cpu().numpy()
    shade = 0.55 + 0.45 * (depth / reach + 1) / 2
    ink = (np.clip(base * shade[:, None], 0, 1) * 255).astype(np.uint8)
    scale = (size / 2 - 4) / reach
    column, row = size / 2 + x * scale, size / 2 - y * scale
    canvas = np.full((size, size, 3), 255, np.uint8)
    largest = int(math.ceil(radius.max()))
    span = np.arange(-largest, largest + 1)
    offsets = np.stack(np.meshgrid(span, span), -1).reshape(-1, 2, 1)
    places, owners = [], []
    for dx, dy in offsets:  # the pixels of a disc, each for all points
        point = np.flatnonzero(dx * dx + dy * dy <= radius**2)
        across, down = (column[point] + dx).astype(int), (row[point] + dy).astype(int)
        inside = (across >= 0) & (across < size) & (down >= 0) & (down < size)
        places.append(down[inside] * size + across[inside])
        owners.append(point[inside])
    place, owner = np.concatenate(places), np.concatenate(owners)
    nearest = np.argsort(-depth[owner], kind="stable")
    shown, first = np.unique(place[nearest], return_index=True)  # of several at one place the nearest
    canvas.reshape(-1, 3)[shown] = ink[owner[nearest[first]]]
    return Image.fromarray(canvas)


def captioned(picture: Image.Image, text: str) -> Image.Image:
    framed = Image.new("RGB", (picture.width, picture.height + 14), "white")
    framed.paste(picture, (0, 0))
    ImageDraw.Draw(framed).text((2, picture.height + 1), text, fill="black")
    return framed


def legend(
    picture: Image.Image, labels: Sequence[int], names: Sequence[str], heading: str = "", first: int = 0
) -> Image.Image:
    """With the colours of the labels below, in as many lines as they need; the label `first` has the first colour."""
    lines, x = [[]], 2
    for label in labels:
        width = 16 + 6 * len(names[label])
        if x + width > picture.width and lines[-1]:
            lines.append([])
            x = 2
        lines[-1].append((x, label))
        x += width
    top = 14 if heading else 0
    framed = Image.new("RGB", (picture.width, picture.height + top + 14 * len(lines)), "white")
    framed.paste(picture, (0, 0))
    draw = ImageDraw.Draw(framed)
    if heading:
        draw.text((2, picture.height + 1), heading, fill="black")
    for i, line in enumerate(lines):
        y = picture.height + top + 14 * i
        for x, label in line:
            draw.rectangle((x, y + 3, x + 7, y + 10), fill=label_colour(label - first))
            draw.text((x + 10, y + 1), names[label], fill="black")
    return framed
