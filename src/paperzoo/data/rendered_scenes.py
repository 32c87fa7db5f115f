"""Scenes rendered with known cameras, always there: objects on a slab, seen from all around; a room, seen from side to side.

`rendered_objects`: a chequered slab with a glossy ball, a striped ball, a box and a post on it, on nothing: pictures have opacity, as the
Blender scenes. Rays are cast into analytic shapes, four a pixel. Light comes from one side; gloss (Phong's) moves with the viewer,
so that colour depends on the viewing direction. Cameras lie on the upper half of a sphere of radius 4; training views on a golden
spiral, test views as far from them as can be.

`rendered_room`: one of the traced rooms of `paperzoo.data.traced_scenes`, photographed by a grid of cameras that look forward, for normalised
device coordinates; every fifth view is for testing.

Everything follows from constants; nothing is downloaded, nothing is random but the room, which follows from its seed.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from paperzoo.blocks.rays import Cameras, looking, scaling
from paperzoo.data.cameras import BOUND_FACTOR, Views
from paperzoo.data.traced_scenes import Scene, trace

SIZE = 40  # pixels
COUNT = {"train": 30, "test": 8}
RADIUS = 4.0
NEAR, FAR = 2.7, 5.3  # what there is lies within 1.3 of the middle
FIELD = 0.69  # radians, of the Blender scenes
SAMPLES = 2  # rays a pixel along each axis
LIGHT = (0.5, -0.3, 0.8)

ROOM_SIZE = (36, 48)
ROOM_GRID = (5, 5)
ROOM_SEED = 3


# -- objects -------------------------------------------------------------------------------------------------------------

Hit = tuple[
    Tensor, Tensor, Tensor
]  # depth (P,), infinite where there is none; normal (P, 3); the point in the shape's own axes (P, 3)


def ball(centre: tuple[float, float, float], radius: float, origins: Tensor, rays: Tensor) -> Hit:
    away = origins - torch.tensor(centre)
    a, b = rays.square().sum(1), (rays * away).sum(1)
    inside = b.square() - a * (away.square().sum(1) - radius**2)
    depth = (-b - inside.clamp(min=0).sqrt()) / a
    depth = torch.where((inside > 0) & (depth > 0), depth, torch.inf)
    point = away + depth.nan_to_num(posinf=0.0)[:, None] * rays
    return depth, point / radius, point


def box(
    centre: tuple[float, float, float], half: tuple[float, float, float], turn: float, origins: Tensor, rays: Tensor
) -> Hit:
    """Turned about the vertical by `turn` radians."""
    cos, sin = math.cos(turn), math.sin(turn)
    axes = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    start, along = (origins - torch.tensor(centre)) @ axes, rays @ axes
    along = torch.where(along.abs() < 1e-9, 1e-9, along)
    sides = torch.tensor(half)
    near, far = (-along.sign() * sides - start) / along, (along.sign() * sides - start) / along
    depth, axis = near.max(1)
    depth = torch.where((depth < far.amin(1)) & (depth > 0), depth, torch.inf)
    normal = F.one_hot(axis, 3) * -along.sign()
    return depth, normal @ axes.T, start + depth.nan_to_num(posinf=0.0)[:, None] * along


def post(centre: tuple[float, float, float], radius: float, half: float, origins: Tensor, rays: Tensor) -> Hit:
    """An upright cylinder with its two ends."""
    start = origins - torch.tensor(centre)
    a, b = rays[:, :2].square().sum(1).clamp(min=1e-12), (rays[:, :2] * start[:, :2]).sum(1)
    inside = b.square() - a * (start[:, :2].square().sum(1) - radius**2)
    root = inside.clamp(min=0).sqrt()
    slope = torch.where(rays[:, 2].abs() < 1e-9, 1e-9, rays[:, 2])
    wall = (-b - root) / a
    end = (-slope.sign() * half - start[:, 2]) / slope
    depth = torch.maximum(wall, end)
    leaves = torch.minimum((-b + root) / a, (slope.sign() * half - start[:, 2]) / slope)
    depth = torch.where((inside > 0) & (depth < leaves) & (depth > 0), depth, torch.inf)
    point = start + depth.nan_to_num(posinf=0.0)[:, None] * rays
    round_about = torch.cat([point[:, :2] / radius, torch.zeros_like(point[:, :1])], 1)
    flat = torch.stack([torch.zeros_like(slope), torch.zeros_like(slope), -slope.sign()], 1)
    return depth, torch.where((wall > end)[:, None], round_about, flat), point


def chequered(point: Tensor, side: float, one: tuple, other: tuple) -> Tensor:
    odd = (point / side + 1e-4).floor().sum(1).remainder(2)[:, None]
    return torch.lerp(torch.tensor(one), torch.tensor(other), odd)


def striped(place: Tensor, width: float, one: tuple, other: tuple) -> Tensor:
    odd = (place / width).floor().remainder(2)[:, None]
    return torch.lerp(torch.tensor(one), torch.tensor(other), odd)


def look(origins: Tensor, rays: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Colours (P, 3), opacity (P,) and depth (P,) of rays (P, 3) into the objects."""
    hits = [
        box((0.0, 0.0, -0.45), (1.1, 0.5, 0.12), 0.4, origins, rays),
        ball((-0.65, -0.28, 0.05), 0.4, origins, rays),
        ball((0.1, 0.3, -0.05), 0.3, origins, rays),
        box((0.7, 0.3, 0.05), (0.2, 0.3, 0.4), 0.9, origins, rays),
        post((-0.75, 0.25, 0.1), 0.15, 0.5, origins, rays),
    ]
    points = [hit[2] for hit in hits]
    albedos = [
        chequered(points[0][:, :2], 0.55, (0.85, 0.8, 0.7), (0.4, 0.35, 0.35)),
        torch.tensor([0.8, 0.15, 0.12]).expand_as(rays),
        striped(points[2][:, 2], 0.2, (0.95, 0.8, 0.2), (0.15, 0.35, 0.75)),
        chequered(points[3], 0.4, (0.15, 0.6, 0.3), (0.65, 0.85, 0.5)),
        striped(points[4][:, 2], 0.34, (0.9, 0.9, 0.9), (0.55, 0.2, 0.6)),
    ]
    gloss = torch.tensor([0.0, 0.7, 0.2, 0.0, 0.3])
    depth, first = torch.stack([hit[0] for hit in hits], 1).min(1)
    pick = first[:, None, None].expand(-1, 1, 3)
    normal = torch.stack([hit[1] for hit in hits], 1).gather(1, pick)[:, 0]
    albedo = torch.stack(albedos, 1).gather(1, pick)[:, 0]
    light, view = F.normalize(torch.tensor(LIGHT), dim=0), F.normalize(rays, dim=1)
    cosine = normal @ light
    mirrored = 2 * cosine[:, None] * normal - light
    shine = (-(mirrored * view).sum(1)).clamp(min=0) ** 12 * gloss[first] * (cosine > 0)
    colour = albedo * (0.4 + 0.6 * cosine.clamp(min=0))[:, None] + shine[:, None]
    seen = depth.isfinite()
    return colour.clamp(0, 1) * seen[:, None], seen.float(), depth


def around(count: int, lowest: float = 0.1, highest: float = 0.85) -> Tensor:
    """Places (count, 3) on the sphere: a golden spiral from the height `lowest` to `highest` (of the radius)."""
    k = torch.arange(count, dtype=torch.float64)
    heights = lowest + (highest - lowest) * (k + 0.5) / count
    angles = k * math.pi * (3 - math.sqrt(5))
    flat = (1 - heights.square()).sqrt()
    return RADIUS * torch.stack([flat * angles.cos(), flat * angles.sin(), heights], 1)


def between(places: Tensor, count: int) -> Tensor:
    """Places (count, 3) on the sphere, one after the other as far as can be from `places` and from each other."""
    candidates, taken = around(2000, 0.2, 0.75), []
    distance = torch.cdist(candidates, places).amin(1)
    for _ in range(count):
        taken.append(candidates[int(distance.argmax())])
        distance = torch.minimum(distance, (candidates - taken[-1]).norm(dim=1))
    return torch.stack(taken)


@functools.lru_cache(maxsize=8)
def rendered_objects(split: str = "train", size: int = SIZE, count: int | None = None) -> Views:
    """The objects, with opacity. See the module's docstring; treat what is returned as read-only.

    Args:
        split: "train" or "test".
        size: pixels along each side.
        count: pictures; None for 30 and 8.
    """
    count = COUNT[split] if count is None else count
    places = around(COUNT["train"] if split == "test" else count)
    if split == "test":
        places = between(places, count)
    up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    poses = torch.stack([looking(place, up, place) for place in places]).float()
    focal = 0.5 * size / math.tan(FIELD / 2)
    middle = (size - 1) / 2
    cameras = Cameras(
        poses,
        torch.tensor([[focal, focal, middle, middle]]).expand(count, 4),
        torch.tensor([[size, size]]).expand(count, 2),
    )
    fine = size * SAMPLES
    line, column = torch.meshgrid(torch.arange(fine), torch.arange(fine), indexing="ij")
    x, y = ((v.flatten() + 0.5) / SAMPLES - 0.5 for v in (column, line))
    images = []
    for row in range(count):
        rays = cameras.directions(torch.full((fine * fine,), row), x, y)
        colour, opacity, _ = look(poses[row, :, 3].expand_as(rays), rays)
        both = torch.cat([colour, opacity[:, None]], 1).T.unflatten(1, (fine, fine))
        both = F.avg_pool2d(both, SAMPLES)
        both[:3] /= both[3:].clamp(min=1e-6)  # not premultiplied, as PNG files
        images.append((both * 255).round().to(torch.uint8))
    bounds = (NEAR, FAR)
    names = tuple(f"rendered_objects {split} {i}" for i in range(count))
    return Views(images, cameras, *bounds, bounds, names=names)


# -- room ----------------------------------------------------------------------------------------------------------------


def _room(count: int) -> Scene:
    """One room, as often as there are cameras: x right, y down, z forward."""
    boxes = torch.tensor([[-1.1, 0.85, 3.4], [0.9, 0.95, 4.6], [0.1, 1.05, 2.6]])
    halves = torch.tensor([[0.4, 0.55, 0.4], [0.5, 0.45, 0.35], [0.3, 0.35, 0.3]])
    scene = Scene(
        room=torch.tensor([[-2.2, 2.2], [-1.6, 1.4], [-4.0, 6.0]])[None],
        box_centres=boxes[None],
        box_halves=halves[None],
        box_turns=torch.tensor([[0.4, 0.9, 1.2]]),
        ball_centres=torch.tensor([[[-0.35, 1.0, 4.2], [1.3, 1.05, 3.0]]]),
        ball_radii=torch.tensor([[0.4, 0.35]]),
        textures=torch.randint(32, (1, 11), generator=torch.Generator().manual_seed(ROOM_SEED)),
        tiles=torch.tensor([[3.5] * 6 + [1.4] * 5]),
        tints=torch.tensor(
            [
                [[0.9, 0.85, 0.8]] * 6
                + [[1.0, 0.5, 0.4], [0.5, 0.8, 1.0], [1.0, 0.9, 0.4], [0.6, 1.0, 0.6], [1.0, 0.6, 0.9]]
            ]
        ),
    )
    return Scene(**{name: value.expand(count, *value.shape[1:]) for name, value in vars(scene).items()})


@functools.lru_cache(maxsize=8)
def rendered_room(split: str = "train", size: tuple[int, int] = ROOM_SIZE) -> Views:
    """The room: 25 cameras in a plane, one step apart, looking forward; in normalised device coordinates. Treat it as read-only.

    Args:
        split: "train" (20) or "test" (5).
        size: (height, width) in pixels.
    """
    across, down = (torch.linspace(-1, 1, n) for n in ROOM_GRID)
    grid = torch.cartesian_prod(across * 0.45, down * 0.3)
    places = torch.cat([grid, torch.zeros(len(grid), 1)], 1)
    count, (height, width) = len(places), size
    focal = 0.85 * width
    middles = torch.tensor([[focal, 0.0, (width - 1) / 2], [0.0, focal, (height - 1) / 2], [0.0, 0.0, 1.0]])
    turned = torch.eye(3).expand(count, 3, 3)
    images, depth = trace(_room(count), turned, places, middles, size, "train")
    pictures = list((images * 255).round().to(torch.uint8))
    # the room has y down and z forward; here the world has y up, and cameras look along its -z
    poses = torch.cat([turned, (places * torch.tensor([1.0, -1.0, -1.0]))[..., None]], 2)
    scale = 1 / (float(depth.min()) * BOUND_FACTOR)
    poses[:, :, 3] *= scale
    cameras = Cameras(
        poses,
        torch.tensor([[focal, focal, (width - 1) / 2, (height - 1) / 2]]).expand(count, 4),
        torch.tensor([[height, width]]).expand(count, 2),
    )
    rows = [i for i in range(count) if (i % 5 == 2) == (split == "test")]
    bounds = (float(depth.min()) * scale, float(depth.max()) * scale)
    names = tuple(f"rendered_room {split} {i}" for i in rows)
    return Views(
        [pictures[i] for i in rows], cameras[torch.tensor(rows)], 0.0, 1.0, bounds, True, True, scaling(scale), names
    )
