"""FarSeg's training: the task's default recipe on aerial data, with the foreground-aware loss (sec. 3.4)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.transforms import v2

from paperzoo.data.aerial import open_aerial
from paperzoo.papers.remote_sensing.farseg.model import Annealing, annealed, focal_parts, weighed
from paperzoo.tasks import segmentation
from paperzoo.tasks.change_detection import QuarterTurn
from paperzoo.tasks.segmentation import Count, NotNegative, Positive, SegmentationRecipe, class_ious, metrics


@dataclass(frozen=True)
class Config(segmentation.Config):
    """Sec. 4.1 and the released configuration: iSAID, two GPUs with 4 crops of 896 pixels each, 60,000 steps, 0.007 with "poly", mirrors and
    quarter turns; the loss is annealed over the first 10,000 steps. Tested by windows of 896 pixels, 512 apart.
    """

    model: str = "farseg_resnet50"
    data: str = "isaid"
    crop_size: Count = 896
    scale: tuple[Positive, Positive] = (1.0, 1.0)
    turn: bool = True  # also mirrored top-bottom, and turned by quarters
    steps: Count = 60_000
    batch_size: Count = 8
    learning_rate: Positive = 0.007
    clip: Positive | None = 35.0
    gamma: NotNegative = 2.0  # of the focal weights; 0 is plain cross-entropy
    annealing: Annealing = "cosine"
    anneal_steps: Annotated[int, Field(ge=0)] = 10_000
    window: Count | None = 896
    overlap: Annotated[float, Field(ge=0, lt=1)] = 1 - 512 / 896
    workers: Annotated[int, Field(ge=0)] = 8


class FarSegRecipe(SegmentationRecipe):
    """`evaluate` adds `foreground_miou`, the mean over all classes but the first."""

    config: Config

    @cached_property
    def train_set(self):
        return open_aerial(self.config.data, "train")

    @cached_property
    def test_set(self):
        return open_aerial(self.config.data, "test")

    def augmentation(self) -> list[nn.Module]:
        more = [v2.RandomVerticalFlip(self.config.flip), QuarterTurn()] if self.config.turn else []
        return super().augmentation() + more

    def loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """As released: the sum of the weighed losses over (pixels that count + pictures), of the whole global batch."""
        config, step = self.config, self.runtime.step + 1
        share = annealed(step / config.anneal_steps, config.annealing) if config.anneal_steps else 1.0
        losses, focal = focal_parts(logits.float(), masks, config.gamma, config.ignore_index)
        sums = torch.stack([losses.detach().sum(), (losses.detach() * focal).sum()])
        counted = (masks != config.ignore_index).sum().float() + len(masks)
        return weighed(losses, focal, self.runtime.mean(sums), share).sum() / self.runtime.mean(counted)

    def evaluate(self, split: str = "test") -> dict[str, float]:
        counts = self.confusion(split)
        return metrics(counts) | {"foreground_miou": float(class_ious(counts)[1:].nanmean())}


PRESETS = {
    "embedded": Config(
        model="farseg_slim",
        data="terrain_buildings",
        crop_size=96,
        steps=120,
        batch_size=8,
        optimizer="adamw",
        learning_rate=4e-3,
        anneal_steps=60,
        clip=None,
        window=None,
        workers=0,
    ),
    "published": Config(),
}

RECIPE = FarSegRecipe

__all__ = ["PRESETS", "RECIPE", "Config"]
