"""From volumes to what networks are fed with: resampled and normalised cases, and random patches of them.

A case is brought to the voxel spacing of the set and its intensities to a common scale. Patches are cut by one look-up: the window's voxels are
placed in the case, turned, scaled and bent in mm (so that thick slices are turned correctly), and read there.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.data.volumes import IGNORE, Volume, empty

SLAB = 16  # slices that are worked on together where a volume is large
SEEDS = 2000  # voxels of each class that patches are centred on


@dataclass(frozen=True)
class Prepared:
    """A case at the set's spacing: float32 (C, X, Y, Z), normalised, and uint8 (X, Y, Z) or None; the distances of its voxels, mm."""

    image: Tensor
    mask: Tensor | None
    spacing: tuple[float, float, float]
    seeds: tuple[Tensor, ...] = ()


# -- spacing -----------------------------------------------------------------------------------------------------------


def size_at(size: Sequence[int], spacing: Sequence[float], wanted: Sequence[float]) -> tuple[int, ...]:
    """The voxels of a volume at another spacing; its extent in mm stays, to half a voxel. A single slice stays one."""
    return tuple(1 if n == 1 else max(1, round(n * s / w)) for n, s, w in zip(size, spacing, wanted, strict=True))


def slab(values: Tensor, size: Sequence[int], first: int, last: int) -> Tensor:
    """The slices first … last - 1 of (C, X, Y, Z) resampled linearly to `size`; the ends of both volumes coincide, as in `F.interpolate`."""
    deep = values.shape[-1]
    at = ((torch.arange(first, last) + 0.5) * deep / size[2] - 0.5).clamp(0, deep - 1)
    low = at.floor().long()
    high = (low + 1).clamp(max=deep - 1)
    start, stop = int(low[0]), int(high[-1]) + 1
    part = values[..., start:stop].float()
    if part.shape[1:3] != tuple(size[:2]):
        part = F.interpolate(part[None], size=(*size[:2], stop - start), mode="trilinear", align_corners=False)[0]
    return torch.lerp(part[..., low - start], part[..., high - start], at - low)


def resampled(values: Tensor, size: Sequence[int]) -> Tensor:
    """(C, X, Y, Z) resampled linearly to `size`."""
    if values.shape[1:] == tuple(size):
        return values
    out = torch.from_numpy(empty((len(values), *size)))
    for first in range(0, size[2], SLAB):
        last = min(size[2], first + SLAB)
        out[..., first:last] = slab(values, size, first, last)
    return out


def resampled_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Class ids (X, Y, Z) at the nearest voxel."""
    for axis, (n, wanted) in enumerate(zip(mask.shape, size, strict=True)):
        mask = mask.index_select(axis, ((torch.arange(wanted) + 0.5) * n / wanted).long().clamp(max=n - 1))
    return mask


# -- intensities -------------------------------------------------------------------------------------------------------


def intensity_statistics(volumes: Any, progress: bool = True) -> dict[str, list[float]]:
    """Of a training set, a number a channel, from the voxels of its structures: 0.5th and 99.5th percentile, mean and deviation between.

    At most 10,000 voxels a case are looked at.
    """
    from tqdm import tqdm

    taken: list[Tensor] = []
    for i in tqdm(
        range(len(volumes)), desc="reading intensities", delay=1.0, leave=False, disable=None if progress else True
    ):
        volume = volumes[i]
        inside = volume.image[:, (volume.mask > 0) & (volume.mask != IGNORE)]
        taken.append(inside[:, :: max(1, inside.shape[1] // 10_000)])
    values = torch.cat(taken, 1).double().numpy()
    facts: dict[str, list[float]] = {"low": [], "high": [], "mean": [], "deviation": []}
    for channel in values:
        channel = channel[np.isfinite(channel)]
        low, high = np.percentile(channel, (0.5, 99.5)) if channel.size else (0.0, 1.0)
        channel = channel.clip(low, high) if channel.size else np.array([0.0, 1.0])
        for key, value in zip(facts, (low, high, channel.mean(), max(float(channel.std()), 1e-8)), strict=True):
            facts[key].append(float(value))
    return facts


def normalised(image: Tensor, how: str, facts: dict[str, list[float]]) -> Tensor:
    """(C, X, Y, Z) with comparable intensities; a channel of NaN, a modality that is missing, becomes zeros.

    "ct": clipped to the set's percentiles, then less its mean, over its deviation (nnU-Net's rule for Hounsfield units). "zscore": less the
    volume's own mean, over its deviation. "none": as stored.
    """
    out = image.clone() if how == "none" else torch.from_numpy(empty(image.shape))
    for c, channel in enumerate(image):
        if torch.isnan(channel[..., 0]).all() and torch.isnan(channel).all():
            out[c] = 0
        elif how == "ct":
            low, high, mean, deviation = (facts[key][c] for key in ("low", "high", "mean", "deviation"))
            torch.clamp(channel, low, high, out=out[c])
            out[c].sub_(mean).div_(deviation)
        elif how == "zscore":
            mean = channel.mean(dtype=torch.float64)
            deviation = torch.stack([(s.double() - mean).square().mean() for s in channel.unbind(-1)]).mean().sqrt()
            torch.sub(channel, float(mean), out=out[c])
            out[c].div_(max(float(deviation), 1e-8))
    return out


# -- cases and patches ---------------------------------------------------------------------------------------------------


def prepare(volume: Volume, facts: dict[str, Any]) -> Prepared:
    """A volume at the set's spacing and scale; `facts` has spacing, normalise and intensity."""
    size = size_at(volume.size, volume.spacing, facts["spacing"])
    if all(abs(s - w) < 0.01 * w for s, w in zip(volume.spacing, facts["spacing"], strict=True)):
        size = volume.size  # as good as there
    image = resampled(normalised(volume.image, facts["normalise"], facts["intensity"]), size)
    spacing = tuple(n * s / m for n, s, m in zip(volume.size, volume.spacing, size, strict=True))
    mask = None if volume.mask is None else resampled_mask(volume.mask, size)
    return Prepared(image, mask, spacing)


class PreparedCases(Dataset):
    """A set's cases, prepared; the latest `cache` GiB of them are kept."""

    def __init__(self, volumes: Any, facts: dict[str, Any], cache: float) -> None:
        self.volumes, self.facts, self.room = volumes, facts, cache * 2**30
        self.kept: OrderedDict[int, Prepared] = OrderedDict()

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, i: int) -> Prepared:
        if i in self.kept:
            self.kept.move_to_end(i)
            return self.kept[i]
        case = prepare(self.volumes[i], self.facts)
        every = torch.nonzero((case.mask > 0) & (case.mask != IGNORE))
        labels = case.mask[tuple(every.T)]
        seeds = []
        for label in labels.unique().tolist():
            mine = every[labels == label]
            seeds.append(mine[:: max(1, len(mine) // SEEDS)])
        case = Prepared(case.image, case.mask, case.spacing, tuple(seeds))
        self.kept[i] = case
        while len(self.kept) > 1 and sum(c.image.nbytes + c.mask.nbytes for c in self.kept.values()) > self.room:
            self.kept.popitem(last=False)
        return case


class Patches(Dataset):
    """One random patch of each case: (image float32 (C, *window), mask int64 (*window)); random numbers come from torch's global generator.

    Args:
        window: three extents; 1 along the axis across which 2-D networks look.
        config: of the task, for the augmentation.
    """

    def __init__(self, cases: PreparedCases, window: Sequence[int], config: Any) -> None:
        self.cases, self.window, self.config = cases, tuple(window), config

    def __len__(self) -> int:
        return len(self.cases)

    def path(self, i: int) -> str:
        return self.cases.volumes.path(i)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        case, c = self.cases[i], self.config
        centre = self.centre(case)
        if c.rotate or c.elastic or c.scale != (1.0, 1.0):
            image, mask = warped(case, centre, self.window, self.field(case.spacing))
        else:
            start = [round(float(m) - (n - 1) / 2) for m, n in zip(centre, self.window, strict=True)]
            image = crop(case.image, start, self.window, 0.0)
            mask = crop(case.mask[None], start, self.window, IGNORE)[0]
        flipped = [a for a, name in enumerate("xyz") if name in c.flip and float(torch.rand(())) < 0.5]
        image, mask = image.flip([1 + a for a in flipped]), mask.flip(flipped)
        return self.intensities(image), mask.long()

    def centre(self, case: Prepared) -> Tensor:
        """The voxel in the middle of the patch: somewhere in a structure with the probability `foreground`, else anywhere."""
        if case.seeds and float(torch.rand(())) < self.config.foreground:
            seeds = case.seeds[int(torch.randint(len(case.seeds), ()))]
            middle = seeds[int(torch.randint(len(seeds), ()))].float()
        else:
            middle = torch.stack([torch.rand(()) * (n - 1) for n in case.mask.shape])
        kept = []
        for m, n, w in zip(middle, case.mask.shape, self.window, strict=True):
            low, high = (w - 1) / 2, n - 1 - (w - 1) / 2  # inside, where the case is larger than the window
            kept.append(m.clamp(low, high) if high > low else torch.tensor((n - 1) / 2))
        return torch.stack(kept)

    def field(self, spacing: Sequence[float]) -> Tensor:
        """Where the patch's voxels are read, relative to its centre and in voxels of the case: (*window, 3)."""
        c, window = self.config, self.window
        across = [a for a, n in enumerate(window) if n > 1]
        lines = [(torch.arange(n) - (n - 1) / 2) * s for n, s in zip(window, spacing, strict=True)]
        places = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)  # mm
        turn = torch.eye(3)
        for axis in range(3) if len(across) == 3 else [a for a in range(3) if a not in across]:
            turn = turn @ rotation(axis, math.radians(c.rotate) * (2 * float(torch.rand(())) - 1))
        factor = float(torch.empty(()).uniform_(*c.scale))
        places = places @ (turn.T / factor)
        if c.elastic:
            bend = torch.randn(1, 3, *(c.elastic_grid if n > 1 else 1 for n in window)) * c.elastic
            keep = torch.tensor([n > 1 for n in window]).view(1, 3, 1, 1, 1)
            places = places + smooth_field(bend * keep, window)[0].movedim(0, -1)
        return places / torch.tensor(spacing, dtype=torch.float32)

    def intensities(self, image: Tensor) -> Tensor:
        c = self.config
        if c.gain:
            image = image * (1 + c.gain * (2 * torch.rand(len(image), 1, 1, 1) - 1))
        if c.shift:
            image = image + c.shift * (2 * torch.rand(len(image), 1, 1, 1) - 1)
        return image + c.noise * torch.randn(image.shape) if c.noise else image


def rotation(axis: int, angle: float) -> Tensor:
    """A turn about one of the three axes, (3, 3)."""
    a, b = [i for i in range(3) if i != axis]
    turn = torch.eye(3)
    turn[a, a] = turn[b, b] = math.cos(angle)
    turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
    return turn


def smooth_field(points: Tensor, size: Sequence[int]) -> Tensor:
    """(1, C, p, q, r) on a coarse grid of control points -> (1, C, *size), by cubic B-splines (their values are approached, not hit)."""
    for axis, n in enumerate(size):
        count = points.shape[2 + axis]
        if count == 1:
            points = points.expand(*(-1 if a != 2 + axis else n for a in range(5)))
            continue
        at = torch.linspace(0, count - 1, n)
        low = at.floor().clamp(max=count - 2)
        t = at - low
        shares = torch.stack(
            [(1 - t) ** 3 / 6, (3 * t**3 - 6 * t**2 + 4) / 6, (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6, t**3 / 6]
        )
        mixed = torch.zeros(n, count)
        for k in range(4):
            where = (low.long() + k - 1).clamp(0, count - 1)
            mixed[torch.arange(n), where] += shares[k]
        points = torch.tensordot(points, mixed, ([2 + axis], [1])).movedim(-1, 2 + axis)
    return points


def crop(values: Tensor, start: Sequence[int], window: Sequence[int], outside: float) -> Tensor:
    """The window of (C, X, Y, Z) that starts there, (C, *window); what lies outside has the value `outside`."""
    pads: list[int] = []
    inside: list[slice] = []
    for s, n, size in zip(start, window, values.shape[1:], strict=True):
        low, high = min(max(0, s), size), max(0, min(size, s + n))
        inside.append(slice(low, high))
        pads = [low - s, s + n - high, *pads]
    part = values[(slice(None), *inside)]
    return F.pad(part, pads, value=outside) if any(pads) else part.clone()


def warped(case: Prepared, centre: Tensor, window: Sequence[int], field: Tensor) -> tuple[Tensor, Tensor]:
    """Image (linearly) and mask (nearest) read at centre + field, voxels of the case: (C, *window) and (*window)."""
    at = centre + field
    low = at.flatten(0, 2).amin(0).floor().long() - 1
    high = at.flatten(0, 2).amax(0).ceil().long() + 2
    extent = (high - low).tolist()
    image = crop(case.image, low.tolist(), extent, 0.0)
    mask = crop(case.mask[None], low.tolist(), extent, IGNORE)
    grid = (2 * (at - low) + 1) / torch.tensor(extent) - 1
    grid = grid.flip(-1)[None]  # grid_sample counts from the last axis
    image = F.grid_sample(image[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]
    mask = F.grid_sample(mask[None].float(), grid, mode="nearest", padding_mode="border", align_corners=False)[0, 0]
    return image, mask.to(torch.uint8)
