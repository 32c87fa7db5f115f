"""Chalk scenes: handwritten digits, chalk-white on a darkened photograph, so that a small network learns them in seconds.

What makes a scene its class is known to the pixel, and a network that is trained on the class alone never sees it: the ground
on which explanations are measured. A scene shows one digit, or several copies of the same digit by different hands.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from paperzoo.data.scenes import CHUNK, backgrounds, boxes_around, digit_scans, digit_scenes

CHALK = 230
CELLS = 4  # two rows and two columns: a copy has one to itself


def chalk_scenes(
    count: int, size: int = 32, split: str = "train", instances: int = 1, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Scenes of one class each; treat the tensors as read-only.

    Args:
        count: how many. The first scenes do not depend on it.
        size: height and width in pixels, at least 32.
        split: "train" or "test"; they share no scan and no part of a photograph.
        instances: the most copies in a scene, 1 to 4; each scene has 1 to so many. A single digit is 40 to 60% of the scene
            high and anywhere; copies are 35 to 48% high, each in its own quarter.
        seed: every choice follows from it.

    Returns:
        One dict a scene: image uint8 (3, size, size); boxes float32 (N, 4), x1 y1 x2 y2 in pixels around the ink; labels
        int64 (N,), all the same digit; masks bool (N, size, size), the ink of each.

    Raises:
        ValueError: if an argument is outside its range.
    """
    if not 1 <= instances <= CELLS:
        raise ValueError(f"instances is {instances}; it must be 1 to {CELLS}")
    if instances == 1:
        found = digit_scenes(count, size, seed, max_objects=1, split=split, scale=(0.4, 0.6))
        return [scene | {"image": torch.where(scene["masks"], CHALK, scene["image"] // 2)} for scene in found]
    if count < 1 or size < 32:
        raise ValueError(f"count is {count} and size {size}; they must be at least 1 and 32")
    scenes: list[dict[str, Tensor]] = []
    for chunk in range(-(-count // CHUNK)):
        scenes += _copies(chunk, size, seed, instances, split)
    return scenes[:count]


@functools.lru_cache(maxsize=128)
def _copies(chunk: int, size: int, seed: int, instances: int, split: str) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed((seed * 100_003 + chunk) * 2 + (split == "test"))
    images = backgrounds(size, split, rng) / 2
    scans, digits = digit_scans(split)
    rows, sizes = by_class(digits)
    labels = torch.randint(10, (CHUNK,), generator=rng)
    wanted = torch.randint(1, instances + 1, (CHUNK,), generator=rng)
    cells = torch.rand(CHUNK, CELLS, generator=rng).argsort(1)
    masks = []
    for slot in range(instances):
        row = (torch.rand(CHUNK, generator=rng) * sizes[labels]).long()
        side = size * (0.35 + 0.13 * torch.rand(CHUNK, generator=rng))
        corner = torch.stack([cells[:, slot] % 2, cells[:, slot] // 2], 1) * size / 2
        centre = corner + side[:, None] / 2 + torch.rand(CHUNK, 2, generator=rng) * (size / 2 - side[:, None])
        angle = (torch.rand(CHUNK, generator=rng) - 0.5) * 0.5  # +- 14 degrees
        ink = written(scans[rows[labels, row]], centre, side, angle, size)
        masks.append((ink > 0.5) & (slot < wanted)[:, None, None])
    every = torch.stack(masks, 1)  # (B, N, S, S)
    finished = (images * 255).round().to(torch.uint8)
    finished = torch.where(every.any(1, keepdim=True), CHALK, finished)
    boxes, alive = boxes_around(every)
    return [
        {
            "image": finished[i].clone(),
            "boxes": boxes[i, alive[i]],
            "labels": labels[i].expand(int(alive[i].sum())).clone(),
            "masks": every[i, alive[i]],
        }
        for i in range(CHUNK)
    ]


def written(scans: Tensor, centre: Tensor, side: Tensor, angle: Tensor, size: int) -> Tensor:
    """Scans (B, 8, 8) as squares of the given side around (B, 2) x y, turned by (B,) radians: ink (B, size, size) in [0, 1]."""
    at = torch.arange(size) + 0.5
    x = ((at - centre[:, :1]) / (side[:, None] / 2))[:, None, :]
    y = ((at - centre[:, 1:]) / (side[:, None] / 2))[:, :, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    grid = torch.stack([cos * x + sin * y, cos * y - sin * x], dim=-1)
    ink = F.grid_sample(scans[:, None], grid, mode="bicubic", padding_mode="zeros", align_corners=False)[:, 0]
    return ((ink - 0.3) / 0.3).clamp(0, 1)  # a stroke has an edge; the enlarged scan alone is a blur


def grid_scenes(
    count: int, size: int = 48, split: str = "train", digits: int = 1, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Scenes of `digits` different classes, each digit as it was scanned, 8 x 8, in one cell of a grid: patches of a transformer.

    Args:
        count: how many. The first scenes do not depend on it.
        size: height and width in pixels, a multiple of 8 and at least 32.
        split: "train" or "test"; they share no scan and no part of a photograph.
        digits: how many in each scene, 1 to 10.
        seed: every choice follows from it.

    Returns:
        One dict a scene: image uint8 (3, size, size); boxes float32 (digits, 4), x1 y1 x2 y2 of the cells in pixels; labels
        int64 (digits,), all different.

    Raises:
        ValueError: if an argument is outside its range.
    """
    if count < 1 or size < 32 or size % 8:
        raise ValueError(f"count is {count} and size {size}; they must be at least 1, and a multiple of 8 from 32 on")
    if not 1 <= digits <= 10:
        raise ValueError(f"digits is {digits}; it must be 1 to 10")
    scenes: list[dict[str, Tensor]] = []
    for chunk in range(-(-count // CHUNK)):
        scenes += _cells(chunk, size, seed, digits, split)
    return scenes[:count]


@functools.lru_cache(maxsize=128)
def _cells(chunk: int, size: int, seed: int, digits: int, split: str) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed((seed * 100_003 + chunk) * 2 + (split == "test"))
    images, side = backgrounds(size, split, rng) / 2, size // 8
    scans, classes = digit_scans(split)
    rows, sizes = by_class(classes)
    labels = torch.rand(CHUNK, 10, generator=rng).argsort(1)[:, :digits]  # (B, digits), all different
    cells = torch.rand(CHUNK, side * side, generator=rng).argsort(1)[:, :digits]
    chosen = rows[labels, (torch.rand(CHUNK, digits, generator=rng) * sizes[labels]).long()]
    ink = torch.zeros(CHUNK, side * side, 8, 8).scatter_(1, cells[:, :, None, None].expand(-1, -1, 8, 8), scans[chosen])
    ink = ink.view(CHUNK, side, side, 8, 8).transpose(2, 3).reshape(CHUNK, 1, size, size)
    finished = ((images + ink * (CHALK / 255 - images)) * 255).round().to(torch.uint8)
    corners = torch.stack([cells % side, cells // side], 2).float() * 8
    boxes = torch.cat([corners, corners + 8], 2)
    return [{"image": finished[i].clone(), "boxes": boxes[i], "labels": labels[i]} for i in range(CHUNK)]


def by_class(digits: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of each digit (10, most of one), filled up with zeros, and how many there are (10,)."""
    rows = [(digits == digit).nonzero()[:, 0] for digit in range(10)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(r) for r in rows])
