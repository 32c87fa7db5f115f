"""Scenes of simple shapes on a 3 x 3 grid, and sentences that change them: a small world like CSS (Vo et al. 2019), flat.

A scene is 9 cells, row by row, each empty or with a circle, a square or a triangle of one of eight colours and three sizes. It is
drawn exactly and without jitter, so two scenes look alike only if they are alike. Everything follows from the seed.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle")
SIZES = ("small", "medium", "large")
COLOURS = {  # as CSS has them
    "gray": (87, 87, 87),
    "red": (244, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 205, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}
NAMES = tuple(COLOURS)
PLACES = tuple(f"{row}-{column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right"))
RADII = (0.2, 0.31, 0.44)  # of a cell's side, by size

Thing = tuple[int, int, int]  # shape, colour, size
Scene = tuple[Thing | None, ...]  # nine


@dataclass(frozen=True)
class Change:
    """A scene, what is to be changed in it, and the scene that comes of it."""

    source: Scene
    text: str
    target: Scene


def scene_of(things: dict[int, Thing]) -> Scene:
    return tuple(things.get(place) for place in range(9))


def random_scene(allowed: list[tuple[int, int]], most: int, rng: random.Random) -> Scene:
    """One to `most` things in free cells, each of an allowed (shape, colour)."""
    places = rng.sample(range(9), rng.randint(1, most))
    return scene_of({place: (*rng.choice(allowed), rng.randrange(len(SIZES))) for place in places})


def change(scene: Scene, allowed: list[tuple[int, int]], rng: random.Random) -> Change:
    """A random change: something is added, removed, or gets another size or colour. The sentence leaves one reading open.

    A thing is called by colour and shape, and by its place as well where two are alike.
    """
    taken = [place for place, thing in enumerate(scene) if thing is not None]
    free = [place for place in range(9) if scene[place] is None]
    kinds = (["add"] if free else []) + (["remove", "size", "colour"] if taken else [])
    kind = rng.choice(kinds)
    after = list(scene)
    if kind == "add":
        place, (shape, colour), size = rng.choice(free), rng.choice(allowed), rng.randrange(len(SIZES))
        after[place] = (shape, colour, size)
        text = f"add {SIZES[size]} {NAMES[colour]} {SHAPES[shape]} to {PLACES[place]}"
        return Change(scene, text, tuple(after))
    place = rng.choice(taken)
    shape, colour, size = scene[place]
    alike = [p for p in taken if scene[p][:2] == (shape, colour)]
    name = f"{NAMES[colour]} {SHAPES[shape]}" if len(alike) == 1 else f"{PLACES[place]} {NAMES[colour]} {SHAPES[shape]}"
    if kind == "remove":
        after[place] = None
        return Change(scene, f"remove {name}", tuple(after))
    if kind == "size":
        new = rng.choice([s for s in range(len(SIZES)) if s != size])
        after[place] = (shape, colour, new)
        return Change(scene, f"make {name} {SIZES[new]}", tuple(after))
    new = rng.choice([c for s, c in allowed if s == shape and c != colour] or [colour])
    if new == colour:
        return change(scene, allowed, rng)  # this shape has no other colour here
    after[place] = (shape, new, size)
    return Change(scene, f"make {name} {NAMES[new]}", tuple(after))


def combinations(split: str, colours: int) -> list[tuple[int, int]]:
    """The (shape, colour) pairs of a split. One colour of each shape is never seen in training, and its scenes are for testing."""
    held = {(shape, (2 * shape + 1) % colours) for shape in range(len(SHAPES))}
    every = [(shape, colour) for shape in range(len(SHAPES)) for colour in range(colours)]
    return [pair for pair in every if pair not in held] if split == "train" else every


def changes(split: str, scenes: int, each: int = 2, most: int = 4, colours: int = 8, seed: int = 0) -> list[Change]:
    """`each` changes of each of `scenes` different scenes, those of a scene together.

    Args:
        split: "train" or "test"; every test scene has a thing whose colour and shape never come together in training, and
            keeps one through the change, so the two splits share no picture.
        most: things in a scene before the change.
        colours: how many of the eight are used, at least 3.
    """
    rng = random.Random(f"{split} {seed}")
    allowed = combinations(split, colours)
    new = set(allowed) - set(combinations("train", colours))
    made: list[Change] = []
    seen: set[Scene] = set()
    while len(made) < scenes * each:
        scene = random_scene(allowed, most, rng)
        if scene in seen or (new and not any(t and t[:2] in new for t in scene)):
            continue
        found: dict[Scene, Change] = {}
        for _ in range(8 * each):
            one = change(scene, allowed, rng)
            if not new or any(t and t[:2] in new for t in one.target):
                found.setdefault(one.target, one)
            if len(found) == each:
                seen.add(scene)
                made += found.values()
                break
    return made


# -- drawing -----------------------------------------------------------------------------------------------------------


@functools.cache
def stamps(cell: int) -> Tensor:
    """How much of each pixel of a cell a shape covers: float32 (shapes, sizes, cell, cell), from 8 x 8 points a pixel."""
    fine = 8
    at = (torch.arange(cell * fine) + 0.5) / (cell * fine) - 0.5  # from the cell's centre, in its sides
    y, x = torch.meshgrid(at, at, indexing="ij")
    covered = []
    for radius in RADII:
        circle = x.square() + y.square() <= radius**2
        square = torch.maximum(x.abs(), y.abs()) <= radius * 0.886  # about as much ink as the circle
        low, high = radius * 0.75, -radius  # a triangle with its tip up
        triangle = (y <= low) & (y >= high) & (x.abs() <= (y - high) * radius / (low - high))
        covered.append(torch.stack([circle, square, triangle]))
    inside = torch.stack(covered, 1).float()  # (shapes, sizes, fine cell, fine cell)
    return inside.unflatten(-1, (cell, fine)).unflatten(-3, (cell, fine)).mean((-3, -1))


def draw(scenes: list[Scene], size: int) -> Tensor:
    """Scenes as pictures on white: uint8 (N, 3, size, size); `size` is a multiple of 3."""
    if size < 12 or size % 3:
        raise ValueError(f"size is {size}; it must be a multiple of 3, at least 12")
    cell = size // 3
    codes = torch.tensor([[thing or (-1, -1, -1) for thing in scene] for scene in scenes])  # (N, 9, 3)
    there = (codes[..., 0] >= 0).float()
    shape, colour, scale = codes.clamp(min=0).unbind(-1)
    ink = stamps(cell)[shape, scale] * there[..., None, None]  # (N, 9, cell, cell)
    paint = torch.tensor(list(COLOURS.values()), dtype=torch.float32)[colour]  # (N, 9, 3)
    cells = 255 + ink[:, :, None] * (paint - 255)[..., None, None]  # (N, 9, 3, cell, cell)
    whole = cells.unflatten(1, (3, 3)).permute(0, 3, 1, 4, 2, 5).reshape(len(scenes), 3, size, size)
    return whole.round().to(torch.uint8)
