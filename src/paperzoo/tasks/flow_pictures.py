"""Optical flow in the field's usual colours: the hue is the direction, the saturation the speed (Baker et al. 2007)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from paperzoo.engine.pictures import tile
from paperzoo.tasks.depth_pictures import enlarged

UNKNOWN = 120
WHEEL = 48


def colours(flows: Sequence[Tensor], valid: Tensor | None = None) -> list[Image.Image]:
    """Flows (2, H, W) of one size in the same colours: the fastest pixel of all has the full ones. Grey where `valid` (1, H, W) is false."""
    from torchvision.utils import flow_to_image

    painted = flow_to_image(torch.stack([f.float() for f in flows]))
    if valid is not None:
        painted = torch.where(valid, painted, torch.full_like(painted, UNKNOWN))
    return [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in painted]


def wheel(size: int = WHEEL) -> Image.Image:
    """What the colours mean: each direction from the middle of the disc, the full speed at its rim."""
    at = torch.linspace(-1, 1, size)
    disc = torch.stack([at.expand(size, size), at[:, None].expand(size, size)])
    rim = disc.norm(dim=0) > 1
    picture = colours([torch.where(rim, 0.0, disc)])[0]
    picture.paste((255, 255, 255), mask=Image.fromarray((rim.numpy() * 255).astype("uint8")))
    return picture


def side_by_side(first: Tensor, second: Tensor, flow: Tensor) -> Image.Image:
    """The pair, uint8 (3, H, W) each, the flow (2, H, W) between them in colours, and what they mean."""
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in (first, second)]
    sheet = tile([enlarged(p) for p in (*pictures, colours([flow])[0])], 3)
    out = Image.new("RGB", (sheet.width + WHEEL + 12, sheet.height), "white")
    out.paste(sheet, (0, 0))
    out.paste(wheel(), (sheet.width + 6, 2))
    fastest = float(flow.norm(dim=0).max())
    ImageDraw.Draw(out).text((sheet.width + 6, WHEEL + 6), f"{fastest:.3g} px", fill="black")
    return out


def errors(error: Tensor, limit: float) -> Image.Image:
    """End-point errors (1, H, W): black for none, white for `limit` pixels and more."""
    grey = (error[0] / max(limit, 1e-6) * 255).clamp(0, 255).to(torch.uint8)
    return Image.fromarray(grey.numpy()).convert("RGB")
