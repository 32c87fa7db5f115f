"""Depth in colours: near is bright, far is dark, as in the field's figures (the "magma" map of 1 / depth)."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

UNKNOWN = (120, 120, 120)
BAR = 12  # pixels of the bar beside a map
SHOWN = 160  # pixels that the shorter side of a small picture is brought to


def limits(depth: Tensor) -> tuple[float, float]:
    """(far, near) in 1 / depth of what the colours span: the least, and the 95th percentile, so that one near pixel does not darken the rest."""
    known = 1 / depth[depth > 0].double().flatten()
    if not len(known):
        return 0.0, 1.0
    known = known[:: max(1, len(known) // 1_000_000)]
    far, near = float(known.min()), float(known.quantile(0.95))
    return far, near if near > far * 1.001 else far * 1.001 + 1e-9


def colours(depth: Tensor, span: tuple[float, float] | None = None) -> Image.Image:
    """A depth map (H, W) as a picture of the same size; grey where it is 0."""
    from matplotlib import colormaps

    far, near = limits(depth) if span is None else span
    inverse = torch.where(depth > 0, 1 / depth.clamp(min=1e-9), 0.0)
    share = ((inverse - far) / (near - far)).clamp(0, 1)
    painted = (colormaps["magma"](share.numpy())[..., :3] * 255).round().astype(np.uint8)
    painted[(depth <= 0).numpy()] = UNKNOWN
    return Image.fromarray(painted)


def enlarged(picture: Image.Image) -> Image.Image:
    factor = max(1, round(SHOWN / min(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def side_by_side(image: Tensor, depth: Tensor, metric: bool) -> Image.Image:
    """A picture uint8 (3, H, W), its depth (H, W) in colours, and a bar that says what they mean: metres, or near and far."""
    photograph = enlarged(Image.fromarray(image.permute(1, 2, 0).numpy()))
    span = limits(depth)
    painted = enlarged(colours(depth, span))
    width, height = photograph.size
    sheet = Image.new("RGB", (2 * width + BAR + 44, height), "white")
    sheet.paste(photograph, (0, 0))
    sheet.paste(painted, (width + 2, 0))
    ramp = torch.linspace(span[1], max(span[0], 1e-9), height)[:, None].expand(-1, BAR)
    sheet.paste(colours(1 / ramp, span), (2 * width + 6, 0))
    draw = ImageDraw.Draw(sheet)
    for share in (0.0, 0.5, 1.0):
        inverse = span[1] + (span[0] - span[1]) * share
        y = min(max(0, round(share * height) - 5), height - 11)
        if metric:
            draw.text((2 * width + BAR + 10, y), f"{1 / max(inverse, 1e-9):.3g} m", fill="black")
        elif share != 0.5:
            draw.text((2 * width + BAR + 10, y), "near" if share == 0 else "far", fill="black")
    return sheet
