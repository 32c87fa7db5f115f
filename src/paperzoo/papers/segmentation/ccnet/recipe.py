"""CCNet's training: the task's default recipe, with hard pixels mined in the main head alone, as released."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from paperzoo.tasks.segmentation import Config, SegmentationRecipe


class CCNetRecipe(SegmentationRecipe):
    def training_loss(self, output: dict[str, Any], masks: Tensor) -> Tensor:
        """The loss of the logits, and `aux_weight` times the auxiliary head's plain cross-entropy."""
        loss = self.loss(output["out"], masks)
        if "aux" not in output:
            return loss
        ignored = self.config.ignore_index
        summed = F.cross_entropy(output["aux"].float(), masks, ignore_index=ignored, reduction="sum")
        counted = self.runtime.mean((masks != ignored).sum().float()).clamp(min=1)
        return loss + self.config.aux_weight * summed / counted


PRESETS = {
    "embedded": Config(
        model="ccnet_slim",
        data="shape_masks",
        crop_size=64,
        scale=(1.0, 1.0),
        steps=110,
        batch_size=16,
        optimizer="adamw",
        learning_rate=4e-3,
        aux_weight=0.4,
        hard_pixels=0.7,  # four pixels of five are background and soon easy
    ),
    # Sec. 4.2 on Cityscapes: 60,000 steps with batches of 8 crops of 769, 0.01 with "poly", scales of 0.75 to 2, mirroring.
    # The headline mines hard pixels: below 0.7, at least 100,000 of the two crops on a GPU. --backbone-weights takes an
    # ImageNet ResNet-101 with PSPNet's stem.
    "published": Config(
        model="ccnet_resnet101",
        data="cityscapes",
        crop_size=769,
        scale=(0.75, 2.0),
        steps=60_000,
        batch_size=8,
        learning_rate=0.01,
        weight_decay=1e-4,
        aux_weight=0.4,
        hard_pixels=0.7,
        min_kept=0.0845,
        workers=8,
    ),
}

RECIPE = CCNetRecipe

__all__ = ["PRESETS", "RECIPE", "Config"]
