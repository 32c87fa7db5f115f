"""How far codes are from their prior, which class a cluster is, and what a flat code looks like."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor


def sliced_distance(codes: Tensor, others: Tensor, directions: int = 64) -> float:
    """The sliced Wasserstein distance of two sets (N, D) of equal size, along always the same directions."""
    axes = torch.randn(codes.shape[1], directions, generator=torch.Generator().manual_seed(0))
    axes = F.normalize(axes, dim=0)
    return float(((codes @ axes).sort(0).values - (others @ axes).sort(0).values).abs().mean())


def cluster_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """The class of each cluster: the label of the image that is surest of it (section 6). (N, K) and (N,) -> int64 (K,)."""
    return labels[logits.softmax(1).argmax(0)]


COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777", "#ee7733", "#009988", "#cc3311"]


def scatter(codes: Tensor, labels: Tensor, size: int = 480) -> Image.Image:
    """Codes (N, 2) as points, coloured by label."""
    picture = Image.new("RGB", (size, size), "white")
    pen, reach = ImageDraw.Draw(picture), float(codes.abs().max()) * 1.05
    for (x, y), label in zip(((codes / reach + 1) * size / 2).tolist(), labels.tolist(), strict=True):
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=COLOURS[label % len(COLOURS)])
    return picture
