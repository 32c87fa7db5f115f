"""RoI max pooling (sec. 2.1) in plain tensor operations, for exported programs: exporters know no RoIPool.

A part's maximum is that of four overlapping blocks whose sides are powers of two (a sparse table of range maxima). The
numbers are those of `torchvision.ops.roi_pool`, which is used everywhere else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def roi_max_pool(features: Tensor, regions: Tensor, size: int, scale: float) -> Tensor:
    """Maps (B, C, H, W) and regions (R, 5), the image's number before x1 y1 x2 y2 -> (R, C, size, size); empty parts are 0."""
    height, width = features.shape[2:]
    x1, y1, x2, y2 = (regions[:, 1:] * scale + 0.5).floor().unbind(1)
    top, bottom = parts(y1, y2, size, height)  # (R, size) each
    left, right = parts(x1, x2, size, width)
    table, rows, columns = range_maxima(features)  # (B * rows * columns * H * W, C)
    tall, wide = power_in(bottom - top, rows), power_in(right - left, columns)
    level = (tall * columns)[:, :, None] + wide[:, None, :]  # (R, size, size)
    first = regions[:, 0].long()[:, None, None] * (rows * columns) + level
    found = None
    for y in (top, bottom - 2**tall):
        for x in (left, right - 2**wide):
            at = (first * height + y.clamp(0, height - 1)[:, :, None]) * width + x.clamp(0, width - 1)[:, None, :]
            block = table[at]
            found = block if found is None else torch.maximum(found, block)
    empty = (bottom <= top)[:, :, None] | (right <= left)[:, None, :]
    return torch.where(empty[..., None], 0.0, found).permute(0, 3, 1, 2)


def parts(first: Tensor, last: Tensor, size: int, extent: int) -> tuple[Tensor, Tensor]:
    """Where each of `size` parts begins and ends (exclusive), int64 (R, size); within 0 … extent."""
    step = ((last - first + 1).clamp(min=1) / size)[:, None]
    number = torch.arange(size, device=first.device).to(first.dtype)
    begin, end = (number * step).floor() + first[:, None], ((number + 1) * step).ceil() + first[:, None]
    return begin.clamp(0, extent).long(), end.clamp(0, extent).long()


def power_in(length: Tensor, count: int) -> Tensor:
    """The largest k below `count` with 2^k <= length; 0 for an empty part."""
    return sum((length >= 2**k).long() for k in range(1, count)) if count > 1 else torch.zeros_like(length)


def range_maxima(features: Tensor) -> tuple[Tensor, int, int]:
    """For each place the maximum of the block of 2^i by 2^j that begins there, for all i and j: (B * i * j * H * W, C)."""
    height, width = features.shape[2:]
    rows, columns = height.bit_length(), width.bit_length()
    by_row = [features]
    for k in range(rows - 1):
        by_row.append(torch.maximum(by_row[k], shifted(by_row[k], 2**k, 0)))
    blocks = []
    for level in by_row:
        blocks.append(level)
        for k in range(columns - 1):
            blocks.append(torch.maximum(blocks[-1], shifted(blocks[-1], 0, 2**k)))
    table = torch.stack(blocks, 1).permute(0, 1, 3, 4, 2)  # (B, rows * columns, H, W, C)
    return table.reshape(-1, features.shape[1]), rows, columns


def shifted(x: Tensor, down: int, right: int) -> Tensor:
    """The map as seen from a place further on; beyond the border nothing is larger."""
    return F.pad(x[:, :, down:, right:], (0, right, 0, down), value=-torch.inf)
