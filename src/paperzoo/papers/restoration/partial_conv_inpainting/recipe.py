"""Training with partial convolutions: five losses (eq. 7), and a second phase in which the encoder's batch norm is frozen (sec. 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.papers.restoration.partial_conv_inpainting.model import PartialConvUNet
from paperzoo.papers.restoration.partial_conv_inpainting.technique import (
    Features,
    feature_losses,
    hole_losses,
    seam_loss,
    vgg_features,
    weigh,
)
from paperzoo.tasks import inpainting
from paperzoo.tasks.inpainting import Fraction, InpaintingRecipe, NotNegative, Positive


@dataclass(frozen=True)
class Config(inpainting.Config):
    """Sec. 4.2: Adam at 2e-4 with batch norm everywhere, then 5e-5 with the encoder's frozen; batches of 6; weights of eq. 7.

    The lengths of the two phases are not in the paper; these are MMagic's.
    """

    features: Literal["vgg16", "random"] = "vgg16"  # what the perceptual and style losses look through
    feature_weights: str | None = None  # torchvision's vgg16 file, for "vgg16"
    perceptual_weight: NotNegative = 0.05
    style_weight: NotNegative = 120.0
    seam_weight: NotNegative = 0.1  # of the total variation
    fine_tune_share: Fraction = 0.0  # of the steps, the last ones, with the encoder's batch norm frozen
    fine_tune_factor: Positive = 0.25  # of the learning rate then


class PartialConvRecipe(InpaintingRecipe):
    config: Config
    model: PartialConvUNet

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        norms = [p for name, p in self.model.encoder.named_parameters() if ".bn." in name]
        frozen = {id(p) for p in norms}
        rest = [p for p in self.model.parameters() if id(p) not in frozen]
        self.optimizer = torch.optim.Adam([{"params": rest}, {"params": norms}], config.learning_rate)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            [
                lambda step: config.fine_tune_factor if self.fine_tunes(step) else 1.0,
                lambda step: 0.0 if self.fine_tunes(step) else 1.0,
            ],
        )

    def fine_tunes(self, step: int) -> bool:
        """Whether this step belongs to the second phase."""
        return step >= round((1 - self.config.fine_tune_share) * self.config.steps)

    def look(self) -> Features:
        """What the perceptual and style losses look through; made once."""
        kept = self.__dict__.get("_look")
        if kept is None:
            config = self.config
            if config.features == "vgg16" and config.feature_weights is None:
                raise PaperZooError(
                    "feature_weights names no file: the perceptual and style losses need torchvision's vgg16 weights, or --features random"
                )
            slim = config.features == "random"
            kept = self._look = vgg_features(config.feature_weights, self.runtime.device, slim)
        return kept

    def loss(self, output: dict[str, Tensor], images: Tensor, masks: Tensor) -> dict[str, Tensor]:
        config, out = self.config, output["out"].float()
        composite = images * masks + out * (1 - masks)
        losses = dict(zip(("hole", "rest"), hole_losses(out, images, masks), strict=True))
        weights = [("hole", config.hole_weight), ("rest", 1.0)]
        if config.perceptual_weight or config.style_weight:
            found = feature_losses(self.look(), out, composite, images)
            losses |= dict(zip(("perceptual", "style"), found, strict=True))
            weights += [("perceptual", config.perceptual_weight), ("style", config.style_weight)]
        losses["seam"] = seam_loss(composite, masks)
        weights.append(("seam", config.seam_weight))
        return {"loss": weigh(losses, weights)} | {name: value.detach() for name, value in losses.items()}

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        self.model.freeze_encoder_norm = self.fine_tunes(self.runtime.step)
        return super().step(batch)


PRESETS = {
    "embedded": Config(
        model="pconv_unet_slim",
        image_size=48,
        hole_share=(0.1, 0.5),
        features="random",
        style_weight=2.0,  # Gram matrices of random kernels are larger than VGG-16's
        steps=280,
        batch_size=8,
        learning_rate=1e-2,
        fine_tune_share=0.3,
        fine_tune_factor=0.1,
    ),
    # --data takes a folder with `train` and `val` (Places2, ImageNet, CelebA-HQ), --holes the folder of the released masks, --feature-weights torchvision's vgg16.
    "published": Config(
        model="pconv_unet",
        data="places2",
        holes="irregular_masks",
        image_size=512,
        steps=1_000_000,
        batch_size=6,
        fine_tune_share=0.2,
        workers=8,
    ),
}

RECIPE = PartialConvRecipe

__all__ = ["PRESETS", "RECIPE", "Config"]
