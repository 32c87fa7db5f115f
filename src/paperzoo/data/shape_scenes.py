"""Shape scenes: circles, triangles, squares, stars, crosses and rings over real photographs, with every special case.

Shapes are drawn from their equations: enlarged, turned, painted with two colours in a pattern, partly hiding one another, over
the crops of photographs that `paperzoo.data.scenes` uses, with the same parts for each split. Some scenes are empty; some have
a crowd, a region of many tiny shapes that is marked as such; some have a shape so far away that one pixel is left of it.
Nothing is downloaded, everything follows from the seed.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from paperzoo.data.coco import DetectionData
from paperzoo.data.scenes import CHUNK, backgrounds, boxes_around

LABELS = ["circle", "triangle", "square", "star", "cross", "ring"]
"""Class names of the scenes, by label."""

EMPTY, CROWDS, DOTS = 0.1, 0.15, 0.1
"""The shares of scenes without any object, with a crowd, with an object of one pixel."""

_TRIES = 16  # places that are tried for each shape
_HIDDEN = 0.25  # at most this part of a shape's square lies over an earlier one's
_CROWD_SIDE = 7  # a crowd has so many tiny shapes in a row and in a column


def shape_scenes(
    count: int,
    size: int = 96,
    seed: int = 0,
    max_objects: int = 4,
    split: str = "train",
    scale: tuple[float, float] = (0.2, 0.45),
) -> list[dict[str, Tensor]]:
    """Scenes of shapes over photographs; kept in memory, so treat the tensors as read-only.

    Args:
        count: how many scenes. The first scenes do not depend on it.
        size: height and width in pixels, at least 32.
        seed: every choice follows from it (and from `split`, `size`, `max_objects`, `scale`).
        max_objects: a scene that is not empty has 1 to `max_objects` shapes, drawn uniformly; where there is no place left,
            fewer; a crowd or a one-pixel shape comes on top.
        split: "train" or "test"; they share no part of a photograph.
        scale: smallest and largest diameter, as a part of `size`. Diameters are log-uniform.

    Returns:
        One dict a scene:
        image: uint8 (3, size, size);
        boxes: float32 (N, 4), x1 y1 x2 y2 in pixels, tight around what is visible, x2 and y2 exclusive; N may be 0;
        labels: int64 (N,), a row of `LABELS`;
        masks: bool (N, size, size), the visible pixels of each; masks do not overlap;
        crowd: bool (N,), True for a region of many tiny shapes of the label's kind.

    Raises:
        ValueError: if an argument is outside its range.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is '{split}'; it must be 'train' or 'test'")
    if count < 1:
        raise ValueError(f"count is {count}; it must be 1 or more")
    if size < 32:
        raise ValueError(f"size is {size}; it must be 32 or more")
    if max_objects < 1:
        raise ValueError(f"max_objects is {max_objects}; it must be 1 or more")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale is {scale}; it must be (smallest, largest) with 0 < smallest <= largest <= 1")
    scenes: list[dict[str, Tensor]] = []
    for chunk in range(-(-count // CHUNK)):
        scenes += _scenes(chunk, size, seed, max_objects, split, (float(scale[0]), float(scale[1])))
    return scenes[:count]


class ShapeScenes(DetectionData):
    """`shape_scenes` as a data set."""

    def __init__(self, split: str, count: int = 512, size: int = 96, **options: Any) -> None:
        self.labels, self.split = LABELS, split
        self.scenes = shape_scenes(count, size, split=split, **options)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict:
        scene = self.scenes[index]
        area = scene["masks"].flatten(1).sum(1)
        return self.item(scene["image"], scene["boxes"], scene["labels"], scene["crowd"], area, index)

    def path(self, index: int) -> str:
        return f"{self.split} scene {index}"


@functools.lru_cache(maxsize=256)
def _scenes(
    chunk: int, size: int, seed: int, max_objects: int, split: str, scale: tuple[float, float]
) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(((seed * 100_003 + chunk) * 2 + (split == "test")) * 31 + 7)
    images = backgrounds(size, split, rng)  # (B, 3, S, S) float in [0, 1]
    chance = torch.rand(3, CHUNK, generator=rng)
    full = chance[0] >= EMPTY
    wanted = torch.randint(1, max_objects + 1, (CHUNK,), generator=rng) * full
    taken = torch.full((CHUNK, 1, 4), 2.0 * size)
    layers: list[tuple[Tensor, Tensor]] = []  # masks (B, S, S) and labels (B,), from behind to the front
    # the crowd lies behind everything
    kinds = torch.randint(len(LABELS), (CHUNK,), generator=rng)
    centre, side, _ = _places(taken, size, (0.35, 0.45), rng)
    has_crowd = full & (chance[1] < CROWDS)
    ink = _crowd(kinds, centre, side, size, rng) * has_crowd[:, None, None]
    images = _painted(images, ink, *_flat_texture(size), rng)
    layers.append((ink > 0.5, kinds))
    taken = torch.cat([taken, _squares(centre, side, has_crowd, size)[:, None]], dim=1)
    for slot in range(max_objects):
        kinds = torch.randint(len(LABELS), (CHUNK,), generator=rng)
        centre, side, free = _places(taken, size, scale, rng)
        there = (slot < wanted) & free
        u, v = _turned(centre, side / 2, torch.rand(CHUNK, generator=rng) * 2 * math.pi, size)
        ink = _coverage(_shapes(u, v, kinds), side / 2) * there[:, None, None]
        images = _painted(images, ink, u, v, rng)
        layers = [(mask & ~(ink > 0.5), k) for mask, k in layers] + [(ink > 0.5, kinds)]
        taken = torch.cat([taken, _squares(centre, side, there, size)[:, None]], dim=1)
    # a circle so far away that it is a pixel, in black or white, where nothing else is
    column, row = torch.randint(size, (2, CHUNK), generator=rng)
    covered = torch.stack([mask for mask, _ in layers]).any(0)[torch.arange(CHUNK), row, column]
    has_dot = full & (chance[2] < DOTS) & ~covered
    dot = torch.zeros(CHUNK, size, size)
    dot[torch.arange(CHUNK), row, column] = has_dot.float()
    under = (images.mean(1) * dot).sum((1, 2))
    images = torch.lerp(images, (under < 0.5).float()[:, None, None, None], dot[:, None])
    layers.append((dot > 0.5, torch.zeros(CHUNK, dtype=torch.int64)))

    masks, labels = (torch.stack(part, 1) for part in zip(*layers, strict=True))  # (B, M, S, S), (B, M)
    boxes, alive = boxes_around(masks)
    crowd = torch.zeros(len(layers), dtype=torch.bool)
    crowd[0] = True
    finished = (images * 255).round().to(torch.uint8)
    return [
        {
            "image": finished[i].clone(),
            "boxes": boxes[i, alive[i]],
            "labels": labels[i, alive[i]],
            "masks": masks[i, alive[i]],
            "crowd": crowd[alive[i]],
        }
        for i in range(CHUNK)
    ]


# -- places ------------------------------------------------------------------------------------------------------------


def _squares(centre: Tensor, side: Tensor, there: Tensor, size: int) -> Tensor:
    """Centres (B, 2) and sides (B,) as boxes (B, 4); far outside where there is nothing."""
    boxes = torch.cat([centre - side[:, None] / 2, centre + side[:, None] / 2], dim=1)
    return torch.where(there[:, None], boxes, 2.0 * size)


def _places(
    taken: Tensor, size: int, scale: tuple[float, float], rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """For each scene a square that hides little of the earlier ones: centres (B, 2), sides (B,), and whether one was found (B,)."""
    low, high = (math.log(s) for s in scale)
    side = size * (low + (high - low) * torch.rand(CHUNK, _TRIES, generator=rng)).exp()
    centre = side[..., None] / 2 + torch.rand(CHUNK, _TRIES, 2, generator=rng) * (size - side[..., None])
    lower, upper = centre - side[..., None] / 2, centre + side[..., None] / 2  # (B, T, 2)
    shared = torch.minimum(upper[:, :, None], taken[:, None, :, 2:]) - torch.maximum(
        lower[:, :, None], taken[:, None, :, :2]
    )
    hidden = shared.clamp(min=0).prod(-1)  # (B, T, squares)
    area = torch.minimum((taken[..., 2:] - taken[..., :2]).prod(-1)[:, None], side[..., None] ** 2)
    free = (hidden <= _HIDDEN * area).all(-1)
    first = free.float().argmax(1)  # the first free try; the first try where there is none
    rows = torch.arange(CHUNK)
    return centre[rows, first], side[rows, first], free[rows, first]


def _turned(centre: Tensor, radius: Tensor, angle: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Each pixel in the shape's own axes, two (B, S, S): the shape lies in -1 … 1."""
    at = torch.arange(size) + 0.5
    x = (at[None, None, :] - centre[:, 0, None, None]) / radius[:, None, None]
    y = (at[None, :, None] - centre[:, 1, None, None]) / radius[:, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    return cos * x + sin * y, cos * y - sin * x


# -- shapes and paint --------------------------------------------------------------------------------------------------


def _shapes(u: Tensor, v: Tensor, kinds: Tensor) -> Tensor:
    """About how far each pixel (B, S, S) lies outside of its scene's shape, in radii; negative inside."""
    radius, angle = (u * u + v * v).sqrt(), torch.atan2(u, v)

    def polygon(sides: int) -> Tensor:
        """Inscribed in the circle of radius 1."""
        sector = 2 * math.pi / sides
        return radius * (angle.remainder(sector) - sector / 2).cos() - math.cos(sector / 2)

    def star() -> Tensor:
        """Five points; the corners between them at 0.45. Folded onto one edge of ten, whose inner side is wanted."""
        folded = (angle.remainder(2 * math.pi / 5) - math.pi / 5).abs()  # 0 between two points, pi / 5 at a point
        x, y = radius * folded.cos(), radius * folded.sin()
        tip = (math.cos(math.pi / 5), math.sin(math.pi / 5))
        edge = (tip[0] - 0.45, tip[1])
        length = math.hypot(*edge)
        return ((x - 0.45) * edge[1] - y * edge[0]) / length

    small, large = torch.minimum(u.abs(), v.abs()), torch.maximum(u.abs(), v.abs())
    every = [
        radius - 1,
        polygon(3),
        polygon(4),
        star(),
        torch.maximum(small - 0.28, large - 0.95),
        torch.maximum(radius - 1, 0.55 - radius),
    ]
    chosen = torch.zeros_like(radius)
    for kind, distance in enumerate(every):
        chosen = torch.where((kinds == kind)[:, None, None], distance, chosen)
    return chosen


def _coverage(distance: Tensor, radius: Tensor) -> Tensor:
    """How much of each pixel a shape covers, from the distance in radii (B, S, S)."""
    return (0.5 - distance * radius[:, None, None]).clamp(0, 1)


def _crowd(kinds: Tensor, centre: Tensor, side: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """Tiny shapes of one kind in the cells of a grid, each a little beside its cell's middle: ink (B, S, S)."""
    n = _CROWD_SIDE
    u, v = _turned(centre, side / 2, torch.zeros(CHUNK), size)
    inside = (u.abs() < 1) & (v.abs() < 1)
    x, y = ((w + 1) * n / 2 for w in (u, v))  # in cells
    column, row = (w.floor().clamp(0, n - 1) for w in (x, y))
    cell = (row * n + column).long().flatten(1)
    shift = (torch.rand(2, CHUNK, n * n, generator=rng) - 0.5) * 0.3
    dx, dy = (s.gather(1, cell).view_as(x) for s in shift)
    part = 0.36  # a shape's radius, in cells
    distance = _shapes((x - column - 0.5 - dx) / part, (y - row - 0.5 - dy) / part, kinds)
    return _coverage(distance, part * side / n) * inside


def _flat_texture(size: int) -> tuple[Tensor, Tensor]:
    """Coordinates at which every pattern shows its first colour."""
    return torch.zeros(CHUNK, size, size), torch.zeros(CHUNK, size, size)


def _painted(images: Tensor, ink: Tensor, u: Tensor, v: Tensor, rng: torch.Generator) -> Tensor:
    """Ink (B, S, S) in two colours, plain, striped, chequered or shaded along the shape's axes; clearly unlike what lies under it."""
    under = (images.mean(1) * ink).sum((1, 2)) / ink.sum((1, 2)).clamp(min=1)  # (B,) brightness
    colour = torch.rand(CHUNK, 3, generator=rng)
    far = torch.where(under < 0.5, under + 0.35, under - 0.35)
    beyond = torch.where(under < 0.5, torch.maximum(far, colour.mean(1)), torch.minimum(far, colour.mean(1)))
    colour = (colour + (beyond - colour.mean(1))[:, None]).clamp(0, 1)  # the hue is kept
    second = (colour + 0.5 * (torch.rand(CHUNK, 3, generator=rng) - 0.5)).clamp(0, 1)
    pattern = torch.randint(4, (CHUNK,), generator=rng)[:, None, None]
    waves = (1.5 + 2.5 * torch.rand(CHUNK, generator=rng))[:, None, None] * math.pi
    along, across = (waves * u).sin() > 0, (waves * v).sin() > 0
    share = torch.where(pattern == 1, along.float(), 0.0)
    share = torch.where(pattern == 2, (along ^ across).float(), share)
    share = torch.where(pattern == 3, (0.5 + 0.5 * v).clamp(0, 1), share)
    paint = torch.lerp(colour[:, :, None, None], second[:, :, None, None], share[:, None])
    return torch.lerp(images, paint, ink[:, None])
