"""Generated aerial terrain: fields, roads, water and trees seen from above, with buildings that stay, appear or vanish.

Everything is drawn from equations: fields are the cells of random sites with furrows, roads are bent lines, water and woods follow
smooth noise, buildings are turned rectangles with flat or gabled roofs and a shadow away from the sun. Masks are exact, because they
are what was drawn. Two dates of one place differ in season, ploughing, sun, haze, cars and sensor noise, none of which is a change; only
buildings are. Nothing is downloaded, everything follows from the seed; the splits share no tile.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

LABELS = ["background", "building", "tank", "car"]
"""Class names of a single date's masks."""

CHUNK = 64  # tiles that are drawn together; a longer list starts with the same tiles as a shorter one
CELL = 21  # units: each cell of this grid holds one object at most, so none overlap
REACH = 6  # units: shadows are no longer
STATES = (
    0.25,
    0.15,
    0.13,
)  # of a cell: a building on both dates, on the second alone, on the first alone; else nothing
UNCHANGED = 0.15  # share of the tiles in which no building may appear or vanish
TANKS = 0.35  # share of the objects that are round storage tanks

# Colours in red, green, blue: crops in summer and in winter, roofs, cars
SUMMER = [(0.33, 0.45, 0.20), (0.44, 0.50, 0.24), (0.62, 0.56, 0.30), (0.27, 0.38, 0.18), (0.52, 0.42, 0.28)]
WINTER = [(0.40, 0.36, 0.26), (0.47, 0.41, 0.31), (0.36, 0.38, 0.24), (0.52, 0.48, 0.38), (0.33, 0.28, 0.22)]
ROOFS = [(0.66, 0.33, 0.25), (0.56, 0.56, 0.58), (0.82, 0.81, 0.78), (0.42, 0.34, 0.29), (0.38, 0.45, 0.54)]
CARS = [(0.9, 0.9, 0.9), (0.12, 0.12, 0.14), (0.7, 0.15, 0.12), (0.2, 0.3, 0.6)]


@dataclass(frozen=True)
class Terrain:
    """Tiles. Images uint8 (N, 3, S, S); masks uint8 (N, S, S), rows of `LABELS`, of each date; `change` is 1 where a building is on one alone."""

    before: Tensor
    after: Tensor
    before_mask: Tensor
    after_mask: Tensor
    change: Tensor


def terrain(
    count: int, size: int = 64, seed: int = 0, split: str = "train", zoom: float = 1.0, density: float = 1.0
) -> Terrain:
    """Tiles of two dates; kept in memory, so treat the tensors as read-only.

    Args:
        count: how many tiles. The first tiles do not depend on it.
        size: height and width in pixels, at least 32.
        seed: every choice follows from it (and from the other arguments but `count`).
        split: "train" or "test".
        zoom: pixels a unit of length; a building's side has 7 to 14 units, a road is 3 to 6 wide, a car 4.6 long.
        density: how many buildings there are, relative; at most 1.8.

    Raises:
        ValueError: if an argument is outside its range.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is '{split}'; it must be 'train' or 'test'")
    if count < 1:
        raise ValueError(f"count is {count}; it must be 1 or more")
    if size < 32:
        raise ValueError(f"size is {size}; it must be 32 or more")
    if not 0.5 <= zoom <= 8:
        raise ValueError(f"zoom is {zoom}; it must be 0.5 to 8")
    if not 0 <= density <= 1.8:
        raise ValueError(f"density is {density}; it must be 0 to 1.8")
    chunks = [_tiles(chunk, size, seed, split, float(zoom), float(density)) for chunk in range(-(-count // CHUNK))]
    return Terrain(*(torch.cat([getattr(c, f.name) for c in chunks])[:count] for f in fields(Terrain)))


class TerrainChanges(Dataset):
    """ "terrain_changes": pairs of dates with a mask of what changed; see `paperzoo.data.change_pairs` for an item."""

    labels = ["unchanged", "changed"]
    bands = 3

    def __init__(self, split: str) -> None:
        self.split = split
        self.tiles = terrain(512 if split == "train" else 128, split=split)

    def __len__(self) -> int:
        return len(self.tiles.before)

    def path(self, i: int) -> str:
        return f"{self.split} tile {i}"

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Image, tv_tensors.Mask]:
        tiles = self.tiles
        return (
            tv_tensors.Image(tiles.before[i]),
            tv_tensors.Image(tiles.after[i]),
            tv_tensors.Mask(tiles.change[i].long()),
        )


class TerrainMasks(Dataset):
    """ "terrain": one date with buildings, storage tanks and cars, an item as in `paperzoo.data.masks`; "terrain_buildings": what is built (tanks
    too) against all else, cars included. About nine tenths are background.
    """

    def __init__(self, split: str, buildings: bool = False) -> None:
        self.split, self.labels = split, LABELS[:2] if buildings else LABELS
        tiles = terrain(384 if split == "train" else 96, 96, seed=1, split=split, zoom=1.5, density=1.8)
        self.images, self.masks = tiles.after, tiles.after_mask
        if buildings:
            self.masks = ((self.masks > 0) & (self.masks != LABELS.index("car"))).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def path(self, i: int) -> str:
        return f"{self.split} tile {i}"

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        return tv_tensors.Image(self.images[i]), tv_tensors.Mask(self.masks[i].long())


# -- drawing -----------------------------------------------------------------------------------------------------------


Window = tuple[slice, slice]


class Pen:
    """Random numbers and the pixels' coordinates for one chunk of tiles."""

    def __init__(self, size: int, zoom: float, rng: torch.Generator) -> None:
        self.size, self.zoom, self.rng = size, zoom, rng
        at = torch.arange(size) + 0.5
        self.x, self.y = at.expand(CHUNK, size, size), at[:, None].expand(CHUNK, size, size)
        self.units = size / zoom

    def rand(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), (CHUNK, *shape)."""
        return torch.rand(CHUNK, *shape, generator=self.rng)

    def colours(self, palette: list, *shape: int) -> Tensor:
        """Random entries of a palette, slightly varied: (CHUNK, *shape, 3)."""
        chosen = torch.tensor(palette)[torch.randint(len(palette), (CHUNK, *shape), generator=self.rng)]
        return (chosen + 0.08 * (self.rand(*shape, 3) - 0.5)).clamp(0, 1)

    def noise(self, *cells: int) -> Tensor:
        """Smooth noise about 0.5, (CHUNK, S, S): a mean of random grids of so many cells, each weighing half the one before."""
        total = torch.zeros(CHUNK, self.size, self.size)
        for i, count in enumerate(cells):
            grid = self.rand(1, count, count)
            smooth = F.interpolate(grid, size=(self.size, self.size), mode="bicubic", align_corners=False)[:, 0]
            total += smooth * 0.5**i
        return total / sum(0.5**i for i in range(len(cells)))


def each(values: Tensor) -> Tensor:
    """(CHUNK,) beside pixels (CHUNK, S, S)."""
    return values[:, None, None]


def paint(images: Tensor, colour: Tensor, share: Tensor) -> Tensor:
    """Images (CHUNK, 3, S, S) with a colour (CHUNK, 3) or picture (CHUNK, 3, S, S) laid over them by a share (CHUNK, S, S)."""
    return torch.lerp(images, colour if colour.ndim == 4 else colour[:, :, None, None], share[:, None])


def rectangle(
    pen: Pen, centre: Tensor, sides: Tensor, angle: Tensor, window: Window = (slice(None), slice(None))
) -> tuple[Tensor, ...]:
    """Turned rectangles: the share of each pixel that they cover, and the pixels in their own axes, u and v in -1 … 1 inside.

    Args:
        centre, sides: (CHUNK, 2) in pixels; angle (CHUNK,).
        window: rows and columns of the tile that are looked at.
    """
    dx, dy = pen.x[:, *window] - each(centre[:, 0]), pen.y[:, *window] - each(centre[:, 1])
    cos, sin = each(angle.cos()), each(angle.sin())
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    half = sides / 2
    inside = torch.minimum(each(half[:, 0]) - u.abs(), each(half[:, 1]) - v.abs())
    return (inside + 0.5).clamp(0, 1), u / each(half[:, 0]), v / each(half[:, 1])


@dataclass
class Thing:
    """One grid cell's building or tank in every tile of the chunk: where, how large, which colour, and on which dates."""

    window: Window  # the pixels that it or its shadow may reach
    centre: Tensor
    sides: Tensor
    angle: Tensor
    height: Tensor
    roof: Tensor
    gabled: Tensor
    tank: Tensor
    there: tuple[Tensor, Tensor] = ()
    shape: tuple[Tensor, Tensor, Tensor] = ()

    def cover(self, pen: Pen, shift: Tensor | float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """As `rectangle`, within the window; a tank is the circle within."""
        share, u, v = rectangle(pen, self.centre + shift, self.sides, self.angle, self.window)
        radius = each(self.sides[:, 0]) / 2
        disc = (radius * (1 - (u * u + v * v).sqrt()) + 0.5).clamp(0, 1)
        return torch.where(each(self.tank), disc, share), u, v


@functools.lru_cache(maxsize=64)
def _tiles(chunk: int, size: int, seed: int, split: str, zoom: float, density: float) -> Terrain:
    pen = Pen(size, zoom, torch.Generator().manual_seed(((seed * 100_003 + chunk) * 2 + (split == "test")) * 31 + 11))
    ground = Ground(pen)
    things = list(_things(pen, ground, density))
    drawn = [_date(pen, ground, things, date) for date in range(2)]
    change = torch.zeros(CHUNK, size, size, dtype=torch.bool)
    for thing in things:
        change[:, *thing.window] |= (thing.shape[0] > 0.5) & each(thing.there[0] != thing.there[1])
    (before, before_mask), (after, after_mask) = drawn
    return Terrain(before, after, before_mask, after_mask, change.to(torch.uint8))


class Ground:
    """What both dates share: fields, roads, water, woods."""

    def __init__(self, pen: Pen) -> None:
        size, units = pen.size, pen.units
        coarse, middle, fine = (
            max(3, round(units / n)) for n in (16, 3, 2)
        )  # grids of noise: a cell of 16, 3, 2 units
        sites = pen.rand(7, 2) * size
        bent = [w + 8 * pen.zoom * (pen.noise(5) - 0.5) for w in (pen.x, pen.y)]
        away = (bent[0][:, None] - sites[..., 0, None, None]) ** 2 + (bent[1][:, None] - sites[..., 1, None, None]) ** 2
        self.field = away.argmin(1)  # (CHUNK, S, S)
        self.summer, self.winter = pen.colours(SUMMER, 7), pen.colours(WINTER, 7)
        angle, period = pen.rand(7) * math.pi, (3 + 4 * pen.rand(7)) * pen.zoom
        along = pen.x * self.of_field(angle.cos()) + pen.y * self.of_field(angle.sin())
        furrows = (2 * math.pi * along / self.of_field(period)).sin()
        self.furrows = furrows * self.of_field(0.05 * (pen.rand(7) > 0.4))
        self.grain = 0.12 * (pen.noise(fine, 2 * fine) - 0.5)

        self.water = ((0.36 - 0.16 * each(pen.rand()) - pen.noise(3, 6)) * size / 3 + 0.5).clamp(0, 1)
        self.woods = ((pen.noise(coarse * 4) - 0.5) * 6 + (pen.noise(coarse) - 0.62) * 8).clamp(0, 1) * (1 - self.water)
        self.leaves = 0.16 * (pen.noise(middle) - 0.5)

        self.axis = pen.rand() * math.pi  # towns follow their first road
        self.roads, cover = [], torch.zeros_like(self.water)
        for i in range(2):
            angle = self.axis if i == 0 else self.axis + math.pi / 2 + 0.3 * (pen.rand() - 0.5)
            through = size * (0.2 + 0.6 * pen.rand(2))
            width = (3 + 3 * pen.rand()) * pen.zoom
            there = (pen.rand() < (0.85, 0.45)[i]).float()
            dx, dy = pen.x - each(through[:, 0]), pen.y - each(through[:, 1])
            off = (each(angle.cos()) * dy - each(angle.sin()) * dx).abs()
            cover = torch.maximum(cover, (each(width / 2) - off + 0.5).clamp(0, 1) * each(there))
            self.roads.append((angle, through, width, there))
        self.road = cover
        self.asphalt = (0.42 + 0.15 * pen.rand(1)) * torch.tensor([1.0, 0.99, 0.96])

    def of_field(self, values: Tensor) -> Tensor:
        """(CHUNK, 7) -> each pixel's field's value (CHUNK, S, S)."""
        return values.gather(1, self.field.flatten(1)).view_as(self.field)

    def picture(self, pen: Pen, season: Tensor, ploughed: Tensor) -> Tensor:
        """The bare ground: season (CHUNK,) from 0, summer, to 1, winter; `ploughed` colours (CHUNK, 7, 3) lie where they are not NaN."""
        crops = torch.lerp(self.summer, self.winter, season[:, None, None])
        crops = torch.where(ploughed.isnan(), crops, ploughed)
        image = torch.stack([self.of_field(crops[..., c]) for c in range(3)], 1)
        image = image + (self.furrows + self.grain)[:, None]
        green = torch.lerp(torch.tensor([0.14, 0.25, 0.11]), torch.tensor([0.24, 0.23, 0.15]), season[:, None])
        image = paint(image, green[:, :, None, None] + self.leaves[:, None], self.woods)
        image = paint(image, torch.tensor([0.13, 0.22, 0.27]).expand(CHUNK, 3), self.water)
        return paint(image, self.asphalt, self.road)


def _things(pen: Pen, ground: Ground, density: float):
    """Buildings and tanks, one a grid cell at most, none on a road or in water."""
    quiet = pen.rand() < UNCHANGED
    cells = max(1, int(pen.units // CELL))
    step = pen.size / cells
    for cell in range(cells * cells):
        row, column = divmod(cell, cells)
        window = tuple(
            slice(max(0, int(i * step - REACH * pen.zoom)), int((i + 1) * step + REACH * pen.zoom) + 1)
            for i in (row, column)
        )
        tank = pen.rand() < TANKS
        sides = 7 * pen.zoom + (step * 0.68 - 7 * pen.zoom) * pen.rand(2)
        sides = torch.where(tank[:, None], (0.8 * sides[:, :1]).expand(-1, 2), sides)
        room = (step - sides.norm(dim=1, keepdim=True)).clamp(min=0)  # so that its corners stay in its cell
        corner = torch.tensor([column, row]) * step
        centre = corner + step / 2 + room * (pen.rand(2) - 0.5)
        angle = ground.axis + (pen.rand() > 0.5) * math.pi / 2 + 0.2 * (pen.rand() - 0.5)
        state = pen.rand()
        both, second, first = (density * sum(STATES[: i + 1]) for i in range(3))
        stays, comes, goes = state < both, (state >= both) & (state < second), (state >= second) & (state < first)
        stays, comes, goes = stays | (quiet & comes), comes & ~quiet, goes & ~quiet
        roof = torch.where(tank[:, None], 0.55 + 0.35 * pen.rand(1), pen.colours(ROOFS))
        height = (1.5 + 2.5 * pen.rand()) * pen.zoom
        thing = Thing(window, centre, sides, angle, height, roof, pen.rand() < 0.6, tank)
        thing.shape = thing.cover(pen)
        share, bad = thing.shape[0], torch.maximum(ground.road, ground.water)[:, *window]
        blocked = (share * bad).sum((1, 2)) > 0.05 * share.sum((1, 2))
        thing.there = ((stays | goes) & ~blocked, (stays | comes) & ~blocked)
        yield thing


def _date(pen: Pen, ground: Ground, things: list[Thing], date: int) -> tuple[Tensor, Tensor]:
    """The picture of one date uint8 (CHUNK, 3, S, S), and its mask uint8 (CHUNK, S, S)."""
    season = pen.rand()
    fresh = pen.colours(SUMMER + WINTER, 7)
    ploughed = torch.where(pen.rand(7, 1) < 0.3 * date, fresh, torch.nan)
    image = ground.picture(pen, season, ploughed)
    sun = pen.rand() * 2 * math.pi
    ray = torch.stack([sun.cos(), sun.sin()], 1) * (0.6 + 0.8 * pen.rand(1))  # where shadows fall, in heights

    dark = torch.zeros_like(ground.road)
    for thing in things:
        for part in (0.5, 1.0):
            shadow = thing.cover(pen, ray * thing.height[:, None] * part)[0]
            dark[:, *thing.window] = torch.maximum(dark[:, *thing.window], shadow * each(thing.there[date]))
    image = image * (1 - 0.5 * dark[:, None])

    mask = torch.zeros(CHUNK, pen.size, pen.size, dtype=torch.uint8)
    for angle, through, width, there in ground.roads:  # cars come and go, and are no change
        for _ in range(3):
            shift = (pen.rand() - 0.5) * 0.9 * pen.size
            lane = (pen.rand() - 0.5) * 0.4 * width
            heading = torch.stack([angle.cos(), angle.sin()], 1)
            across = torch.stack([-angle.sin(), angle.cos()], 1)
            centre = through + heading * shift[:, None] + across * lane[:, None]
            sides = (pen.zoom * torch.tensor([4.6, 2.4])).expand(CHUNK, 2)
            share = rectangle(pen, centre, sides, angle)[0] * each(there * (pen.rand() < 0.7))
            share = share * (1 - ground.water)
            image = paint(image, pen.colours(CARS), share)
            mask[share > 0.5] = LABELS.index("car")

    for thing in things:
        share, u, v = thing.shape
        shown = share * each(thing.there[date])
        slope = -(thing.angle + math.pi / 2 - sun).cos()  # how much the side with v > 0 faces the sun
        shade = torch.where(each(thing.gabled & ~thing.tank), each(slope) * v.sign() * 0.28, 0.0)
        bulge = -(u * each((thing.angle - sun).cos()) + v * each((thing.angle + math.pi / 2 - sun).cos())) * 0.18
        shade = torch.where(each(thing.tank), bulge, shade)
        roof = (thing.roof[:, :, None, None] * (1 + shade[:, None])).clamp(0, 1)
        image[:, :, *thing.window] = paint(image[:, :, *thing.window], roof, shown)
        kind = torch.where(thing.tank, LABELS.index("tank"), LABELS.index("building")).to(torch.uint8)
        mask[:, *thing.window] = torch.where(shown > 0.5, each(kind), mask[:, *thing.window])

    # air and sensor: brightness, colour cast, haze, a soft lens, noise
    image = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1) * 0.3 + image * 0.7
    gain = (0.75 + 0.4 * pen.rand(1)) * (1 + 0.1 * (pen.rand(3) - 0.5))
    haze = 0.1 * pen.rand(1)
    image = (image * gain[:, :, None, None]).lerp(torch.full_like(image, 0.7), haze[:, :, None, None])
    image = image + 0.02 * torch.randn(image.shape, generator=pen.rng)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), mask
