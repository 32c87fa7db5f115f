"""Mosaic and mixup for detection, as YOLOX uses them (arXiv:2107.08430, sec. 2.1, "strong data augmentation"; mosaic from YOLOv4).

A sample is a dict: "image" uint8 (3, H, W), "boxes" float32 (N, 4) as x1 y1 x2 y2 in its pixels, "labels" int64 (N,). What is
drawn comes from torch's global generator. Sizes, ranges and the grey of 114 are the released code's; its images pass through
OpenCV, which rounds pixels and places their centres by half a pixel otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GREY = 114.0


def uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def fitted(sample: dict[str, Tensor], size: int, factor: float = 1.0) -> dict[str, Tensor]:
    """The sample resized by one factor so that its longer side is `size * factor`."""
    image, boxes = sample["image"], sample["boxes"]
    scale = factor * size / max(image.shape[1:])
    height, width = (max(1, int(side * scale)) for side in image.shape[1:])
    if (height, width) != tuple(image.shape[1:]):
        resized = F.interpolate(image[None].float(), (height, width), mode="bilinear")[0]
        image = resized.round().to(torch.uint8)
    shape = torch.tensor([width / sample["image"].shape[2], height / sample["image"].shape[1]]).repeat(2)
    return {"image": image, "boxes": boxes * shape, "labels": sample["labels"]}


def inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes (N, 4) cut to an image."""
    return boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height], dtype=boxes.dtype))


def without_slivers(sample: dict[str, Tensor], least: float = 1.0) -> dict[str, Tensor]:
    """The sample without boxes of which no more than `least` pixels in width or height are left."""
    boxes = sample["boxes"]
    kept = (boxes[:, 2:] - boxes[:, :2] > least).all(1)
    return sample | {"boxes": boxes[kept], "labels": sample["labels"][kept]}


def mosaic(samples: Sequence[dict[str, Tensor]], size: int, centre: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """Four images around a point of a canvas of twice the size, each fitted to `size` and cut at the canvas.

    Args:
        samples: four: above left, above right, below left, below right.
        size: half the canvas' side, in pixels.
        centre: x and y of the point; drawn from the canvas' middle half if None.

    Returns:
        a sample of 2 `size` by 2 `size` pixels; boxes outside are cut, and may be empty.
    """
    if len(samples) != 4:
        raise ValueError(f"samples has {len(samples)} entries; a mosaic has four")
    if centre is None:
        centre = (int(uniform(0.5 * size, 1.5 * size)), int(uniform(0.5 * size, 1.5 * size)))
    side = 2 * size
    canvas = torch.full((3, side, side), int(GREY), dtype=torch.uint8)
    boxes = []
    for place, sample in enumerate(samples):
        part = fitted(sample, size)
        height, width = part["image"].shape[1:]
        left = centre[0] - width if place % 2 == 0 else centre[0]
        top = centre[1] - height if place < 2 else centre[1]
        x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + width, side), min(top + height, side)
        canvas[:, y1:y2, x1:x2] = part["image"][:, y1 - top : y2 - top, x1 - left : x2 - left]
        boxes.append(inside(part["boxes"] + torch.tensor([left, top, left, top]), side, side))
    return {"image": canvas, "boxes": torch.cat(boxes), "labels": torch.cat([s["labels"] for s in samples])}


def affine_matrix(angle: float, scale: float, shear: tuple[float, float], shift: tuple[float, float]) -> Tensor:
    """(2, 3): turned by `angle` and enlarged, then sheared (both in degrees, around the corner), then shifted in pixels."""
    cos, sin = scale * math.cos(math.radians(angle)), scale * math.sin(math.radians(angle))
    across, along = (math.tan(math.radians(s)) for s in shear)
    turned = torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
    sheared = torch.tensor([[1.0, along], [across, 1.0]], dtype=torch.float64) @ turned
    return torch.cat([sheared, torch.tensor(shift, dtype=torch.float64)[:, None]], dim=1)


def warp(sample: dict[str, Tensor], matrix: Tensor, size: int) -> dict[str, Tensor]:
    """The sample under an affine map (2, 3) of its pixels to those of a `size` by `size` image; what is outside is grey."""
    image, boxes = sample["image"], sample["boxes"]
    back = torch.linalg.inv(torch.cat([matrix, matrix.new_tensor([[0, 0, 1]])]))[:2]
    at = torch.arange(size, dtype=torch.float64) + 0.5  # centres of pixels
    y, x = torch.meshgrid(at, at, indexing="ij")
    source = torch.stack([x, y, torch.ones_like(x)], dim=-1) @ back.T
    grid = (2 * source / torch.tensor([image.shape[2], image.shape[1]]) - 1).float()
    warped = F.grid_sample(image[None].float() - GREY, grid[None], padding_mode="zeros", align_corners=False)[0] + GREY

    x1, y1, x2, y2 = boxes.double().unbind(1)
    corner = torch.stack([torch.stack(p, dim=1) for p in ((x1, y1), (x2, y2), (x1, y2), (x2, y1))], dim=1)  # (N, 4, 2)
    corner = corner @ matrix[:, :2].T + matrix[:, 2]
    boxes = torch.cat([corner.amin(1), corner.amax(1)], dim=1).float()
    picture = warped.round().clamp(0, 255).to(torch.uint8)
    return {"image": picture, "boxes": inside(boxes, size, size), "labels": sample["labels"]}


def random_affine(
    sample: dict[str, Tensor],
    size: int,
    degrees: float = 10.0,
    translate: float = 0.1,
    scale: tuple[float, float] = (0.1, 2.0),
    shear: float = 2.0,
) -> dict[str, Tensor]:
    """Turned, enlarged, sheared and shifted at random; of a mosaic this keeps a part of `size` by `size` pixels."""
    matrix = affine_matrix(
        uniform(-degrees, degrees),
        uniform(*scale),
        (uniform(-shear, shear), uniform(-shear, shear)),
        (uniform(-translate, translate) * size, uniform(-translate, translate) * size),
    )
    return warp(sample, matrix, size)


def mixup(
    sample: dict[str, Tensor], other: dict[str, Tensor], scale: tuple[float, float] = (0.5, 1.5), flip: float = 0.5
) -> dict[str, Tensor]:
    """Half of a square image and half of another one, resized and perhaps mirrored; the objects of both are all there.

    Args:
        sample: a square image.
        other: any image; it is fitted to the same square, then enlarged by a factor drawn from `scale` and cut.
        flip: how probably it is mirrored.
    """
    size, factor = sample["image"].shape[-1], uniform(*scale)
    part = fitted(other, size, factor)
    whole = max(1, int(size * factor))  # the square that the other image lies in, above left
    height, width = part["image"].shape[1:]
    canvas = torch.full((3, max(whole, size), max(whole, size)), 0.0)
    canvas[:, :whole, :whole] = GREY
    canvas[:, :height, :width] = part["image"].float()
    boxes = part["boxes"]
    if float(torch.rand(())) < flip:
        canvas[:, :whole, :whole] = canvas[:, :whole, :whole].flip(2)
        boxes = torch.stack([whole - boxes[:, 2], boxes[:, 1], whole - boxes[:, 0], boxes[:, 3]], dim=1)
    top, left = (int(torch.randint(max(whole - size, 0) + 1, ())) for _ in range(2))
    mixed = 0.5 * sample["image"].float() + 0.5 * canvas[:, top : top + size, left : left + size]
    boxes = inside(boxes - torch.tensor([left, top, left, top]), size, size)
    return {
        "image": mixed.to(torch.uint8),
        "boxes": torch.cat([sample["boxes"], boxes]),
        "labels": torch.cat([sample["labels"], other["labels"]]),
    }
