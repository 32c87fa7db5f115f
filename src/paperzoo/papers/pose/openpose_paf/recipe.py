"""How OpenPose learns and finds people: the task's default recipe with fields and maps, and the average over scales at test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from paperzoo.data.skeletons import COCO, OPENPOSE, Skeleton
from paperzoo.papers.pose.openpose_paf.technique import (
    COCO_ORDER,
    affinity_fields,
    assemble,
    candidates,
    confidence_maps,
    masked_loss,
)
from paperzoo.tasks import multi_pose
from paperzoo.tasks.classification import Positive

NotNegative = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Config(multi_pose.Config):
    """The task's settings, and those of maps, fields and assembly; thresholds as the released code's."""

    normalise: str = "half"
    sigma: Positive = 7.0  # of the confidence maps, in pixels
    limb_width: Positive = 1.0  # of the fields, in cells
    head_rate: Positive = 1.0  # learning rate of what follows VGG's layers, as a factor
    smooth: NotNegative = 3.0  # blur before peaks are looked for, in pixels of the image
    peak_above: NotNegative = 0.1
    limb_above: NotNegative = 0.05
    least_parts: Annotated[int, Field(ge=1)] = 4
    least_score: NotNegative = 0.4


class OpenPoseRecipe(multi_pose.MultiPoseRecipe):
    """Everybody in the image, from affinity fields and confidence maps."""

    config: Config

    def network_skeleton(self, skeleton: Skeleton) -> Skeleton:
        """COCO's people get a neck, half-way between their shoulders, and the limbs of the released code."""
        return OPENPOSE if skeleton == COCO else skeleton

    def arguments(self) -> dict[str, Any]:
        return {"num_keypoints": len(self.skeleton), "num_limbs": len(self.skeleton.limbs)}

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The config's optimizer, with another rate for what does not come from VGG."""
        optimizer, rate = super().make_optimizer(), self.config.learning_rate * self.config.head_rate
        named = self.model.named_parameters()
        front = {id(p) for name, p in named if name.startswith("model0.") and "CPM" not in name}
        for group in list(optimizer.param_groups):
            head = [p for p in group["params"] if id(p) not in front]
            group["params"] = [p for p in group["params"] if id(p) in front]
            optimizer.add_param_group(group | {"params": head, "lr": rate})
        return optimizer

    # -- learning ------------------------------------------------------------------------------------------------

    def losses(self, outputs: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Eq. 5 of both branches, summed over stages."""
        fields, maps = (y.float() for y in outputs)
        size, stride, c = tuple(maps.shape[-2:]), self.model.stride, self.config
        keypoints, weight = batch["keypoints"], batch["weight"]
        true_maps = confidence_maps(keypoints, weight, size, stride, c.sigma)
        true_fields = affinity_fields(keypoints, weight, self.skeleton.limbs, size, stride, c.limb_width)
        mask = F.avg_pool2d(batch["mask"].float(), stride) > 0.5
        return {"fields": masked_loss(fields, true_fields, mask), "maps": masked_loss(maps, true_maps, mask)}

    # -- use -----------------------------------------------------------------------------------------------------

    def mirrored_limbs(self) -> list[int]:
        """The channels of the fields that take each one's place in a mirrored image."""
        limbs, flip = list(self.skeleton.limbs), self.skeleton.flip
        places = [
            limbs.index((flip[a], flip[b])) if (flip[a], flip[b]) in limbs else c for c, (a, b) in enumerate(limbs)
        ]
        return [2 * c + k for c in places for k in (0, 1)]

    def averaged(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Fields (B, 2 C, H, W) and maps (B, K + 1, H, W) in pixels of the images: the mean over scales and mirror images."""
        model, size = self.deployed.eval(), images.shape[-2:]
        totals: list[Any] = [0.0, 0.0]
        factors = self.config.test_scales
        for scale in factors:
            inputs, factor = self.network_input(images, scale)
            real = [round(side * factor) for side in size]
            outputs = list(model(inputs))
            if self.config.flip_test:
                # the image is mirrored, then padded anew: the grey stays on the right
                other, _ = self.network_input(images.flip(-1), scale)
                fields, maps = (enlarged(y, model.stride, real) for y in model(other))
                swapped = fields.flip(-1)[:, self.mirrored_limbs()].clone()
                swapped[:, ::2] *= -1  # the x components
                keypoints = [*self.skeleton.flip, len(self.skeleton)]
                outputs = [enlarged(y, model.stride, real) for y in outputs]
                outputs = [(outputs[0] + swapped) / 2, (outputs[1] + maps.flip(-1)[:, keypoints]) / 2]
            else:
                outputs = [enlarged(y, model.stride, real) for y in outputs]
            for i, y in enumerate(outputs):
                whole = y if y.shape[-2:] == size else F.interpolate(y, size, mode="bicubic")
                totals[i] = totals[i] + whole / len(factors)
        return totals[0], totals[1]

    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        fields, maps = self.averaged(images)
        c, limbs = self.config, self.skeleton.limbs
        parts = candidates(maps[:, :-1].float(), c.peak_above, c.smooth)
        order = COCO_ORDER if self.skeleton == OPENPOSE else None
        results = []
        for people, field in zip(parts, fields.float().cpu(), strict=True):
            found, total, _ = assemble(people, field, limbs, order, c.least_parts, c.least_score, c.limb_above)
            score = total / (len(self.skeleton) + len(limbs))  # the sum over keypoints and limbs, each at most about 1
            best = score.argsort(descending=True, stable=True)
            results.append(
                {"keypoints": found[best, :, :2], "keypoint_scores": found[best, :, 2], "scores": score[best]}
            )
        return results


def enlarged(maps: Tensor, stride: int, size: list[int]) -> Tensor:
    """Maps brought to the pixels of the network's input (bicubic), without what was padded."""
    whole = F.interpolate(maps.float(), scale_factor=float(stride), mode="bicubic")
    return whole[..., : size[0], : size[1]]


RECIPE = OpenPoseRecipe

PRESETS = {
    # From nothing, in seconds: a thin network with batch norm, smaller pictures with one or two people, gentler augmentation.
    # From nothing, in seconds: a thin network with batch norm, smaller pictures with one or two people, gentler augmentation.
    "embedded": Config(
        model="openpose_slim",
        data="stick_crowds",
        figures=1024,
        figure_size=64,
        figure_people=2,
        figure_scale=(0.65, 0.9),
        image_size=(64, 64),
        framing="image",
        image_scale=(0.97, 1.03),
        shift=0.03,
        rotate=3.0,
        sigma=4.0,
        smooth=2.0,
        limb_above=0.02,
        least_score=0.2,
        test_size=None,
        flip_test=True,
        steps=260,
        batch_size=8,
        optimizer="adam",
        learning_rate=3e-3,
        weight_decay=0.0,
        schedule="cosine",
        warmup_steps=10,
        show_above=0.1,
    ),
    # Sec. 3 and the released code: parts of 368 pixels around a person who fills 0.3 to 0.66 of them, turned by up to 40 degrees,
    # mirrored; momentum 0.9 at 4e-5, four times that after VGG's layers, a third of it every 136,106 steps. It starts from
    # VGG-19: --backbone-weights vgg19.pth. Tests average four scales.
    "published": Config(
        model="openpose_coco18",
        data="coco",
        image_size=(368, 368),
        framing="person",
        person_share=(0.3, 0.66),
        shift=0.11,
        rotate=40.0,
        sigma=7.0,
        smooth=3.0,
        test_size=368,
        test_scales=(0.5, 1.0, 1.5, 2.0),
        flip_test=True,
        steps=600_000,
        batch_size=10,
        optimizer="sgd",
        learning_rate=4e-5,
        momentum=0.9,
        weight_decay=5e-4,
        head_rate=4.0,
        schedule="step",
        milestones=(136_106 / 600_000, 272_212 / 600_000, 408_318 / 600_000, 544_424 / 600_000),
        gamma=0.333,
        workers=8,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
