"""From a data set to plans: what nnU-Net looks at (the fingerprint) and the rules that turn it into spacing, patch, batch and topology.

Sizes and spacings are of axes right, front, top. The rules work on axes in which the one with the largest spacing comes first, as slices are
stacked along it; 2-D networks see the other two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from paperzoo.data.volumes import IGNORE, Volume
from paperzoo.errors import DataError, PaperZooError

ANISOTROPIC = 3.0  # spacings apart by more than this factor
SMALLEST_EDGE = 4  # voxels of the deepest maps
BASE_3D, MOST_3D = 30, 320  # channels at full resolution, and at most
BASE_2D, MOST_2D = 30, 480
BUDGET_3D, BATCH_3D = 520_000_000, 2  # numbers in all maps of a training sample that fit 12 GB at that batch size
BUDGET_2D, BATCH_2D = 19_739_648, 42  # the batch of the first paper at 256 x 256; later releases count with 50
SEEN = 4  # the patch covers less than 1/4 of the median volume: a coarse network comes first
SHARE = 0.05  # a batch holds at most 5 % of the training set's voxels


class Fingerprint(BaseModel):
    """Of a training set, every case cropped to where any modality is not 0."""

    sizes: list[tuple[int, int, int]]
    spacings: list[tuple[float, float, float]]  # mm
    kept: float  # median share of a case's voxels that cropping leaves
    labels: list[str]
    channels: list[str]
    connected: list[int]  # classes that are in one piece in every case that has them
    intensity: dict[str, list[float]]  # low, high, mean, deviation of the foreground, a number a channel


class Configuration(BaseModel):
    """One network and what it sees."""

    dimensions: int
    axis: int  # across which slices are stacked
    spacing: tuple[float, float, float]  # mm
    median: tuple[int, int, int]  # voxels of the median case at that spacing
    patch: list[int]
    batch_size: int
    strides: list[list[int]]  # of the levels below the first
    kernels: list[list[int]]  # of all levels
    base_features: int
    max_features: int
    memory: int  # the estimate that was held against the budget
    batch_dice: bool

    @property
    def anisotropic(self) -> bool:
        """Whether patches are so flat that they are only turned within their slices."""
        return self.dimensions == 3 and max(self.patch) / self.patch[self.axis] > ANISOTROPIC

    def arguments(self) -> dict[str, str | int]:
        """Of the network."""
        written = {k: " ".join(".".join(map(str, row)) for row in getattr(self, k)) for k in ("strides", "kernels")}
        return {
            "dimensions": self.dimensions,
            "base_features": self.base_features,
            "max_features": self.max_features,
            **written,
        }


class Plans(BaseModel):
    """All that follows from the fingerprint."""

    fingerprint: Fingerprint
    normalise: list[str]  # a channel: "ct" or "zscore"
    within_mask: bool  # statistics of "zscore" from voxels that are not 0 alone
    configurations: dict[str, Configuration]  # 2d, 3d_fullres, and 3d_lowres where the cascade is needed

    def save(self, path: str | Path) -> None:
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise PaperZooError(f"{path}: cannot be written ({error.strerror})") from None

    @classmethod
    def read(cls, path: str | Path) -> Plans:
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(path, f"cannot be read ({error.strerror})") from None
        except (ValidationError, UnicodeDecodeError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
            raise DataError(path, f"not plans of nnU-Net: {'.'.join(map(str, first['loc']))} {first['msg']}") from None

    def configuration(self, name: str) -> Configuration:
        if name not in self.configurations:
            whys = {
                "3d_lowres": "a patch covers at least a quarter of the median case: no cascade",
                "2d": "whole slices do not fit the memory budget",
            }
            why = f" ({whys[name]})" if name in whys else ""
            raise PaperZooError(
                f"configuration '{name}' is not planned for this set{why}; there are {', '.join(self.configurations)}"
            )
        return self.configurations[name]


# -- the fingerprint -----------------------------------------------------------------------------------------------------


def nonzero_box(image: Tensor) -> tuple[slice, slice, slice]:
    """Where any channel (C, X, Y, Z) is not 0; everything where all are 0."""
    there = ((image != 0) & ~image.isnan()).any(0)
    if not there.any():
        return tuple(slice(0, n) for n in there.shape)
    box = []
    for axis in range(3):
        inside = there.any(tuple(a for a in range(3) if a != axis)).nonzero()
        box.append(slice(int(inside[0]), int(inside[-1]) + 1))
    return tuple(box)


def cropped(volume: Volume) -> tuple[Volume, tuple[slice, slice, slice]]:
    """A volume without its empty border, and where it lay."""
    box = nonzero_box(volume.image)
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [s.start for s in box]
    mask = None if volume.mask is None else volume.mask[box]
    return Volume(volume.image[(slice(None), *box)], affine, mask, volume.name, volume.original), box


def fingerprint(volumes: Any, progress: bool = True) -> Fingerprint:
    """Look at every training case once."""
    from scipy.ndimage import label
    from tqdm import tqdm

    sizes, spacings, kept, taken = [], [], [], []
    pieces = dict.fromkeys(range(1, len(volumes.labels)), 0)  # the most of any case
    rows = tqdm(range(len(volumes)), desc="fingerprint", delay=1.0, leave=False, disable=None if progress else True)
    for i in rows:
        whole = volumes[i]
        volume, _ = cropped(whole)
        sizes.append(volume.size)
        spacings.append(volume.spacing)
        kept.append(math.prod(volume.size) / math.prod(whole.size))
        for k in pieces:
            if pieces[k] < 2 and (volume.mask == k).any():
                pieces[k] = max(pieces[k], int(label((volume.mask == k).numpy(), np.ones((3, 3, 3)))[1]))
        inside = volume.image[:, (volume.mask > 0) & (volume.mask != IGNORE)]
        taken.append(inside[:, :: max(1, inside.shape[1] // 10_000)])
    values = torch.cat(taken, 1).double().numpy()
    facts: dict[str, list[float]] = {"low": [], "high": [], "mean": [], "deviation": []}
    for channel in values:
        channel = channel[np.isfinite(channel)]
        channel = channel if channel.size else np.array([0.0, 1.0])
        low, high = np.percentile(channel, (0.5, 99.5))
        for key, value in zip(facts, (low, high, channel.mean(), max(float(channel.std()), 1e-8)), strict=True):
            facts[key].append(float(value))
    return Fingerprint(
        sizes=sizes,
        spacings=spacings,
        kept=float(np.median(kept)),
        labels=volumes.labels,
        channels=volumes.channels,
        connected=[k for k, n in pieces.items() if n == 1],
        intensity=facts,
    )


# -- rules ---------------------------------------------------------------------------------------------------------------


def target_spacing(
    spacings: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], thick: float = 10.0
) -> np.ndarray:
    """The median of each axis; along thick slices the `thick`-th percentile, but never finer than the other axes. 50 is the first paper's rule."""
    target, size = np.median(np.array(spacings, dtype=float), 0), np.median(np.array(sizes), 0)
    worst = int(target.argmax())
    others = [a for a in range(3) if a != worst]
    if target[worst] > ANISOTROPIC * target[others].max() and size[worst] * ANISOTROPIC < size[others].min():
        target[worst] = np.percentile(np.array(spacings)[:, worst], thick)
        if target[worst] < target[others].max():
            target[worst] = target[others].max() + 1e-5
    return target


def counts_of_halvings(size: Sequence[int], most: int) -> list[int]:
    """How often each axis can be halved until `SMALLEST_EDGE` voxels are left."""
    return [min(most, int(math.floor(math.log2(n / SMALLEST_EDGE)))) if n >= SMALLEST_EDGE else 0 for n in size]


def topology_3d(size: Sequence[int], spacing: Sequence[float], most: int) -> tuple[list[list[int]], list[list[int]]]:
    """Strides and kernels: axes with fewer halvings are halved late; as long as some axis is finer than half the coarsest, kernels are flat.

    An axis whose spacing reaches more than half of the largest one has kernels of 1 until all do (but then it is the *others* that are convolved).
    """
    counts = counts_of_halvings(size, most)
    levels, now, coarsest = max(counts), [float(s) for s in spacing], max(spacing)
    strides, kernels = [], []
    for level in range(levels):
        reached = [s / coarsest > 0.5 for s in now]
        kernels.append([3] * len(size) if all(reached) else [1 if r else 3 for r in reached])
        strides.append([2 if count + level >= levels else 1 for count in counts])
        now = [s * t for s, t in zip(now, strides[-1], strict=True)]
    return strides, [*kernels, [3] * len(size)]


def topology_2d(size: Sequence[int], spacing: Sequence[float], most: int) -> tuple[list[list[int]], list[list[int]]]:
    """Strides and kernels: at each level those axes are halved whose spacing is within a factor of 2 of the finest; kernels span axes alike in spacing."""
    count, edges, now = len(size), list(size), [float(s) for s in spacing]
    done = [0] * count
    strides, kernels = [], []
    while True:
        halved = [a for a in range(count) if now[a] / min(now) < 2 and edges[a] >= 2 * SMALLEST_EDGE and done[a] < most]
        if not halved:
            return strides, [*kernels, [3] * count]
        alike = max(([b for b in range(count) if 0.5 < now[b] / now[a] < 2] for a in range(count)), key=len)
        kernels.append([3 if a in alike else 1 for a in range(count)])
        strides.append([2 if a in halved else 1 for a in range(count)])
        for a in halved:
            now[a], edges[a], done[a] = 2 * now[a], math.ceil(edges[a] / 2), done[a] + 1


def fitting(size: Sequence[int], strides: Sequence[Sequence[int]]) -> list[int]:
    """The next larger size that all strides divide."""
    products = np.prod(np.array(strides, dtype=int), 0) if len(strides) else [1] * len(size)
    return [int(math.ceil(n / p) * p) for n, p in zip(size, products, strict=True)]


def memory(
    patch: Sequence[int],
    strides: Sequence[Sequence[int]],
    base: int,
    most: int,
    channels: int,
    classes: int,
    convolutions: int = 2,
) -> int:
    """Numbers in all maps of a sample: `convolutions` a level on each way and the transposed one, the input, the logits. Proportional to the memory of training."""
    edges, width = np.array(patch, dtype=np.int64), base
    per_level = 2 * convolutions + 1
    total = int(edges.prod()) * (per_level * base + channels + classes)
    for level, stride in enumerate(strides):
        edges = edges // np.array(stride)
        width = min(2 * width, most)
        blocks = per_level if level < len(strides) - 1 else convolutions
        total += blocks * int(edges.prod()) * width
    return total


def plan_3d(
    spacing: np.ndarray,
    median: np.ndarray,
    cases: int,
    channels: int,
    classes: int,
    budget: int,
    base: int,
    most_pools: int,
    start: str,
) -> dict[str, Any]:
    """Patch, batch and topology of a 3-D network; axes are in the rules' order. The largest patch that fits the budget at a batch of two.

    `start`: the patch begins as the median case ("median", the first paper) or as a cube in mm that is cut to it ("cube", later releases). Then
    the axis that covers most of its median loses a step, and the topology follows, until the estimate fits.
    """
    if start == "cube":
        edge = 1 / spacing
        patch = [int(min(n, m)) for n, m in zip(np.round(edge / edge.min() * 512).astype(int), median, strict=True)]
    else:
        patch = [int(n) for n in median]

    def shaped(size: Sequence[int]) -> tuple[list, list, list]:
        strides, kernels = topology_3d(size, spacing, most_pools)
        return strides, kernels, fitting(size, strides)

    strides, kernels, patch = shaped(patch)
    needed = memory(patch, strides, base, MOST_3D, channels, classes)
    while needed > budget:
        axis = int(np.argsort(np.array(patch) / median)[-1])
        smaller = list(patch)
        smaller[axis] -= int(np.prod([s[axis] for s in strides]))
        if smaller[axis] < SMALLEST_EDGE:
            raise PaperZooError(f"no patch fits a memory budget of {budget:,} numbers; give a larger one")
        step = int(np.prod([s[axis] for s in shaped(smaller)[0]]))
        patch[axis] -= step
        strides, kernels, patch = shaped(patch)
        needed = memory(patch, strides, base, MOST_3D, channels, classes)
    batch = int(max(budget / needed, 1) * BATCH_3D)
    largest = max(round(SHARE * float(median.prod()) * cases / math.prod(patch)), 2)
    return {
        "patch": patch,
        "batch_size": max(1, min(batch, largest)),
        "strides": strides,
        "kernels": kernels,
        "memory": needed,
    }


def plan_2d(
    spacing: np.ndarray,
    median: np.ndarray,
    cases: int,
    channels: int,
    classes: int,
    budget: int,
    base: int,
    most_pools: int,
    fits: int = BATCH_2D,
) -> dict[str, Any] | None:
    """Whole slices of the median case; the batch is what fits. None where two do not."""
    strides, kernels = topology_2d(median[1:], spacing[1:], most_pools)
    patch = fitting(median[1:], strides)
    needed = memory(patch, strides, base, MOST_2D, channels, classes)
    batch = int(budget / needed * fits)
    if batch < 2:
        return None
    largest = round(SHARE * float(median.prod()) * cases / math.prod(patch))
    return {
        "patch": patch,
        "batch_size": max(1, min(batch, largest)),
        "strides": strides,
        "kernels": kernels,
        "memory": needed,
    }


def make_plans(
    found: Fingerprint,
    memory_factor: float = 1.0,
    base_features: int = BASE_3D,
    thick: float = 10.0,
    start: str = "median",
    most_pools: tuple[int, int] = (6, 5),
) -> Plans:
    """The plans for a fingerprint.

    Args:
        memory_factor: of the budget of a 12 GB GPU.
        base_features: channels at full resolution (30).
        thick: percentile of the spacing along thick slices, see `target_spacing`.
        start: see `plan_3d`.
        most_pools: halvings at most, of 2-D and 3-D networks.
    """
    target = target_spacing(found.spacings, found.sizes, thick)
    single = [a for a in range(3) if max(n[a] for n in found.sizes) == 1]
    worst = single[0] if single else int(target.argmax())  # pictures of one slice: across it, whatever its thickness
    order = [worst, *(a for a in range(3) if a != worst)]
    scaled = np.array([np.array(s) / target * np.array(n) for s, n in zip(found.spacings, found.sizes, strict=True)])
    exact, spacing = np.median(scaled, 0)[order], target[order]
    cases, channels, classes = len(found.sizes), len(found.channels), len(found.labels)
    budget = int(BUDGET_3D * memory_factor)

    def in_3d(at: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
        median = np.round(spacing / at * exact).astype(int)
        median = np.maximum(median, 1)
        return plan_3d(at, median, cases, channels, classes, budget, base_features, most_pools[1], start), median

    full, median = in_3d(spacing)
    low = None
    if exact.prod() / math.prod(full["patch"]) >= SEEN:
        low = coarse(spacing, exact, full, in_3d)
        if low is not None and 2 * low[1].prod() >= median.prod():
            low = None
    planned = {"3d_fullres": (full, median, spacing)} | ({"3d_lowres": low} if low is not None else {})
    back = np.argsort(order)
    configurations: dict[str, Configuration] = {}
    flat = plan_2d(
        spacing, median, cases, channels, classes, int(BUDGET_2D * memory_factor), base_features, most_pools[0]
    )
    if flat is not None:
        configurations["2d"] = Configuration(
            dimensions=2,
            axis=worst,
            spacing=tuple(spacing[back]),
            median=tuple(median[back]),
            base_features=base_features,
            max_features=MOST_2D,
            batch_dice=True,
            **flat,
        )
    for name, (made, size, at) in planned.items():
        for key in ("strides", "kernels"):
            made[key] = [[row[a] for a in back] for row in made[key]]
        made["patch"] = [made["patch"][a] for a in back]
        configurations[name] = Configuration(
            dimensions=3,
            axis=worst,
            spacing=tuple(at[back]),
            median=tuple(size[back]),
            base_features=base_features,
            max_features=MOST_3D,
            batch_dice=low is not None,
            **made,
        )
    normalise = ["ct" if name.upper() == "CT" else "zscore" for name in found.channels]
    return Plans(fingerprint=found, normalise=normalise, within_mask=found.kept < 0.75, configurations=configurations)


def coarse(
    spacing: np.ndarray, exact: np.ndarray, full: dict[str, Any], in_3d: Any
) -> tuple[dict[str, Any], np.ndarray, np.ndarray] | None:
    """The first network of the cascade: the spacing grows by 1 % steps, the finest axes first, until a patch sees a quarter of the median case."""
    at, seen = spacing.copy(), math.prod(full["patch"])
    made = None
    while (spacing / at * exact).prod() > SEEN * seen:
        far = at.max() / at > 2
        at[far if far.any() else slice(None)] *= 1.01
        plan, median = in_3d(at)
        seen, made = math.prod(plan["patch"]), (plan, median, at.copy())
    return made
