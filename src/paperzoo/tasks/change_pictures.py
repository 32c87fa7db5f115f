"""Pairs of pictures as a user has them, and how changes are drawn; for `paperzoo.tasks.change_detection`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from paperzoo.data.change_pairs import read_pair
from paperzoo.errors import PaperZooError

IGNORE = 255
BETWEEN = " :: "  # in a string that names both pictures
HIT, FALSE_ALARM, MISS = (
    (255, 255, 255),
    (220, 60, 40),
    (70, 130, 230),
)  # colours in which answers are held against the truth


def split_pair(value: Any) -> tuple[Tensor, Tensor, str | None]:
    """What `predict` takes, as two (C, H, W), uint8 or float32, and the first one's path where it is a file."""
    if isinstance(value, str):
        before, between, after = value.partition(BETWEEN.strip())
        value = (before.strip(), after.strip()) if between else None
    elif isinstance(value, Mapping):
        value = (value["before"], value["after"]) if value.keys() >= {"before", "after"} else None
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise PaperZooError(
            "an input is a pair (before, after), {'before': …, 'after': …}, or 'before.tif :: after.tif'"
        )
    first, second = value
    if isinstance(first, str | Path) and isinstance(second, str | Path):
        return *read_pair(first, second), str(first)
    pictures = [as_bands(x) for x in value]
    if pictures[0].shape != pictures[1].shape:
        raise PaperZooError(
            f"the pictures have the shapes {tuple(pictures[0].shape)} and {tuple(pictures[1].shape)}; both dates must be on the same grid"
        )
    if pictures[0].dtype != pictures[1].dtype:
        pictures = [as_float(x) for x in pictures]
    return *pictures, str(first) if isinstance(first, str | Path) else None


def as_bands(value: Any) -> Tensor:
    """One picture as (C, H, W), uint8 or float32."""
    from paperzoo.data.images import pil_to_tensor
    from paperzoo.data.rasters import read_bands

    if isinstance(value, str | Path):
        return read_bands(value)
    if isinstance(value, Image.Image):
        return pil_to_tensor(value)
    if not isinstance(value, np.ndarray | Tensor):
        raise PaperZooError(f"a picture is a path, a PIL image, an array or a tensor, not {type(value).__name__}")
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and array.shape[0] > 16 and array.shape[2] <= 16:
        array = array.transpose(2, 0, 1)
    if array.ndim != 3 or 0 in array.shape:
        raise PaperZooError(f"a picture has the shape (H, W), (H, W, C) or (C, H, W), not {tuple(value.shape)}")
    if array.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(array))
    top = 1.0 if array.dtype.kind == "f" else 65535.0
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > top:
        raise PaperZooError("a picture's values are uint8, uint16, or floating point of at least 0 and at most 1")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32) / top)


def as_float(picture: Tensor) -> Tensor:
    picture = picture.as_subclass(Tensor)
    return picture.float() / 255 if picture.dtype == torch.uint8 else picture.float()


def visible(picture: Tensor) -> Tensor:
    """Any (C, H, W) as uint8 (3, H, W): the first three bands (or the first), stretched where they are not 8-bit colours."""
    bands = picture[:3] if picture.shape[0] >= 3 else picture[:1].expand(3, -1, -1)
    if bands.dtype == torch.uint8:
        return bands.as_subclass(Tensor)
    low, high = np.quantile(bands.numpy(), [0.02, 0.98])
    return ((bands - float(low)) / max(float(high - low), 1e-6) * 255).clamp(0, 255).to(torch.uint8)


def as_picture(mask: Tensor) -> Tensor:
    return (mask.cpu() * 255).to(torch.uint8).expand(3, -1, -1)


def outlined(picture: Tensor, mask: Tensor) -> Tensor:
    """A uint8 picture (3, H, W) with the borders of a bool mask (H, W) in red."""
    inner = mask.cpu().float()[None, None]
    border = (inner - -F.max_pool2d(-inner, 3, 1, 1))[0, 0] > 0
    return torch.where(border, torch.tensor([255, 40, 40], dtype=torch.uint8)[:, None, None], picture)


def compared(found: Tensor, truth: Tensor) -> Tensor:
    """Two masks (H, W) as one uint8 picture (3, H, W): hits white, false alarms red, misses blue, what does not count grey."""
    found, counts = found.cpu() > 0, truth != IGNORE
    shown = torch.zeros(*truth.shape, 3, dtype=torch.uint8)
    shown[~counts] = 90
    cases = ((HIT, found & (truth > 0)), (FALSE_ALARM, found & (truth == 0)), (MISS, ~found & (truth > 0)))
    for colour, where in cases:
        shown[where & counts] = torch.tensor(colour, dtype=torch.uint8)
    return shown.permute(2, 0, 1)


def row(pictures: list[Tensor]) -> Image.Image:
    """uint8 pictures (3, H, W) of one size side by side, small ones enlarged."""
    from paperzoo.engine.pictures import tile

    height, width = pictures[0].shape[-2:]
    factor = max(1, round(160 / min(height, width)))
    shown = [Image.fromarray(p.permute(1, 2, 0).contiguous().numpy()) for p in pictures]
    return tile([p.resize((width * factor, height * factor), Image.Resampling.NEAREST) for p in shown], len(shown), 2)
