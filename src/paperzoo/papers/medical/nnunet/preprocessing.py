"""Cropping, resampling and normalising as nnU-Net does it, and the way back from probabilities to a volume's own voxels.

Images are resampled by cubic splines, labels class by class linearly. Along thick slices (spacings apart by more than 3) both take the nearest
slice, within them they are treated as before: a spline across slices that lie far apart invents structures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paperzoo.data.volumes import IGNORE, Volume
from paperzoo.papers.medical.nnunet.planning import ANISOTROPIC, cropped
from paperzoo.tasks.volume_patches import Patches, Prepared, PreparedCases, rotation, size_at, smooth_field


def thick_axis(*spacings: Sequence[float]) -> int | None:
    """The axis to be resampled separately: that of the first spacing that is anisotropic, if it has one coarsest axis."""
    for spacing in spacings:
        if max(spacing) / min(spacing) > ANISOTROPIC:
            coarsest = [a for a, s in enumerate(spacing) if s == max(spacing)]
            return coarsest[0] if len(coarsest) == 1 else None
    return None


def resized(values: np.ndarray, size: Sequence[int], order: int) -> np.ndarray:
    """An array of two or three axes at another size, by splines; its ends stay where they are, beyond them the border continues.

    Splines overshoot: values stay within those of the array.
    """
    from scipy.ndimage import zoom

    if values.shape == tuple(size):
        return values
    factors = [n / m for n, m in zip(size, values.shape, strict=True)]
    return zoom(values, factors, order=order, mode="nearest", grid_mode=True).clip(values.min(), values.max())


def resampled(values: np.ndarray, size: Sequence[int], order: int, axis: int | None) -> np.ndarray:
    """One channel (X, Y, Z) at another size; across `axis` the nearest slice is taken."""
    size = tuple(int(n) for n in size)
    if axis is None:
        return resized(values, size, order)
    if values.shape[axis] != size[axis]:  # slices first: none is resampled that is not used
        at = np.floor((np.arange(size[axis]) + 0.5) * values.shape[axis] / size[axis]).astype(int)
        values = np.take(values, at.clip(0, values.shape[axis] - 1), axis)
    flat = tuple(n for a, n in enumerate(size) if a != axis)
    if flat == tuple(n for a, n in enumerate(values.shape) if a != axis):
        return values
    return np.stack([resized(part, flat, order) for part in np.moveaxis(values, axis, 0)], axis)


def resampled_labels(mask: np.ndarray, size: Sequence[int], axis: int | None) -> np.ndarray:
    """Class ids (X, Y, Z): each class linearly, taken where it is at least one half; later ids win where several are."""
    if mask.shape == tuple(size):
        return mask
    out = np.zeros(tuple(int(n) for n in size), mask.dtype)
    for label in np.unique(mask):
        out[resampled((mask == label).astype(np.float64), size, 1, axis) >= 0.5] = label
    return out


def normalised(image: Tensor, facts: dict[str, Any]) -> Tensor:
    """ "ct": clipped to the foreground's 0.5th and 99.5th percentile of the set, less its mean, over its deviation. "zscore": less the case's own mean,
    over its deviation; with `within_mask` both from voxels that are not 0 alone, and 0 elsewhere. A missing modality (NaN) becomes zeros."""
    out = torch.zeros_like(image)
    known = image.nan_to_num()
    there = (known != 0).any(0)
    for c, (how, channel) in enumerate(zip(facts["schemes"], known, strict=True)):
        if torch.isnan(image[c]).all():
            continue
        if how == "ct":
            low, high, mean, deviation = (facts["intensity"][key][c] for key in ("low", "high", "mean", "deviation"))
            out[c] = (channel.clamp(low, high) - mean) / deviation
            continue
        inside = there if facts["within_mask"] and there.any() else torch.ones_like(there)
        values = channel[inside].double()
        mean, deviation = float(values.mean()), max(float(values.std(correction=0)), 1e-8)
        out[c][inside] = (channel[inside] - mean) / deviation
    return out


def prepared(
    volume: Volume, facts: dict[str, Any]
) -> tuple[Prepared, tuple[slice, slice, slice], tuple[int, int, int]]:
    """A volume cropped, at the planned spacing, normalised; where the crop lay, and how large it was before."""
    part, box = cropped(volume)
    wanted = facts["spacing"]
    size = size_at(part.size, part.spacing, wanted)
    if all(abs(s - w) < 0.01 * w for s, w in zip(part.spacing, wanted, strict=True)):
        size = part.size
    axis = thick_axis(part.spacing, wanted)
    image = torch.from_numpy(np.stack([resampled(c.nan_to_num().numpy(), size, 3, axis) for c in part.image]))
    for c, channel in enumerate(part.image):
        if torch.isnan(channel).all():
            image[c] = torch.nan
    if facts["within_mask"]:  # splines ring at the edge of the mask: what was 0 stays 0
        outside = torch.from_numpy(
            resampled_labels((part.image.nan_to_num() == 0).all(0).numpy().astype(np.uint8), size, axis) > 0
        )
        image[:, outside] = 0
    mask = None if part.mask is None else torch.from_numpy(resampled_labels(part.mask.numpy(), size, axis))
    spacing = tuple(n * s / m for n, s, m in zip(part.size, part.spacing, size, strict=True))
    return Prepared(normalised(image, facts), mask, spacing), box, part.size


class PlannedCases(PreparedCases):
    """The training cases, prepared; `coarse` gives the one-hot answer of the cascade's first network, if there is one."""

    def __init__(self, volumes: Any, facts: dict, cache: float, coarse: Any = None) -> None:
        super().__init__(volumes, facts, cache)
        self.coarse = coarse

    def prepare(self, i: int) -> Prepared:
        volume = self.volumes[i]
        case = prepared(volume, self.facts)[0]
        return (
            case
            if self.coarse is None
            else Prepared(torch.cat([case.image, self.coarse(volume, case)]), case.mask, case.spacing)
        )

    def __getitem__(self, i: int) -> Prepared:
        if i not in self.kept:
            case = self.prepare(i)
            seeds = foreground_seeds(case.mask)
            self.kept[i] = Prepared(case.image, case.mask, case.spacing, seeds)
            while len(self.kept) > 1 and sum(c.image.nbytes + c.mask.nbytes for c in self.kept.values()) > self.room:
                self.kept.popitem(last=False)
        self.kept.move_to_end(i)
        return self.kept[i]


def foreground_seeds(mask: Tensor, most: int = 2000) -> tuple[Tensor, ...]:
    """Of every class but the background some voxels, (N, 3)."""
    every = torch.nonzero((mask > 0) & (mask != IGNORE))
    labels = mask[tuple(every.T)]
    found = []
    for label in labels.unique().tolist():
        mine = every[labels == label]
        found.append(mine[:: max(1, len(mine) // most)])
    return tuple(found)


class PlannedPatches(Patches):
    """The task's patches with nnU-Net's further changes: gamma, and turns that stay within the slices of flat patches.

    Args:
        flat: the axis about which alone patches are turned, or None.
        images: channels that are images; those behind them, of the cascade, keep their values.
    """

    def __init__(self, cases: PreparedCases, window: Sequence[int], config: Any, flat: int | None, images: int) -> None:
        super().__init__(cases, window, config)
        self.flat, self.images = flat, images

    def field(self, spacing: Sequence[float]) -> Tensor:
        if self.flat is None:
            return super().field(spacing)
        c, window = self.config, self.window
        lines = [(torch.arange(n) - (n - 1) / 2) * s for n, s in zip(window, spacing, strict=True)]
        places = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)
        turn = rotation(self.flat, np.radians(c.rotate) * (2 * float(torch.rand(())) - 1))
        scale = torch.full((3,), 1 / float(torch.empty(()).uniform_(*c.scale)))
        scale[self.flat] = 1.0
        places = places @ turn.T * scale
        if c.elastic:
            bend = torch.randn(1, 3, *(1 if a == self.flat else c.elastic_grid for a in range(3))) * c.elastic
            bend[:, self.flat] = 0
            places = places + smooth_field(bend, window)[0].movedim(0, -1)
        return places / torch.tensor(spacing, dtype=torch.float32)

    def intensities(self, image: Tensor) -> Tensor:
        """Gamma with an exponent from `gamma`, on the patch's own range, which keeps its mean and deviation; then the task's changes."""
        if self.images < len(image):
            return torch.cat([self.intensities(image[: self.images]), image[self.images :]])
        low, high = self.config.gamma
        if (low, high) != (1.0, 1.0) and float(torch.rand(())) < self.config.gamma_share:
            for c, channel in enumerate(image):
                exponent = float(torch.empty(()).uniform_(low, high))
                span = (channel.max() - channel.min()).clamp(min=1e-7)
                bent = ((channel - channel.min()) / span) ** exponent
                image[c] = (bent - bent.mean()) / bent.std().clamp(min=1e-7) * channel.std() + channel.mean()
        return super().intensities(image)


def on_own_voxels(
    probabilities: Tensor, volume: Volume, box: Sequence[slice], size: Sequence[int], axis: int | None
) -> Tensor:
    """Probabilities of a prepared volume (K, x, y, z), resampled linearly to the crop and laid into the volume: (K, X, Y, Z); outside it is background."""
    out = torch.zeros(len(probabilities), *volume.size)
    out[0] = 1
    for k, channel in enumerate(probabilities):
        out[(k, *box)] = torch.from_numpy(resampled(channel.numpy(), size, 1, axis)).float()
    return out
