"""Moving layers: pairs of pictures with exact optical flow and occlusion, always there.

Parts of real photographs (see `paperzoo.data.photograph_parts`) are the background and the objects in front of it. Each layer moves by a map of
its own: shifted, turned, enlarged, tilted (a homography) and bent smoothly. The second picture shows the layers as they are; the first one
is read from it through each layer's map, so that the flow is exact, whatever the map is: layer k of the first picture at x is layer k of the
second one at x + w_k(x). What is hidden in the second picture follows from the layers in front.

Training and test pairs use other parts of the photographs, and other random numbers.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from paperzoo.blocks.warping import pixel_grid
from paperzoo.data.photograph_parts import random_parts

CHUNK = 64  # pairs that are drawn together; a longer list starts with the same pairs as a shorter one
OUTLINE = 5  # waves around an object's outline


@dataclass(frozen=True)
class Layers:
    """Pairs; treat the tensors as read-only.

    first, second: uint8 (N, 3, H, W). flow: float32 (N, 2, H, W), pixels, from the first to the second. occluded: bool (N, 1, H, W), pixels of
    the first picture that the second one does not show.
    """

    first: Tensor
    second: Tensor
    flow: Tensor
    occluded: Tensor


@functools.lru_cache(maxsize=8)
def moving_layers(
    count: int,
    size: tuple[int, int] = (64, 96),
    seed: int = 0,
    split: str = "train",
    motion: float = 0.06,
    objects: int = 3,
) -> Layers:
    """Random pairs.

    Args:
        count: how many. The first pairs do not depend on it.
        size: height and width, at least 32.
        seed: every choice follows from it, and from the other arguments.
        split: "train" or "test".
        motion: the largest shift of a layer along each axis, as a part of the width.
        objects: the most objects in front of the background, 0 or more.

    Raises:
        ValueError: if an argument is outside its range.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is '{split}'; it must be 'train' or 'test'")
    if count < 1:
        raise ValueError(f"count is {count}; it must be 1 or more")
    if min(size) < 32:
        raise ValueError(f"size is {size}; both must be 32 or more")
    if not 0 <= motion <= 0.5:
        raise ValueError(f"motion is {motion}; it must be 0 to 0.5")
    if objects < 0:
        raise ValueError(f"objects is {objects}; it must be 0 or more")
    chunks = [_pairs(i, size, seed, split, motion, objects) for i in range(-(-count // CHUNK))]
    return Layers(*(torch.cat([c[k] for c in chunks])[:count] for k in range(4)))


def _pairs(chunk: int, size: tuple[int, int], seed: int, split: str, motion: float, objects: int) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed((seed * 100_003 + chunk) * 2 + (split == "test") + 7_000_003)
    grid = pixel_grid(*size, torch.empty(0)).expand(CHUNK, 2, *size)
    wanted = torch.randint(0, objects + 1, (CHUNK,), generator=rng)
    maps = random_maps(size, rng, motion)
    textures = random_parts(CHUNK, size, split, rng)
    first, second = textures(maps), textures(grid)
    flow = maps - grid
    layer = torch.zeros(CHUNK, 1, *size, dtype=torch.int64)  # the layer that the first picture shows
    covers = []  # of each object, where the second picture has it
    for k in range(objects):
        there = (k < wanted)[:, None, None, None]
        outline, textures = random_outline(size, rng), random_parts(CHUNK, size, split, rng)
        maps = random_maps(size, rng, motion)
        inside, now = outline(maps) & there, outline(grid) & there
        first = torch.where(inside, textures(maps), first)
        second = torch.where(now, textures(grid), second)
        flow = torch.where(inside, maps - grid, flow)
        layer = torch.where(inside, k + 1, layer)
        covers.append((outline, there))
    target = grid + flow
    x, y = target[:, :1], target[:, 1:]
    occluded = (x < 0) | (y < 0) | (x > size[1] - 1) | (y > size[0] - 1)
    for k, (outline, there) in enumerate(covers):
        occluded |= outline(target) & there & (layer < k + 1)
    light = 0.7 + 0.3 * torch.rand(CHUNK, 1, 1, 1, generator=rng)
    pictures = [(p * light * 255).round().clamp(0, 255).to(torch.uint8) for p in (first, second)]
    return (*pictures, flow, occluded)


def random_maps(size: tuple[int, int], rng: torch.Generator, motion: float) -> Tensor:
    """Where each pixel goes: (CHUNK, 2, H, W), a homography about the middle and a smooth bend."""
    height, width = size
    draw = 2 * torch.rand(CHUNK, 8, generator=rng) - 1
    angle, zoom = 0.12 * draw[:, 0], (0.08 * draw[:, 1]).exp()
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    shift = motion * width * draw[:, 2:4]
    tilt = 0.1 * draw[:, 4:6] / width
    middle = torch.tensor([(width - 1) / 2, (height - 1) / 2])[:, None, None]
    x, y = (pixel_grid(height, width, shift) - middle).unbind(0)
    a, b = (v[:, None, None] for v in (cos, sin))
    depth = 1 + tilt[:, 0, None, None] * x + tilt[:, 1, None, None] * y
    turned = torch.stack([a * x - b * y, b * x + a * y], 1) / depth[:, None]
    bend = 2 * torch.rand(CHUNK, 2, 4, 4, generator=rng) - 1
    bend = F.interpolate(bend * 0.015 * width, size, mode="bicubic", align_corners=True)
    return turned + middle + shift[..., None, None] + bend


def random_outline(size: tuple[int, int], rng: torch.Generator):
    """A wavy outline for each pair, as a function of places (CHUNK, 2, H, W) to inside or not, bool (CHUNK, 1, H, W)."""
    height, width = size
    centre = torch.rand(CHUNK, 2, generator=rng) * torch.tensor([width, height])
    radius = min(size) * (0.14 + 0.24 * torch.rand(CHUNK, generator=rng))
    height_of = 0.35 * torch.rand(CHUNK, OUTLINE, generator=rng) / torch.arange(1, OUTLINE + 1)
    phase = 2 * math.pi * torch.rand(CHUNK, OUTLINE, generator=rng)
    order = torch.arange(1, OUTLINE + 1)[None, :, None, None]

    def inside(places: Tensor) -> Tensor:
        x, y = (places - centre[..., None, None]).unbind(1)
        waves = height_of[..., None, None] * torch.cos(order * torch.atan2(y, x)[:, None] + phase[..., None, None])
        return ((x.square() + y.square()).sqrt() < radius[:, None, None] * (1 + waves.sum(1)))[:, None]

    return inside
