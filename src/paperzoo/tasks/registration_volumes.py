"""From pairs of volumes to what registration networks are fed with, and from their answers back to the volumes.

Both volumes are read on one grid in mm, which has the directions of the fixed one and lies in its middle.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.data.registration_pairs import Pair
from paperzoo.data.volumes import IGNORE, Volume, read_volume
from paperzoo.errors import PaperZooError
from paperzoo.tasks import registration_measures as measure
from paperzoo.tasks import volume_metrics

BETWEEN = " :: "  # "moving.nii.gz :: fixed.nii.gz"


@dataclass(frozen=True)
class PreparedPair:
    """On the network's grid: float32 (C, *size) in [0, 1]; uint8 (*size), 255 where nothing is known; the grid's affine, (4, 4)."""

    moving: Tensor
    fixed: Tensor
    moving_mask: Tensor
    fixed_mask: Tensor
    affine: np.ndarray


class PreparedPairs(Dataset):
    """Batches' items of a set of pairs; the latest `cache` GiB of them are kept."""

    def __init__(self, pairs: Any, config: Any, facts: dict) -> None:
        self.pairs, self.config, self.facts = pairs, config, facts
        self.kept: OrderedDict[int, PreparedPair] = OrderedDict()
        self.taken = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def path(self, i: int) -> str:
        return self.pairs.path(i)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if i not in self.kept:
            ready = prepare(aligned(self.pairs[i], self.config), self.config, self.facts)
            self.kept[i] = ready
            self.taken += ready.moving.nbytes * 2 + ready.moving_mask.nbytes * 2
            while len(self.kept) > 1 and self.taken > self.config.cache * 2**30:
                old = self.kept.popitem(last=False)[1]
                self.taken -= old.moving.nbytes * 2 + old.moving_mask.nbytes * 2
        self.kept.move_to_end(i)
        ready = self.kept[i]
        return ready.moving, ready.fixed, ready.moving_mask.long(), ready.fixed_mask.long()


def thin_axis(volume: Volume) -> int:
    """The axis of a single slice.

    Raises:
        PaperZooError: if a volume has more than one, as 2-D networks register pictures.
    """
    if 1 not in volume.size:
        raise PaperZooError(
            f"{volume}: is {' x '.join(map(str, volume.size))} voxels; with dimensions 2 a volume has one slice"
        )
    return volume.size.index(1)


def prepare(pair: Pair, config: Any, facts: dict) -> PreparedPair:
    """Both volumes on the network's grid, which has the directions of the fixed one and lies in its middle."""
    fixed, size, spacing = pair.fixed, list(config.size), list(facts["spacing"])
    if config.dimensions == 2:
        thin = thin_axis(fixed)
        thin_axis(pair.moving)
        size.insert(thin, 1)
    directions = fixed.affine[:3, :3] / np.linalg.norm(fixed.affine[:3, :3], axis=0)
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing
    affine[:3, 3] = middle(fixed) - affine[:3, :3] @ ((np.array(size) - 1) / 2)
    images, masks = [], []
    for volume in (pair.moving, fixed):
        at = measure.places((measure.inverse(volume.affine) @ torch.as_tensor(affine)).float(), size)
        image = measure.read_at(scaled(volume.image, config.intensity_range), at)
        mask = torch.full(tuple(size), IGNORE, dtype=torch.uint8)
        if volume.mask is not None:
            mask = measure.read_at(volume.mask[None].float(), at, "nearest")[0].to(torch.uint8)
        images.append(image.squeeze(1 + thin) if config.dimensions == 2 else image)
        masks.append(mask.squeeze(thin) if config.dimensions == 2 else mask)
    return PreparedPair(images[0], images[1], masks[0], masks[1], affine)


def middle(volume: Volume) -> np.ndarray:
    """Of a volume, mm."""
    return volume.affine[:3, :3] @ ((np.array(volume.size) - 1) / 2) + volume.affine[:3, 3]


def shifted(volume: Volume, by: Any) -> Volume:
    affine = volume.affine.copy()
    affine[:3, 3] += np.asarray(by)
    return replace(volume, affine=affine)


def aligned(pair: Pair, config: Any) -> Pair:
    """The pair, its moving volume shifted so that the middles agree where `align` is "centre"; a picture is always brought to the fixed one's height.

    A shift takes the known map away, as it is one in the scanner's coordinates.
    """
    away = middle(pair.fixed) - middle(pair.moving)
    if config.dimensions == 2:
        thin_axis(pair.moving)
        across = pair.fixed.affine[:3, thin_axis(pair.fixed)]
        across = across / np.linalg.norm(across)
        if config.align == "none":
            away = across * (across @ away)
    elif config.align == "none":
        return pair
    return replace(pair, moving=shifted(pair.moving, away), field=pair.field if np.abs(away).max() < 1e-6 else None)


def scaled(image: Tensor, span: tuple[float, float] | None) -> Tensor:
    """(C, X, Y, Z) in [0, 1]; a modality that is missing (NaN) or constant becomes zeros."""
    out = torch.zeros(image.shape)
    for c, channel in enumerate(image):
        some = channel.flatten()[:: max(1, channel.numel() // 100_000)]
        some = some[some.isfinite()]
        if not len(some):
            continue
        low, high = span if span is not None else np.percentile(some.numpy(), (0.5, 99.5))
        if high > low:
            out[c] = ((channel.nan_to_num(float(low)) - float(low)) / float(high - low)).clamp(0, 1)
    return out


def moving_indices(found: Tensor, fixed: np.ndarray, moving: np.ndarray) -> Tensor:
    """Where each voxel of the fixed grid is read in the moving volume, in its indices: (3, X, Y, Z). Affines are of the two volumes; the field is in mm."""
    to_moving = measure.inverse(moving)
    directions = torch.as_tensor(fixed[:3, :3] / np.linalg.norm(fixed[:3, :3], axis=0))
    at = measure.places((to_moving @ torch.as_tensor(fixed)).float(), found.shape[1:])
    return at + torch.einsum("ij,jxyz->ixyz", (to_moving[:3, :3] @ directions).float(), found)


def hausdorff(mask: Tensor, truth: Tensor, spacing: Any, classes: int) -> list[float]:
    """HD95 of each class, mm; NaN for the background and for what is on neither side, the volume's diagonal for what is on one."""
    values, counted = [float("nan")], (truth != IGNORE).numpy()
    for k in range(1, classes):
        a, b = (mask == k).numpy() & counted, (truth == k).numpy()
        distances = volume_metrics.surface_distances(a, b, spacing)
        alone = volume_metrics.diagonal(mask.shape, spacing) if a.any() or b.any() else float("nan")
        values.append(alone if distances is None else volume_metrics.hausdorff_95(distances))
    return values


def as_pair(value: Any) -> Pair:
    """Whatever a user may call a pair.

    Raises:
        PaperZooError: for anything else. DataError: from reading.
    """
    if isinstance(value, Pair):
        return value
    if isinstance(value, str) and BETWEEN.strip() in value:
        value = [part.strip() for part in value.split(BETWEEN.strip())]
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise PaperZooError(
            f"a pair is (moving, fixed), or text 'moving.nii.gz{BETWEEN}fixed.nii.gz', not {str(value)[:80]!r}"
        )
    moving, fixed = (read_volume(v) for v in value)
    return Pair(moving, fixed, f"{moving} to {fixed}")
