"""Point clouds of solids, made by a rule: single ones, objects of several parts, rooms. Always there, the same on every machine.

    solids("train")        balls, boxes, cylinders, cones, tori, capsules, pyramids and tubes, one a cloud
    solid_parts("train")   mugs, lamps, tables, dumbbells and hammers, each point with its part
    solid_rooms("train")   floors, two walls and what stands on them, each point with its class; metres

Points lie evenly on the surfaces (by area) and are moved by a little noise. Solids are turned about the vertical axis, which is z, by any
angle; objects of parts lie in any position. Sizes and proportions are drawn anew for every object. All clouds of a set are made at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SOLIDS = ["ball", "box", "capsule", "cone", "cylinder", "pyramid", "torus", "tube"]
OBJECTS = {
    "dumbbell": ["bar", "weights"],
    "hammer": ["handle", "head"],
    "lamp": ["base", "pole", "shade"],
    "mug": ["body", "handle"],
    "table": ["top", "legs"],
}
ROOM_CLASSES = ["floor", "wall", "box", "ball", "cylinder", "cone"]
POINTS = 512  # of a solid or an object
ROOM_POINTS = 8192
NOISE = 0.01  # standard deviation, of the object's largest half extent


class Surface(NamedTuple):
    """One surface in each of M clouds: N points on each (M, N, 3), their normals, and the surface's area (M,)."""

    points: Tensor
    normals: Tensor
    area: Tensor


class Maker:
    """Draws surfaces for `clouds` clouds of `points` points, from one generator. Sizes are (clouds,), lengths in one unit."""

    def __init__(self, clouds: int, points: int, seed: int) -> None:
        self.shape = (clouds, points)
        self.generator = torch.Generator().manual_seed(seed)

    def size(self, low: float, high: float) -> Tensor:
        """One number for each cloud."""
        return low + (high - low) * torch.rand(self.shape[0], generator=self.generator)

    def uniform(self) -> tuple[Tensor, ...]:
        """Four numbers in [0, 1) for each point."""
        return torch.rand(4, *self.shape, generator=self.generator).unbind(0)

    def ball(self, radius: Tensor) -> Surface:
        a, b, _, _ = self.uniform()
        height, angle = 1 - 2 * a, 2 * math.pi * b
        ring = (1 - height.square()).clamp(min=0).sqrt()
        normals = torch.stack([ring * angle.cos(), ring * angle.sin(), height], 2)
        return Surface(normals * radius[:, None, None], normals, 4 * math.pi * radius.square())

    def box(self, x: Tensor, y: Tensor, z: Tensor) -> Surface:
        """Half extents along the axes."""
        a, b, c, d = self.uniform()
        half = torch.stack([x, y, z], 1)
        areas = 8 * torch.stack([y * z, x * z, x * y], 1)
        across = torch.nn.functional.one_hot(pick(d, areas), 3)
        sign = torch.where((d * 4096) % 1 < 0.5, -1.0, 1.0)
        normals = across * sign[..., None]
        inside = 2 * torch.stack([a, b, c], 2) - 1
        return Surface((inside * (1 - across) + normals) * half[:, None], normals, areas.sum(1))

    def frustum(self, bottom: Tensor, top: Tensor, height: Tensor, closed: bool = True) -> Surface:
        """A cone cut off: radii below and above (equal for a cylinder, 0 for a cone), its middle at the origin."""
        a, b, c, _ = self.uniform()
        slant = (height.square() + (bottom - top).square()).sqrt()
        caps = math.pi * torch.stack([bottom.square(), top.square()], 1) * float(closed)
        areas = torch.cat([(math.pi * (bottom + top) * slant)[:, None], caps], 1)
        face = pick(c, areas)
        low, high, tall = bottom[:, None], top[:, None], height[:, None]
        radius = (
            (low.square() + b * (high.square() - low.square())).clamp(min=0).sqrt()
        )  # as much of it as there is area
        change = high - low
        share = torch.where(change.abs() < 1e-6, b, (radius - low) / torch.where(change.abs() < 1e-6, 1.0, change))
        disc = b.sqrt()
        radius = torch.where(face == 0, radius, disc * torch.where(face == 1, low, high))
        share = torch.where(face == 0, share, (face == 2).float())
        angle = 2 * math.pi * a
        points = torch.stack([radius * angle.cos(), radius * angle.sin(), (share - 0.5) * tall], 2)
        side = (
            torch.stack([angle.cos() * tall, angle.sin() * tall, (low - high).expand_as(a)], 2) / slant[:, None, None]
        )
        flat = torch.tensor([0.0, 0.0, 1.0]) * torch.where(face == 1, -1.0, 1.0)[..., None]
        return Surface(points, torch.where((face == 0)[..., None], side, flat), areas.sum(1))

    def torus(self, ring: Tensor, tube: Tensor) -> Surface:
        """Radii of the ring and of the tube around it. Even by area: the angle solves Kepler's equation."""
        a, b, _, _ = self.uniform()
        mean, ratio = 2 * math.pi * b, (tube / ring)[:, None]
        around = mean
        for _ in range(6):  # Newton; exact to rounding for any ratio used here
            around = around - (around + ratio * around.sin() - mean) / (1 + ratio * around.cos())
        angle = 2 * math.pi * a
        normals = torch.stack([around.cos() * angle.cos(), around.cos() * angle.sin(), around.sin()], 2)
        middle = torch.stack([angle.cos(), angle.sin(), torch.zeros_like(angle)], 2) * ring[:, None, None]
        return Surface(middle + normals * tube[:, None, None], normals, 4 * math.pi**2 * ring * tube)

    def pyramid(self, half: Tensor, height: Tensor) -> Surface:
        """A square base of side 2 `half`."""
        a, b, c, d = self.uniform()
        slant = (height.square() + half.square()).sqrt()
        areas = torch.stack([4 * half * slant, 4 * half.square()], 1)
        on_side = (pick(c, areas) == 0)[..., None]
        up = 1 - (1 - a).sqrt()  # a triangle has less area above
        width, tall = half[:, None], height[:, None]
        out = (1 - up) * width
        along = (2 * b - 1) * out
        quarter = (d * 4).floor() * (math.pi / 2)
        cos, sin = quarter.cos(), quarter.sin()
        side = torch.stack([cos * out - sin * along, sin * out + cos * along, (up - 0.5) * tall], 2)
        base = torch.stack([(2 * a - 1) * width, (2 * b - 1) * width, (-0.5 * tall).expand_as(a)], 2)
        tilt = torch.stack([cos * tall, sin * tall, width.expand_as(a)], 2) / slant[:, None, None]
        down = torch.tensor([0.0, 0.0, -1.0]).expand_as(tilt)
        return Surface(torch.where(on_side, side, base), torch.where(on_side, tilt, down), areas.sum(1))

    def capsule(self, radius: Tensor, height: Tensor) -> Surface:
        """A cylinder without caps between two half balls."""
        ends = self.ball(radius)
        half = (height / 2)[:, None] * torch.where(ends.points[..., 2] < 0, -1.0, 1.0)
        shift = torch.stack([torch.zeros_like(half), torch.zeros_like(half), half], 2)
        ends = Surface(ends.points + shift, ends.normals, ends.area)
        return self.union([ends, self.frustum(radius, radius, height, closed=False)])[0]

    def tube(self, outer: Tensor, inner: Tensor, height: Tensor) -> Surface:
        """A cylinder with a hole through it."""
        a, b, _, d = self.uniform()
        radius = (inner.square()[:, None] + b * (outer.square() - inner.square())[:, None]).sqrt()
        sign = torch.where(d < 0.5, -1.0, 1.0)
        angle = 2 * math.pi * a
        rim = torch.stack([radius * angle.cos(), radius * angle.sin(), sign * height[:, None] / 2], 2)
        up = torch.tensor([0.0, 0.0, 1.0]) * sign[..., None]
        ends = Surface(rim, up, 2 * math.pi * (outer.square() - inner.square()))
        hole = self.frustum(inner, inner, height, closed=False)
        hole = Surface(hole.points, -hole.normals, hole.area)
        return self.union([self.frustum(outer, outer, height, closed=False), hole, ends])[0]

    def union(self, surfaces: Sequence[Surface]) -> tuple[Surface, Tensor]:
        """All of them in one cloud, each with as many points as its area asks for; and which one each point is on (M, N)."""
        areas = torch.stack([s.area for s in surfaces], 1)
        which = pick(torch.rand(self.shape, generator=self.generator), areas)
        index = which[None, :, :, None].expand(1, *self.shape, 3)
        points = torch.stack([s.points for s in surfaces]).gather(0, index)[0]
        normals = torch.stack([s.normals for s in surfaces]).gather(0, index)[0]
        return Surface(points, normals, areas.sum(1)), which

    def turned(self, surface: Surface) -> Surface:
        """Each cloud about the z axis by an angle of its own."""
        matrix = about(2, self.size(0, 2 * math.pi))
        return Surface(surface.points @ matrix, surface.normals @ matrix, surface.area)

    def tumbled(self, surface: Surface) -> Surface:
        """Each cloud by a rotation of its own, all alike: the orthogonal factor of a Gaussian matrix."""
        q, r = torch.linalg.qr(torch.randn(self.shape[0], 3, 3, generator=self.generator))
        q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None]
        q = q * torch.linalg.det(q).sign()[:, None, None]
        return Surface(surface.points @ q, surface.normals @ q, surface.area)

    def noisy(self, points: Tensor) -> Tensor:
        scale = points.abs().amax((1, 2), keepdim=True) * NOISE
        return points + scale * torch.randn(points.shape, generator=self.generator)


def pick(u: Tensor, areas: Tensor) -> Tensor:
    """u in [0, 1) (M, N), areas (M, K) -> int64 (M, N) in 0 … K - 1, as often as the areas say."""
    upto = areas.cumsum(1) / areas.sum(1, keepdim=True)
    return (u[..., None] >= upto[:, None, :-1]).sum(2)


def about(axis: int, angle: Tensor) -> Tensor:
    """Rotations about an axis (0 x, 1 y, 2 z), for rows of points: angles (M,) -> (M, 3, 3)."""
    cos, sin = angle.cos(), angle.sin()
    one, zero = torch.ones_like(cos), torch.zeros_like(cos)
    rows = {
        0: [one, zero, zero, zero, cos, sin, zero, -sin, cos],
        1: [cos, zero, -sin, zero, one, zero, sin, zero, cos],
        2: [cos, sin, zero, -sin, cos, zero, zero, zero, one],
    }[axis]
    return torch.stack(rows, 1).view(-1, 3, 3)


def moved(surface: Surface, x: Tensor | float = 0.0, y: Tensor | float = 0.0, z: Tensor | float = 0.0) -> Surface:
    shift = torch.stack([torch.as_tensor(v, dtype=torch.float32).expand(len(surface.area)) for v in (x, y, z)], 1)
    return Surface(surface.points + shift[:, None], surface.normals, surface.area)


def rolled(surface: Surface, order: tuple[int, int, int]) -> Surface:
    """With its axes exchanged: (2, 0, 1) lays what stood along z along x."""
    return Surface(surface.points[..., list(order)], surface.normals[..., list(order)], surface.area)


# -- the three sets ------------------------------------------------------------------------------------------------------


class Made(NamedTuple):
    """A set of clouds: points and normals float32 (M, N, 3), the class of each int64 (M,), the label of each point int64 (M, N)."""

    points: Tensor
    normals: Tensor
    targets: Tensor
    labels: Tensor


def one_solid(kind: str, m: Maker) -> tuple[Surface, Tensor]:
    size = m.size
    if kind == "ball":
        surface = m.ball(size(0.6, 1.0))
    elif kind == "box":
        surface = m.box(size(0.4, 1.0), size(0.4, 1.0), size(0.4, 1.0))
    elif kind == "capsule":
        surface = m.capsule(size(0.4, 0.7), size(0.5, 1.4))
    elif kind == "cone":
        surface = m.frustum(size(0.5, 1.0), torch.zeros(m.shape[0]), size(1.0, 2.2))
    elif kind == "cylinder":
        radius = size(0.4, 0.9)
        surface = m.frustum(radius, radius, size(0.8, 2.2))
    elif kind == "pyramid":
        surface = m.pyramid(size(0.5, 1.0), size(1.0, 2.2))
    elif kind == "torus":
        ring = size(0.6, 1.0)
        surface = m.torus(ring, ring * size(0.25, 0.6))
    else:
        outer = size(0.4, 0.9)
        surface = m.tube(outer, outer * size(0.5, 0.85), size(0.8, 2.2))
    return surface, torch.zeros(m.shape, dtype=torch.int64)


def one_object(kind: str, m: Maker) -> tuple[Surface, Tensor]:
    size = m.size
    if kind == "dumbbell":
        length, bar, weight = size(1.0, 1.8), size(0.08, 0.16), size(0.3, 0.5)
        pieces = [
            rolled(m.frustum(bar, bar, length, closed=False), (2, 0, 1)),
            moved(m.ball(weight), x=-length / 2 - weight),
            moved(m.ball(weight), x=length / 2 + weight),
        ]
        parts = [0, 1, 1]
    elif kind == "hammer":
        length, grip, head = size(1.4, 2.0), size(0.06, 0.12), size(0.16, 0.26)
        pieces = [
            m.frustum(grip, grip, length),
            moved(m.box(size(0.4, 0.7), head, head), z=length / 2 + head),
        ]
        parts = [0, 1]
    elif kind == "lamp":
        foot, pole, shade = size(0.1, 0.2), size(1.0, 1.6), size(0.4, 0.8)
        wide, thin = size(0.4, 0.7), size(0.04, 0.08)
        low = size(0.4, 0.7)
        pieces = [
            m.frustum(wide, wide, foot),
            moved(m.frustum(thin, thin, pole, closed=False), z=foot / 2 + pole / 2),
            moved(m.frustum(low, low * size(0.3, 0.6), shade, closed=False), z=foot / 2 + pole),
        ]
        parts = [0, 1, 2]
    elif kind == "mug":
        radius, height = size(0.4, 0.6), size(1.0, 1.4)
        ring = height * size(0.32, 0.42)
        loop = rolled(m.torus(ring, ring * size(0.3, 0.45)), (0, 2, 1))
        fold = torch.where(loop.points[..., :1] < 0, torch.tensor([-1.0, 1.0, 1.0]), 1.0)  # the half that is outside
        handle = Surface(loop.points * fold, loop.normals * fold, loop.area / 2)
        pieces = [m.frustum(radius * size(0.9, 1.0), radius, height), moved(handle, x=0.97 * radius)]
        parts = [0, 1]
    else:
        x, y, tall = size(0.7, 1.1), size(0.5, 0.9), size(0.8, 1.4)
        thick, leg = size(0.04, 0.1), size(0.05, 0.1)
        pieces, parts = [moved(m.box(x, y, thick), z=tall / 2 + thick)], [0, 1, 1, 1, 1]
        for right in (-1, 1):
            for front in (-1, 1):
                pieces.append(moved(m.box(leg, leg, tall / 2), x=right * (x - leg), y=front * (y - leg)))
    surface, which = m.union(pieces)
    return surface, torch.tensor(parts)[which]


def made_of(kinds: Sequence[str], make, first_label: Sequence[int], each: int, points: int, seed: int) -> Made:
    """`each` clouds of every kind."""
    rows = []
    for k, kind in enumerate(kinds):
        maker = Maker(each, points, seed + k)
        surface, labels = make(kind, maker)
        surface = maker.tumbled(surface) if make is one_object else maker.turned(surface)
        rows.append((maker.noisy(surface.points), surface.normals, torch.full((each,), k), labels + first_label[k]))
    return Made(*(torch.cat(parts) for parts in zip(*rows, strict=True)))


@functools.cache
def solids(split: str) -> Made:
    """200 clouds of each of the eight `SOLIDS` to learn from, 50 for testing; 512 points. Labels are all 0."""
    each, seed = (200, 1000) if split == "train" else (50, 2000)
    return made_of(SOLIDS, one_solid, [0] * len(SOLIDS), each, POINTS, seed)


@functools.cache
def solid_parts(split: str) -> Made:
    """120 clouds of each of the five `OBJECTS` to learn from, 30 for testing; 512 points, labelled by part, numbered through."""
    each, seed = (120, 3000) if split == "train" else (30, 4000)
    counts = [len(parts) for parts in OBJECTS.values()]
    first = [sum(counts[:k]) for k in range(len(counts))]
    return made_of(list(OBJECTS), one_object, first, each, POINTS, seed)


@functools.cache
def solid_rooms(split: str) -> Made:
    """24 rooms to learn from, 8 for testing: 8,192 points in metres, labelled with `ROOM_CLASSES`; four to five metres square."""
    count, seed = (24, 5000) if split == "train" else (8, 6000)
    m = Maker(count, ROOM_POINTS, seed)
    x, y, tall = m.size(4.0, 5.0), m.size(4.0, 5.0), m.size(2.2, 2.8)
    thin = torch.full((count,), 0.005)
    pieces = [
        moved(m.box(x / 2, y / 2, thin), x=x / 2, y=y / 2),
        moved(m.box(thin, y / 2, tall / 2), y=y / 2, z=tall / 2),
        moved(m.box(x / 2, thin, tall / 2), x=x / 2, z=tall / 2),
    ]
    classes = [torch.full((count,), k) for k in (0, 1, 1)]
    for place in range(8):  # on a grid of 3 x 3 without the corner at the walls, so that nothing stands in anything
        kind = torch.randint(2, len(ROOM_CLASSES), (count,), generator=m.generator)
        radius, height = m.size(0.25, 0.5), m.size(0.5, 1.4)
        options = [
            m.box(radius * 0.8, radius * 0.8, height / 2),
            moved(m.ball(radius), z=radius - height / 2),
            m.frustum(radius, radius, height),
            m.frustum(radius, torch.zeros(count), height),
        ]
        index = kind - 2
        chosen = Surface(
            torch.stack([s.points for s in options], 1)[torch.arange(count), index],
            torch.stack([s.normals for s in options], 1)[torch.arange(count), index],
            torch.stack([s.area for s in options], 1)[torch.arange(count), index],
        )
        column, row = (place + 1) % 3, (place + 1) // 3
        chosen = m.turned(chosen)
        pieces.append(
            moved(chosen, x=0.75 + column * (x - 1.4) / 2.6, y=0.75 + row * (y - 1.4) / 2.6, z=height / 2 + 0.01)
        )
        classes.append(kind)
    surface, which = m.union(pieces)
    labels = torch.stack(classes, 1).gather(1, which)
    noise = 0.005 * torch.randn(surface.points.shape, generator=m.generator)
    return Made(surface.points + noise, surface.normals, torch.zeros(count, dtype=torch.int64), labels)
