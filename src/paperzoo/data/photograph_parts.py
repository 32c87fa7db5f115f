"""Parts of real photographs with something to see in them, for pictures that are made by moving them. Nothing is downloaded.

The colour photographs of `paperzoo.data.scenes`, and more of those that lie inside the scikit-image package: walls, grass, gravel, coins, a page of print,
stained tissue. The left 60% of each is for training, the right 40% for testing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from paperzoo.blocks.warping import read_maps
from paperzoo.data.scenes import photographs

MORE = ("brick.png", "grass.png", "gravel.png", "coins.png", "camera.png", "page.png", "ihc.png")
TRAIN_COLUMNS = 0.6
CANDIDATES = 6  # parts that are tried for one; the liveliest is taken
COARSE = 4  # pixels along each side of the squares whose differences make a part lively
LARGEST = 3  # pixels of a photograph, along each side, that one pixel of a part may be made of


@functools.cache
def all_photographs() -> tuple[Tensor, ...]:
    """uint8 (3, H, W) each. Do not modify them."""
    import skimage
    from PIL import Image

    folder = Path(skimage.__file__).parent / "data"
    arrays = [numpy.asarray(Image.open(folder / name).convert("RGB")) for name in MORE]
    return (*photographs(), *(torch.from_numpy(numpy.array(a)).permute(2, 0, 1).contiguous() for a in arrays))


@functools.cache
def reduced(number: int, split: str, factor: int) -> Tensor:
    """A split's side of a photograph in [0, 1], its pixels averaged in squares: (1, 3, H / factor, W / factor)."""
    photograph = all_photographs()[number]
    border = int(photograph.shape[2] * TRAIN_COLUMNS)
    side = photograph[:, :, :border] if split == "train" else photograph[:, :, border:]
    return F.avg_pool2d(side[None].float() / 255, factor)


@functools.cache
def slopes(number: int, split: str, factor: int) -> Tensor:
    """How fast its greys change from square of COARSE pixels to square, where a coarse map of features still sees it."""
    grey = F.avg_pool2d(reduced(number, split, factor).mean(1, keepdim=True), COARSE)[0, 0]
    return (grey[1:, 1:] - grey[1:, :-1]).abs() + (grey[1:, 1:] - grey[:-1, 1:]).abs()


@dataclass(frozen=True)
class Parts:
    """A part for each picture of a batch, as a function of places: (B, 2, h, w), x and y in pixels of the part, to colours (B, 3, h, w) in [0, 1].

    What lies beside the part is shown as well; beyond the photograph its border continues.
    """

    split: str
    numbers: tuple[int, ...]
    factors: tuple[int, ...]
    starts: Tensor  # (B, 2), in pixels of the reduced photograph
    mirrored: tuple[bool, ...]
    width: int

    def __call__(self, places: Tensor) -> Tensor:
        out = torch.empty(len(places), 3, *places.shape[2:])
        for i, number in enumerate(self.numbers):
            at = places[i : i + 1]
            if self.mirrored[i]:
                at = torch.stack([self.width - 1 - at[:, 0], at[:, 1]], 1)
            out[i] = read_maps(
                reduced(number, self.split, self.factors[i]), at + self.starts[i, :, None, None], "border"
            )[0]
        return out


def random_parts(count: int, size: tuple[int, int], split: str, rng: torch.Generator, margin: float = 0.25) -> Parts:
    """Lively parts of (height, width), with this share of it around that still belongs to the photograph, where there is room."""
    height, width = size
    total = len(all_photographs())
    numbers, factors, starts = [], [], []
    for _ in range(count):
        best = (-1.0, 0, 1, (0.0, 0.0))
        draw = torch.rand(CANDIDATES, 4, generator=rng).tolist()
        for which, how, right, down in draw:
            number = int(which * total)
            rows, columns = reduced(number, split, 1).shape[2:]
            room = min(rows / height, columns / width)
            factor = max(1, min(1 + int(how * LARGEST), int(room)))
            free = [n // factor - side for n, side in ((columns, width), (rows, height))]
            edge = [min(f / 2, margin * side) for f, side in zip(free, (width, height), strict=True)]
            x, y = (e + share * max(0, f - 2 * e) for e, f, share in zip(edge, free, (right, down), strict=True))
            left, top = max(0, int(x)), max(0, int(y))
            window = tuple(slice(a // COARSE, (a + n) // COARSE) for a, n in ((top, height), (left, width)))
            liveliness = float(slopes(number, split, factor)[window].mean())
            if liveliness > best[0]:
                best = (liveliness, number, factor, (float(left), float(top)))
        numbers.append(best[1])
        factors.append(best[2])
        starts.append(best[3])
    mirrored = (torch.rand(count, generator=rng) < 0.5).tolist()
    return Parts(split, tuple(numbers), tuple(factors), torch.tensor(starts), tuple(mirrored), width)
