"""What a radiance field's renderings are as files: pictures, depth in colours, films."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from paperzoo.errors import PaperZooError
from paperzoo.tasks.depth_pictures import colours, enlarged, limits, side_by_side

RATE = 15.0  # pictures a second of a film


@dataclass(frozen=True)
class RenderedViews:
    """The answer for one input: V views.

    images: uint8 (V, 3, H, W), RGB.
    depth: float32 (V, H, W), along the optical axis in the scene's units; 0 where the ray meets nothing (its opacity is below a half).
    opacity: float32 (V, H, W) in [0, 1].
    """

    images: Tensor = field(repr=False)
    depth: Tensor = field(repr=False)
    opacity: Tensor = field(repr=False)
    views: int
    height: int
    width: int

    def save(self, path: str | Path, depth: bool = False) -> Path:
        """Write the views: a .png of the first, a .gif or .mp4 of all; of their depth in colours if `depth`.

        Raises:
            PaperZooError: for another ending.
        """
        path = Path(path)
        pictures = depth_pictures(self.depth) if depth else [as_picture(image) for image in self.images]
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            pictures[0].save(path)
        elif path.suffix == ".gif":
            path.write_bytes(gif(pictures))
        elif path.suffix == ".mp4":
            from paperzoo.engine.streams import VideoWriter

            writer = VideoWriter(path, RATE)
            for picture in pictures:
                writer.add(picture)
            writer.close()
        else:
            raise PaperZooError(f"{path}: views are written as .png, .gif or .mp4")
        return path


def as_picture(image: Tensor) -> Image.Image:
    """uint8 (3, H, W)."""
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()))


def depth_pictures(depth: Tensor) -> list[Image.Image]:
    """Depth (V, H, W) in colours that are the same for all."""
    span = limits(depth)
    return [colours(one, span) for one in depth]


def gif(pictures: list[Image.Image]) -> bytes:
    """An endless animation."""
    buffer = io.BytesIO()
    first, *others = [picture.quantize(128, dither=Image.Dither.NONE) for picture in pictures]
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=round(1000 / RATE), loop=0)
    return buffer.getvalue()


def drawn(result: RenderedViews) -> Image.Image:
    """One view beside its depth; several as an animation, picture and depth side by side in each frame."""
    if result.views == 1:
        return side_by_side(result.images[0], result.depth[0], metric=False)
    frames = []
    for image, depth in zip(result.images, depth_pictures(result.depth), strict=True):
        picture, depth = enlarged(as_picture(image)), enlarged(depth)
        frame = Image.new("RGB", (2 * picture.width + 2, picture.height), "white")
        frame.paste(picture, (0, 0))
        frame.paste(depth, (picture.width + 2, 0))
        frames.append(frame)
    return Image.open(io.BytesIO(gif(frames)))
