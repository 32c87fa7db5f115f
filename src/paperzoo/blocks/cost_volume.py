"""Cost volumes: how well each place of one feature map fits places of another. Maps are (B, C, H, W).

local_correlation(a, b, 4)      each place with its neighbours up to 4 cells away: (B, 81, H, W), as in FlowNet's and PWC-Net's "corr"
global_correlation(a, b)        each place with every other: (B, H, W, H', W'), as in CNNGeo and RAFT
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def local_correlation(first: Tensor, second: Tensor, displacement: int = 4) -> Tensor:
    """The mean product over channels of each place of `first` and the places of `second` around it.

    A row is cut into tiles; a tile times the cells it can reach is one small matrix product, from whose band the diagonals are read by a
    reshape. That is several times faster than one product for each displacement, needs no kernel of its own, and exports.

    Args:
        first, second: (B, C, H, W). Outside of `second` there are zeros.
        displacement: d, the largest distance along each axis, 1 or more.

    Returns:
        (B, (2 d + 1)^2, H, W); channel (dy + d) (2 d + 1) + (dx + d) belongs to the neighbour (x + dx, y + dy).
    """
    if displacement < 1:
        raise ValueError(f"displacement is {displacement}; it must be 1 or more")
    batch, channels, height, width = first.shape
    tile, reach = 2 * displacement, 2 * displacement + 1
    tiles = (width + tile - 1) // tile
    # rows first, so that a shift by rows is a slice without a copy: (H, B, W, C)
    rows = F.pad((first / channels).permute(2, 0, 3, 1), (0, 0, 0, tiles * tile - width))
    rows = rows.reshape(height, batch, tiles, tile, channels)
    around = F.pad(
        second.permute(2, 0, 3, 1),
        (0, 0, displacement, tiles * tile - width + displacement, 0, 0, displacement, displacement),
    )
    blocks = around[:, :, : tiles * tile].reshape(-1, batch, tiles, tile, channels)
    following = around[:, :, tile:].reshape(-1, batch, tiles, tile, channels)
    reached = torch.cat([blocks, following], 3).mT  # what a tile can reach: (H + 2 d, B, tiles, C, 2 tile)
    volume = []
    for shift in range(reach):
        products = rows @ reached[shift : shift + height]  # (H, B, tiles, tile, 2 tile)
        # cell (i, i + k) of rows of length n lies at i (n + 1) + k: rows that are one longer have the diagonals as columns
        skewed = F.pad(products.flatten(3), (0, tile)).unflatten(3, (tile, 2 * tile + 1))
        volume.append(skewed[..., :reach])
    stacked = torch.stack(volume, 4).flatten(4)  # (H, B, tiles, tile, reach * reach)
    return stacked.flatten(2, 3)[:, :, :width].permute(1, 3, 0, 2)


def global_correlation(first: Tensor, second: Tensor) -> Tensor:
    """The product over channels of every place of `first` and every place of `second`: (B, C, H, W), (B, C, h, w) -> (B, H, W, h, w)."""
    products = first.flatten(2).mT @ second.flatten(2)
    return products.unflatten(2, tuple(second.shape[2:])).unflatten(1, tuple(first.shape[2:]))
