"""Skeletons drawn over pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageDraw
from torch import Tensor

from paperzoo.data.skeletons import Skeleton

if TYPE_CHECKING:
    from paperzoo.tasks.pose import Poses

LEFT, RIGHT, MIDDLE = "#3cb44b", "#e6194b", "#ffe119"
"""A limb's colour says whose side it is: the person's own left is green, the right red."""

RINGS = ("#ffffff", "#42d4f4", "#f032e6", "#f58231", "#bfef45", "#911eb4")


def side(name: str) -> str:
    return LEFT if name.startswith("left") else RIGHT if name.startswith("right") else MIDDLE


def draw_poses(image: Tensor, poses: Poses, skeleton: Skeleton, above: float, least: int = 240) -> Image.Image:
    """A uint8 image (3, H, W) with everybody's limbs; each person's joints have rings of one colour.

    Args:
        above: keypoints with a lower score are not shown.
        least: small pictures are enlarged to this many pixels.
    """
    factor = max(1, -(-least // max(image.shape[1:])))
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(picture)
    width = max(2, round(max(picture.size) / 110))
    for number, (points, scores) in reversed(list(enumerate(zip(poses.keypoints, poses.keypoint_scores, strict=True)))):
        at = [((x + 0.5) * factor, (y + 0.5) * factor) for x, y in points]
        shown = [s > above for s in scores]
        for a, b in skeleton.limbs:
            if shown[a] and shown[b]:
                colours = {side(skeleton.names[a]), side(skeleton.names[b])} - {MIDDLE}
                pen.line((*at[a], *at[b]), fill=colours.pop() if len(colours) == 1 else MIDDLE, width=width)
        for k, (x, y) in enumerate(at):
            if shown[k]:
                box = (x - width, y - width, x + width, y + width)
                pen.ellipse(box, fill=side(skeleton.names[k]), outline=RINGS[number % len(RINGS)])
    return picture
