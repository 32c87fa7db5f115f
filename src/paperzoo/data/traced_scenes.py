"""Traced scenes: rooms with boxes and balls, seen by a moving camera, with exact depth and exact motion. Always there.

A scene is a room (floor, ceiling and walls, seen from inside) with up to three boxes and two balls on the floor. Every surface
carries a piece of a real photograph as its texture, pale on the room's sides, and is shaded by one fixed light. A ray goes through the middle of every pixel,
so the depth is exact. The camera drives forward and to the right, and turns a little; the frames before and after, or a second camera
beside it, see the same scene. Nothing is downloaded, everything follows from the seed.

As in recordings from a car there is what breaks the assumption of a still world: in some scenes the camera stands still, in some the
first box drives along with the camera.

The splits share neither a scene nor a part of a photograph (`paperzoo.data.scenes`: the right 30% of each is for testing).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from paperzoo.data.scenes import photographs

CHUNK = 32  # scenes that are traced together; a longer list starts with the same scenes as a shorter one
FOCAL = 0.85  # of the camera, in image widths
STEREO = 0.2  # metres from the camera to the second one on its right
STANDING, COMPANION = 0.05, 0.1  # shares of scenes with a camera that stands still, with a box that drives along

_BOXES, _BALLS = 3, 2
_TEXTURES, _SIDE = 32, 128  # pieces of photographs a split; texels of each
_LEVELS = 6  # 128, 64 … 4 texels: the distant ones are read from smaller copies, else they would flicker
_TRAIN_COLUMNS = 0.7
_LIGHT = (0.35, -0.8, -0.5)
_ROOM_COLOUR = 0.25  # how much of a texture's colour is left on the room's sides


@dataclass(frozen=True)
class TracedScenes:
    """Frames of N scenes; treat the tensors as read-only.

    images: uint8 (N, 1 + F, 3, H, W), the target frame first, then the frames that were asked for.
    depth: float32 (N, 1, H, W), metres along the optical axis, of the target frame.
    intrinsics: float32 (3, 3), in pixels; a pixel's middle has whole coordinates.
    motions: float32 (N, F, 4, 4), from points in the target camera's coordinates (x right, y down, z forward, metres) to
        points in each other camera's.
    moving: bool (N,), whether a box drives along with the camera.
    """

    images: Tensor
    depth: Tensor
    intrinsics: Tensor
    motions: Tensor
    moving: Tensor

    def __len__(self) -> int:
        return len(self.images)


def camera(size: tuple[int, int]) -> Tensor:
    """Intrinsics (3, 3) of the camera for images of (height, width)."""
    height, width = size
    focal = FOCAL * width
    return torch.tensor([[focal, 0.0, (width - 1) / 2], [0.0, focal, (height - 1) / 2], [0.0, 0.0, 1.0]])


@functools.lru_cache(maxsize=8)
def traced_scenes(
    count: int,
    size: tuple[int, int] = (64, 96),
    seed: int = 0,
    split: str = "train",
    frames: tuple[int | str, ...] = (-1, 1),
) -> TracedScenes:
    """Traced scenes, kept in memory.

    Args:
        count: how many; the first ones do not depend on it.
        size: (height, width) in pixels, at least 16 each.
        seed: every choice follows from it and from `split`. The scenes depend neither on `size` nor on `frames`.
        split: "train" or "test".
        frames: the other views: whole numbers are moments (-1: the frame before), "s" is the second camera, 0.2 m to the right.

    Raises:
        ValueError: if an argument is outside its range.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is '{split}'; it must be 'train' or 'test'")
    if count < 1:
        raise ValueError(f"count is {count}; it must be 1 or more")
    if min(size) < 16:
        raise ValueError(f"size is {size}; it must be (height, width) of 16 or more")
    for frame in frames:
        if frame != "s" and (not isinstance(frame, int) or frame == 0):
            raise ValueError(
                f"frames holds {frame!r}; moments are whole numbers other than 0, the second camera is 's'"
            )
    parts = [_chunk(k, size, seed, split, frames) for k in range(-(-count // CHUNK))]
    images, depth, motions, moving = (torch.cat(p)[:count] for p in zip(*parts, strict=True))
    return TracedScenes(images, depth, camera(size), motions, moving)


# -- what is where -----------------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """CHUNK scenes in the coordinates of their target cameras' feet: x right, y down, z forward, the camera near the origin.

    room: (B, 3, 2), the walls' places along each axis, smaller first.
    boxes: centre (B, K, 3), half sizes (B, K, 3), turn about the vertical (B, K). balls: centre (B, K, 3), radius (B, K).
    textures, tiles: int64 and float32 (B, S): which texture a surface has and how many metres one copy covers; tints (B, S, 3).
        Surfaces: the room's 6 sides, then each box, then each ball.
    """

    room: Tensor
    box_centres: Tensor
    box_halves: Tensor
    box_turns: Tensor
    ball_centres: Tensor
    ball_radii: Tensor
    textures: Tensor
    tiles: Tensor
    tints: Tensor


def _uniform(rng: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=rng)


def _scene(rng: torch.Generator) -> Scene:
    b = CHUNK
    floor = _uniform(rng, 1.0, 1.6, b)
    room = torch.stack(
        [
            torch.stack([-_uniform(rng, 1.8, 4.0, b), _uniform(rng, 1.8, 4.0, b)], 1),
            torch.stack([-_uniform(rng, 1.2, 2.5, b), floor], 1),
            torch.stack([torch.full((b,), -4.0), _uniform(rng, 6.0, 12.0, b)], 1),
        ],
        1,
    )
    halves = _uniform(rng, 0.25, 0.7, b, _BOXES, 3)
    radii = _uniform(rng, 0.25, 0.6, b, _BALLS)
    heights = torch.cat([halves[..., 1], radii], 1)
    centres = torch.stack(
        [
            _uniform(rng, -1.8, 1.8, b, _BOXES + _BALLS),
            floor[:, None] - heights,
            _uniform(rng, 2.4, 6.0, b, _BOXES + _BALLS),
        ],
        2,
    )
    there = torch.rand(b, _BOXES + _BALLS, generator=rng) < 0.75
    there[:, 0] = True
    centres[..., 1] += torch.where(there, 0.0, 100.0)  # deep under the floor
    surfaces = 6 + _BOXES + _BALLS
    tiles = torch.cat([_uniform(rng, 2.5, 5.0, b, 6), _uniform(rng, 0.8, 2.0, b, _BOXES + _BALLS)], 1)
    return Scene(
        room,
        centres[:, :_BOXES],
        halves,
        _uniform(rng, 0, math.pi / 2, b, _BOXES),
        centres[:, _BOXES:],
        radii,
        torch.randint(_TEXTURES, (b, surfaces), generator=rng),
        tiles,
        torch.cat(
            [_uniform(rng, 0.6, 0.95, b, 6, 1).expand(-1, -1, 3), _uniform(rng, 0.3, 1.0, b, surfaces - 6, 3)], 1
        ),
    )


def _turn(yaw: Tensor, pitch: Tensor) -> Tensor:
    """Rotations (B, 3, 3) from camera to world: first up or down, then about the vertical."""
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    about_y = torch.stack([yaw.cos(), zero, yaw.sin(), zero, one, zero, -yaw.sin(), zero, yaw.cos()], 1).view(-1, 3, 3)
    about_x = torch.stack([one, zero, zero, zero, pitch.cos(), -pitch.sin(), zero, pitch.sin(), pitch.cos()], 1)
    return about_y @ about_x.view(-1, 3, 3)


def _chunk(
    chunk: int, size: tuple[int, int], seed: int, split: str, frames: tuple[int | str, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed((seed * 100_003 + chunk) * 2 + (split == "test"))
    scene = _scene(rng)
    yaw, pitch = _uniform(rng, -0.2, 0.2, CHUNK), _uniform(rng, -0.06, 0.06, CHUNK)
    speed = torch.stack(
        [_uniform(rng, 0.12, 0.18, CHUNK), _uniform(rng, -0.01, 0.01, CHUNK), _uniform(rng, 0.2, 0.3, CHUNK)], 1
    )
    turns = torch.stack([_uniform(rng, -0.006, 0.006, CHUNK), _uniform(rng, -0.002, 0.002, CHUNK)], 1)
    standing = torch.rand(CHUNK, generator=rng) < STANDING
    companion = (torch.rand(CHUNK, generator=rng) < COMPANION) & ~standing
    speed[standing], turns[standing] = 0.0, 0.0
    intrinsics = camera(size)
    target = _turn(yaw, pitch)
    here = torch.zeros(CHUNK, 3)
    image, depth = trace(scene, target, here, intrinsics, size, split)
    images, motions = [image], []
    for frame in frames:
        if frame == "s":
            rotation, position, moved = target, (target @ torch.tensor([STEREO, 0.0, 0.0])), here
        else:
            rotation = _turn(yaw + frame * turns[:, 0], pitch + frame * turns[:, 1])
            position = (target @ (frame * speed)[..., None])[..., 0]
            moved = torch.where(companion[:, None], position, 0.0)
        images.append(trace(scene, rotation, position, intrinsics, size, split, moved)[0])
        motion = torch.eye(4).repeat(CHUNK, 1, 1)
        motion[:, :3, :3] = rotation.mT @ target
        motion[:, :3, 3] = (rotation.mT @ -position[..., None])[..., 0]
        motions.append(motion)
    stacked = torch.stack(images, 1)
    motion = torch.stack(motions, 1) if motions else torch.empty(CHUNK, 0, 4, 4)
    return (stacked * 255).round().to(torch.uint8), depth[:, None], motion, companion


# -- rays --------------------------------------------------------------------------------------------------------------


def trace(
    scene: Scene,
    rotation: Tensor,
    position: Tensor,
    intrinsics: Tensor,
    size: tuple[int, int],
    split: str,
    moved: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One view of each scene.

    Args:
        rotation, position: (B, 3, 3) from the camera's directions to the world's, (B, 3) its place.
        moved: (B, 3), by how much the first box has moved.

    Returns:
        images float32 (B, 3, H, W) in [0, 1], depth float32 (B, H, W) in metres.
    """
    height, width = size
    v, u = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], -1).flatten(0, 1)  # (P, 3)
    rays = pixels @ intrinsics.inverse().T @ rotation.mT  # (B, P, 3): depth 1 in the camera, so t is the depth
    start = position[:, None]
    centres = scene.box_centres.clone()
    if moved is not None:
        centres[:, 0] += moved

    nearest, normal, place, surface = _room(scene.room, start, rays)
    for k in range(_BOXES):
        hit = _box(centres[:, k], scene.box_halves[:, k], scene.box_turns[:, k], start, rays)
        nearest, normal, place, surface = _nearer((nearest, normal, place, surface), hit, 6 + k)
    for k in range(_BALLS):
        hit = _ball(scene.ball_centres[:, k], scene.ball_radii[:, k], start, rays)
        nearest, normal, place, surface = _nearer((nearest, normal, place, surface), hit, 6 + _BOXES + k)

    tile = scene.tiles.gather(1, surface)
    cosine = (normal * F.normalize(rays, dim=-1)).sum(-1).abs().clamp(min=0.15)
    texels = nearest / intrinsics[0, 0] * _SIDE / tile / cosine.sqrt()  # texels under a pixel
    colour = _read(scene.textures.gather(1, surface), place / tile[..., None], texels, split)
    colour = torch.where(
        (surface < 6)[..., None], torch.lerp(colour.mean(-1, keepdim=True), colour, _ROOM_COLOUR), colour
    )
    tint = scene.tints.gather(1, surface[..., None].expand(-1, -1, 3))
    light = F.normalize(torch.tensor(_LIGHT), dim=0)
    shade = 0.7 + 0.3 * (normal @ light)
    image = (colour * tint * shade[..., None]).clamp(0, 1)
    return image.mT.unflatten(2, size), nearest.unflatten(1, size)


Hit = tuple[
    Tensor, Tensor, Tensor
]  # depth (B, P), infinite where there is none; normal (B, P, 3); place on the surface (B, P, 2)


def _nearer(best: tuple[Tensor, ...], hit: Hit, surface: int) -> tuple[Tensor, ...]:
    depth, normal, place = hit
    closer = depth < best[0]
    wide = closer[..., None]
    return (
        torch.where(closer, depth, best[0]),
        torch.where(wide, normal, best[1]),
        torch.where(wide, place, best[2]),
        torch.where(closer, surface, best[3]),
    )


def _side(axis: Tensor, sign: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """Normal (B, P, 3) and place (B, P, 2) on the side of a box that is crossed along `axis`."""
    normal = F.one_hot(axis, 3) * sign[..., None]
    x, y, z = point.unbind(-1)
    place = torch.stack([torch.where(axis == 0, z, x), torch.where(axis == 1, z, y)], -1)
    return normal, place


def _room(room: Tensor, start: Tensor, rays: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where rays that start inside leave the room."""
    ahead = torch.where(rays > 0, room[:, None, :, 1], room[:, None, :, 0])
    depth, axis = ((ahead - start) / torch.where(rays.abs() < 1e-9, 1e-9, rays)).abs().min(-1)
    positive = rays.gather(-1, axis[..., None])[..., 0] > 0
    normal, place = _side(axis, torch.where(positive, -1.0, 1.0), start + depth[..., None] * rays)
    return depth, normal, place, axis * 2 + positive


def _box(centre: Tensor, half: Tensor, turn: Tensor, start: Tensor, rays: Tensor) -> Hit:
    """The slab test, in the box's own directions."""
    own = _turn(turn, torch.zeros_like(turn))  # box to world
    origin, direction = (start - centre[:, None]) @ own, rays @ own
    direction = torch.where(direction.abs() < 1e-9, 1e-9, direction)
    near = (-direction.sign() * half[:, None] - origin) / direction
    far = (direction.sign() * half[:, None] - origin) / direction
    depth, axis = near.max(-1)
    depth = torch.where((depth < far.amin(-1)) & (depth > 1e-3), depth, torch.inf)
    point = origin + depth.nan_to_num(posinf=0.0)[..., None] * direction
    normal, place = _side(axis, -direction.sign().gather(-1, axis[..., None])[..., 0], point)
    return depth, normal @ own.mT, place


def _ball(centre: Tensor, radius: Tensor, start: Tensor, rays: Tensor) -> Hit:
    """|start + t ray - centre| = radius, the smaller t."""
    away = start - centre[:, None]
    a, b = rays.square().sum(-1), (rays * away).sum(-1)
    inside = b.square() - a * (away.square().sum(-1) - radius[:, None].square())
    depth = (-b - inside.clamp(min=0).sqrt()) / a
    depth = torch.where((inside > 0) & (depth > 1e-3), depth, torch.inf)
    normal = (away + depth.nan_to_num(posinf=0.0)[..., None] * rays) / radius[:, None, None]
    angles = torch.stack([torch.atan2(normal[..., 0], -normal[..., 2]), normal[..., 1].clamp(-1, 1).asin()], -1)
    return depth, normal, angles * radius[:, None, None]


# -- textures ----------------------------------------------------------------------------------------------------------


@functools.cache
def _atlas(split: str) -> Tensor:
    """The split's textures at all their sizes, largest first: float32 (texels of all, 3), brought to one contrast."""
    rng = torch.Generator().manual_seed(17 if split == "train" else 18)
    pictures = photographs()
    pieces = []
    for i in range(_TEXTURES):
        photograph = pictures[i % len(pictures)]
        border = int(photograph.shape[2] * _TRAIN_COLUMNS)
        part = photograph[:, :, :border] if split == "train" else photograph[:, :, border:]
        height, width = part.shape[1:]
        side = int(min(height, width) * float(_uniform(rng, 0.5, 1.0, 1)))
        y = int(torch.randint(height - side + 1, (), generator=rng))
        x = int(torch.randint(width - side + 1, (), generator=rng))
        piece = part[None, :, y : y + side, x : x + side].float() / 255
        piece = F.interpolate(piece, (_SIDE, _SIDE), mode="bilinear", antialias=True, align_corners=False)
        spread = piece.std().clamp(min=0.02)
        pieces.append(((piece - piece.mean((2, 3), keepdim=True)) / spread * 0.22 + 0.5).clamp(0, 1))
    level = torch.cat(pieces)
    levels = []
    for _ in range(_LEVELS):
        levels.append(level.permute(0, 2, 3, 1).reshape(-1, 3))
        level = F.avg_pool2d(level, 2)
    return torch.cat(levels)


def _read(texture: Tensor, place: Tensor, texels: Tensor, split: str) -> Tensor:
    """Colours (B, P, 3) at places (B, P, 2) in copies of a texture, every second copy mirrored; bilinear in the right size."""
    level = texels.clamp(min=1).log2().round().clamp(max=_LEVELS - 1).long()
    side = _SIDE >> level
    sizes = torch.tensor([_TEXTURES * (_SIDE >> k) ** 2 for k in range(_LEVELS)])
    base = (sizes.cumsum(0) - sizes)[level] + texture * side.square()
    inside = 1 - (place.remainder(2.0) - 1).abs()  # 0 … 1 … 0
    at = inside * side[..., None] - 0.5
    low = at.floor()
    weight = at - low
    most = (side - 1)[..., None]
    first, second = low.long().clamp(min=0).minimum(most), (low.long() + 1).minimum(most)
    atlas = _atlas(split)
    (x0, y0), (x1, y1), (wx, wy) = first.unbind(-1), second.unbind(-1), weight.unbind(-1)
    rows = [atlas[base + y * side + x] for y, x in ((y0, x0), (y0, x1), (y1, x0), (y1, x1))]
    upper = torch.lerp(rows[0], rows[1], wx[..., None])
    return torch.lerp(upper, torch.lerp(rows[2], rows[3], wx[..., None]), wy[..., None])
