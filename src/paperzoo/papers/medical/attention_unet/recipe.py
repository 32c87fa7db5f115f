"""Attention U-Net learns by the task's default recipe with the Dice loss; here are its settings.

Besides the answer there is a picture of what the finest gate lets through.
"""

from __future__ import annotations

import torch
from PIL import Image

from paperzoo.tasks.volume_patches import prepare
from paperzoo.tasks.volume_pictures import focus, three_planes
from paperzoo.tasks.volume_segmentation import Config, VolumeSegmentationRecipe


class AttentionUNetRecipe(VolumeSegmentationRecipe):
    @torch.inference_mode()
    def figures(self) -> dict[str, Image.Image]:
        """The task's pictures, and of a network with gates on a grid the coefficients alpha of the finest one on a held-out volume."""
        pictures = super().figures()
        network, gates = self.deployed.eval(), "attentionblock2"
        if not hasattr(network, gates):
            return pictures
        case = prepare(self.test_set[0], self.facts)
        seen: list[torch.Tensor] = []
        block = getattr(network, gates).gate_block_1
        hook = block.register_forward_hook(lambda gate, inputs, _: seen.append(gate.coefficients(*inputs)))
        network(case.image[None].to(self.runtime.device))
        hook.remove()
        alpha = torch.nn.functional.interpolate(seen[0].float().cpu(), size=case.image.shape[1:], mode="trilinear")[0]
        at = focus(case.mask, case.image.shape[1:])
        shown = three_planes(alpha, None, case.spacing, self.facts["labels"], at, "what the finest gate lets through")
        return {**pictures, "Attention": shown}


RECIPE = AttentionUNetRecipe

PRESETS = {
    "embedded": Config(
        model="attention_unet_slim",
        data="lesions",
        window=(24, 24, 12),
        loss="dice",
        batch_dice=True,
        foreground=0.6,
        flip=("x",),
        steps=90,
        batch_size=4,
        learning_rate=1e-2,
        schedule="cosine",
        overlap=0.25,
    ),
    # Sec. 3.1 and the authors' configuration: Adam at 1e-4, weight decay 1e-6, a step of 0.1 every 250 of 1000 epochs, two windows of 160 x 160 x 96
    # voxels of 2 mm, affine changes, flips, Dice loss (theirs without squares). CT-150 is available on request; TCIA Pancreas-CT as images/
    # and masks/. 80 cases are 40 steps an epoch.
    "published": Config(
        model="attention_unet",
        data="data/Pancreas-CT",
        window=(160, 160, 96),
        spacing=(2.0, 2.0, 2.0),
        normalise="ct",
        loss="dice",
        dice_squares=False,
        foreground=0.0,
        flip=("x", "y"),
        rotate=15.0,
        scale=(0.7, 1.3),
        steps=40_000,
        batch_size=2,
        learning_rate=1e-4,
        weight_decay=1e-6,
        schedule="step",
        milestones=(0.25, 0.5, 0.75),
        gamma=0.1,
        workers=4,
    ),
}

__all__ = ["PRESETS", "RECIPE", "AttentionUNetRecipe", "Config"]
