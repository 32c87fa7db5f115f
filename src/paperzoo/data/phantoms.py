"""Generated bodies: small volumes with anatomy-like structures, voxel spacings and orientations, that are always there.

"organs": CT-like, one channel in Hounsfield units, six classes. Liver and spleen have the same density and differ by the side they lie on, as
the stomach, which is background, does: grey values alone do not tell the structures apart, and an axis that is turned the wrong way is punished.
"lesions": MRI-like, two channels (T1, FLAIR) of arbitrary scale and thick slices. A lesion is bright in FLAIR and dark in T1; what is bright in
FLAIR alone is not one, so both channels are needed. Every sixth case has none.
"cells": pictures for 2-D networks, touching round cells of uneven brightness, divided by a thin border of background.

Everything follows from the set's name, the split and the number of the case. The splits share no case.
"""

from __future__ import annotations

import functools
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from paperzoo.data.volumes import Volume
from paperzoo.errors import PaperZooError

ORGANS = ("background", "lungs", "liver", "spleen", "kidneys", "spine")
LESIONS = ("background", "lesion")
EMBEDDED = {"organs": (ORGANS, ("CT",)), "lesions": (LESIONS, ("T1", "FLAIR"))}
CASES = {"organs": (24, 6), "lesions": (36, 8)}  # for training, for testing
ORIENTATIONS = ("RAS", "LPS", "LAS", "PIR", "SRA")  # in which the cases lie in their files

# centre and radii in mm (right, front, top), Hounsfield units
SHAPES = {
    "lungs": [((32, 2, 40), (20, 28, 28), -780), ((-32, 2, 40), (20, 28, 28), -780)],
    "liver": [((28, 6, -8), (30, 26, 16), 95)],
    "spleen": [((-36, -12, -6), (14, 16, 15), 95)],
    "kidneys": [((26, -26, -40), (10, 10, 15), 180), ((-26, -26, -38), (10, 10, 15), 180)],
    "spine": [((0, -32, 0), (10, 10, 200), 420)],
}
STOMACH = ((-22, 16, -10), (17, 15, 13), 95)
BODY, BODY_VALUE, AIR = (66, 50, 200), 10, -1000


class Phantoms(Dataset):
    """`Volume`s of an embedded set, made when they are asked for and kept."""

    def __init__(self, name: str, split: str) -> None:
        self.name, self.split = name, split
        self.labels, self.channels = (list(names) for names in EMBEDDED[name])

    def __len__(self) -> int:
        return CASES[self.name][self.split == "test"]

    def path(self, i: int) -> str:
        return f"{self.name} {self.split} {i}"

    def spacing(self, i: int) -> tuple[float, float, float]:
        return self[i].spacing

    def __getitem__(self, i: int) -> Volume:
        return phantom(self.name, self.split, i)


@functools.lru_cache(maxsize=128)
def phantom(name: str, split: str, i: int) -> Volume:
    """One case; treat its tensors as read-only."""
    rng = np.random.default_rng(zlib.crc32(f"{name} {split} {i}".encode()))
    torch_rng = torch.Generator().manual_seed(int(rng.integers(2**31)))
    image, mask, spacing = (_organs if name == "organs" else _lesions)(rng, torch_rng, i)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    original = affine @ _stored(ORIENTATIONS[i % len(ORIENTATIONS)], image.shape[1:])
    return Volume(image, affine, mask, f"{name}_{split}_{i:02d}", original)


def _stored(code: str, size: tuple[int, ...]) -> np.ndarray:
    """From the indices of an array that is stored with this orientation to those of the same array in RAS."""
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for axis, letter in enumerate(code):
        world = next(w for w, pair in enumerate(("RL", "AP", "SI")) if letter in pair)
        against = letter in "LPI"
        matrix[world, axis] = -1 if against else 1
        matrix[world, 3] = size[world] - 1 if against else 0
    return matrix


def _places(size: tuple[int, ...], spacing: tuple[float, ...], bend: float, rng: torch.Generator) -> Tensor:
    """Where each voxel lies, mm from the middle, bent by a smooth random field of `bend` mm: (3, X, Y, Z)."""
    lines = [(torch.arange(n) - (n - 1) / 2) * s for n, s in zip(size, spacing, strict=True)]
    field = torch.randn(1, 3, 5, 5, 5, generator=rng) * bend
    return torch.stack(torch.meshgrid(*lines, indexing="ij")) + F.interpolate(
        field, size=tuple(size), mode="trilinear", align_corners=True
    ).squeeze(0)


def _inside(places: Tensor, centre, radii) -> Tensor:
    """Which voxels lie in an ellipsoid, bool (X, Y, Z)."""
    shape = (3, 1, 1, 1)
    away = (places - torch.tensor(centre, dtype=torch.float32).view(shape)) / torch.tensor(
        radii, dtype=torch.float32
    ).view(shape)
    return away.square().sum(0) < 1


def _organs(rng: np.random.Generator, torch_rng: torch.Generator, i: int) -> tuple[Tensor, Tensor, tuple]:
    plane = float(rng.uniform(3.0, 4.0))
    spacing = (plane, plane, float(rng.uniform(4.0, 6.0)))
    extent = (148 * rng.uniform(0.95, 1.05), 116 * rng.uniform(0.95, 1.05), 150 * rng.uniform(0.9, 1.1))
    size = tuple(int(round(e / s)) for e, s in zip(extent, spacing, strict=True))
    places = _places(size, spacing, 3.0, torch_rng)
    grown = float(rng.uniform(0.9, 1.1))
    values = torch.full(size, float(AIR))
    values[_inside(places, (0, 0, 0), tuple(r * grown for r in BODY))] = BODY_VALUE
    mask = torch.zeros(size, dtype=torch.uint8)

    def put(centre, radii, value: float, label: int) -> None:
        centre = tuple(c * grown + rng.normal(0, 3) for c in centre)
        here = _inside(places, centre, tuple(r * grown * rng.uniform(0.85, 1.15) for r in radii))
        values[here] = value
        mask[here] = label

    put(*STOMACH, 0)
    for label, name in enumerate(ORGANS[1:], 1):
        for centre, radii, value in SHAPES[name]:
            put(centre, radii, value, label)
    blurred = F.avg_pool3d(F.pad(values[None, None], (1,) * 6, mode="replicate"), 3, 1)[0, 0]  # voxels hold mixtures
    image = 0.5 * values + 0.5 * blurred + 35 * torch.randn(size, generator=torch_rng)
    return image[None], mask, spacing


def _lesions(rng: np.random.Generator, torch_rng: torch.Generator, i: int) -> tuple[Tensor, Tensor, tuple]:
    plane = float(rng.uniform(2.2, 2.8))
    spacing = (plane, plane, float(rng.uniform(5.0, 6.0)))
    size = tuple(int(round(e / s)) for e, s in zip((126, 150, 112), spacing, strict=True))
    places = _places(size, spacing, 2.0, torch_rng)
    grown = float(rng.uniform(0.9, 1.05))
    brain = _inside(places, (0, 0, 0), tuple(r * grown for r in (55, 67, 48)))
    t1, flair = torch.zeros(size), torch.zeros(size)
    t1[brain], flair[brain] = 0.75, 0.5
    core = _inside(places, (0, 0, 4), tuple(r * grown for r in (40, 50, 32)))
    t1[core], flair[core] = 1.0, 0.4
    for side in (-1, 1):
        ventricle = _inside(places, (side * 9, 0, 6), (6, 24, 9))
        t1[ventricle], flair[ventricle] = 0.3, 0.1
    mask = torch.zeros(size, dtype=torch.uint8)
    lesions = 0 if i % 6 == 5 else int(rng.integers(1, 5))
    for k in range(lesions + 3):
        direction = rng.normal(size=3)
        centre = direction / np.linalg.norm(direction) * rng.uniform(0.35, 0.75) * np.array([55, 67, 48]) * grown
        here = _inside(places, tuple(centre), tuple(rng.uniform(6, 12) * rng.uniform(0.8, 1.2, 3))) & brain
        flair[here] = 0.95
        if k < lesions:
            t1[here] = 0.5
            mask[here] = 1
        else:  # bright in one channel alone; what lay there before stays a lesion only where it still is dark in T1
            t1[here] = 0.9
            mask[here] = 0
    image = torch.stack([t1, flair])
    image = 0.6 * image + 0.4 * F.avg_pool3d(F.pad(image[None], (1,) * 6, mode="replicate"), 3, 1)[0]
    image = image + 0.05 * torch.randn(image.shape, generator=torch_rng) * (image > 0.05)
    scale = torch.from_numpy(rng.uniform(200, 1500, 2)).float().view(2, 1, 1, 1)
    return (image.clamp(min=0) * scale), mask, spacing


# -- pictures ----------------------------------------------------------------------------------------------------------

CELL_PICTURES = (64, 16)
CELL_SIZE = 96


class Cells(Dataset):
    """Pictures of touching cells as `paperzoo.data.masks` has them: `tv_tensors.Image` uint8 (3, H, W), `tv_tensors.Mask` int64 (H, W), 0 and 1.

    Cells lie in clusters and touch; the mask divides them by one or two pixels of background, as the paper on U-Net has it, and the picture shows
    the border between two cells hardly darker than the cells.
    """

    labels = ("background", "cell")

    def __init__(self, split: str) -> None:
        if split not in ("train", "test"):
            raise PaperZooError(f"split '{split}' is not known; it is one of train, test")
        self.split = split

    def __len__(self) -> int:
        return CELL_PICTURES[self.split == "test"]

    def path(self, i: int) -> str:
        return f"cells {self.split} {i}"

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        image, mask = cell_picture(self.split, i)
        return tv_tensors.Image(image.clone()), tv_tensors.Mask(mask.clone())


@functools.lru_cache(maxsize=256)
def cell_picture(split: str, i: int) -> tuple[Tensor, Tensor]:
    """uint8 (3, 96, 96), all channels the same, and int64 (96, 96). Cells are the parts of a few blobs that are nearest to a seed."""
    rng = np.random.default_rng(zlib.crc32(f"cells {split} {i}".encode()))
    size = CELL_SIZE
    clusters = rng.uniform(10, size - 10, (3, 2))
    tried = torch.from_numpy(clusters[rng.integers(3, size=400)] + rng.normal(0, 16, (400, 2))).float()
    tried = tried[(tried > -4).all(1) & (tried < size + 4).all(1)]
    far = (torch.cdist(tried, tried) > 10).tolist()
    seeds: list[int] = []
    for i in range(len(tried)):  # greedily: a seed that is far from those before it
        if all(far[i][j] for j in seeds) and len(seeds) < 26:
            seeds.append(i)
    centres = tried[seeds]
    radii = torch.from_numpy(rng.uniform(6.5, 9.0, len(seeds))).float()
    bend = torch.from_numpy(rng.normal(0, 1.2, (1, 2, 9, 9))).float()
    lines = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).float()
    lines = lines + F.interpolate(bend, size=(size, size), mode="bicubic", align_corners=True)[0]
    away = (lines[None] - centres[:, :, None, None]).square().sum(1).sqrt() / radii[
        :, None, None
    ]  # (N, H, W), 1 at the rim
    nearest, owner = away.min(0)
    second = away.scatter(0, owner[None], torch.inf).amin(0)
    inside = nearest < 1
    border = inside & (second - nearest < 0.17)  # between two cells, some 1.5 pixels wide
    cell = inside & ~border
    brightness = torch.from_numpy(rng.uniform(0.42, 0.6, len(seeds))).float()[owner]
    value = torch.where(inside, brightness + 0.12 * (1 - nearest), torch.tensor(0.33))
    value = torch.where(border, value - 0.06, value)
    halo = (nearest >= 1) & (nearest < 1.12)
    value = torch.where(halo, torch.tensor(0.42), value)  # phase contrast brightens the rim outside
    light = torch.from_numpy(rng.normal(0, 0.04, (1, 1, 3, 3))).float()
    value = value + F.interpolate(light, size=(size, size), mode="bicubic", align_corners=True)[0, 0]
    value = F.avg_pool2d(F.pad(value[None, None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0, 0] * 0.5 + value * 0.5
    value = value + torch.from_numpy(rng.normal(0, 0.035, (size, size))).float()
    grey = (value.clamp(0, 1) * 255).round().to(torch.uint8)
    return grey.expand(3, -1, -1).contiguous(), cell.long()
