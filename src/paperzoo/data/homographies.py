"""Pairs of pictures with a known homography, and pictures to learn from: HPatches, folders, and warped photographs.

    open_pairs("warped_photographs", "test")         parts of photographs under known homographies, always there
    open_pairs("hpatches-sequences-release", "test") i_ajuntament/1.ppm … 6.ppm, H_1_2 … H_1_6, v_…/…; five pairs a scene
    open_pictures("warped_photographs")              parts of photographs, from which a detector learns without labels
    open_pictures("path/to/folder")                  every picture in it, as COCO's train2014

A pair is a dict:
    first, second   uint8 (3, H, W) and (3, h, w)
    homography      float64 (3, 3), from pixels of the first picture to pixels of the second

Training and test parts of the photographs share nothing, see `paperzoo.data.photograph_parts`.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.blocks.homography import HomographyRange, random_homographies, transform
from paperzoo.blocks.warping import pixel_grid
from paperzoo.data.depth import pictures_in, split_folder
from paperzoo.data.images import read_image
from paperzoo.data.keypoint_pairs import Photographs
from paperzoo.data.photograph_parts import random_parts
from paperzoo.errors import DataError, PaperZooError, UnknownName

EMBEDDED = "warped_photographs"
SIZE = (72, 96)  # height and width of embedded pictures
COUNTS = {"train": 64, "test": 48}
VIEWS = HomographyRange(patch=0.75, perspective=0.16, zoom=0.12, angle=math.pi / 8)
SCENES = ("i_", "v_")


class Pairs(Dataset):
    """What every set of pairs shares. `kind(i)` is "i" for changed light, "v" for a changed view, "" where it is not said."""

    def __len__(self) -> int:
        raise NotImplementedError

    def kind(self, i: int) -> str:
        return ""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        raise NotImplementedError


class HPatches(Pairs):
    """The sequences: the first picture of each scene with each of the others."""

    def __init__(self, root: Path) -> None:
        scenes = sorted(p for p in root.iterdir() if p.is_dir() and p.name.startswith(SCENES))
        self.rows = []
        for scene in scenes:
            first = self.picture(scene, 1)
            for k in range(2, 7):
                if (scene / f"H_1_{k}").is_file():
                    self.rows.append((first, self.picture(scene, k), scene / f"H_1_{k}"))
        if not self.rows:
            raise DataError(root, "has no scenes i_… and v_… with 1.ppm, 2.ppm, … and H_1_2, …")

    @staticmethod
    def picture(scene: Path, number: int) -> Path:
        for suffix in (".ppm", ".png", ".jpg"):
            if (scene / f"{number}{suffix}").is_file():
                return scene / f"{number}{suffix}"
        raise DataError(scene, f"has no picture {number}.ppm")

    def __len__(self) -> int:
        return len(self.rows)

    def kind(self, i: int) -> str:
        return self.rows[i][0].parent.name[0]

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        first, second, matrix = self.rows[i]
        return {"first": read_image(first), "second": read_image(second), "homography": read_homography(matrix)}


class WarpedPhotographs(Pairs):
    """The embedded pairs: a part of a photograph and another view of it, in other light."""

    def __init__(self, split: str) -> None:
        self.first, self.second, self.matrices = warped_photographs(COUNTS[split], split=split)

    def __len__(self) -> int:
        return len(self.first)

    def kind(self, i: int) -> str:
        return "v"

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"first": self.first[i], "second": self.second[i], "homography": self.matrices[i]}


def read_homography(path: Path) -> Tensor:
    """Nine numbers, row by row, as float64 (3, 3)."""
    try:
        numbers = np.array(path.read_text(encoding="utf-8").split(), dtype=np.float64)
    except FileNotFoundError:
        raise DataError(path, "no such file") from None
    except (OSError, ValueError) as error:
        raise DataError(path, f"not readable numbers ({error})") from None
    if numbers.size != 9 or not np.isfinite(numbers).all() or abs(np.linalg.det(numbers.reshape(3, 3))) < 1e-12:
        raise DataError(path, f"holds {numbers.size} numbers; a homography is nine, row by row, that can be inverted")
    return torch.from_numpy(numbers.reshape(3, 3))


def open_pairs(data: str | Path, split: str = "test") -> Pairs:
    """Pairs by name or place; see the module's docstring. HPatches has no splits: all of it is for testing.

    Raises:
        PaperZooError, UnknownName: if there is no such set or split.
        DataError: if a folder has not this layout.
    """
    _check(split)
    if str(data) == EMBEDDED:
        return WarpedPhotographs(split)
    return HPatches(_folder(data))


def open_pictures(data: str | Path, split: str = "train") -> Photographs:
    """Pictures without anything known of them, by name or place; train/ and val/ in a folder are its splits.

    Raises:
        PaperZooError, UnknownName: if there is no such set or split.
        DataError: if a folder holds no pictures.
    """
    _check(split)
    if str(data) == EMBEDDED:
        return Photographs(None, warped_photographs(COUNTS[split], split=split)[0])
    root = _folder(data)
    files = pictures_in(split_folder(root, split) or root)
    if not files:
        raise DataError(root, "holds no pictures")
    return Photographs(files)


def _check(split: str) -> None:
    if split not in COUNTS:
        raise PaperZooError(f"split '{split}' is not known; it is one of {', '.join(COUNTS)}")


def _folder(data: str | Path) -> Path:
    path = Path(data).expanduser()
    if not path.is_dir():
        if path.suffix or len(path.parts) > 1:
            raise DataError(path, "no such folder")
        raise UnknownName("set of pictures or path", str(data), [EMBEDDED])
    return path


@functools.lru_cache(maxsize=4)
def warped_photographs(
    count: int, size: tuple[int, int] = SIZE, seed: int = 0, split: str = "train"
) -> tuple[Tensor, Tensor, Tensor]:
    """Parts of photographs, what they show from another place in other light, and the homographies between the two.

    Returns:
        uint8 (count, 3, H, W) twice, float64 (count, 3, 3). Treat them as read-only.
    """
    rng = torch.Generator().manual_seed(seed * 2 + (split == "test") + 11_000_003)
    matrices = random_homographies(count, size, VIEWS, rng)
    own = pixel_grid(*size, matrices)
    places = transform(torch.linalg.inv(matrices), own.flatten(1).T.expand(count, -1, 2)).mT.unflatten(2, size)
    part = random_parts(count, size, split, rng, margin=0.0)
    first, second = part(own.expand(count, -1, -1, -1)), part(places)
    gain = 0.7 + 0.6 * torch.rand(count, 1, 1, 1, generator=rng)
    shift = 0.1 * torch.randn(count, 1, 1, 1, generator=rng)
    noise = 0.01 * torch.randn(second.shape, generator=rng)
    second = (gain * second + shift).clamp(0, 1) + noise
    pictures = [(p * 255).round().clamp(0, 255).to(torch.uint8) for p in (first, second)]
    return (*pictures, matrices.double())
