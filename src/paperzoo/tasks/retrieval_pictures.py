"""Pictures of retrieval: a query and what was found, distances, precision against recall."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

RIGHT, WRONG, OPEN = "#3cb44b", "#e6194b", "#8a93a3"  # frames: relevant, not, not known


def framed(image: Tensor, caption: str, colour: str, size: int = 64) -> Image.Image:
    """uint8 (3, H, W) in a square frame of a colour with a line of text below."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    smooth = min(picture.size) > size
    picture = picture.resize((size, size), Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (size + 6, size + 20), "white")
    sheet.paste(Image.new("RGB", (size + 6, size + 6), colour), (0, 0))
    sheet.paste(picture, (3, 3))
    ImageDraw.Draw(sheet).text((2, size + 7), caption, fill="black")
    return sheet


def in_a_row(pictures: Sequence[Image.Image], gap: int = 3) -> Image.Image:
    """The first picture, a wider gap, and the others."""
    width = sum(p.width + gap for p in pictures) + 3 * gap
    sheet = Image.new("RGB", (width, max(p.height for p in pictures)), "white")
    x = 0
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (x, 0))
        x += picture.width + gap + (3 * gap if i == 0 else 0)
    return sheet


def precision_recall_plot(points: Sequence[tuple[float, float]]) -> Image.Image:
    """(recall, precision) as a line."""
    from paperzoo.engine.pictures import new_figure, to_picture

    figure, axes = new_figure(4.2, 3.2)
    axes.plot(*zip(*points, strict=True), linewidth=1.4)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    return to_picture(figure)


def distance_plot(near: Tensor, far: Tensor, metric: str) -> Image.Image:
    """Histograms of the distances of relevant pairs and of others, one-dimensional each."""
    from paperzoo.engine.pictures import new_figure, to_picture

    figure, axes = new_figure(4.2, 3.2)
    bins = 40 if metric != "hamming" else [i - 0.5 for i in range(int(torch.cat([near, far]).max()) + 2)]
    axes.hist([near.tolist(), far.tolist()], bins=bins, density=True, label=["a common label", "none"])
    axes.set_xlabel("Hamming distance" if metric == "hamming" else f"{metric} distance")
    axes.legend(fontsize=8)
    return to_picture(figure)
