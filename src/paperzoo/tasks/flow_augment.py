"""Training pairs of optical flow made more various, as FlowNet did it: a strong change of place and colour for both pictures of a
pair, and a weak one of the second picture alone (Dosovitskiy et al., ICCV 2015, sec. 5.2; the ranges of the places are those of the prototxt files
released with FlowNet2 and PWC-Net). The flow follows exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paperzoo.blocks.warping import inside, pixel_grid, read_maps

TRIES = 50  # changes of place that are drawn; the first one whose crop stays inside the pictures is taken


def affine(angle: Tensor, zoom: Tensor, squeeze: Tensor, shift: Tensor) -> Tensor:
    """x -> R diag(1 / (zoom squeeze), squeeze / zoom) x + shift, all (N, …): (N, 2, 3)."""
    across, along = 1 / (zoom * squeeze), squeeze / zoom
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack([cos * across, -sin * along, shift[:, 0], sin * across, cos * along, shift[:, 1]], 1)
    return rows.view(-1, 2, 3)


def after(outer: Tensor, inner: Tensor) -> Tensor:
    """outer(inner(x)) of affine maps (N, 2, 3)."""
    linear = outer[:, :, :2] @ inner[:, :, :2]
    return torch.cat([linear, outer[:, :, :2] @ inner[:, :, 2:] + outer[:, :, 2:]], 2)


def apply(matrix: Tensor, points: Tensor) -> Tensor:
    """Affine maps (N, 2, 3) of points (N, 2, …)."""
    flat = matrix[:, :, :2] @ points.flatten(2) + matrix[:, :, 2:]
    return flat.unflatten(2, tuple(points.shape[2:]))


def inverse(matrix: Tensor) -> Tensor:
    linear = torch.linalg.inv(matrix[:, :, :2])
    return torch.cat([linear, -linear @ matrix[:, :, 2:]], 2)


def random_affines(size: tuple[int, int], crop: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where the pixels of a crop are read in the first and in the second picture: (1, 2, 3) each, about the middles of crop and picture."""
    height, width = size
    extent = torch.tensor([width, height], dtype=torch.float32)
    draw = 2 * torch.rand(TRIES, 5) - 1
    strong = affine(
        0.4 * draw[:, 0], (0.2 + 0.4 * draw[:, 1]).exp(), (0.3 * draw[:, 2]).exp(), 0.4 * draw[:, 3:] * extent
    )
    draw = 0.03 * torch.randn(TRIES, 4)
    weak = affine(draw[:, 0], draw[:, 1].exp(), torch.ones(TRIES), draw[:, 2:] * extent)
    both = after(strong, weak)
    corner = torch.tensor([(crop[1] - 1) / 2, (crop[0] - 1) / 2])
    corners = corner[:, None] * torch.tensor([[-1.0, 1, -1, 1], [-1, -1, 1, 1]])
    limit = ((extent - 1) / 2)[:, None]
    fits = torch.stack([(apply(m, corners.expand(TRIES, 2, 4)).abs() <= limit).all(2).all(1) for m in (strong, both)])
    good = fits.all(0).nonzero()
    if not len(good):
        still = torch.eye(2, 3)[None]
        return still, still
    at = good[:1, 0]
    return strong[at], both[at]


def moved(item: dict[str, Tensor], crop: tuple[int, int]) -> dict[str, Tensor]:
    """An item whose pictures (3, H, W) are float: both read through random affine maps, a crop of (height, width); the flow follows."""
    height, width = item["first"].shape[-2:]
    to_first, to_second = random_affines((height, width), crop)
    own = pixel_grid(*crop, item["first"])[None]
    middle = torch.tensor([(crop[1] - 1) / 2, (crop[0] - 1) / 2])[:, None, None]
    centre = torch.tensor([(width - 1) / 2, (height - 1) / 2])[:, None, None]
    places = [apply(m, own - middle) + centre for m in (to_first, to_second)]
    found = {k: read_maps(item[k][None], p, "border")[0] for k, p in zip(("first", "second"), places, strict=True)}
    if "flow" in item:
        flow = read_maps(item["flow"][None], places[0], "border", "nearest")
        target = apply(inverse(to_second), places[0] + flow - centre) + middle
        known = {
            k: read_maps(item[k][None].float(), places[0], "border", "nearest") > 0.5 for k in ("valid", "occluded")
        }
        valid = known["valid"] & inside(places[0], height, width)
        found |= {"flow": torch.where(valid, target - own, 0.0)[0], "valid": valid[0]}
        hidden = known["occluded"] | ~inside(target, *crop)
        found["occluded"] = (hidden & valid)[0]
    return found


def recoloured(first: Tensor, second: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Pictures (3, H, W) in [0, 1] with changed gamma, colours, contrast and brightness, and with Gaussian noise of up to `noise`."""
    draw = torch.rand(6)
    gamma, contrast = 0.7 + 0.8 * draw[0], 1 + (-0.8 + 1.2 * draw[1])
    colour, brightness = (0.5 + 1.5 * draw[2:5]), 0.2 * torch.randn(1)
    sigma = noise * draw[5]
    pictures = []
    for i, picture in enumerate((first, second)):
        weak = 1 + 0.02 * i * torch.randn(6)
        x = picture.clamp(0, 1) ** (gamma * weak[0])
        x = x * (colour * weak[1:4])[:, None, None]
        mean = x.mean()
        x = (x - mean) * (contrast * weak[4]) + mean + brightness + 0.02 * i * (weak[5] - 1)
        pictures.append((x + sigma * torch.randn_like(x)).clamp(0, 1))
    return pictures[0], pictures[1]
