"""EncNet's training: PSPNet's, without blur, and the semantic encoding loss (sec. 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from paperzoo.papers.segmentation.encnet.model import semantic_encoding_loss
from paperzoo.papers.segmentation.pspnet import recipe as pspnet
from paperzoo.tasks.segmentation import Count, Fraction, NotNegative, Positive


@dataclass(frozen=True)
class Config(pspnet.Config):
    """Sec. 4: ADE20K, 120 epochs of its 20,210 images in batches of 16, 0.01 with "poly", scales of 0.5 to 2, turns of up to 10 degrees."""

    model: str = "encnet_resnet101"
    crop_size: Count = 480
    steps: Count = 120 * 1263
    learning_rate: Positive = 0.01
    head_factor: Positive = 1.0  # the paper names one rate; the released script has ten times a smaller one here
    aux_weight: NotNegative = 0.2  # the released script's
    se_weight: NotNegative = 0.2  # sec. 4.1, fig. 6
    blur: Fraction = 0.0
    window: Count | None = None


class EncNetRecipe(pspnet.RECIPE):
    config: Config

    def training_loss(self, output: dict[str, Any], masks: Tensor) -> Tensor:
        loss = super().training_loss(output, masks)
        return loss + self.config.se_weight * semantic_encoding_loss(output["presence"], masks)


PRESETS = {
    "embedded": Config(
        model="encnet_slim",
        data="shape_masks",
        crop_size=64,
        scale=(1.0, 1.0),
        steps=130,
        batch_size=16,
        hard_pixels=0.7,  # four pixels of five are background and soon easy
        optimizer="adamw",
        learning_rate=4e-3,
        rotate=0.0,
        workers=0,
    ),
    "published": Config(),
}

RECIPE = EncNetRecipe

__all__ = ["PRESETS", "RECIPE", "Config"]
