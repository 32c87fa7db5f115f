"""Digit scenes: a small world for detection and segmentation that is always there.

Real scans of handwritten digits (scikit-learn's 8x8 optical digits) are enlarged, turned, tinted and pasted over crops
of real photographs that ship inside scikit-learn and scikit-image. Boxes and masks are exact, because they follow from
the pasted ink. Nothing is downloaded, everything follows from the seed.

The two splits share nothing: other scans (the last fifth of the scans, mostly other writers) and other parts of the
photographs (the right 30% of each).
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

LABELS = [str(digit) for digit in range(10)]
"""Class names of the scenes, by label."""

PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "motorcycle_left.png",
    "rocket.jpg",
    "hubble_deep_field.jpg",
)
"""Colour photographs whose files lie inside the scikit-image package itself."""

CHUNK = 64  # scenes that are drawn together; a longer list starts with the same scenes as a shorter one
_TRIES = 12  # places that are tried for each digit
_TRAIN_SCANS = 0.8
_TRAIN_COLUMNS = 0.7


@functools.cache
def photographs() -> tuple[Tensor, ...]:
    """Real colour photographs, uint8 (3, H, W) each: two of scikit-learn, six of scikit-image. Do not modify them."""
    import skimage
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder = Path(skimage.__file__).parent / "data"
    arrays = [*load_sample_images().images]
    arrays += [numpy.asarray(Image.open(folder / name).convert("RGB")) for name in PHOTOGRAPHS]
    return tuple(torch.from_numpy(numpy.array(a)).permute(2, 0, 1).contiguous() for a in arrays)


@functools.cache
def digit_scans(split: str = "train") -> tuple[Tensor, Tensor]:
    """The scans of one split: float32 (N, 8, 8) ink in [0, 1] and int64 (N,) digits."""
    from sklearn.datasets import load_digits

    _check_split(split)
    scans, digits = load_digits(return_X_y=True)
    border = int(len(scans) * _TRAIN_SCANS)  # the scans are ordered by writer
    rows = slice(0, border) if split == "train" else slice(border, None)
    return (
        torch.from_numpy(scans[rows]).float().reshape(-1, 8, 8) / 16,
        torch.from_numpy(digits[rows]).long(),
    )


def digit_scenes(
    count: int,
    size: int = 96,
    seed: int = 0,
    max_objects: int = 4,
    split: str = "train",
    scale: tuple[float, float] = (0.2, 0.45),
) -> list[dict[str, Tensor]]:
    """Scenes of digits over photographs; kept in memory, so treat the tensors as read-only.

    Args:
        count: how many scenes. The first scenes do not depend on it.
        size: height and width in pixels, at least 32.
        seed: every choice follows from it (and from `split`, `size`, `max_objects`, `scale`).
        max_objects: each scene has 1 to `max_objects` digits, drawn uniformly; where there is no free place left, fewer.
        split: "train" or "test"; they share no scan and no part of a photograph.
        scale: smallest and largest height of the pasted scan, as a part of `size`. Heights are log-uniform.

    Returns:
        One dict a scene:
        image: uint8 (3, size, size);
        boxes: float32 (N, 4), x1 y1 x2 y2 in pixels, tight around the ink, x2 and y2 exclusive;
        labels: int64 (N,), the digit, 0 to 9;
        masks: bool (N, size, size), the ink of each digit; masks do not overlap.

    Raises:
        ValueError: if an argument is outside its range.
    """
    _check_split(split)
    if count < 1:
        raise ValueError(f"count is {count}; it must be 1 or more")
    if size < 32:
        raise ValueError(f"size is {size}; it must be 32 or more")
    if max_objects < 1:
        raise ValueError(f"max_objects is {max_objects}; it must be 1 or more")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale is {scale}; it must be (smallest, largest) with 0 < smallest <= largest <= 1")
    scenes: list[dict[str, Tensor]] = []
    for chunk in range(-(-count // CHUNK)):
        scenes += _scenes(chunk, size, seed, max_objects, split, (float(scale[0]), float(scale[1])))
    return scenes[:count]


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"split is '{split}'; it must be 'train' or 'test'")


@functools.lru_cache(maxsize=256)
def _scenes(
    chunk: int, size: int, seed: int, max_objects: int, split: str, scale: tuple[float, float]
) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed((seed * 100_003 + chunk) * 2 + (split == "test"))
    images = backgrounds(size, split, rng)  # (B, 3, S, S) float in [0, 1]
    scans, digits = digit_scans(split)
    wanted = torch.randint(1, max_objects + 1, (CHUNK,), generator=rng)
    masks: list[Tensor] = []
    labels: list[Tensor] = []
    taken = torch.zeros(CHUNK, 0, 4)
    for slot in range(max_objects):
        rows = torch.randint(len(scans), (CHUNK,), generator=rng)
        centre, side, free = _places(taken, size, scale, rng)
        angle = (torch.rand(CHUNK, generator=rng) - 0.5) * 0.5  # +- 14 degrees
        ink = _paste(scans[rows], centre, side, angle, size)  # (B, S, S)
        ink = ink * ((slot < wanted) & free)[:, None, None]
        images = _tint(images, ink, rng)
        mask = ink > 0.5
        masks = [m & ~mask for m in masks] + [mask]
        labels.append(digits[rows])
        square = torch.cat([centre - side[:, None] / 2, centre + side[:, None] / 2], dim=1)
        square[~((slot < wanted) & free)] = 2.0 * size  # takes no place
        taken = torch.cat([taken, square[:, None]], dim=1)
    every_mask, every_label = torch.stack(masks, 1), torch.stack(labels, 1)  # (B, M, S, S), (B, M)
    every_box, alive = boxes_around(every_mask)
    finished = (images * 255).round().to(torch.uint8)
    return [
        {
            "image": finished[i].clone(),
            "boxes": every_box[i, alive[i]],
            "labels": every_label[i, alive[i]],
            "masks": every_mask[i, alive[i]],
        }
        for i in range(CHUNK)
    ]


def backgrounds(size: int, split: str, rng: torch.Generator) -> Tensor:
    """Random square crops of the split's parts of the photographs, resized: (64, 3, S, S) in [0, 1]."""
    which = torch.randint(len(photographs()), (CHUNK,), generator=rng)
    corner, extent = torch.rand(CHUNK, 2, generator=rng), torch.rand(CHUNK, generator=rng)
    flip, gain = torch.rand(CHUNK, generator=rng) < 0.5, 0.6 + 0.4 * torch.rand(CHUNK, generator=rng)
    out = torch.empty(CHUNK, 3, size, size)
    for i, photograph in enumerate(photographs()):
        rows = (which == i).nonzero()[:, 0]
        if not len(rows):
            continue
        border = int(photograph.shape[2] * _TRAIN_COLUMNS)
        part = photograph[:, :, :border] if split == "train" else photograph[:, :, border:]
        height, width = part.shape[1:]
        largest = min(height, width)
        side = min(size, largest) * 0.75 + extent[rows] * (min(2 * size, largest) - min(size, largest) * 0.75)
        start = corner[rows] * (torch.tensor([width, height]) - side[:, None])  # (n, 2) x, y
        steps = (torch.arange(size) + 0.5) / size
        at = start[:, None, :] + steps[None, :, None] * side[:, None, None]  # (n, S, 2) pixel coordinates
        x, y = 2 * at[..., 0] / width - 1, 2 * at[..., 1] / height - 1
        x = torch.where(flip[rows, None], x.flip(1), x)
        grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1)
        source = (part.float() / 255)[None].expand(len(rows), -1, -1, -1)
        out[rows] = F.grid_sample(source, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return out * gain[:, None, None, None]


def _places(
    taken: Tensor, size: int, scale: tuple[float, float], rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """For each scene a free square: centres (B, 2), sides (B,), and whether a free place was found (B,)."""
    low, high = (torch.tensor(s).log() for s in scale)
    side = size * (low + (high - low) * torch.rand(CHUNK, _TRIES, generator=rng)).exp()
    centre = side[..., None] / 2 + torch.rand(CHUNK, _TRIES, 2, generator=rng) * (size - side[..., None])
    low_corner, high_corner = centre - side[..., None] / 2, centre + side[..., None] / 2  # (B, T, 2)
    apart = (low_corner[:, :, None] >= taken[:, None, :, 2:]) | (high_corner[:, :, None] <= taken[:, None, :, :2])
    free = apart.any(-1).all(-1)  # (B, T)
    first = free.float().argmax(1)  # the first free try; the first try where there is none
    rows = torch.arange(CHUNK)
    return centre[rows, first], side[rows, first], free[rows, first]


def _paste(scans: Tensor, centre: Tensor, side: Tensor, angle: Tensor, size: int) -> Tensor:
    """Scans (B, 8, 8) drawn as squares of the given side on an empty canvas: ink (B, S, S) in [0, 1]."""
    at = torch.arange(size) + 0.5
    x = (at[None, None, :] - centre[:, 0, None, None]) / (side[:, None, None] / 2)
    y = (at[None, :, None] - centre[:, 1, None, None]) / (side[:, None, None] / 2)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    grid = torch.stack([cos * x + sin * y, cos * y - sin * x], dim=-1)
    ink = F.grid_sample(scans[:, None], grid, mode="bicubic", padding_mode="zeros", align_corners=False)[:, 0]
    return ((ink - 0.3) / 0.3).clamp(0, 1)  # a pen stroke has an edge; the enlarged scan alone is a blur


def _tint(images: Tensor, ink: Tensor, rng: torch.Generator) -> Tensor:
    """Paint the ink in a random colour that is clearly lighter or darker than what lies under it."""
    under = (images.mean(1) * ink).sum((1, 2)) / ink.sum((1, 2)).clamp(min=1)  # (B,) brightness
    colour = torch.rand(CHUNK, 3, generator=rng)
    wanted = torch.where(under < 0.5, under + 0.4, under - 0.4)
    # the colour keeps its hue and is moved to the wanted brightness, or beyond
    beyond = torch.where(under < 0.5, torch.maximum(wanted, colour.mean(1)), torch.minimum(wanted, colour.mean(1)))
    colour = (colour + (beyond - colour.mean(1))[:, None]).clamp(0, 1)
    return images + ink[:, None] * (colour[:, :, None, None] - images)


def boxes_around(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Masks (B, M, S, S) -> tight boxes (B, M, 4), and which masks have any ink (B, M)."""
    size = masks.shape[-1]
    columns, rows = masks.any(2), masks.any(3)  # (B, M, S) each
    x1, y1 = (line.float().argmax(-1) for line in (columns, rows))
    x2, y2 = (size - line.flip(-1).float().argmax(-1) for line in (columns, rows))
    return torch.stack([x1, y1, x2, y2], dim=-1).float(), columns.any(-1)
