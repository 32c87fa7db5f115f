"""Synthetic shapes: rendered pictures whose corners are known, from which SuperPoint's base detector learns (DeTone et al., 2018, sec. 4.1).

Triangles, quadrilaterals and other polygons, lines, stars, checkerboards, stripes, cubes; ellipses and plain noise, which have no points. Drawn in
batches, at twice the size, then averaged; the background is uneven, and the whole is blurred and noisy.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from paperzoo.blocks.homography import from_corners, transform
from paperzoo.blocks.warping import pixel_grid

KINDS = ("polygon", "polygons", "lines", "star", "checkerboard", "stripes", "cube", "ellipses", "noise")
FINE = 2  # drawn at this times the size
POINTS = 128  # the most points of a picture


def synthetic_shapes(
    count: int, size: tuple[int, int], rng: torch.Generator, kinds: tuple[str, ...] = KINDS
) -> tuple[Tensor, Tensor]:
    """Random pictures, as many of each kind as come up.

    Args:
        count: how many. size: height and width.
        rng: every choice follows from it.

    Returns:
        pictures float32 (count, 1, H, W) in [0, 1]; points float32 (count, POINTS, 2), x and y in pixels, NaN where there is none.

    Raises:
        ValueError: if a kind is unknown.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kinds holds '{kind}'; they are {', '.join(KINDS)}")
    drawn = torch.randint(len(kinds), (count,), generator=rng)
    pictures = background(count, size, rng)
    points = torch.full((count, POINTS, 2), float("nan"))
    for i, kind in enumerate(kinds):
        rows = (drawn == i).nonzero()[:, 0]
        if len(rows) and kind != "noise":
            pictures[rows], found = DRAW[kind](pictures[rows], rng)
            points[rows, : found.shape[1]] = found
        elif len(rows):
            pictures[rows] = torch.rand(len(rows), 1, *pictures.shape[2:], generator=rng)
    pictures = F.avg_pool2d(blurred(pictures, rng), FINE)
    noise = 0.03 * torch.rand(count, 1, 1, 1, generator=rng) * torch.randn(pictures.shape, generator=rng)
    at = (points + 0.5) / FINE - 0.5
    inside = ((at > 0) & (at < torch.tensor([size[1] - 1.0, size[0] - 1.0]))).all(2, keepdim=True)
    return (pictures + noise).clamp(0, 1), torch.where(inside, at, float("nan"))


def shape_sheets(count: int, size: tuple[int, int], tiles: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sheets of tiles x tiles small pictures of shapes, so that each step of learning sees more corners.

    As `synthetic_shapes`, but points float32 (count, tiles^2 POINTS, 2). `size` must be a multiple of `tiles`.
    """
    if tiles < 1 or size[0] % tiles or size[1] % tiles:
        raise ValueError(f"tiles is {tiles}; both sides of {size} must be multiples of it")
    height, width = size[0] // tiles, size[1] // tiles
    pictures, points = synthetic_shapes(count * tiles * tiles, (height, width), rng)
    sheet = pictures.view(count, tiles, tiles, height, width).transpose(2, 3).reshape(count, 1, *size)
    row, column = torch.arange(tiles * tiles) // tiles, torch.arange(tiles * tiles) % tiles
    corner = torch.stack([column * width, row * height], 1).float()
    return sheet, (points.view(count, tiles * tiles, -1, 2) + corner[:, None]).flatten(1, 2)


def point_map(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Points (B, N, 2), NaN for none, at their nearest pixels: bool (B, H, W). Those outside are left out."""
    whole = points.nan_to_num(-1e6).round().long()
    x, y = whole.unbind(2)
    known = (x >= 0) & (y >= 0) & (x < size[1]) & (y < size[0])
    rows, places = known.nonzero(as_tuple=True)
    out = torch.zeros(len(points), *size, dtype=torch.bool, device=points.device)
    out[rows, y[rows, places], x[rows, places]] = True
    return out


# -- paper and light -----------------------------------------------------------------------------------------------------


def background(count: int, size: tuple[int, int], rng: torch.Generator) -> Tensor:
    """Uneven greys: (count, 1, FINE H, FINE W)."""
    fine = (FINE * size[0], FINE * size[1])
    base = torch.rand(count, 1, 1, 1, generator=rng)
    cloud = torch.rand(count, 1, 6, 6, generator=rng) - 0.5
    strength = 0.5 * torch.rand(count, 1, 1, 1, generator=rng)
    return (base + strength * F.interpolate(cloud, fine, mode="bicubic", align_corners=True)).clamp(0, 1)


def blurred(pictures: Tensor, rng: torch.Generator) -> Tensor:
    """Each picture by a small Gaussian of its own."""
    deviation = 0.3 + 1.5 * torch.rand(len(pictures), 1, generator=rng)
    kernel = torch.exp(-torch.arange(-3, 4)[None].square() / (2 * deviation.square()))
    kernel = (kernel / kernel.sum(1, keepdim=True))[:, None]
    x = F.pad(pictures, (3, 3, 3, 3), mode="replicate").transpose(0, 1)
    x = F.conv2d(x, kernel[:, :, None, :], groups=len(pictures))
    return F.conv2d(x, kernel[:, :, :, None], groups=len(pictures)).transpose(0, 1)


def ink(pictures: Tensor, rng: torch.Generator, shape: tuple[int, ...] = (1, 1, 1)) -> Tensor:
    """Greys (B, *shape) that stand out from each picture's mean by 0.2 and more."""
    mean = pictures.mean((1, 2, 3)).view(-1, *[1] * len(shape))
    grey = torch.rand(len(pictures), *shape, generator=rng)
    apart = torch.where(grey > mean, mean + 0.2 + (0.8 - mean).clamp(min=0) * (grey - mean) / (1 - mean + 1e-3),
                        mean - 0.2 - (mean - 0.2).clamp(min=0) * (mean - grey) / (mean + 1e-3))  # fmt: skip
    wrapped = torch.where(apart > 1, apart - 1, torch.where(apart < 0, apart + 1, apart))
    return wrapped.clamp(0, 1)


def grid_of(pictures: Tensor) -> Tensor:
    return pixel_grid(*pictures.shape[2:], pictures)


def uniform(rng: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=rng)


def random_centres(pictures: Tensor, rng: torch.Generator, margin: float = 0.2) -> Tensor:
    extent = torch.tensor([pictures.shape[3], pictures.shape[2]], dtype=torch.float32)
    return uniform(rng, len(pictures), 2, low=margin, high=1 - margin) * extent


# -- shapes: each takes (B, 1, H, W) and returns them with the shape drawn, and its points (B, N, 2) ---------------------------


def filled(corners: Tensor, grid: Tensor) -> Tensor:
    """Inside of polygons by the even-odd rule: corners (B, K, 2), NaN for those that there are not, grid (2, H, W) -> bool (B, H, W)."""
    known = ~corners[..., 0].isnan()
    count = known.sum(1)
    following = (torch.arange(corners.shape[1]) + 1) % count[:, None].clamp(min=1)
    a, b = corners, corners.gather(1, following[..., None].expand(-1, -1, 2))
    inside = torch.zeros(len(corners), *grid.shape[1:], dtype=torch.bool)
    for k in range(corners.shape[1]):
        (ax, ay), (bx, by) = (v[:, k, :, None, None].unbind(1) for v in (a, b))
        spans = (ay > grid[1]) != (by > grid[1])
        at = ax + (grid[1] - ay) * (bx - ax) / torch.where(by == ay, 1e-9, by - ay)
        inside ^= spans & (grid[0] < at) & known[:, k, None, None]
    return inside


def random_polygons(pictures: Tensor, rng: torch.Generator, corners: int = 7, small: float = 1.0) -> Tensor:
    """Simple polygons of 3 to `corners` corners, in order around a centre: (B, corners, 2), NaN beyond their own number."""
    batch, side = len(pictures), min(pictures.shape[2:])
    wanted = torch.randint(3, corners + 1, (batch, 1), generator=rng)
    steps = uniform(rng, batch, corners, low=0.6, high=1.4)
    there = torch.arange(corners) < wanted
    steps = steps * there
    angle = 2 * math.pi * (steps.cumsum(1) / steps.sum(1, keepdim=True)) + uniform(rng, batch, 1, high=2 * math.pi)
    radius = side * small * uniform(rng, batch, corners, low=0.16, high=0.5)
    points = torch.stack([angle.cos(), angle.sin()], 2) * radius[..., None]
    points = points + random_centres(pictures, rng, 0.2)[:, None]
    return torch.where(there[..., None], points, float("nan"))


def draw_polygon(pictures: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    corners = random_polygons(pictures, rng)
    inside = filled(corners, grid_of(pictures))[:, None]
    return torch.where(inside, ink(pictures, rng), pictures), corners


def draw_polygons(pictures: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Several small ones; where one would touch another it is left out."""
    grid, taken = grid_of(pictures), torch.zeros(len(pictures), *pictures.shape[2:], dtype=torch.bool)
    points = []
    for _ in range(6):
        corners = random_polygons(pictures, rng, 5, 0.45)
        inside = filled(corners, grid)
        free = ~(inside & taken).flatten(1).any(1)
        inside &= free[:, None, None]
        pictures = torch.where(inside[:, None], ink(pictures, rng), pictures)
        around = F.max_pool2d(inside[:, None].float(), 9, 1, 4)[:, 0] > 0
        taken |= around
        points.append(torch.where(free[:, None, None], corners, float("nan")))
    return pictures, torch.cat(points, 1)


def strokes(start: Tensor, end: Tensor, width: Tensor, grid: Tensor) -> Tensor:
    """Lines with round ends: (B, 2), (B, 2), (B,) -> bool (B, H, W)."""
    a, along = start[:, :, None, None], (end - start)[:, :, None, None]
    share = ((grid - a) * along).sum(1) / along.square().sum(1).clamp(min=1e-6)
    nearest = a + share.clamp(0, 1)[:, None] * along
    return (grid - nearest).square().sum(1) <= (width[:, None, None] / 2).square()


def draw_lines(pictures: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Up to six lines that do not cross; their ends are points."""
    batch, grid = len(pictures), grid_of(pictures)
    taken = torch.zeros(batch, *pictures.shape[2:], dtype=torch.bool)
    points = []
    for i in range(6):
        ends = [random_centres(pictures, rng, 0.04) for _ in range(2)]
        inside = strokes(*ends, uniform(rng, batch, low=2.0, high=6.0), grid)
        free = ~(inside & taken).flatten(1).any(1) & ((ends[0] - ends[1]).norm(dim=1) > 20)
        free &= (torch.rand(batch, generator=rng) < 0.7) | (i == 0)
        inside &= free[:, None, None]
        pictures = torch.where(inside[:, None], ink(pictures, rng), pictures)
        taken |= F.max_pool2d(inside[:, None].float(), 9, 1, 4)[:, 0] > 0
        points.append(torch.where(free[:, None, None], torch.stack(ends, 1), float("nan")))
    return pictures, torch.cat(points, 1)


def draw_star(pictures: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Three to six rays; their ends and where they meet are points."""
    batch, grid, side = len(pictures), grid_of(pictures), min(pictures.shape[2:])
    centre, wanted = random_centres(pictures, rng, 0.3), torch.randint(3, 7, (batch,), generator=rng)
    turn, width = uniform(rng, batch, high=2 * math.pi), uniform(rng, batch, low=2.0, high=6.0)
    grey, points = ink(pictures, rng), [centre]
    for k in range(6):
        angle = turn + 2 * math.pi * (k + uniform(rng, batch, low=-0.25, high=0.25)) / wanted
        length = side * uniform(rng, batch, low=0.2, high=0.6)
        end = centre + length[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
        there = k < wanted
        inside = strokes(centre, end, width, grid) & there[:, None, None]
        pictures = torch.where(inside[:, None], grey, pictures)
        points.append(torch.where(there[:, None], end, float("nan")))
    return pictures, torch.stack(points, 1)


def slanted_square(pictures: Tensor, rng: torch.Generator) -> Tensor:
    """A square of side 1 seen from somewhere, as a homography into the picture: (B, 3, 3)."""
    batch, (height, width) = len(pictures), pictures.shape[2:]
    square = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    angle, side = uniform(rng, batch, high=2 * math.pi), min(height, width) * uniform(rng, batch, low=0.7, high=1.6)
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    shaken = square - 0.5 + uniform(rng, batch, 4, 2, low=-0.15, high=0.15)
    seen = (shaken @ turn.mT) * side[:, None, None] + random_centres(pictures, rng, 0.35)[:, None]
    return from_corners(square.expand(batch, 4, 2), seen)


def draw_cells(pictures: Tensor, rng: torch.Generator, columns: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """A slanted sheet cut at columns (B, c + 1) and rows (B, r + 1), 0 … 1, each cell of another grey; all crossings are points."""
    batch, (c, r) = len(pictures), (columns.shape[1] - 1, rows.shape[1] - 1)
    place = slanted_square(pictures, rng)
    back = torch.linalg.inv(place)
    u, v = transform(back, grid_of(pictures).flatten(1).T.expand(batch, -1, 2)).unbind(2)
    column = torch.searchsorted(columns, u.contiguous()) - 1
    row = torch.searchsorted(rows, v.contiguous()) - 1
    on = (column >= 0) & (column < c) & (row >= 0) & (row < r)
    greys = torch.rand(batch, r, c, generator=rng)
    # neighbours differ, as on a chessboard
    odd = (torch.arange(r)[:, None] + torch.arange(c)) % 2
    greys = (
        (0.45 * greys + 0.55 * odd) if float(torch.rand((), generator=rng)) < 0.5 else (0.45 * greys + 0.55 * (1 - odd))
    )
    cell = (row.clamp(0, r - 1) * c + column.clamp(0, c - 1)).clamp(min=0)
    painted = greys.flatten(1).gather(1, cell).view(batch, 1, *pictures.shape[2:])
    pictures = torch.where(on.view_as(painted), painted, pictures)
    crossing = torch.stack([columns[:, None, :].expand(-1, r + 1, -1), rows[:, :, None].expand(-1, -1, c + 1)], 3)
    return pictures, transform(place, crossing.flatten(1, 2))


def draw_checkerboard(pictures: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    c, r = torch.randint(3, 8, (2,), generator=rng).tolist()
    lines = [torch.linspace(0, 1, n + 1).expand(len(pictures), -1).contiguous() for n in (c, r)]
    return draw_cells(pictures, rng, *lines)


def draw_stripes(pictures: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    count = int(torch.randint(4, 10, (), generator=rng))
    widths = uniform(rng, len(pictures), count, low=0.4, high=1.6).cumsum(1)
    columns = torch.cat([torch.zeros(len(pictures), 1), widths / widths[:, -1:]], 1)
    return draw_cells(pictures, rng, columns, torch.tensor([0.0, 1.0]).repeat(len(pictures), 1))


def draw_cube(pictures: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A box seen from somewhere: three faces, seven points."""
    batch, grid, side = len(pictures), grid_of(pictures), min(pictures.shape[2:])
    yaw, pitch = uniform(rng, batch, low=0.25, high=1.3), uniform(rng, batch, low=0.25, high=1.2)
    edges = side * uniform(rng, batch, 3, low=0.2, high=0.5)
    # the three edges that meet in the nearest corner, as they are seen (orthographic), then turned in the picture
    across = torch.stack([yaw.cos(), yaw.sin() * pitch.sin()], 1) * edges[:, :1]
    back = torch.stack([-yaw.sin(), yaw.cos() * pitch.sin()], 1) * edges[:, 1:2]
    up = torch.stack([torch.zeros(batch), -pitch.cos()], 1) * edges[:, 2:]
    roll = uniform(rng, batch, high=2 * math.pi)
    turn = torch.stack([torch.stack([roll.cos(), -roll.sin()], 1), torch.stack([roll.sin(), roll.cos()], 1)], 1)
    a, b, c = ((turn @ v[..., None])[..., 0] for v in (across, back, up))
    # what faces the eye: the top (turned away from the near corner) and the two sides that share the near upright edge
    origin = random_centres(pictures, rng, 0.3) - (a + b + c) / 2
    near = origin + a + b
    corners = {"top": (origin + c, origin + a + c, near + c, origin + b + c)}
    corners |= {
        "left": (origin + b, near, near + c, origin + b + c),
        "right": (origin + a, near, near + c, origin + a + c),
    }
    base = ink(pictures, rng)
    for i, face in enumerate(corners.values()):
        shade = (base * (1 - 0.3 * i) if i else base) + 0.15 * (i == 2)
        inside = filled(torch.stack(face, 1), grid)[:, None]
        pictures = torch.where(inside, shade.clamp(0, 1), pictures)
    seen = [origin + c, origin + a + c, near + c, origin + b + c, origin + b, near, origin + a]
    return pictures, torch.stack(seen, 1)


def draw_ellipses(pictures: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Up to six, without points."""
    batch, grid, side = len(pictures), grid_of(pictures), min(pictures.shape[2:])
    for _ in range(6):
        centre, axes = random_centres(pictures, rng, 0.05), side * uniform(rng, batch, 2, low=0.04, high=0.2)
        angle = uniform(rng, batch, high=math.pi)
        x, y = (grid - centre[:, :, None, None]).unbind(1)
        cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
        inside = ((cos * x + sin * y) / axes[:, :1, None]).square() + (
            (cos * y - sin * x) / axes[:, 1:, None]
        ).square() < 1
        inside &= (torch.rand(batch, generator=rng) < 0.7)[:, None, None]
        pictures = torch.where(inside[:, None], ink(pictures, rng), pictures)
    return pictures, torch.empty(batch, 0, 2)


DRAW = {
    "polygon": draw_polygon,
    "polygons": draw_polygons,
    "lines": draw_lines,
    "star": draw_star,
    "checkerboard": draw_checkerboard,
    "stripes": draw_stripes,
    "cube": draw_cube,
    "ellipses": draw_ellipses,
}
