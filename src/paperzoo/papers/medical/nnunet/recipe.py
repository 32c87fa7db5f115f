"""nnU-Net learns any set of volumes without being told how: fingerprint, plans, a plain U-Net, Dice and cross-entropy (Isensee et al., 2018).

`configuration` chooses what is trained: 2d, 3d_fullres, 3d_lowres, or 3d_cascade, which refines what a finished run of 3d_lowres says (`low`). Window, batch,
spacing and topology come from the plans, unless `window` or `batch_size` say otherwise. The plans are kept with a run (and, with `plans`, in a file
that can be edited and used again). Which configuration or ensemble is best is found by cross-validation: `selection.py`.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from paperzoo.blocks.tiling import tiled
from paperzoo.data.volumes import IN_MEMORY, Volume, open_volumes
from paperzoo.engine.models import create
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.papers.medical.nnunet.planning import Configuration, Plans, cropped, fingerprint, make_plans
from paperzoo.papers.medical.nnunet.preprocessing import (
    PlannedCases,
    PlannedPatches,
    on_own_voxels,
    prepared,
    resampled_labels,
    thick_axis,
)
from paperzoo.tasks.volume_patches import Prepared
from paperzoo.tasks.volume_segmentation import Config as TaskConfig
from paperzoo.tasks.volume_segmentation import Count, Fraction, Positive, VolumeSegmentationRecipe

FOLDS = 5


@dataclass(frozen=True)
class Config(TaskConfig):
    """The task's settings with nnU-Net's values, and what is planned."""

    model: str = "nnunet"
    configuration: Literal["2d", "3d_fullres", "3d_lowres", "3d_cascade"] = "3d_fullres"
    plans: str | None = None  # a file: read where it is there, else written
    window: tuple[Count, ...] = ()  # (): as planned
    batch_size: Annotated[int, Field(ge=0)] = 0  # 0: as planned
    memory: Positive = 1.0  # of a 12 GB GPU, for which patch and batch are planned
    base_features: Count = 30
    thick_percentile: Annotated[float, Field(ge=0, le=100)] = (
        10.0  # of the spacing along thick slices that becomes the target; the first paper: 50
    )
    start: Literal["median", "cube"] = "median"  # from which a patch is made smaller; later releases: a cube in mm
    fold: Annotated[int, Field(ge=0, lt=FOLDS)] | None = (
        None  # of the training cases that is left out; None: all are learned from
    )
    low: str | None = None  # a finished run of 3d_lowres, for 3d_cascade
    keep_connected: bool = True  # classes that are in one piece in every training case keep their largest piece
    mirror_test: bool = True  # predictions are averaged over all mirrorings
    gamma: tuple[Positive, Positive] = (0.7, 1.5)
    gamma_share: Fraction = 0.3  # of the patches
    flip: tuple[Literal["x", "y", "z"], ...] = ("x", "y", "z")
    rotate: Annotated[float, Field(ge=0)] = 30.0
    scale: tuple[Positive, Positive] = (0.85, 1.25)
    dice_squares: bool = False
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: Positive = 3e-4
    weight_decay: Annotated[float, Field(ge=0)] = 3e-5
    schedule: Literal["constant", "cosine", "step", "poly", "plateau"] = "plateau"
    epoch: Count = 250  # steps after which the plateau is looked for
    patience: Count = 30  # epochs
    windows: Count = 2


class Plateau:
    """Divides the learning rate by 5 where the running average of the training loss (0.93 of itself, 0.07 of the epoch's mean) has not fallen by 5e-3
    within `patience` epochs."""

    def __init__(self, optimizer: torch.optim.Optimizer, epoch: int, patience: int) -> None:
        self.inner = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "min", 0.2, patience, 5e-3, "abs")
        self.epoch, self.total, self.count, self.average = epoch, 0.0, 0, None

    def observe(self, loss: Tensor) -> None:
        self.total, self.count = self.total + float(loss), self.count + 1

    def step(self) -> None:
        if self.count < self.epoch:
            return
        mean = self.total / self.count
        self.average = mean if self.average is None else 0.93 * self.average + 0.07 * mean
        self.total, self.count = 0.0, 0
        self.inner.step(self.average)

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "total": self.total, "count": self.count, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self.total, self.count, self.average = state["total"], state["count"], state["average"]


class Some:
    """Some cases of a set."""

    def __init__(self, volumes: Any, numbers: list[int]) -> None:
        self.volumes, self.numbers = volumes, numbers
        self.labels, self.channels = volumes.labels, volumes.channels

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Volume:
        return self.volumes[self.numbers[i]]

    def path(self, i: int) -> str:
        return self.volumes.path(self.numbers[i])

    def spacing(self, i: int) -> tuple[float, float, float]:
        return self.volumes.spacing(self.numbers[i])


def folds(count: int, number: int = FOLDS) -> list[list[int]]:
    """The cases that each fold leaves out: shuffled once, the same on every machine.

    Raises:
        PaperZooError: with fewer cases than folds.
    """
    if count < number:
        raise PaperZooError(f"{count} training case(s) cannot be divided into {number} folds")
    order = np.random.RandomState(12345).permutation(count)  # nnU-Net's own seed
    return [sorted(int(i) for i in part) for part in np.array_split(order, number)]


class NNUNetRecipe(VolumeSegmentationRecipe):
    config: Config

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        self.config = config
        facts = facts or self.learned_facts()
        self.plans = Plans.model_validate(facts["plans"])
        self.plan = self.plans.configuration(
            "3d_fullres" if config.configuration == "3d_cascade" else config.configuration
        )
        self.coarse = self.first_network(facts) if config.configuration == "3d_cascade" else None
        super().__init__(planned(config, self.plan), runtime, facts)
        if config.schedule == "plateau":
            self.scheduler = Plateau(self.optimizer, config.epoch, config.patience)

    def learned_facts(self) -> dict[str, Any]:
        """The plans, and of the chosen configuration what preparing a volume needs."""
        config, path = self.config, self.config.plans
        if path is not None and Path(path).exists():
            plans = Plans.read(path)
            if plans.fingerprint.labels != list(self.train_set.labels) or plans.fingerprint.channels != list(
                self.train_set.channels
            ):
                raise PaperZooError(f"{path}: is of another set: its classes are {', '.join(plans.fingerprint.labels)}")
        else:
            plans = make_plans(
                fingerprint(self.train_set), config.memory, config.base_features, config.thick_percentile, config.start
            )
            if path is not None:
                plans.save(path)
        plan = plans.configuration("3d_fullres" if config.configuration == "3d_cascade" else config.configuration)
        return {
            "labels": list(plans.fingerprint.labels),
            "channels": list(plans.fingerprint.channels),
            "spacing": list(config.spacing or plan.spacing),
            "schemes": plans.normalise if config.normalise == "auto" else [config.normalise] * len(plans.normalise),
            "within_mask": plans.within_mask,
            "intensity": plans.fingerprint.intensity,
            "keep_largest": plans.fingerprint.connected if config.keep_connected else [],
            "plans": plans.model_dump(mode="json"),
        }

    def first_network(self, facts: dict) -> Callable[[Volume, Prepared], Tensor]:
        """What the cascade's first network says of a volume, one-hot on the prepared case's voxels: (K - 1, x, y, z)."""
        from paperzoo.engine.run import load

        if self.config.low is None:
            raise PaperZooError("3d_cascade needs low: the folder of a finished run of 3d_lowres")
        first = load(self.config.low, device="cpu")
        if first.facts.get("labels") != facts["labels"]:
            raise PaperZooError(f"low: {self.config.low} knows other classes")

        def answer(volume: Volume, case: Prepared) -> Tensor:
            mask, _ = first.segment(volume)
            part, box = cropped(volume)
            there = resampled_labels(mask[box].numpy(), case.image.shape[1:], thick_axis(part.spacing, case.spacing))
            return F.one_hot(torch.from_numpy(there).long(), len(facts["labels"])).movedim(-1, 0)[1:].float()

        return answer

    @property
    def inputs(self) -> int:
        """Channels that the network sees."""
        return len(self.facts["channels"]) + (len(self.facts["labels"]) - 1 if self.coarse is not None else 0)

    def build(self) -> nn.Module:
        given = {**self.plan.arguments(), **self.config.model_arguments}
        for name in ("num_classes", "in_channels"):
            if name in self.config.model_arguments:
                raise PaperZooError(f"model_arguments: {name} is not chosen; it follows from the data")
        return create(
            self.config.model,
            weights=self.config.weights,
            num_classes=len(self.facts["labels"]),
            in_channels=self.inputs,
            **given,
        )

    # -- data ------------------------------------------------------------------------------------------------------------

    @cached_property
    def every_case(self):
        return open_volumes(self.config.data, "train", self.config.missing)

    @cached_property
    def train_set(self):
        if self.config.fold is None:
            return self.every_case
        out = set(folds(len(self.every_case))[self.config.fold])
        return Some(self.every_case, [i for i in range(len(self.every_case)) if i not in out])

    @cached_property
    def validation_set(self):
        """The cases of the fold that is left out."""
        if self.config.fold is None:
            raise PaperZooError("without a fold there are no validation cases")
        return Some(self.every_case, folds(len(self.every_case))[self.config.fold])

    @property
    def axis(self) -> int:
        return self.plan.axis

    @cached_property
    def patches(self) -> PlannedPatches:
        window = list(self.config.window)
        if self.config.dimensions == 2:
            window.insert(self.axis, 1)
        cases = PlannedCases(self.train_set, self.facts, self.config.cache, self.coarse)
        flat = self.axis if self.plan.anisotropic else None
        return PlannedPatches(cases, window, self.config, flat, len(self.facts["channels"]))

    # -- learning --------------------------------------------------------------------------------------------------------

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        output = super().step(batch)
        if isinstance(self.scheduler, Plateau):
            self.scheduler.observe(self.runtime.mean(output["loss"]))
        return output

    # -- whole volumes ---------------------------------------------------------------------------------------------------

    def probabilities(self, image: Tensor) -> Tensor:
        """A prepared volume (C, x, y, z) -> softmax (K, x, y, z) on the CPU: overlapping windows, Gaussian weights, averaged over mirrorings."""
        config, network = self.config, self.deployed.eval()
        flat = config.dimensions == 2
        axes = range(2, 2 + config.dimensions)
        turns = (
            [t for n in range(config.dimensions + 1) for t in itertools.combinations(axes, n)]
            if config.mirror_test
            else [()]
        )

        def answer(x: Tensor) -> Tensor:
            total = sum(network(x.flip(turn)).float().softmax(1).flip(turn) for turn in turns)
            return total / len(turns)

        inputs = image.movedim(1 + self.axis, 0) if flat else image[None]
        values = image[0].numel() * (len(self.facts["labels"]) + 1) * 4
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "probabilities" if values > IN_MEMORY else None
            out = tiled(
                answer, inputs, config.window, config.overlap, config.windows, config.blend,
                progress=True, device=self.runtime.device, accumulate_on="cpu", memory_map=place,
            )  # fmt: skip
        return out.movedim(0, 1 + self.axis) if flat else out[0]

    @torch.inference_mode()
    def soft(self, volume: Volume) -> Tensor:
        """Probabilities on the volume's own voxels, (K, X, Y, Z): what ensembles average."""
        channels = self.facts["channels"]
        if len(volume.image) != len(channels):
            raise PaperZooError(
                f"{volume}: has {len(volume.image)} channel(s), the network needs {len(channels)} ({', '.join(channels)}); "
                "give a list with a file each, None for one that is missing"
            )
        case, box, size = prepared(volume, self.facts)
        image = case.image if self.coarse is None else torch.cat([case.image, self.coarse(volume, case)])
        return on_own_voxels(
            self.probabilities(image), volume, box, size, thick_axis(volume.spacing, self.facts["spacing"])
        )

    @torch.inference_mode()
    def segment(self, volume: Volume) -> tuple[Tensor, Tensor]:
        return decided(self.soft(volume), self.facts["keep_largest"])

    def example(self) -> tuple[Tensor]:
        shape = (2, self.inputs, *self.config.window)
        return (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)


def planned(config: Config, plan: Configuration) -> Config:
    """The config with what it leaves to the plans."""
    return replace(
        config,
        dimensions=plan.dimensions,
        window=config.window or tuple(plan.patch),
        batch_size=config.batch_size or plan.batch_size,
        batch_dice=config.batch_dice or plan.batch_dice,
    )


def decided(probabilities: Tensor, keep_largest: list[int]) -> tuple[Tensor, Tensor]:
    """Probabilities (K, X, Y, Z) -> mask uint8 and confidence float16; of the classes named only the largest piece stays."""
    best = probabilities.max(0)
    mask = largest_pieces(best.indices.to(torch.uint8), keep_largest)
    return mask, torch.where(mask == best.indices, best.values, probabilities[0]).to(torch.float16)


def largest_pieces(mask: Tensor, classes: list[int]) -> Tensor:
    """The mask with the smaller pieces of these classes made background; pieces touch across faces, edges or corners."""
    from scipy.ndimage import label

    mask = mask.clone()
    for k in classes:
        pieces, count = label((mask == k).numpy(), np.ones((3, 3, 3)))
        if count > 1:
            largest = int(np.bincount(pieces.ravel())[1:].argmax()) + 1
            mask[torch.from_numpy((pieces > 0) & (pieces != largest))] = 0
    return mask


RECIPE = NNUNetRecipe

_QUICK = Config(
    data="lesions",
    memory=0.002,
    base_features=8,
    thick_percentile=50.0,
    foreground=0.6,
    rotate=0.0,
    scale=(1.0, 1.0),
    mirror_test=False,
    steps=140,
    batch_size=2,
    learning_rate=1e-2,
    weight_decay=0.0,
    schedule="cosine",
    overlap=0.25,
)

PRESETS = {
    "embedded": _QUICK,
    "embedded_2d": replace(_QUICK, configuration="2d", memory=1.0, batch_size=12, steps=120),
    # The Medical Segmentation Decathlon's layout; 1000 epochs of 250 steps at most (the paper stops where the validation loss stands still).
    "published": Config(
        data="data/Task06_Lung",
        thick_percentile=50.0,
        foreground=1 / 3,
        elastic=4.0,
        steps=250_000,
        workers=4,
    ),
    # What later releases do: SGD with Nesterov momentum 0.99, poly decay, logits at all levels.
    "published_v2": Config(
        data="data/Task06_Lung",
        model_arguments={"deep_supervision": True},
        aux_weights=(0.5, 0.25, 0.125, 0.0625),
        start="cube",
        base_features=32,
        optimizer="sgd",
        learning_rate=0.01,
        momentum=0.99,
        schedule="poly",
        clip=12.0,
        steps=250_000,
        workers=4,
    ),
}  # fmt: skip

__all__ = ["PRESETS", "RECIPE", "Config", "NNUNetRecipe"]
