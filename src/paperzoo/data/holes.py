"""Pictures with holes: masks drawn at random or read from files, clean pictures, and pictures whose user marked what is to be filled.

A picture is uint8 (3, H, W). A mask is bool (H, W), True where the picture is *known*. Mask files, as their data sets have them, are white where the hole is.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.data.photograph_parts import random_parts
from paperzoo.data.picture_files import as_float, as_pixels, read_pixels, to_pixels, with_channels
from paperzoo.errors import DataError, PaperZooError

PARTS = "photograph_parts"
SIDE = 48  # pixels of an embedded picture
TRAIN, TEST = 1536, 96
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SPLITS = {"train": ("train",), "test": ("test", "val", "validation")}


# -- masks -----------------------------------------------------------------------------------------------------------


def free_form(size: tuple[int, int], rng: torch.Generator, strokes: tuple[int, int] = (1, 4)) -> Tensor:
    """Brush strokes as of a person who paints something over (DeepFill v2, algorithm 1): bool (H, W), True where known.

    Each stroke is a polygon of 4 to 12 corners; from corner to corner it turns by about 2 pi / 5 +- 2 pi / 15, to and fro; lengths and widths
    are drawn in proportion to the picture, as algorithm 1 has them for 256 pixels. Joints are round. The whole is mirrored at random.
    """
    height, width = size
    scale = math.hypot(height, width) / 8
    image = Image.new("1", (width, height), 1)
    draw = ImageDraw.Draw(image)
    low, high = strokes
    for _ in range(int(torch.randint(low, high + 1, (), generator=rng))):
        corners = int(torch.randint(4, 13, (), generator=rng))
        lowest, highest = (2 * math.pi / 5 + sign * 2 * math.pi / 15 for sign in (-1, 1))
        numbers = torch.rand(corners, 2, generator=rng).tolist()
        lengths = (scale + scale / 2 * torch.randn(corners, generator=rng)).clamp(0, 2 * scale).tolist()
        x, y = (n * float(torch.rand((), generator=rng)) for n in (width, height))
        brush = max(1, round(max(height, width) * float(0.047 + 0.11 * torch.rand((), generator=rng))))
        points = [(x, y)]
        for i, ((angle, _), length) in enumerate(zip(numbers, lengths, strict=True)):
            turn = lowest + angle * (highest - lowest)
            turn = 2 * math.pi - turn if i % 2 == 0 else turn
            x = min(max(x + length * math.sin(turn), 0), width)
            y = min(max(y + length * math.cos(turn), 0), height)
            points.append((x, y))
        draw.line(points, fill=0, width=brush)
        for x, y in points:
            draw.ellipse((x - brush / 2, y - brush / 2, x + brush / 2, y + brush / 2), fill=0)
    known = torch.tensor(list(image.getdata()), dtype=torch.uint8).view(height, width) > 0
    for axis in (0, 1):
        known = known.flip(axis) if torch.rand((), generator=rng) < 0.5 else known
    return known


def rectangle(size: tuple[int, int], rng: torch.Generator) -> Tensor:
    """One rectangular hole of a quarter to half of each side: bool (H, W), True where known."""
    known = torch.ones(size, dtype=torch.bool)
    starts = []
    for extent in size:
        length = int(extent * float(0.25 + 0.25 * torch.rand((), generator=rng)))
        start = int(torch.randint(0, extent - length + 1, (), generator=rng))
        starts.append(slice(start, start + length))
    known[tuple(starts)] = False
    return known


class Holes:
    """Masks of a size with a share of holes in a range: called with a generator, gives bool (H, W), True where known.

    Args:
        kind: "free_form", "rectangle", or a folder of mask files (white: hole), of which one is drawn, turned by a multiple of 90 degrees, mirrored,
            cut to a square and resized.
        size: (height, width) in pixels.
        share: least and most of the picture that is hole; masks are drawn until one fits, at most 50 times.

    Raises:
        DataError: for a folder without mask files, or where none fits.
    """

    def __init__(self, kind: str, size: tuple[int, int], share: tuple[float, float] = (0.0, 1.0)) -> None:
        if not 0 <= share[0] < share[1] <= 1:
            raise PaperZooError(f"hole_share is {share}; two shares of the picture are needed, the smaller one first")
        self.kind, self.size, self.share = kind, size, share
        self.files = () if kind in ("free_form", "rectangle") else picture_files(Path(kind), "mask")

    def __call__(self, rng: torch.Generator) -> Tensor:
        best, least = None, math.inf
        for _ in range(50):
            known = self.draw(rng)
            share = 1 - float(known.float().mean())
            if self.share[0] <= share <= self.share[1]:
                return known
            off = max(self.share[0] - share, share - self.share[1])
            if off < least:
                best, least = known, off
        if self.files or least > 0.1:
            low, high = (f"{s:.0%}" for s in self.share)
            raise DataError(self.kind, f"in 50 draws no mask left a hole of {low} to {high} of the picture")
        return best

    def draw(self, rng: torch.Generator) -> Tensor:
        if self.kind == "free_form":
            most = 1 + round(6 * self.share[1])  # more strokes for larger holes
            return free_form(self.size, rng, (1 + round(4 * self.share[0]), max(most, 2)))
        if self.kind == "rectangle":
            return rectangle(self.size, rng)
        path = self.files[int(torch.randint(len(self.files), (), generator=rng))]
        known = read_mask(path)
        known = known.rot90(int(torch.randint(4, (), generator=rng)))
        known = known.flip(0) if torch.rand((), generator=rng) < 0.5 else known
        side = min(known.shape)
        top, left = (int(torch.randint(0, n - side + 1, (), generator=rng)) for n in known.shape)
        return resized_mask(known[top : top + side, left : left + side], self.size)


def read_mask(path: str | Path) -> Tensor:
    """A mask file, white where the hole is: bool (H, W), True where known."""
    return with_channels(as_float(read_pixels(path)), 1)[0] < 0.5


def resized_mask(known: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask at another size; a pixel that is partly hole is hole."""
    if tuple(known.shape) == size:
        return known
    hole = torch.nn.functional.interpolate((~known)[None, None].float(), size, mode="area")[0, 0]
    return hole < 1e-6


# -- pictures --------------------------------------------------------------------------------------------------------


def picture_files(folder: Path, what: str = "picture") -> tuple[Path, ...]:
    """All picture files below a folder, sorted.

    Raises:
        DataError: if there is no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise DataError(
            folder,
            f"no such folder of {what} files; 'free_form' and 'rectangle' draw masks"
            if what == "mask"
            else "no such folder",
        )
    found = tuple(sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS))
    if not found:
        raise DataError(folder, f"no {what} files in it (looked for {', '.join(e[1:] for e in ENDINGS)})")
    return found


class Pictures(Dataset):
    """Pictures of a folder, uint8 (3, H, W), read when they are asked for."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        return as_pixels(with_channels(as_float(read_pixels(self.files[i])), 3), 8)


class EmbeddedPictures(Dataset):
    """Parts of real photographs, uint8 (3, 48, 48); those for testing come from the other side of each photograph."""

    def __init__(self, split: str) -> None:
        self.pictures = embedded_pictures(split)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> Tensor:
        return self.pictures[i]


@functools.cache
def embedded_pictures(split: str) -> Tensor:
    """uint8 (N, 3, 48, 48). Do not modify it."""
    rng = torch.Generator().manual_seed(0 if split == "train" else 1)
    count = TRAIN if split == "train" else TEST
    grid = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="xy")).float()
    parts = random_parts(count, (SIDE, SIDE), split, rng, margin=0.0)
    return as_pixels(parts(grid.expand(count, -1, -1, -1)), 8)


def open_pictures(data: str, split: str) -> Dataset:
    """Clean pictures: the embedded ones ("photograph_parts"), or a folder.

    A folder with `train` and `test` (or `val`) inside is used as it is divided (Places2, CelebA-HQ, ImageNet); of any other every tenth picture is for testing.

    Raises:
        DataError: if there is no such folder, or it holds no pictures.
    """
    if split not in SPLITS:
        raise PaperZooError(f"split '{split}' is not known; it is train or test")
    if data == PARTS:
        return EmbeddedPictures(split)
    folder = Path(data)
    if (folder / "train").is_dir():
        inside = next((folder / name for name in SPLITS[split] if (folder / name).is_dir()), None)
        if inside is None:
            raise DataError(folder, f"has a folder train but none of {', '.join(SPLITS[split])}")
        return Pictures(picture_files(inside))
    files = picture_files(folder)
    if len(files) < 2:
        raise DataError(folder, "one picture; at least two are needed, one of them for testing")
    held_out = files[::10]
    return Pictures(held_out if split == "test" else tuple(f for f in files if f not in set(held_out)))


# -- what a user has -------------------------------------------------------------------------------------------------


def to_marked(value: Any) -> tuple[Tensor, Tensor]:
    """A picture with what is to be filled: pixels uint8 or uint16 (1 or 3, H, W), and bool (H, W), True where known.

    Either a pair (picture, mask); or a picture with transparency, whose transparent pixels are holes; or a path beside which a mask lies: `photo.png` and
    `photo_mask.png`. A mask given as a picture is white where the hole is.

    Raises:
        DataError, PaperZooError: where no hole is marked, everything is, or the sizes differ.
    """
    mask = None
    if isinstance(value, tuple | list) and len(value) == 2:
        value, mask = value
    pixels = to_pixels(value)
    name = value if isinstance(value, str | Path) else "the picture"
    if mask is None and isinstance(value, str | Path):
        beside = Path(value).with_name(f"{Path(value).stem}_mask.png")
        mask = beside if beside.is_file() else None
    if mask is not None:
        known = with_channels(as_float(to_pixels(mask)), 1)[0] < 0.5
    elif len(pixels) in (2, 4):
        known = as_float(pixels)[-1] > 0.5
    else:
        raise DataError(
            name,
            "nothing says what is to be filled: make it transparent, or put a mask beside it, white in the hole, named …_mask.png",
        )
    colour = pixels[: 1 if len(pixels) <= 2 else 3]
    if known.shape != colour.shape[1:]:
        height, width = colour.shape[1:]
        raise DataError(name, f"is {height}x{width} pixels, its mask {known.shape[0]}x{known.shape[1]}")
    if not known.any():
        raise DataError(name, "is all hole; nothing is known to fill it from")
    return colour, known
