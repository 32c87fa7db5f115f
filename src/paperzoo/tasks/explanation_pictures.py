"""Heat over an image, signed gradients as relief, and the curves of deletion and insertion, as pictures."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor


def overlay(image: Tensor, heat: Tensor, strength: float = 0.5) -> Image.Image:
    """The map as heat over the image, blue for 0 and red for 1.

    Args:
        image: (3, H, W) or (1, H, W), uint8 or float in [0, 1].
        heat: (H, W) in [0, 1].
        strength: how much of the heat is mixed in, 0 to 1.
    """
    base = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    centres = torch.tensor([3.0, 2.0, 1.0])[:, None, None]  # red, green, blue of the usual "jet" colours
    colours = (1.5 - (4 * heat.float().cpu() - centres).abs()).clamp(0, 1)
    return picture(base.cpu().clamp(0, 1).expand(3, -1, -1) * (1 - strength) + colours * strength)


def relief(gradients: Tensor) -> Image.Image:
    """Signed gradients (C, H, W) as a picture: grey for 0, three standard deviations to either side."""
    gradients = gradients.float().cpu()
    if len(gradients) not in (1, 3):
        gradients = gradients.mean(0, keepdim=True)
    spread = gradients.std().clamp_min(torch.finfo(torch.float32).tiny)
    return picture((gradients / (6 * spread) + 0.5).clamp(0, 1).expand(3, -1, -1))


def picture(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] as an image."""
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def curves(lines: dict[str, Tensor]) -> Image.Image:
    """Confidence over the share of pixels that changed hands, one line a name; each (steps + 1,) in [0, 1]."""
    from paperzoo.engine.pictures import new_figure, to_picture

    figure, axes = new_figure()
    for name, line in lines.items():
        axes.plot(torch.linspace(0, 1, len(line)).tolist(), line.tolist(), label=name, linewidth=1.4)
    axes.set(xlabel="share of the pixels", ylabel="confidence in the class", ylim=(0, 1.02))
    axes.legend(fontsize=8)
    return to_picture(figure)
