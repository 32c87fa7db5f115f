"""What CNNGeo learns from: maps by a few parameters, random ones, pictures bent by them, and the loss on a grid (Rocco et al., CVPR 2017), sec. 3.3, 4 and 5.

Places are (x, y) in -1 … 1 between the *middles* of the corner pixels, as in spatial transformers; a map takes places of the target to places of the source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.papers.classification.spatial_transformer.technique import Affine, ThinPlateSpline, output_points

CROP = 9 / 16  # of a picture's sides, the part that becomes the source (released code)
SIDE = 3  # control points of the spline along each axis (sec. 3.3)


# -- maps: parameters (B, P) and places (N, 2) to places (B, N, 2) --------------------------------------------------------


class Spline(ThinPlateSpline):
    """18 parameters, where the 3 x 3 control points go: all nine x, then all nine y, column by column, as the released networks answer."""

    def __init__(self) -> None:
        super().__init__(SIDE)
        ticks = [-1 + 2 * i / (SIDE - 1) for i in range(SIDE)]
        self.identity = (*(x for x in ticks for _ in ticks), *(y for _ in ticks for y in ticks))

    def forward(self, theta: Tensor, points: Tensor) -> Tensor:
        return super().forward(theta.reshape(-1, 2, SIDE, SIDE).transpose(1, 3).flatten(1), points)


class FourPoints(nn.Module):
    """8 parameters of a homography, where the corners go: four x, then four y, of (-1, -1), (-1, 1), (1, -1), (1, 1).

    Not of the paper but of its journal version. In closed form (Heckbert, 1989), so that it needs no solver and exports.
    """

    identity = (-1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0, 1.0)

    def forward(self, theta: Tensor, points: Tensor) -> Tensor:
        first, below, right, last = theta.reshape(-1, 2, 4).unbind(2)  # (B, 2) each
        a, b, rest = right - last, below - last, first - right - below + last
        area = a[:, 0] * b[:, 1] - b[:, 0] * a[:, 1]
        g = (rest[:, 0] * b[:, 1] - b[:, 0] * rest[:, 1]) / area
        h = (a[:, 0] * rest[:, 1] - rest[:, 0] * a[:, 1]) / area
        across, along = right - first + g[:, None] * right, below - first + h[:, None] * below
        s, t = ((points + 1) / 2).unsqueeze(-2).unbind(-1)  # (…, N, 1), 0 … 1
        depth = g[:, None, None] * s + h[:, None, None] * t + 1
        return (s * across[:, None] + t * along[:, None] + first[:, None]) / depth


MAPS: dict[str, type[nn.Module]] = {"affine": Affine, "tps": Spline, "homography": FourPoints}


def grid_loss(transform: nn.Module, found: Tensor, truth: Tensor, size: int = 20) -> Tensor:
    """L = 1/N sum_i d(T_found(g_i), T_truth(g_i))^2 over a regular grid of size x size places, eq. (3): the mean over the batch.

    found, truth: parameters (B, P) of the same kind of map.
    """
    grid = output_points(size, size, found)
    return (transform(found, grid) - transform(truth, grid)).square().sum(-1).mean()


# -- random maps, from torch's global generator --------------------------------------------------------------------------


def random_affine(
    count: int, turn: float = math.pi / 12, slant: float = math.pi / 6, zoom: float = 0.25, shift: float = 0.25
) -> Tensor:
    """Rows of [R(turn) R(-slant) diag(zooms) R(slant) | shift]: (count, 6). Each number is uniform within its range; zooms around 1."""
    draw = 2 * torch.rand(count, 6) - 1
    turned, slanted = rotations(turn * draw[:, 0]), rotations(slant * draw[:, 1])
    linear = turned @ slanted.mT @ torch.diag_embed(1 + zoom * draw[:, 2:4]) @ slanted
    return torch.cat([linear, shift * draw[:, 4:, None]], 2).flatten(1)


def rotations(angle: Tensor) -> Tensor:
    """Angles (N,) to matrices (N, 2, 2)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)


def random_moves(transform: nn.Module, count: int, reach: float = 0.4) -> Tensor:
    """Control points or corners, each moved by up to `reach` along x and y: (count, P)."""
    still = torch.tensor(transform.identity)
    return still + reach * (2 * torch.rand(count, len(still)) - 1)


# -- pictures ------------------------------------------------------------------------------------------------------------


def bent(pictures: Tensor, places: Tensor, crop: float = CROP) -> Tensor:
    """Pictures (B, C, H, W) read at places (B, h, w, 2) of their middle part, which is `crop` of each side.

    What lies beyond a picture is its mirror image (sec. 5), so that no black corner tells the map. -1 and 1 times `crop` / 2 are the middles of the corner
    pixels of the picture with half of its mirror image on every side, as in the released code.
    """
    height, width = pictures.shape[2:]
    reach = places.new_tensor([crop * (1 - 0.5 / width), crop * (1 - 0.5 / height)])
    return F.grid_sample(pictures, reach * places, padding_mode="reflection", align_corners=False)


def training_pairs(
    pictures: Tensor, maps: Sequence[nn.Module], truths: Sequence[Tensor], size: int, crop: float = CROP
) -> tuple[Tensor, list[Tensor]]:
    """The middle part of each picture, and what each map makes of it: (B, C, size, size) and as many for every map."""
    grid = output_points(size, size, pictures)
    count = len(pictures)
    source = bent(pictures, grid.expand(count, -1, 2).unflatten(1, (size, size)), crop)
    targets = [
        bent(pictures, transform(truth, grid).unflatten(1, (size, size)), crop)
        for transform, truth in zip(maps, truths, strict=True)
    ]
    return source, targets
