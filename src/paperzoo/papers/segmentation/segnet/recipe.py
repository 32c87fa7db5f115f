"""SegNet's recipe: the task's default with median frequency balancing in the loss (sec. 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.papers.segmentation.segnet.model import median_frequency_weights
from paperzoo.tasks import segmentation
from paperzoo.tasks.segmentation import SegmentationRecipe


@dataclass(frozen=True)
class Config(segmentation.Config):
    """The task's settings, and how classes are weighed."""

    model: str = "segnet"
    class_balance: Literal["median_frequency", "natural"] = "median_frequency"


class SegNetRecipe(SegmentationRecipe):
    """The training set is counted once; the weights stay in `facts` beside the network."""

    config: Config

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        balanced = config.class_balance == "median_frequency"
        if balanced and config.hard_pixels is not None:
            raise PaperZooError("hard_pixels needs class_balance natural: a loss weighs classes or mines hard pixels")
        super().__init__(config, runtime, facts)
        if balanced and facts is None:
            self.facts["class_weights"] = self.count_classes()
        self.class_weights = torch.tensor(self.facts["class_weights"], device=runtime.device) if balanced else None

    def count_classes(self) -> list[float]:
        """The weight of each class, from the pixels of the training set."""
        count = len(self.facts["labels"])
        pixels, totals = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
        rows = range(len(self.train_set))
        for i in tqdm(rows, desc="counting classes", delay=1.0, leave=False, disable=None):
            mask = self.train_set[i][1].as_subclass(Tensor)
            here = torch.bincount(mask.flatten(), minlength=self.config.ignore_index + 1)[:count]
            pixels += here
            totals += (here > 0) * mask.numel()
        return median_frequency_weights(pixels, totals).tolist()

    def loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        if self.class_weights is None:
            return super().loss(logits, masks)
        ignored = self.config.ignore_index
        counted = self.runtime.mean((masks != ignored).sum().float())
        return weighted_loss(logits, masks, self.class_weights, ignored, counted)


def weighted_loss(logits: Tensor, masks: Tensor, weights: Tensor, ignored: int, counted: Tensor) -> Tensor:
    """Weighted cross-entropy over the number of pixels that count, as released; not over the sum of their weights.

    Args:
        logits: (B, K, H, W). masks: int64 (B, H, W), class ids or `ignored`. weights: (K,).
        counted: how many pixels count, in the mean over processes.
    """
    summed = F.cross_entropy(logits.float(), masks, weights, ignore_index=ignored, reduction="sum")
    return summed / counted.clamp(min=1)


PRESETS = {
    # From scratch on small images: a narrow network, AdamW.
    "embedded": Config(
        model="segnet_slim",
        data="digit_ink",
        crop_size=64,
        scale=(1.0, 1.0),
        flip=0.5,
        steps=90,
        batch_size=16,
        optimizer="adamw",
        learning_rate=3e-3,
    ),
    # Sec. 4.1 (table 3): CamVid's 360 x 480 images whole (the padding to a square does not count), a fixed rate of 1e-3,
    # momentum 0.9, batches of 5, 140,000 steps; weight decay as the released solver. --backbone-weights takes VGG-16's file.
    "published": Config(
        model="segnet",
        data="CamVid",
        crop_size=480,
        scale=(1.0, 1.0),
        flip=0.0,
        steps=140_000,
        batch_size=5,
        learning_rate=1e-3,
        momentum=0.9,
        weight_decay=5e-4,
        power=0.0,
        workers=4,
    ),
}

RECIPE = SegNetRecipe

__all__ = ["PRESETS", "RECIPE", "Config"]
