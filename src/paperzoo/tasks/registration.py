"""Deformable registration: a map that lays a moving image over a fixed one, in three dimensions or two.

A batch is (moving, fixed, moving_mask, fixed_mask): float32 (B, C, *size) twice, in [0, 1], on one grid in mm that lies in the middle of the fixed volume
(`spacing` in `facts`; `size` of the config), and int64 (B, *size) twice, class ids, the background 0, and 255 where nothing is known. With `dimensions` 3
a size has three extents, right, front, top; with 2 it has two, and volumes are pictures of one slice.

A network maps (moving, fixed) to a displacement (B, D, *size) in voxels: voxel x of the fixed image shows what lies at x + u(x) of the moving one. It takes
`in_channels` (of one image), `dimensions` and what `model_arguments` says. In training it may return {"displacement": u, "regularised": v}, where v is the
field that has to be smooth, a velocity for example.

What a user gives are two volumes of any size, spacing and orientation that share the coordinates of their scanner (`paperzoo.data.volumes.read_volume`), or,
with `align` "centre", their middle. A prediction is a `Registration` on the voxels of the fixed volume, in mm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from paperzoo.data.registration_pairs import Pair, open_pairs
from paperzoo.data.volumes import IGNORE, from_ras, orientation, read_volume, write_volume
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.tasks import registration_measures as measure
from paperzoo.tasks import volume_metrics
from paperzoo.tasks.registration_pictures import sheet
from paperzoo.tasks.registration_volumes import (
    BETWEEN,
    PreparedPairs,
    aligned,
    as_pair,
    hausdorff,
    moving_indices,
    prepare,
    shifted,
    thin_axis,
)
from paperzoo.tasks.training import learning_rate_factor, make_optimizer
from paperzoo.tasks.volume_segmentation import Count, Fraction, NotNegative, Numbered, Positive, Triple


@dataclass(frozen=True)
class Registration:
    """The answer for one pair, on the voxels of the fixed volume.

    displacement: float32 (3, X, Y, Z), mm along the axes of the fixed volume (right, front, top), from a voxel to where its anatomy lies in the moving one.
    warped: float32 (C, X, Y, Z), the moving volume laid over the fixed one, with its own intensities.
    mean_mm, largest_mm: length of the displacements. folds_percent: voxels where the map folds (Jacobian determinant 0 or below).
    correlation_before, correlation_after: of the two volumes, before and after.
    spacing: mm. stored_as: the orientation of the fixed file. affine: of its voxels, (4, 4), to mm.
    """

    displacement: Tensor = field(repr=False)
    warped: Tensor = field(repr=False)
    mean_mm: float
    largest_mm: float
    folds_percent: float
    correlation_before: float
    correlation_after: float
    spacing: tuple[float, float, float]
    stored_as: str
    affine: np.ndarray = field(repr=False)
    turned: np.ndarray = field(repr=False)  # the affine of `displacement` and `warped`
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)  # mm by which the moving volume was moved first

    def warp(self, value: Any, labels: bool = False) -> Tensor:
        """Another volume that lies where the moving one does, a mask for example, laid over the fixed one: (C, X, Y, Z); nearest voxels for `labels`."""
        volume = shifted(read_volume(value), self.shift)
        at = moving_indices(self.displacement, self.turned, volume.affine)
        return measure.read_at(volume.image, at, "nearest" if labels else "bilinear")

    def save(self, path: str | Path) -> Path:
        """Write the warped volume as NIfTI (or .npz) on the voxels of the fixed file; beside it, `…_field`, the displacements, mm, as a fourth axis."""
        path = Path(path)
        ending = next((e for e in (".nii.gz", ".nii", ".npz") if path.name.endswith(e)), path.suffix)
        beside = path.with_name(path.name.removesuffix(ending) + "_field" + ending)
        for name, values in ((path, self.warped), (beside, self.displacement)):
            stored = np.ascontiguousarray(from_ras(values.numpy(), self.affine))
            write_volume(name, stored[0] if len(stored) == 1 else stored, self.affine)
        return path


@dataclass(frozen=True)
class Config:
    """The default recipe: similarity of the fixed and the warped image, smoothness of the map, Adam."""

    model: str = "voxelmorph_2"
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)
    data: str = "bodies"
    atlas: str | None = None  # of sets of single volumes: a case's name or a file, to which all are registered
    dimensions: Literal[2, 3] = 3
    size: tuple[Count, ...] = (32, 32, 32)  # voxels of the grid on which the network works
    spacing: Triple | None = None  # mm of that grid; None: the median of the training set
    align: Literal["none", "centre"] = (
        "none"  # where the scanner's coordinates do not agree, volumes start middle on middle
    )
    intensity_range: tuple[float, float] | None = (
        None  # values that become 0 and 1; None: each volume's 0.5th and 99.5th percentile
    )
    similarity: Literal["mse", "ncc"] = "ncc"
    ncc_window: Annotated[int, Field(ge=3)] = 9  # voxels along an axis, odd
    similarity_weight: Positive = 1.0
    smoothness: NotNegative = 1.0  # lambda
    weights: str | None = None
    steps: Count = 10_000
    batch_size: Count = 1
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: Positive = 1e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 0.0
    decay_all: bool = True
    schedule: Literal["constant", "cosine", "step"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    milestones: tuple[Fraction, ...] = (0.5, 0.75)
    gamma: Positive = 0.1
    ema: Annotated[float, Field(ge=0, lt=1)] | None = None
    clip: Positive | None = None
    cache: NotNegative = 2.0  # GiB of prepared pairs that are kept, in each process
    workers: Annotated[int, Field(ge=0)] = 0


class RegistrationRecipe(Recipe):
    """The task's default recipe. Papers that differ override `loss`, `displacement` or `build`."""

    config: Config
    monitor = ("dice", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if len(config.size) != config.dimensions:
            raise PaperZooError(
                f"size is {config.size}: it has {len(config.size)} extents, dimensions is {config.dimensions}"
            )
        if config.ncc_window % 2 == 0:
            raise PaperZooError(f"ncc_window is {config.ncc_window}; it must be odd, to have a voxel in its middle")
        if config.intensity_range is not None and not config.intensity_range[0] < config.intensity_range[1]:
            raise PaperZooError(f"intensity_range is {config.intensity_range}; the smaller value comes first")
        if not self.facts:
            self.facts = self.learned_facts()
        self.model = runtime.place(self.build())
        self.average = running_average(self.model, config.ema)
        self.optimizer = make_optimizer(config, self.model)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(config, step)
        )

    def learned_facts(self) -> dict[str, Any]:
        pairs, spacing = self.train_set, self.config.spacing
        if spacing is None:
            some = range(0, len(pairs), max(1, len(pairs) // 16))
            spacing = np.median([pairs[i].fixed.spacing for i in some], axis=0)
        return {"labels": list(pairs.labels), "channels": list(pairs.channels), "spacing": [float(s) for s in spacing]}

    def build(self) -> nn.Module:
        given = dict(self.config.model_arguments)
        for name in ("in_channels", "dimensions"):
            if name in given:
                raise PaperZooError(
                    f"model_arguments: {name} is not chosen; it follows from the data and the task's dimensions"
                )
        sizes = {"in_channels": len(self.facts["channels"]), "dimensions": self.config.dimensions}
        return create(self.config.model, weights=self.config.weights, **sizes, **given)

    # -- data ------------------------------------------------------------------------------------------------------------

    @cached_property
    def train_set(self):
        return open_pairs(self.config.data, "train", self.config.atlas)

    @cached_property
    def test_set(self):
        return open_pairs(self.config.data, "test", self.config.atlas)

    @cached_property
    def batches(self):
        prepared = PreparedPairs(self.train_set, self.config, self.facts)
        return self.runtime.batches(prepared, self.config.batch_size, workers=self.config.workers)

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.batches.next()

    # -- learning --------------------------------------------------------------------------------------------------------

    def similarity(self, fixed: Tensor, warped: Tensor) -> Tensor:
        """What is minimised of two images: the mean square, or the negative local correlation."""
        if self.config.similarity == "mse":
            return measure.mean_square(fixed, warped)
        return -measure.local_correlation(fixed, warped, self.config.ncc_window)

    def objective(
        self, moving: Tensor, fixed: Tensor, displacement: Tensor, regularised: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """similarity + lambda * roughness, and its parts."""
        warped = measure.warp(moving, displacement)
        alike = self.similarity(fixed, warped)
        rough = measure.roughness((displacement if regularised is None else regularised).float())
        total = self.config.similarity_weight * alike + self.config.smoothness * rough
        return total, {"similarity_loss": alike.detach(), "roughness": rough.detach()}

    def loss(
        self, batch: tuple[Tensor, ...], displacement: Tensor, regularised: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        moving, fixed, _, _ = batch
        return self.objective(moving, fixed, displacement, regularised)

    def step(self, batch: tuple[Tensor, ...]) -> dict:
        self.model.train()
        output = self.model(batch[0], batch[1])
        parts = output if isinstance(output, dict) else {"displacement": output}
        loss, logged = self.loss(batch, parts["displacement"], parts.get("regularised"))
        return {"loss": loss, **logged}

    # -- whole pairs -----------------------------------------------------------------------------------------------------

    def displacement(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """The network's answer for prepared images (1, C, *size), on the same device: (1, D, *size), voxels."""
        with torch.inference_mode():
            return self.deployed.eval()(moving, fixed).float()

    def register(self, pair: Pair) -> tuple[Pair, Tensor]:
        """The pair, its moving volume where it starts, and the field on the fixed volume's voxels: float32 (3, X, Y, Z), mm."""
        pair = aligned(pair, self.config)
        for which, volume in (("moving", pair.moving), ("fixed", pair.fixed)):
            if len(volume.image) != len(self.facts["channels"]):
                names = ", ".join(self.facts["channels"])
                raise PaperZooError(
                    f"{volume} ({which}): has {len(volume.image)} channel(s), the network needs {len(self.facts['channels'])} ({names})"
                )
        ready = prepare(pair, self.config, self.facts)
        device = self.runtime.device
        found = self.displacement(ready.moving[None].to(device), ready.fixed[None].to(device))[0].detach().cpu()
        if self.config.dimensions == 2:
            thin = thin_axis(pair.fixed)
            rows = list(found.unbind(0))
            rows.insert(thin, torch.zeros_like(rows[0]))
            found = torch.stack(rows).unsqueeze(1 + thin)
        spacing = torch.tensor(self.facts["spacing"]).view(3, 1, 1, 1)
        to_grid = measure.inverse(ready.affine) @ torch.as_tensor(pair.fixed.affine, dtype=torch.float64)
        at = measure.places(to_grid.float(), pair.fixed.size)
        return pair, measure.read_at(found * spacing, at, padding="border")

    @torch.no_grad()
    def table(self, split: str = "test") -> tuple[Tensor, Tensor]:
        """Of every pair and class float64 (N, K, 7): voxels in both, moved, fixed, before and after; HD95 after, mm. And (N, 5): see `evaluate`."""
        pairs = self.test_set if split == "test" else self.train_set
        classes = len(self.facts["labels"])
        rows, facts = (
            torch.zeros(len(pairs), classes, 7, dtype=torch.float64),
            torch.zeros(len(pairs), 5, dtype=torch.float64),
        )
        for i, pair in self.runtime.loader(Numbered(pairs), 1, self.config.workers, collate=lambda items: items[0]):
            pair, found = self.register(pair)
            fixed, moving = pair.fixed, pair.moving
            before = moving_indices(torch.zeros_like(found), fixed.affine, moving.affine)
            after = moving_indices(found, fixed.affine, moving.affine)
            facts[i, 0], facts[i, 1] = measure.folds(found, fixed.spacing)
            for k, at in ((2, before), (3, after)):
                facts[i, k] = measure.correlation(
                    measure.read_at(moving.image.nan_to_num(), at), fixed.image.nan_to_num()
                )
            facts[i, 4] = (
                torch.nan if pair.field is None else float((found - pair.field).square().sum(0).sqrt().nanmean())
            )
            rows[i, :, 6] = torch.nan
            if moving.mask is None or fixed.mask is None:
                continue
            for k, at in ((0, before), (3, after)):
                mask = measure.read_at(moving.mask[None].float(), at, "nearest")[0].to(torch.uint8)
                truth = fixed.mask.where(mask != IGNORE, IGNORE)
                mask = mask.where(mask != IGNORE, 0)
                rows[i, :, k : k + 3] = volume_metrics.overlap_counts(mask, truth, classes)
            rows[i, :, 6] = torch.tensor(hausdorff(mask, truth, fixed.spacing, classes))
        return self.runtime.mean(rows) * self.runtime.world, self.runtime.mean(facts) * self.runtime.world

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """Means over pairs, on each fixed volume's own voxels.

        dice, dice_before: of the moved labels and the fixed ones, mean over structures and pairs; hd95_mm, too. folds_percent: voxels where the Jacobian
        determinant is 0 or below. log_jacobian_std: deviation of its logarithm elsewhere. correlation, correlation_before: of the images. field_error_mm:
        distance to the true map, where it is known. Without labels the first three are left out.
        """
        rows, facts = self.table(split)
        names = ("folds_percent", "log_jacobian_std", "correlation_before", "correlation", "field_error_mm")
        result = {name: float(value) for name, value in zip(names, facts.nanmean(0), strict=True) if value == value}
        dice = {k: volume_metrics.dice_of(rows[:, 1:, a : a + 3]) for k, a in (("dice_before", 0), ("dice", 3))}
        if not dice["dice"].isnan().all():
            result |= {name: float(values.nanmean(0).nanmean()) for name, values in dice.items()}
            result["hd95_mm"] = float(rows[:, 1:, 6].nanmean(0).nanmean())
        return result

    # -- use -------------------------------------------------------------------------------------------------------------

    def predict(self, inputs: list) -> list[Registration]:
        """Pairs, (moving, fixed) of whatever `read_volume` takes, or text "moving.nii.gz :: fixed.nii.gz", to maps."""
        results = []
        for value in inputs:
            given = as_pair(value)
            pair, found = self.register(given)
            fixed, moving = pair.fixed, pair.moving
            before, after = (
                measure.read_at(moving.image.nan_to_num(), moving_indices(f, fixed.affine, moving.affine))
                for f in (torch.zeros_like(found), found)
            )
            length = found.square().sum(0).sqrt()
            shift = tuple(float(s) for s in pair.moving.affine[:3, 3] - given.moving.affine[:3, 3])
            original = fixed.affine if fixed.original is None else fixed.original
            image = fixed.image.nan_to_num()
            results.append(
                Registration(
                    found,
                    after,
                    round(float(length.mean()), 3),
                    round(float(length.max()), 3),
                    round(measure.folds(found, fixed.spacing)[0], 4),
                    round(measure.correlation(before, image), 4),
                    round(measure.correlation(after, image), 4),
                    fixed.spacing,
                    orientation(original),
                    original,
                    fixed.affine,
                    shift,
                )
            )
        return results

    def samples(self, folder: Path) -> list[str]:
        """Three held-out pairs as files: NIfTI, or .npz where nibabel is not installed."""
        import importlib.util

        ending = ".nii.gz" if importlib.util.find_spec("nibabel") else ".npz"
        made = []
        for i in range(min(3, len(self.test_set))):
            pair, paths = self.test_set[i], []
            for which, volume in (("moving", pair.moving), ("fixed", pair.fixed)):
                original = volume.affine if volume.original is None else volume.original
                image = np.ascontiguousarray(from_ras(volume.image.numpy(), original))
                paths.append(folder / f"{i}_{which}{ending}")
                write_volume(paths[-1], image[0] if len(image) == 1 else image, original)
            made.append(BETWEEN.join(map(str, paths)))
        return made

    def example(self) -> tuple[Tensor, Tensor]:
        rng = torch.Generator().manual_seed(0)
        shape = (2, len(self.facts["channels"]), *self.config.size)
        return torch.rand(shape, generator=rng), torch.rand(shape, generator=rng)

    def draw(self, value: Any, result: Registration) -> Image.Image:
        pair = aligned(as_pair(value), self.config)
        before = measure.read_at(
            pair.moving.image,
            moving_indices(torch.zeros_like(result.displacement), pair.fixed.affine, pair.moving.affine),
        )
        title = f"{result.mean_mm:.1f} mm on average, {result.folds_percent:.2g} % folded"
        return sheet(before, pair.fixed.image, result.warped, result.displacement, pair.fixed.spacing, title=title)

    def figures(self) -> dict[str, Image.Image]:
        """Held-out pairs with their labels, and the Dice coefficient of every structure before and after."""
        from paperzoo.engine.pictures import new_figure, tile, to_picture

        labels, pictures = self.facts["labels"], []
        for i in range(min(3, len(self.test_set))):
            pair, found = self.register(self.test_set[i])
            fixed, moving = pair.fixed, pair.moving
            places = [moving_indices(f, fixed.affine, moving.affine) for f in (torch.zeros_like(found), found)]
            images = [measure.read_at(moving.image, at) for at in places]
            masks: list[Tensor | None] = [None, fixed.mask, None]
            if moving.mask is not None:
                masks[0], masks[2] = (
                    measure.read_at(moving.mask[None].float(), at, "nearest")[0].to(torch.uint8) for at in places
                )
            pictures.append(sheet(images[0], fixed.image, images[1], found, fixed.spacing, masks, pair.name))
        shown = {"Held-out pairs": tile(pictures, 1)}
        rows, _ = self.table()
        if rows[:, 1:, :3].sum() > 0:
            figure, axes = new_figure(5, 1.2 + 0.3 * len(labels))
            for a, colour, name in ((0, "#bbbbbb", "before"), (3, "#1f77b4", "after")):
                values = volume_metrics.dice_of(rows[:, 1:, a : a + 3])
                for k in range(values.shape[1]):
                    kept = values[:, k][~values[:, k].isnan()].tolist()
                    axes.scatter(
                        kept, [k + 0.12 * (a > 0)] * len(kept), s=14, color=colour, label=name if k == 0 else None
                    )
            axes.set_yticks(range(len(labels) - 1), labels[1:])
            axes.set_xlim(-0.02, 1.02)
            axes.set_xlabel("Dice, a point a pair")
            axes.legend(fontsize=8)
            shown["Dice of each structure"] = to_picture(figure)
        return shown
