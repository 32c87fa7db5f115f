"""Segmentation of volumes: one class for every voxel of a CT, an MRI, or whatever else is measured on a grid with a spacing in mm.

A batch is (images, masks): float32 (B, C, *window), at the set's voxel spacing and on its scale of intensities (both in `facts`), a channel a
modality; int64 (B, *window), class ids in 0 … num_classes - 1, the background first, and 255 where nothing counts. With `dimensions` 3 a window
has three extents, right, front, top; with 2 it has two, and windows are cut from the slices of one plane: such networks see a volume slice by slice.

A network maps images to logits (B, num_classes, *window). It takes `num_classes`, `in_channels` and what `model_arguments` says. In training it may
return {"out": logits, "aux": [logits, …]}; auxiliary logits may be coarser and are then compared with the mask at their own size. Volumes are
segmented by overlapping windows of the training size, so a network need accept no other size, and a volume may be larger than memory.

What a user gives may have any size, spacing and orientation (`paperzoo.data.volumes.read_volume`); a prediction is a `VolumeSegmentation` on the voxels that were given.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from paperzoo.blocks.tiling import tiled
from paperzoo.data.volumes import IN_MEMORY, Volume, from_ras, open_volumes, orientation, read_volume, write_volume
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.tasks import volume_metrics as measure
from paperzoo.tasks.training import learning_rate_factor, make_optimizer
from paperzoo.tasks.volume_patches import (
    SLAB,
    Patches,
    PreparedCases,
    intensity_statistics,
    prepare,
    slab,
)
from paperzoo.tasks.volume_pictures import PLANES, focus, three_planes

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Triple = tuple[Positive, Positive, Positive]


@dataclass(frozen=True)
class VolumeSegmentation:
    """The answer for one volume, on its own voxels.

    mask: uint8 (X, Y, Z), class ids; axes run right, front, top. confidence: float16 (X, Y, Z) in [0, 1], the probability of the class given.
    volumes_ml: the volume of every class that appears but the background, millilitres, largest first.
    spacing: mm along the three axes. stored_as: the orientation of the file, for example "LPS". affine: of the file's voxels, (4, 4), to mm.
    """

    mask: Tensor = field(repr=False)
    confidence: Tensor = field(repr=False)
    volumes_ml: dict[str, float]
    spacing: tuple[float, float, float]
    stored_as: str
    affine: np.ndarray = field(repr=False)

    def save(self, path: str | Path) -> Path:
        """Write the mask as NIfTI (or .npz), turned back to the voxels of the input file and with its affine."""
        path = Path(path)
        write_volume(path, np.ascontiguousarray(from_ras(self.mask.numpy(), self.affine)), self.affine)
        return path


@dataclass(frozen=True)
class Config:
    """The default recipe: patches, soft Dice and cross-entropy, Adam, overlapping windows."""

    model: str = "vnet"
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)
    data: str = "organs"
    missing: Literal["refuse", "zero"] = "refuse"  # a case that lacks a modality
    dimensions: Literal[2, 3] = 3
    plane: Literal["axial", "coronal", "sagittal"] = "axial"  # of the slices that 2-D networks see
    window: tuple[Count, ...] = (64, 64, 64)  # voxels of a patch, one number an axis that the network sees
    spacing: Triple | None = None  # mm, to which volumes are resampled; None: the median of the training set
    normalise: Literal["auto", "ct", "zscore", "none"] = "auto"  # auto: ct where every channel is named so
    foreground: Fraction = 1 / 3  # of the patches are centred on a structure
    flip: tuple[Literal["x", "y", "z"], ...] = ()  # axes along which patches are mirrored at random
    rotate: NotNegative = 0.0  # degrees, at most, about each axis
    scale: tuple[Positive, Positive] = (1.0, 1.0)
    elastic: NotNegative = 0.0  # mm, standard deviation of the displacement of control points
    elastic_grid: Annotated[int, Field(ge=2)] = 4  # control points an axis
    gain: NotNegative = 0.0  # intensities times 1 +- gain
    shift: NotNegative = 0.0  # and plus +- shift, in deviations
    noise: NotNegative = 0.0  # standard deviation
    loss: Literal["dice", "cross_entropy", "dice_cross_entropy"] = "dice_cross_entropy"
    dice_squares: bool = True  # squares in the denominator, as V-Net has it
    batch_dice: bool = False  # one Dice coefficient for the whole batch, in place of one a sample
    aux_weights: tuple[NotNegative, ...] = (0.5,)  # of auxiliary outputs; the last is used for all further ones
    weights: str | None = None  # start from these weights, of the same classes
    steps: Count = 10_000
    batch_size: Count = 2
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: Positive = 1e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    weight_decay: NotNegative = 0.0
    decay_all: bool = True
    schedule: Literal["constant", "cosine", "step", "poly"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    milestones: tuple[Fraction, ...] = (0.5, 0.75)  # of the steps, for "step"
    gamma: Positive = 0.1
    power: Positive = 0.9  # for "poly"
    ema: Annotated[float, Field(ge=0, lt=1)] | None = None
    clip: Positive | None = None
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5  # of windows in evaluation and prediction
    blend: Literal["gaussian", "constant"] = "gaussian"
    windows: Count = 4  # that the network sees at once then
    cache: NotNegative = 4.0  # GiB of prepared training cases that are kept, in each process
    workers: Annotated[int, Field(ge=0)] = 0


class VolumeSegmentationRecipe(Recipe):
    """The task's default recipe. Papers that differ override `loss`, `logits`, `patches` or `build`."""

    config: Config
    monitor = ("dice", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if len(config.window) != config.dimensions:
            raise PaperZooError(
                f"window is {config.window}: it has {len(config.window)} extents, dimensions is {config.dimensions}"
            )
        if config.scale[0] > config.scale[1]:
            raise PaperZooError(f"scale is {config.scale}; the smaller factor comes first")
        if not self.facts:
            self.facts = self.learned_facts()
        self.model = runtime.place(self.build())
        self.average = running_average(self.model, config.ema)
        self.optimizer = make_optimizer(config, self.model)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)

    def learned_facts(self) -> dict[str, Any]:
        """What preparing a volume needs: class names, modalities, spacing, the rule and the statistics of intensities."""
        volumes, config = self.train_set, self.config
        rule = config.normalise
        if rule == "auto":
            rule = "ct" if all(name.upper() == "CT" for name in volumes.channels) else "zscore"
        spacing = config.spacing or np.median([volumes.spacing(i) for i in range(len(volumes))], axis=0)
        return {
            "labels": list(volumes.labels),
            "channels": list(volumes.channels),
            "spacing": [float(s) for s in spacing],
            "normalise": rule,
            "intensity": intensity_statistics(volumes) if rule == "ct" else {},
        }

    def build(self) -> nn.Module:
        given = dict(self.config.model_arguments)
        for name in ("num_classes", "in_channels"):
            if name in given:
                raise PaperZooError(f"model_arguments: {name} is not chosen; it follows from the data")
        sizes = {"num_classes": len(self.facts["labels"]), "in_channels": len(self.facts["channels"])}
        return create(self.config.model, weights=self.config.weights, **sizes, **given)

    def rate(self, step: int) -> float:
        config = self.config
        if config.schedule == "poly" and step >= config.warmup_steps:
            return (1 - min(1.0, step / config.steps)) ** config.power
        return learning_rate_factor(config, step)

    # -- data ------------------------------------------------------------------------------------------------------------

    @cached_property
    def train_set(self):
        return open_volumes(self.config.data, "train", self.config.missing)

    @cached_property
    def test_set(self):
        return open_volumes(self.config.data, "test", self.config.missing)

    @property
    def axis(self) -> int:
        """Across which 2-D networks see slices."""
        return PLANES.index(self.config.plane)

    @cached_property
    def patches(self) -> Patches:
        window = list(self.config.window)
        if self.config.dimensions == 2:
            window.insert(self.axis, 1)
        return Patches(PreparedCases(self.train_set, self.facts, self.config.cache), window, self.config)

    @cached_property
    def batches(self):
        return self.runtime.batches(self.patches, self.config.batch_size, workers=self.config.workers)

    def batch(self) -> tuple[Tensor, Tensor]:
        images, masks = self.batches.next()
        if self.config.dimensions == 2:
            return images.squeeze(2 + self.axis), masks.squeeze(1 + self.axis)
        return images, masks

    # -- learning --------------------------------------------------------------------------------------------------------

    def loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """1 - soft Dice, averaged over structures and samples; cross-entropy, averaged over the voxels that count; or their sum.

        Of voxels that do not count nothing is learned; where none does, the loss is 0.
        """
        config, logits = self.config, logits.float()
        loss = logits.sum() * 0
        if config.loss != "cross_entropy":
            above, below = measure.soft_dice(logits.softmax(1), masks, config.dice_squares)
            if config.batch_dice:
                above, below = (self.runtime.gather(part).sum(0) for part in (above, below))
            loss = loss + (1 - above / below).mean()
        if config.loss != "dice":
            counted = self.runtime.mean((masks != measure.IGNORE).sum().float()).clamp(min=1)
            loss = loss + F.cross_entropy(logits, masks, ignore_index=measure.IGNORE, reduction="sum") / counted
        return loss

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        images, masks = batch
        self.model.train()
        output = self.model(images)
        if not isinstance(output, dict):
            return {"loss": self.loss(output, masks)}
        loss = self.loss(output["out"], masks)
        logged = {"out_loss": loss.detach()}
        for i, logits in enumerate(output.get("aux", [])):
            weight = self.config.aux_weights[min(i, len(self.config.aux_weights) - 1)]
            loss = loss + weight * self.loss(logits, coarser(masks, logits.shape[2:]))
        return {"loss": loss, **logged}

    # -- whole volumes ---------------------------------------------------------------------------------------------------

    def logits(self, image: Tensor) -> Tensor:
        """A prepared volume (C, X, Y, Z) -> logits (K, X, Y, Z) on the CPU, by overlapping windows; slice by slice for 2-D networks."""
        config, network = self.config, self.deployed.eval()
        flat = config.dimensions == 2
        inputs = image.movedim(1 + self.axis, 0) if flat else image[None]
        values = image[0].numel() * (len(self.facts["labels"]) + 1) * 4
        with tempfile.TemporaryDirectory() as folder:
            out = tiled(
                network,
                inputs,
                config.window,
                config.overlap,
                config.windows,
                config.blend,
                progress=True,
                device=self.runtime.device,
                accumulate_on="cpu",
                memory_map=Path(folder) / "logits" if values > IN_MEMORY else None,
            )
        return out.movedim(0, 1 + self.axis) if flat else out[0]

    @torch.inference_mode()
    def segment(self, volume: Volume) -> tuple[Tensor, Tensor]:
        """A volume as it was given -> mask uint8 and confidence float16, both (X, Y, Z) on its own voxels.

        Logits, not classes, are resampled to the volume's spacing.
        """
        channels = self.facts["channels"]
        if len(volume.image) != len(channels):
            raise PaperZooError(
                f"{volume}: has {len(volume.image)} channel(s), the network needs {len(channels)} ({', '.join(channels)}); "
                "give a list with a file each, None for one that is missing"
            )
        logits = self.logits(prepare(volume, self.facts).image)
        mask = torch.empty(volume.size, dtype=torch.uint8)
        confidence = torch.empty(volume.size, dtype=torch.float16)
        for first in range(0, volume.size[2], SLAB):
            last = min(volume.size[2], first + SLAB)
            best = slab(logits, volume.size, first, last).softmax(0).max(0)
            mask[..., first:last], confidence[..., first:last] = best.indices, best.values
        return mask, confidence

    @torch.inference_mode()
    def table(self, split: str = "test") -> Tensor:
        """Of every case and class: voxels in both, predicted, true; HD95 and average surface distance, mm: float64 (N, K, 5), NaN without surfaces.

        Measured on each case's own voxels. A structure that is on one side only has the volume's diagonal as its distances.
        """
        volumes = self.test_set if split == "test" else self.train_set
        classes = len(self.facts["labels"])
        rows = torch.zeros(len(volumes), classes, 5, dtype=torch.float64)
        for i, volume in self.runtime.loader(Numbered(volumes), 1, self.config.workers, collate=lambda items: items[0]):
            mask, _ = self.segment(volume)
            rows[i, :, :3] = measure.overlap_counts(mask, volume.mask, classes)
            rows[i, :, 3:] = torch.nan
            counted = (volume.mask != measure.IGNORE).numpy()
            for k in range(1, classes):
                found, true = (mask == k).numpy() & counted, (volume.mask == k).numpy()
                distances = measure.surface_distances(found, true, volume.spacing)
                if distances is not None:
                    rows[i, k, 3] = measure.hausdorff_95(distances)
                    rows[i, k, 4] = measure.average_surface_distance(distances)
                elif found.any() or true.any():
                    rows[i, k, 3:] = measure.diagonal(volume.size, volume.spacing)
        rows = self.runtime.mean(rows) * self.runtime.world  # every rank filled its own rows
        rows[rows[:, :, :3].sum((1, 2)) == 0, :, 3:] = torch.nan  # cases that could not be read
        return rows

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """Dice (mean over structures of the mean over cases), of all cases pooled, and of each structure; HD95 and average surface distance.

        A structure that is neither there nor predicted in a case does not enter the means.
        """
        return metrics(self.table(split), self.facts["labels"])

    # -- use -------------------------------------------------------------------------------------------------------------

    def predict(self, inputs: list) -> list[VolumeSegmentation]:
        """Paths, lists of paths (one a modality, None for one that is missing), arrays or `Volume`s to masks on their own voxels."""
        results = []
        for value in inputs:
            volume = read_volume(value)
            mask, confidence = self.segment(volume)
            results.append(self.answer(volume, mask, confidence))
        return results

    def answer(self, volume: Volume, mask: Tensor, confidence: Tensor) -> VolumeSegmentation:
        labels = self.facts["labels"]
        voxel = float(np.prod(volume.spacing)) / 1000
        counts = torch.bincount(mask.flatten(), minlength=len(labels)).tolist()
        sizes = sorted(((n * voxel, k) for k, n in enumerate(counts) if n and k), reverse=True)
        original = volume.affine if volume.original is None else volume.original
        found = {labels[k]: round(size, 3) for size, k in sizes}
        return VolumeSegmentation(mask, confidence, found, volume.spacing, orientation(original), original)

    def samples(self, folder: Path) -> list[str]:
        """Four held-out volumes as files in the orientation that they are stored in: NIfTI, or .npz where nibabel is not installed."""
        import importlib.util

        ending = ".nii.gz" if importlib.util.find_spec("nibabel") else ".npz"
        paths = []
        for i in range(min(4, len(self.test_set))):
            volume = self.test_set[i]
            original = volume.affine if volume.original is None else volume.original
            path = folder / f"{volume.name or i}{ending}"
            image = from_ras(volume.image.numpy(), original)
            write_volume(path, image[0] if len(image) == 1 else image, original)
            paths.append(str(path))
        return paths

    def example(self) -> tuple[Tensor]:
        shape = (2, len(self.facts["channels"]), *self.config.window)
        return (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)

    def same_answers(self, expected: Tensor, found: Tensor) -> Tensor:
        """The most likely class of each voxel."""
        return expected.argmax(1) == found.argmax(1)

    def draw(self, value: Any, result: VolumeSegmentation) -> Image.Image:
        volume = read_volume(value)
        return three_planes(volume.image, result.mask, volume.spacing, self.facts["labels"])

    def figures(self) -> dict[str, Image.Image]:
        """Held-out volumes (image, truth, answer) through the three planes, and the Dice coefficient of every structure."""
        from paperzoo.engine.pictures import new_figure, tile, to_picture

        labels, pictures = self.facts["labels"], []
        for i in range(min(3, len(self.test_set))):
            volume = self.test_set[i]
            mask, _ = self.segment(volume)
            at = focus(volume.mask, volume.size)
            for title, shown in (("image", None), ("truth", volume.mask), ("answer", mask)):
                pictures.append(three_planes(volume.image, shown, volume.spacing, labels, at, title))
        cases = measure.dice_of(self.table()[:, 1:, :3])
        figure, axes = new_figure(5, 1.2 + 0.3 * len(labels))
        for k, values in enumerate(cases.T):
            kept = values[~values.isnan()].tolist()
            axes.scatter(kept, [k] * len(kept), s=14, alpha=0.7)
        axes.set_yticks(range(len(labels) - 1), labels[1:])
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("Dice, a point a case")
        return {"Held-out volumes": tile(pictures, 3), "Dice of each structure": to_picture(figure)}


class Numbered(torch.utils.data.Dataset):
    """The items of a set with their numbers."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def path(self, i: int) -> str:
        return self.data.path(i)

    def __getitem__(self, i: int) -> tuple[int, Volume]:
        return i, self.data[i]


def coarser(masks: Tensor, size: tuple[int, ...]) -> Tensor:
    """Class ids (B, *window) at the nearest voxel of a coarser grid; as they are where the sizes agree."""
    if masks.shape[1:] == size:
        return masks
    return F.interpolate(masks[:, None].float(), size=tuple(size), mode="nearest-exact")[:, 0].long()


def metrics(table: Tensor, labels: list[str]) -> dict[str, float]:
    """From `VolumeSegmentationRecipe.table` to numbers. Where no case has any structure and none was predicted, Dice is 1 and distances 0."""
    cases = measure.dice_of(table[:, 1:, :3])  # (N, K - 1)
    pooled = measure.dice_of(table[:, 1:, :3].sum(0))
    by_class = cases.nanmean(0)
    one_sided = (table[:, 1:, 1] > 0) != (table[:, 1:, 2] > 0)
    result = {
        "dice": float(by_class.nanmean().nan_to_num(1.0)),
        "dice_pooled": float(pooled.nanmean().nan_to_num(1.0)),
        "hd95_mm": float(table[:, 1:, 3].nanmean(0).nanmean().nan_to_num(0.0)),
        "surface_distance_mm": float(table[:, 1:, 4].nanmean(0).nanmean().nan_to_num(0.0)),
        "missed_or_invented": float(one_sided.sum()),  # structures that are on one side only
    }
    if len(labels) > 2:
        named = zip(labels[1:], by_class.tolist(), strict=True)
        result |= {f"dice_{name.replace(' ', '_')}": value for name, value in named if value == value}
    return result
