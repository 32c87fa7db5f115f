"""Moving digits: short videos for action recognition that are always there.

A real scan of a handwritten digit, in a random colour, moves over a crop of a real photograph: it goes to one of four sides, turns one way
or the other, grows, or jumps up and down. Which digit it is, where, how large, how it is turned and how fast it moves tells nothing about
the class: places, sizes and angles are spread alike at the middle of every class's videos, so that one frame does not give the class away.
Nothing is downloaded, everything follows from the seed. The splits share no scan and no part of a photograph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from paperzoo.data.scenes import CHUNK, backgrounds, digit_scans
from paperzoo.data.videos import Video, Videos, shrunk

LABELS = [
    "moves left",
    "moves right",
    "moves up",
    "moves down",
    "turns left",
    "turns right",
    "grows",
    "bounces",
]
"""Class names, by number. "turns left" is counter-clockwise."""

COUNTS = {"train": 768, "test": 256}
FRAMES, SIZE, RATE = 24, 28, 12.0  # two seconds
HAZE = 0.3  # the contrast that is left of a photograph
_TRAIN = "train"


class MovingDigits(Videos):
    """The embedded set: 768 videos for training and 256 for testing, 24 frames of 28 x 28 pixels at 12 frames a second, 8 classes."""

    def __init__(self, split: str) -> None:
        self.clips = draw_clips(COUNTS["train" if split == _TRAIN else "test"], split=split)
        super().__init__(LABELS, self.clips["labels"].tolist())

    def path(self, i: int) -> str:
        return f"moving digit {i}"

    def video(self, i: int) -> MovingDigit:
        return MovingDigit(*(self.clips[name][i] for name in ("ink", "backgrounds", "colours")), self.path(i))


class MovingDigit(Video):
    """One of them; a frame is painted when it is asked for."""

    def __init__(self, ink: Tensor, background: Tensor, colour: Tensor, name: str) -> None:
        super().__init__(torch.arange(len(ink)).double().div(RATE).numpy(), name, RATE)
        self.ink, self.background, self.colour = ink, background, colour[:, None, None]

    def frames(self, wanted: Sequence[float], short_side: int | None = None) -> Tensor:
        ink = self.ink[self.rows(wanted)].float()[:, None] / 255
        pixels = torch.lerp(self.background.float(), self.colour.float(), ink)
        return shrunk(pixels.round().to(torch.uint8), short_side)


@functools.lru_cache(maxsize=4)
def draw_clips(
    count: int, split: str = "train", frames: int = FRAMES, size: int = SIZE, seed: int = 0
) -> dict[str, Tensor]:
    """Videos as ink over backgrounds; kept in memory, so treat the tensors as read-only.

    Returns:
        labels: int64 (N,), balanced; ink: uint8 (N, T, S, S), how much of each pixel is covered;
        backgrounds: uint8 (N, 3, S, S); colours: uint8 (N, 3) of the ink.
    """
    rng = torch.Generator().manual_seed(2 * seed + (split != _TRAIN))
    labels = torch.arange(count)[torch.randperm(count, generator=rng)] % len(LABELS)
    scans, _ = digit_scans("train" if split == _TRAIN else "test")
    scans = scans[torch.randint(len(scans), (count,), generator=rng)]
    under = torch.cat(
        [backgrounds(size, "train" if split == _TRAIN else "test", rng) for _ in range(-(-count // CHUNK))]
    )[:count]
    middle = under.mean((1, 2, 3), keepdim=True)
    under = middle + HAZE * (under - middle)
    brightness = middle.flatten(1)
    colour = torch.rand(count, 3, generator=rng)
    wanted = torch.where(
        brightness < 0.5, brightness + 0.45, brightness - 0.45
    )  # clearly lighter or darker than the photograph
    colour = (colour * 0.4 - 0.2 + wanted).clamp(0, 1)
    centre, side, angle = motion(labels, frames, rng)
    ink = torch.cat(
        [pasted(*part, size) for part in zip(*(x.split(64) for x in (scans, centre, side, angle)), strict=True)]
    )
    return {
        "labels": labels,
        "ink": (ink * 255).round().to(torch.uint8),
        "backgrounds": (under * 255).round().to(torch.uint8),
        "colours": (colour * 255).round().to(torch.uint8),
    }


def motion(labels: Tensor, frames: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Where the digits are, in parts of the picture's side: centres (N, T, 2) as x and y, sides (N, T), angles (N, T) in radians."""
    n = len(labels)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, generator=rng)

    time = torch.linspace(-0.5, 0.5, frames)[None]  # 0 in the middle of the video
    is_class = [(labels == k)[:, None] for k in range(len(LABELS))]
    side = uniform(0.34, 0.56) * torch.where(is_class[6], (uniform(0.9, 1.3) * time).exp(), 1.0)
    turns = uniform(0.6, 1.0) * (2 * math.pi)  # in the whole video
    angle = uniform(-math.pi, math.pi) + turns * time * (is_class[5].float() - is_class[4].float())
    path = uniform(0.5, 0.8)  # of the picture's side, in the whole video
    phase, jumps = uniform(0, 1), uniform(2, 3)
    height = (
        (jumps * time + phase) * math.pi
    ).sin().abs() - 2 / math.pi  # of a ball: up against gravity, and at once up again
    x = uniform(0.36, 0.64) + path * time * (is_class[1].float() - is_class[0].float())
    y = uniform(0.36, 0.64) + path * time * (is_class[3].float() - is_class[2].float())
    y = y - torch.where(is_class[7], 0.55 * path * height, 0.0)
    return torch.stack([x.expand(n, frames), y.expand(n, frames)], 2), side.expand(n, frames), angle.expand(n, frames)


def pasted(scans: Tensor, centre: Tensor, side: Tensor, angle: Tensor, size: int) -> Tensor:
    """Scans (n, 8, 8) at places (n, T, …): ink (n, T, S, S) in [0, 1]."""
    at = (torch.arange(size) + 0.5) / size
    x = (at[None, None, None, :] - centre[..., 0, None, None]) / (side[..., None, None] / 2)
    y = (at[None, None, :, None] - centre[..., 1, None, None]) / (side[..., None, None] / 2)
    cos, sin = angle.cos()[..., None, None], angle.sin()[..., None, None]
    grid = torch.stack([cos * x + sin * y, cos * y - sin * x], -1)  # (n, T, S, S, 2)
    n, frames = side.shape
    ink = F.grid_sample(scans[:, None], grid.view(n, frames * size, size, 2), padding_mode="zeros", align_corners=False)
    return ((ink.view(n, frames, size, size) - 0.3) / 0.3).clamp(0, 1)  # a pen stroke has an edge
