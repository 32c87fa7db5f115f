"""From clouds to what a network sees: a fixed number of points each, centred, turned, jittered; blocks of rooms; views that cover a cloud.

Random numbers come from torch's global generator, which is seeded for every sample. A sample is a dict of `points` float32 (N, C),
`target`, `mask` bool (N,) and, where points are labelled, `labels` int64 (N,), as `tasks.point_clouds` describes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.data.point_files import Cloud
from paperzoo.data.points import Clouds
from paperzoo.data.solids import about
from paperzoo.errors import DataError

AXES = {"x": 0, "y": 1, "z": 2}
TRIES = 10  # places that are tried for a block with enough points


def choose(size: int, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """`count` rows of `size`, none twice if there are enough, else all of them and some again: int64 and bool (count,).

    The mask is false where a row comes again.
    """
    rows = torch.randperm(size, generator=generator)[:count]
    mask = torch.ones(count, dtype=torch.bool)
    if size < count:
        mask[size:] = False
        rows = torch.cat([rows, torch.randint(size, (count - size,), generator=generator)])
    return rows, mask


def covering(size: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows that have every one of `size` points at least once, `count` at a time: int64 and bool (R, count), as `choose`."""
    if size <= count:
        rows, mask = choose(size, count, generator)
        return rows[None], mask[None]
    order = torch.randperm(size, generator=generator)
    views = math.ceil(size / count)
    return torch.cat([order, order[: views * count - size]]).view(views, count), torch.ones(
        views, count, dtype=torch.bool
    )


def in_unit_sphere(cloud: Cloud) -> Cloud:
    """Its mean at the origin, its farthest point at distance 1."""
    points = cloud.points - cloud.points.mean(0)
    return replace(cloud, points=points / points.norm(dim=1).max().clamp(min=1e-12))


def with_features(cloud: Cloud, features: Sequence[str], name: str, place: Tensor | None = None) -> Tensor:
    """x, y, z and the columns that the network is given besides: (N, 3 + 3 len(features)).

    Raises:
        DataError: if the cloud has none of a kind.
    """
    parts = [cloud.points]
    for feature in features:
        values = {"normals": cloud.normals, "colours": cloud.colours, "place": place}[feature]
        if values is None:
            raise DataError(name, f"its points have no {feature}, which the network was made for")
        parts.append(values)
    return torch.cat(parts, 1)


def uniform(low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape)


def augmented(cloud: Cloud, config: Any) -> Cloud:
    """Turned, scaled, shifted and jittered at random, as `config` says; normals are turned along."""
    matrix, axis = torch.eye(3), AXES[config.up]
    if config.rotate == "up":
        matrix = about(axis, uniform(0, 2 * math.pi, 1))[0]
    elif config.rotate == "any":
        q, r = torch.linalg.qr(torch.randn(3, 3))
        q = q * r.diag().sign()
        matrix = q * q.det().sign()  # of all rotations alike; a mirror image is turned inside out by its sign
    if config.perturb:
        angles = (config.perturb * torch.randn(3)).clamp(-3 * config.perturb, 3 * config.perturb)
        matrix = matrix @ about(0, angles[:1])[0] @ about(1, angles[1:2])[0] @ about(2, angles[2:])[0]
    points = cloud.points @ matrix
    if config.scale != (1.0, 1.0):
        points = points * uniform(*config.scale, 1)
    if config.shift:
        points = points + uniform(-config.shift, config.shift, 3)
    if config.jitter:
        points = points + (config.jitter * torch.randn(points.shape)).clamp(-config.jitter_clip, config.jitter_clip)
    return replace(cloud, points=points, normals=None if cloud.normals is None else cloud.normals @ matrix)


def sample(points: Tensor, mask: Tensor, labels: Tensor | None, target: int) -> dict[str, Any]:
    found = {"points": points, "mask": mask, "target": target}
    if labels is not None:
        found["labels"] = labels.masked_fill(~mask, -1)  # a point that comes again counts once
    return found


class Objects(Dataset):
    """Whole clouds, `num_points` of each."""

    def __init__(self, clouds: Clouds, config: Any, train: bool) -> None:
        self.clouds, self.config, self.train = clouds, config, train

    def __len__(self) -> int:
        return len(self.clouds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        cloud, target = self.clouds[index]
        config = self.config
        rows, mask = choose(len(cloud), config.num_points)
        if self.train and config.drop:
            gone = torch.rand(len(rows)) < config.drop * torch.rand(1)
            gone[0] = False
            rows, mask = torch.where(gone, rows[0], rows), mask & ~gone
        cloud = (in_unit_sphere(cloud) if config.normalise == "sphere" else cloud).take(rows)
        if self.train:
            cloud = augmented(cloud, config)
        points = with_features(cloud, config.features, self.clouds.paths[index])
        return sample(points, mask, cloud.labels if self.clouds.point_labels else None, target)


class Blocks(Dataset):
    """Random blocks of rooms: what stands on a square of `block_size` metres around a random point. Rooms are kept once they are read."""

    def __init__(self, clouds: Clouds, config: Any, train: bool) -> None:
        self.clouds, self.config, self.train = clouds, config, train
        self.kept: dict[int, Cloud] = {}

    def __len__(self) -> int:
        return len(self.clouds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        config = self.config
        if index not in self.kept:
            self.kept[index] = self.clouds[index][0]
        room = self.kept[index]
        best = torch.zeros(0, dtype=torch.int64)
        for _ in range(TRIES):
            middle = room.points[torch.randint(len(room), ())]
            inside = rows_of_block(room.points, middle, config)
            if len(inside) > len(best):
                best, centre = inside, middle
            if len(best) >= config.num_points // 4:
                break
        chosen, mask = choose(len(best), config.num_points)
        rows = best[chosen]
        cloud = block(room.take(rows), centre, config)
        if self.train:
            cloud = augmented(cloud, config)
        points = with_features(cloud, config.features, self.clouds.paths[index], place_in_room(room.points, rows))
        return sample(points, mask, cloud.labels, 0)


def flat_axes(up: str) -> list[int]:
    return [axis for axis in range(3) if axis != AXES[up]]


def rows_of_block(points: Tensor, middle: Tensor, config: Any) -> Tensor:
    """The points above the square around `middle`, as row numbers."""
    near = (points - middle).abs()[
        :, flat_axes(config.up)
    ] <= config.block_size / 2 + 1e-4  # with what lies on its edge
    return near.all(1).nonzero().squeeze(1)


def block(cloud: Cloud, middle: Tensor, config: Any) -> Cloud:
    """The origin in the middle of the square; heights stay above the floor of the room."""
    shift = middle.clone()
    shift[AXES[config.up]] = 0
    return replace(cloud, points=cloud.points - shift)


def place_in_room(points: Tensor, rows: Tensor) -> Tensor:
    """Where points are in their room, 0 to 1 along each axis."""
    low, high = points.amin(0), points.amax(0)
    return (points[rows] - low) / (high - low).clamp(min=1e-6)


def views(cloud: Cloud, config: Any, name: str = "cloud") -> tuple[Tensor, Tensor, Tensor]:
    """What a network sees of a cloud, all of whose points are wanted: points (R, N, C), their rows (R, N) and masks (R, N).

    An object in as many random parts as it takes; a room block by block on a grid of half a block's size.
    """
    generator = torch.Generator().manual_seed(len(cloud))
    if config.task != "scenes":
        rows, mask = covering(len(cloud), config.num_points, generator)
        shape = in_unit_sphere(cloud) if config.normalise == "sphere" else cloud
        return with_features(shape, config.features, name)[rows], rows, mask
    seen, rows, masks = [], [], []
    for middle in grid(cloud.points, config):
        inside = rows_of_block(cloud.points, middle, config)
        if not len(inside):
            continue
        for chosen, mask in zip(*covering(len(inside), config.num_points, generator), strict=True):
            here = inside[chosen]
            part = block(cloud.take(here), middle, config)
            seen.append(with_features(part, config.features, name, place_in_room(cloud.points, here)))
            rows.append(here)
            masks.append(mask)
    return torch.stack(seen), torch.stack(rows), torch.stack(masks)


def grid(points: Tensor, config: Any) -> Tensor:
    """The middles of blocks that cover a room, half a block apart: (G, 3)."""
    low, high, half = points.amin(0), points.amax(0), config.block_size / 2
    lines = []
    for axis in range(3):
        steps = max(1, math.ceil(float(high[axis] - low[axis]) / half - 1))
        lines.append(low[axis] + half * (1 + torch.arange(steps)))
    lines[AXES[config.up]] = low[AXES[config.up]][None]
    return torch.cartesian_prod(*lines)
