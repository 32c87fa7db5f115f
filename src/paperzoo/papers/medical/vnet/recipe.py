"""V-Net learns by its Dice loss from volumes that are bent and whose histograms are exchanged (sec. 3 and 4).

The loss, the windows and the metrics are the task's; what is here is the paper's histogram matching.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from paperzoo.tasks.volume_patches import Patches
from paperzoo.tasks.volume_segmentation import Config as TaskConfig
from paperzoo.tasks.volume_segmentation import VolumeSegmentationRecipe


@dataclass(frozen=True)
class Config(TaskConfig):
    """The task's settings, and the share of patches that take over the histogram of another case."""

    histogram: Annotated[float, Field(ge=0, le=1)] = 0.0


def histogram_matched(values: Tensor, reference: Tensor) -> Tensor:
    """`values` of any shape in their order, but distributed as `reference` (any shape, the same or another count)."""
    ranks = values.flatten().argsort()
    ordered = reference.flatten().sort().values
    at = (torch.arange(len(ranks)) + 0.5) * len(ordered) / len(ranks) - 0.5
    low = at.floor().clamp(0, len(ordered) - 1).long()
    high = (low + 1).clamp(max=len(ordered) - 1)
    out = torch.empty(len(ranks))
    out[ranks] = torch.lerp(ordered[low], ordered[high], (at - low).clamp(0, 1))
    return out.view(values.shape)


class MatchedPatches(Patches):
    """Patches of which some have the intensities of a patch at the same place in a randomly chosen other case (sec. 3)."""

    def intensities(self, image: Tensor) -> Tensor:
        if float(torch.rand(())) < self.config.histogram:
            other = self.cases[int(torch.randint(len(self.cases), ()))].image
            step = max(1, other[0].numel() // image[0].numel())
            pairs = zip(image, other.flatten(1)[:, ::step], strict=True)
            image = torch.stack([histogram_matched(channel, reference) for channel, reference in pairs])
        return super().intensities(image)


class VNetRecipe(VolumeSegmentationRecipe):
    config: Config

    @cached_property
    def patches(self) -> MatchedPatches:
        plain = super().patches
        return MatchedPatches(plain.cases, plain.window, plain.config)


RECIPE = VNetRecipe

PRESETS = {
    # Small patches of many bodies. Hounsfield units are the same everywhere, so histograms stay; most patches lack some organ, so
    # one Dice coefficient is taken for the whole batch.
    "embedded": Config(
        model="vnet_slim",
        data="organs",
        window=(20, 20, 20),
        spacing=(4.0, 4.0, 5.0),
        loss="dice",
        batch_dice=True,
        rotate=5.0,
        scale=(0.9, 1.1),
        foreground=0.5,
        steps=120,
        batch_size=3,
        learning_rate=2e-2,
        schedule="cosine",
        overlap=0.25,
    ),
    # Sec. 3 and 4: PROMISE 2012 at 1 x 1 x 1.5 mm and 128 x 128 x 64 voxels, two volumes a batch, momentum 0.99, a rate of 1e-4 that is divided
    # by 10 every 25,000 iterations (the paper says one order of magnitude; it trained 48 hours, about 30,000 iterations), B-spline
    # deformations from 2 x 2 x 2 control points with a deviation of 15 voxels, histogram matching. PROMISE12 as images/ and masks/.
    "published": Config(
        model="vnet",
        data="data/PROMISE12",
        window=(128, 128, 64),
        spacing=(1.0, 1.0, 1.5),
        loss="dice",
        elastic=15.0,
        elastic_grid=2,
        histogram=1.0,
        foreground=0.0,
        steps=30_000,
        batch_size=2,
        optimizer="sgd",
        learning_rate=1e-4,
        momentum=0.99,
        nesterov=False,
        schedule="step",
        milestones=(0.8333,),
        gamma=0.1,
        workers=4,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config", "VNetRecipe"]
