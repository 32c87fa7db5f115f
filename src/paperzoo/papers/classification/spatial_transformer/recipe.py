"""Spatial transformers learn with the classifier behind them, on digits that were turned, scaled and moved (sec. 4.1).

The task's default recipe on distorted images: "R" turns them by up to 90 degrees, "RTS" turns by up to 45, scales by 0.7 to 1.2 and
moves them within the canvas. Each test image has one distortion that depends on its pixels alone.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from paperzoo.data.images import Images
from paperzoo.papers.classification.spatial_transformer.technique import Affine, output_points, sample
from paperzoo.tasks import classification
from paperzoo.tasks.classification import ClassificationRecipe


@dataclass(frozen=True)
class Config(classification.Config):
    """The default recipe's settings, and how images are distorted."""

    distortion: Literal["R", "RTS"] = "RTS"


RANGES = {"R": (90.0, 1.0, 1.0), "RTS": (45.0, 0.7, 1.2)}  # degrees to either side, smallest and largest scale


class Distort(nn.Module):
    """Turns, scales and moves what fills the middle of a uint8 image (C, S, S); the picture stays within the canvas.

    Args:
        kind: "R" or "RTS".
        fixed: draw from the image's own pixels, the same at every call, instead of torch's generator.
    """

    def __init__(self, kind: str, fixed: bool = False) -> None:
        super().__init__()
        self.kind, self.fixed = kind, fixed

    def forward(self, image: Tensor) -> Tensor:
        generator = None
        if self.fixed:
            generator = torch.Generator().manual_seed(zlib.crc32(image.contiguous().numpy().tobytes()))
        angle, size, x, y = torch.rand(4, generator=generator).tolist()
        degrees, smallest, largest = RANGES[self.kind]
        turn, scale = math.radians((2 * angle - 1) * degrees), smallest + (largest - smallest) * size
        room = max(0.0, 1 - PART * scale) if self.kind == "RTS" else 0.0
        right, down = (2 * x - 1) * room, (2 * y - 1) * room
        cos, sin = (
            math.cos(turn) / scale,
            math.sin(turn) / scale,
        )  # from output to input: moved back, turned back, enlarged
        theta = [cos, sin, -cos * right - sin * down, -sin, cos, sin * right - cos * down]
        grid = Affine()(torch.tensor([theta]), output_points(*image.shape[1:], torch.zeros(())))
        warped = sample(image[None].float(), grid.reshape(1, *image.shape[1:], 2))
        return warped[0].round().clamp(0, 255).to(torch.uint8)


PART = 2 / 3  # of the canvas's side that an undistorted image fills: 28 of 42 pixels


class DistortedRecipe(ClassificationRecipe):
    """The task's default recipe on distorted images."""

    config: Config

    def view(self, size: int) -> list[nn.Module]:
        """In the middle of an empty canvas."""
        inner = round(size * PART)
        before = (size - inner) // 2
        after = size - inner - before
        return [v2.Resize((inner, inner), antialias=True), v2.Pad([before, before, after, after])]

    def augmentation(self) -> list[nn.Module]:
        return [*self.view(self.config.image_size), Distort(self.config.distortion)]

    def evaluation_data(self, split: str) -> Images:
        distort = [*self.view(self.config.image_size), Distort(self.config.distortion, fixed=True)]
        return super().evaluation_data(split).with_transform(v2.Compose(distort + self.to_input()))

    def browser(self) -> dict | None:
        return None  # its canvas is not a way of resizing that a page knows

    @torch.inference_mode()
    def figures(self) -> dict[str, Image.Image]:
        """Distorted test images, and the same as the classifier sees them."""
        from paperzoo.engine.pictures import tile

        model = self.deployed.eval()
        images = torch.stack([self.test_data[i][0] for i in range(min(16, len(self.test_data)))])
        pictures = {"Distorted test images": tile([self.picture(x) for x in images], 8)}
        if getattr(model, "transformer", None) is not None:
            warped = model.warp(images.to(self.runtime.device)).cpu()
            pictures["Behind the spatial transformer"] = tile([self.picture(x) for x in warped], 8)
        return pictures | super().figures()

    def picture(self, image: Tensor) -> Image.Image:
        mean, deviation = (torch.tensor(self.facts[k])[:, None, None] for k in ("mean", "deviation"))
        pixels = ((image * deviation + mean).clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0).numpy()
        return Image.fromarray(pixels).resize((84, 84), Image.Resampling.NEAREST)


EMBEDDED = Config(
    model="stn_fcn",
    data="digits",
    image_size=42,
    augment="none",
    distortion="RTS",
    steps=400,
    batch_size=64,
    optimizer="adam",
    learning_rate=2e-3,
    weight_decay=0.0,
    schedule="cosine",
)
PRESETS = {
    "embedded": EMBEDDED,
    # appendix: 150k iterations in batches of 256, rate 0.01 divided by ten every 50k, no weight decay, no dropout
    "published": Config(
        model="stn_cnn",
        data="mnist",
        image_size=42,
        augment="none",
        distortion="RTS",
        steps=150_000,
        batch_size=256,
        learning_rate=0.01,
        nesterov=False,
        momentum=0.0,
        weight_decay=0.0,
        schedule="step",
        milestones=(1 / 3, 2 / 3),
        workers=8,
    ),
}
RECIPE = DistortedRecipe
BASELINE = (DistortedRecipe, replace(EMBEDDED, model="plain_fcn"))
