"""Pictures of generated images: one image, a sheet of many, a walk between two noises."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid


def to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] as a PIL image."""
    pixels = ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def sheet(images: Tensor, columns: int, scale: int = 1) -> Image.Image:
    """(B, 3, H, W) in [-1, 1] as one picture with `columns` images a row, each pixel enlarged `scale` times."""
    grid = to_picture(make_grid(images.detach().float().cpu().clamp(-1, 1), nrow=columns, padding=1, pad_value=1.0))
    return grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)


def walk(first: Tensor, second: Tensor, count: int) -> Tensor:
    """`count` steps from one normal noise (D,) to another: (count, D), along the arc that keeps the norm, as a line would not."""
    share = torch.linspace(0, 1, count)[:, None] * torch.pi / 2
    return share.cos() * first + share.sin() * second
