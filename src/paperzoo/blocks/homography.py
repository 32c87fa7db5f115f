"""Homographies: random ones, points and pictures under them, and the one that fits matches best.

A homography is (…, 3, 3) and maps (x, y, 1) to (u, v, w), the place (u / w, v / w). Places are in pixels; pixels have whole coordinates at their middles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from paperzoo.blocks.warping import inside, pixel_grid, read_maps


def transform(homography: Tensor, points: Tensor) -> Tensor:
    """Points (…, N, 2) under homographies (…, 3, 3): (…, N, 2)."""
    moved = points @ homography[..., :2].mT + homography[..., None, :, 2]
    depth = moved[..., 2:]
    # behind the camera, or on its horizon: far away
    return moved[..., :2] / torch.where(depth.abs() < 1e-8, 1e-8, depth)


def from_corners(source: Tensor, target: Tensor) -> Tensor:
    """The homographies (…, 3, 3) that take four points (…, 4, 2) to four others; NaN or huge where three lie on a line."""
    x, y = source.unbind(-1)
    u, v = target.unbind(-1)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    of_u = torch.stack([x, y, one, zero, zero, zero, -u * x, -u * y], -1)
    of_v = torch.stack([zero, zero, zero, x, y, one, -v * x, -v * y], -1)
    solved = torch.linalg.solve_ex(torch.cat([of_u, of_v], -2), torch.cat([u, v], -1)[..., None])[0][..., 0]
    return torch.cat([solved, torch.ones_like(solved[..., :1])], -1).unflatten(-1, (3, 3))


def warp(pictures: Tensor, homography: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pictures (B, C, H, W) as homographies (B, 3, 3) show them: (B, C, h, w), zero outside; and what lies inside, bool (B, 1, h, w)."""
    back = torch.linalg.inv(homography)
    own = pixel_grid(*size, pictures).flatten(1).T
    places = transform(back, own.expand(len(back), -1, 2)).mT.unflatten(2, size)
    return read_maps(pictures, places), inside(places, *pictures.shape[-2:])


def corners(size: tuple[int, int]) -> Tensor:
    """The middles of the corner pixels of a picture of (height, width), (4, 2)."""
    height, width = size
    return torch.tensor([[0.0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]])


@dataclass(frozen=True)
class HomographyRange:
    """What random homographies are made of, sec. 4.2 of SuperPoint: a part of the picture seen from another place, as a product of simple ones.

    patch: side of the part that is shown, as a share of the picture's. perspective: deviation of the slant along x and y, as a share of the picture.
    zoom: deviation of the scale. angle: largest turn, radians. outside: whether the part may reach beyond the picture's border.
    """

    patch: float = 0.85
    perspective: float = 0.1
    zoom: float = 0.1
    angle: float = math.pi / 2
    outside: bool = False


def truncated_normal(shape: tuple[int, ...], deviation: float, rng: torch.Generator | None) -> Tensor:
    """Normal numbers within two deviations."""
    low, high = (0.5 * (1 + math.erf(z / math.sqrt(2))) for z in (-2.0, 2.0))
    uniform = low + (high - low) * torch.rand(shape, generator=rng)
    return deviation * math.sqrt(2) * torch.erfinv(2 * uniform - 1)


def random_homographies(
    count: int, size: tuple[int, int], ranges: HomographyRange, rng: torch.Generator | None = None
) -> Tensor:
    """Random homographies (count, 3, 3) from a picture of (height, width) to what another one of that size shows of it.

    A central part is slanted, scaled, turned and shifted; its four corners become the corners of the new picture. Scales and turns that would leave the
    picture are drawn again, up to 16 times, unless `ranges.outside`.
    """
    tries = 16
    square = torch.tensor([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    part = (ranges.patch * square).expand(count, 1, 4, 2)
    slant = truncated_normal((count, 1, 3), ranges.perspective / 2, rng)
    left, right, up = slant.unbind(2)
    part = part + torch.stack([torch.stack([left, up], 2), torch.stack([right, -up], 2),
                               torch.stack([right, up], 2), torch.stack([left, -up], 2)], 2)  # fmt: skip
    zoom = 1 + truncated_normal((count, tries), ranges.zoom, rng)
    angle = ranges.angle * (2 * torch.rand(count, tries, generator=rng) - 1)
    aspect = size[1] / size[0]
    cos, sin = angle.cos()[..., None], angle.sin()[..., None]
    x, y = (part * zoom[..., None, None]).unbind(3)  # in shares of width and height; turned in pixels
    turned = torch.stack([cos * x - sin * y / aspect, sin * x * aspect + cos * y], 3)  # (count, tries, 4, 2)
    fits = (turned.abs() <= 0.5).flatten(2).all(2)
    if ranges.outside:
        fits = torch.ones_like(fits)
    chosen = turned[torch.arange(count), fits.int().argmax(1)]  # the first that fits
    # where none does, the part as it was
    chosen = torch.where(fits.any(1)[:, None, None], chosen, ranges.patch * square)
    before, behind = 0.5 + chosen.amin(1), 0.5 - chosen.amax(1)  # how far the part may move along x and y
    low, high = -before.clamp(min=0), behind.clamp(min=0)
    chosen = chosen + (low + torch.rand(count, 2, generator=rng) * (high - low))[:, None]
    extent = torch.tensor([size[1] - 1.0, size[0] - 1.0])
    return from_corners((chosen + 0.5) * extent, corners(size).expand(count, 4, 2))


def normalised(points: Tensor) -> tuple[Tensor, Tensor]:
    """Points (N, 2) around their mean, sqrt(2) away from it on average, and the homography (3, 3) that takes them there."""
    mean = points.mean(0)
    scale = math.sqrt(2) / (points - mean).norm(dim=1).mean().clamp(min=1e-9)
    matrix = torch.eye(3, dtype=points.dtype, device=points.device) * scale
    matrix[:2, 2], matrix[2, 2] = -scale * mean, 1
    return (points - mean) * scale, matrix


def fit(first: Tensor, second: Tensor) -> Tensor:
    """The homography (3, 3) with the least algebraic error for N >= 4 matches (N, 2) each (the normalised direct linear transform)."""
    (p, before), (q, behind) = normalised(first), normalised(second)
    ahead = torch.cat([p, torch.ones_like(p[:, :1])], 1)
    zero = torch.zeros_like(ahead)
    rows = torch.cat([torch.cat([ahead, zero, -q[:, :1] * ahead], 1), torch.cat([zero, ahead, -q[:, 1:] * ahead], 1)])
    least = torch.linalg.eigh(rows.T @ rows)[1][:, 0].view(3, 3)
    matrix = torch.linalg.inv(behind) @ least @ before
    return matrix / torch.where(matrix[2, 2].abs() < 1e-12, 1e-12, matrix[2, 2])


def estimate(
    first: Tensor, second: Tensor, threshold: float = 3.0, tries: int = 2000, seed: int = 0
) -> tuple[Tensor | None, Tensor]:
    """The homography that most matches agree with (RANSAC, all tries at once), fitted again to those.

    Args:
        first, second: (N, 2), matching places.
        threshold: pixels in the second picture that a match may be off.
        tries: samples of four matches.

    Returns:
        the homography float64 (3, 3), None where fewer than four matches agree; and which agree, bool (N,).
    """
    count, device = len(first), first.device
    none = torch.zeros(count, dtype=torch.bool, device=device)
    if count < 4:
        return None, none
    p, q = first.double(), second.double()
    rng = torch.Generator().manual_seed(seed)
    four = torch.rand(tries, count, generator=rng).topk(4, dim=1).indices.to(device)
    models = from_corners(p[four], q[four])
    models = models[torch.isfinite(models).flatten(1).all(1)]
    if not len(models):
        return None, none
    off = (transform(models, p.expand(len(models), -1, 2)) - q).norm(dim=2)
    # each match costs its error, at most the threshold (MSAC): finer than counting
    best = models[off.square().clamp(max=threshold**2).sum(1).argmin()]
    agree = none
    for _ in range(5):
        found = (transform(best, p) - q).norm(dim=1) <= threshold
        if int(found.sum()) < 4:
            break
        if torch.equal(found, agree):
            return best, agree
        agree = found
        best = fit(p[agree], q[agree])
    return (best, agree) if int(agree.sum()) >= 4 else (None, none)


def corner_error(found: Tensor, truth: Tensor, size: tuple[int, int]) -> float:
    """How far apart two homographies take the corners of a picture of (height, width): the mean distance in pixels."""
    points = corners(size).double().to(found.device)
    return float((transform(found.double(), points) - transform(truth.double(), points)).norm(dim=1).mean())
