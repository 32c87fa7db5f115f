"""Mask R-CNN learns by its task's default recipe, both stages and the mask branch at once; here are its settings."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from paperzoo.tasks.instance_segmentation import Config, InstanceSegmentationRecipe


class MaskRCNNRecipe(InstanceSegmentationRecipe):
    """The task's recipe; proposals and boxes are cut to the images, not to the batch's canvas."""

    def outputs(self, images: Tensor, sizes: Tensor) -> Any:
        model = self.deployed.eval()
        whole = sizes.tolist() == [list(images.shape[-2:])] * len(images)  # a program of images alone can answer
        return model(images) if whole else model(images, sizes=sizes)


RECIPE = MaskRCNNRecipe

PRESETS = {
    "embedded": Config(
        model="mask_rcnn_tiny_fpn",
        data="shape_scenes",
        scenes=2048,
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
        show_above=0.25,  # what has learned for so short a time is sure of little
    ),
    # sec. 3.1: 8 GPUs with 2 images each, 160k steps of SGD at 0.02, divided by 10 after 120k, images of 800 pixels; with FPN
    # 512 regions an image, a quarter of them objects. The backbone starts from ImageNet (give --backbone-weights). As the
    # released code: the first stage and all batch norms frozen, flipping, 500 steps of warm-up
    "published": Config(
        model="mask_rcnn_resnet101_fpn",
        data="coco",
        image_sizes=(800,),
        longest_side=1333,
        augment="flip",
        freeze=("backbone.body.conv1", "backbone.body.bn1", "backbone.body.layer1"),
        freeze_norms=True,
        steps=150_000,
        batch_size=16,
        learning_rate=0.02,
        momentum=0.9,
        weight_decay=1e-4,
        schedule="step",
        milestones=(0.75,),
        warmup_steps=500,
        workers=8,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
