"""Panoptic FPN learns by its task's default recipe, instances and stuff at once; here are its settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from paperzoo.tasks.panoptic_segmentation import Config, PanopticSegmentationRecipe


class PanopticFPNRecipe(PanopticSegmentationRecipe):
    """The task's recipe; proposals and boxes are cut to the images, not to the batch's canvas."""

    def outputs(self, images: Tensor, sizes: Tensor) -> Any:
        model = self.deployed.eval()
        whole = sizes.tolist() == [list(images.shape[-2:])] * len(images)  # a program of images alone can answer
        return model(images) if whole else model(images, sizes=sizes)


RECIPE = PanopticFPNRecipe

# sec. 5.1, COCO: Mask R-CNN's 1x schedule of 8 GPUs with 2 images each with scale jitter, lambda_s = 0.5. The backbone starts from
# ImageNet (give --backbone-weights). As the released code: the first stage and all batch norms frozen, 1000 steps of warm-up
COCO = Config(
    model="panoptic_fpn_resnet101",
    data="coco",
    image_sizes=(640, 672, 704, 736, 768, 800),
    longest_side=1333,
    augment="flip",
    freeze=("backbone.body.conv1", "backbone.body.bn1", "backbone.body.layer1"),
    freeze_norms=True,
    steps=90_000,
    batch_size=16,
    learning_rate=0.02,
    momentum=0.9,
    weight_decay=1e-4,
    schedule="step",
    milestones=(2 / 3, 8 / 9),
    warmup_steps=1000,
    workers=8,
)

PRESETS = {
    "embedded": Config(
        model="panoptic_fpn_tiny",
        model_arguments={"confidence": 0.1},  # what has learned for so short a time is sure of little
        data="panoptic_scenes",
        scenes=1024,
        scene_size=64,
        scene_objects=2,
        scene_scale=(0.5, 0.8),  # 32 to 51 pixels
        image_sizes=(64,),
        augment="none",  # shapes are turned already
        steps=150,
        batch_size=16,
        optimizer="adamw",
        learning_rate=5e-3,
        weight_decay=1e-4,
        schedule="cosine",
        warmup_steps=20,
        clip=10.0,
    ),
    "published": COCO,
    # sec. 5.1, Cityscapes: 32 random crops of 512 x 1024 after scaling by 0.5 to 2, 65k steps at 0.01, divided by 10 after 40k and 55k
    "cityscapes": replace(
        COCO,
        data="cityscapes",
        image_sizes=(1024,),
        longest_side=4096,
        augment="colour_flip",
        scale=(0.5, 2.0),
        crop=(512, 1024),
        steps=65_000,
        batch_size=32,
        learning_rate=0.01,
        milestones=(40 / 65, 55 / 65),
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
