"""VoxelMorph learns without true maps: similarity of the images, smoothness of the field, and the labels where training has some (sec. III).

The task has similarity and smoothness (eq. 4 to 7). Here are the auxiliary Dice loss on segmentations (eq. 8, 9) and instance-specific optimisation
(sec. III-E), which goes on from the network's answer with gradient steps on one pair's field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from paperzoo.data.volumes import IGNORE
from paperzoo.tasks import registration_measures as measure
from paperzoo.tasks.registration import Config as TaskConfig
from paperzoo.tasks.registration import RegistrationRecipe


@dataclass(frozen=True)
class Config(TaskConfig):
    """The task's settings; the weight of the labels, and how a pair is refined."""

    label_weight: Annotated[float, Field(ge=0)] = 0.0  # gamma; 0: no labels are used
    instance_steps: Annotated[int, Field(ge=0)] = 0  # gradient steps on the field of each pair at test time
    instance_rate: Annotated[float, Field(gt=0)] = 0.1  # voxels, of their Adam


def label_dice(moving: Tensor, fixed: Tensor, displacement: Tensor, classes: int) -> Tensor:
    """-mean Dice over the structures and samples (eq. 8, 9), labels warped linearly as one-hot maps.

    A structure that is in neither mask of a pair does not count, nor does a pair without masks (255 throughout).

    Args:
        moving, fixed: int64 (B, *size). displacement: (B, D, *size), voxels.
    """
    known = ((moving != IGNORE).flatten(1).any(1) & (fixed != IGNORE).flatten(1).any(1)).float()
    one_hot = [F.one_hot(m.where(m != IGNORE, 0), classes).movedim(-1, 1)[:, 1:].float() for m in (moving, fixed)]
    warped, truth = measure.warp(one_hot[0], displacement.float()).flatten(2), one_hot[1].flatten(2)
    there = ((one_hot[0].flatten(2).sum(2) + truth.sum(2)) > 0) * known[:, None]
    dice = 2 * (warped * truth).sum(2) / (warped.sum(2) + truth.sum(2)).clamp(min=1e-5)
    return -(dice * there).sum() / there.sum().clamp(min=1)


class VoxelMorphRecipe(RegistrationRecipe):
    config: Config

    def loss(
        self, batch: tuple[Tensor, ...], displacement: Tensor, regularised: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L_sim + lambda L_smooth + gamma L_seg (eq. 9)."""
        total, logged = super().loss(batch, displacement, regularised)
        if self.config.label_weight == 0:
            return total, logged
        dice = label_dice(batch[2], batch[3], displacement, len(self.facts["labels"]))
        return total + self.config.label_weight * dice, {**logged, "label_loss": dice.detach()}

    def displacement(self, moving: Tensor, fixed: Tensor) -> Tensor:
        found = super().displacement(moving, fixed)
        if self.config.instance_steps == 0:
            return found
        with torch.inference_mode(False), torch.enable_grad():
            return self.refined(moving.clone(), fixed.clone(), found.clone())

    def refined(self, moving: Tensor, fixed: Tensor, start: Tensor) -> Tensor:
        """Instance-specific optimisation: the objective without labels, minimised over the displacements of one pair, from `start`."""
        field = start.detach().requires_grad_(True)
        optimizer = torch.optim.Adam([field], self.config.instance_rate)
        for _ in range(self.config.instance_steps):
            optimizer.zero_grad()
            self.objective(moving, fixed, field)[0].backward()
            optimizer.step()
        return field.detach()


RECIPE = VoxelMorphRecipe

PRESETS = {
    # Axial slices, whose displacements are seen at 3.8 mm as well. Soft tissue lies between -150 and 450 Hounsfield units.
    "embedded": Config(
        model="voxelmorph_slim",
        data="slices",
        dimensions=2,
        size=(40, 32),
        spacing=(3.8, 3.8, 5.0),
        intensity_range=(-150.0, 450.0),
        similarity="mse",
        similarity_weight=100.0,
        smoothness=1.0,
        label_weight=2.0,
        steps=550,
        batch_size=8,
        learning_rate=5e-3,
        schedule="cosine",
    ),
    # Sec. IV and the released code: affinely aligned, skull-stripped T1 scans of 160 x 192 x 224 voxels of 1 mm in [0, 1], to an atlas or to each
    # other; local cross-correlation over 9^3 voxels with lambda 1 (with the mean square 0.02), Adam at 1e-4, one pair a step, 150,000 steps.
    # The axes run right, front, top here, so that the paper's 160 x 192 x 224 reads 160 x 224 x 192.
    "published": Config(
        model="voxelmorph_2",
        data="data/OASIS",
        size=(160, 224, 192),
        spacing=(1.0, 1.0, 1.0),
        similarity="ncc",
        smoothness=1.0,
        steps=150_000,
        batch_size=1,
        learning_rate=1e-4,
        workers=4,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config", "VoxelMorphRecipe"]
