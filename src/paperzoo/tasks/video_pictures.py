"""Videos as pictures: a film strip with the most likely classes below it."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor

STRIP = 6  # frames of a film strip
ROW = 15  # pixels of a line of text


def film_strip(frames: Tensor, height: int = 96) -> Image.Image:
    """Frames uint8 (T, 3, H, W) side by side, each `height` pixels high."""
    pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    width = max(1, round(pictures[0].width * height / pictures[0].height))
    kind = Image.Resampling.NEAREST if height > 1.5 * pictures[0].height else Image.Resampling.BILINEAR
    strip = Image.new("RGB", (len(pictures) * (width + 3) - 3, height), "white")
    for i, picture in enumerate(pictures):
        strip.paste(picture.resize((width, height), kind), (i * (width + 3), 0))
    return strip


def with_classes(strip: Image.Image, classes: Sequence[tuple[str, float]], title: str = "") -> Image.Image:
    """A picture with a line a class below it: a bar as long as it is probable, its name, its probability."""
    lines = len(classes) + bool(title)
    framed = Image.new("RGB", (strip.width, strip.height + 4 + ROW * lines), "white")
    framed.paste(strip, (0, 0))
    draw = ImageDraw.Draw(framed)
    y = strip.height + 3
    if title:
        draw.text((2, y), title, fill="black")
        y += ROW
    for name, probability in classes:
        draw.rectangle((0, y, max(1, round(probability * (strip.width - 1))), y + ROW - 3), fill="#bfd7f2")
        draw.text((3, y), f"{probability:.0%} {name}", fill="black")
        y += ROW
    return framed
