"""Padding of images to whole windows or to what a network halves its maps by."""

from __future__ import annotations

import torch
from torch import Tensor


def reflect_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Padded below and on the right to whole multiples by reflection without the border. (B, C, H, W) -> (B, C, H', W').

    What an image is too small to reflect repeats its first row or column. Without branches, so that an export takes any size.
    """
    for axis in (2, 3):
        last = x.shape[axis] - 1
        count = (
            x.shape[axis] + multiple - 1
        ) // multiple  # not size + -size % multiple: torch.export then sees what divides it
        places = torch.arange(count * multiple, device=x.device)
        x = x.index_select(axis, (last - (places - last).abs()).clamp(min=0))
    return x
