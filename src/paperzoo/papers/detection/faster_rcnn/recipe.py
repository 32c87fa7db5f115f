"""Faster R-CNN learns by detection's default recipe, both stages at once; here are its settings."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from paperzoo.tasks.detection import Config, DetectionRecipe


class FasterRCNNRecipe(DetectionRecipe):
    """The task's recipe; proposals are cut to the images, not to the batch's canvas."""

    def detect(self, images: Tensor, sizes: Tensor, originals: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        model = self.deployed.eval()
        canvas = tuple(images.shape[-2:])
        whole = sizes.tolist() == [list(canvas)] * len(images)  # nothing to cut: a program of images alone can answer
        found = model.postprocess(model(images) if whole else model(images, sizes=sizes), sizes, canvas)
        for objects, size, original in zip(found, sizes, originals, strict=True):
            factor = (original.to(size.device) / size).flip(0).repeat(2)
            objects["boxes"] = objects["boxes"] * factor.to(objects["boxes"].dtype)
        return found


RECIPE = FasterRCNNRecipe

PRESETS = {
    "embedded": Config(
        model="faster_rcnn_small",
        data="digit_scenes",
        scenes=1024,
        scene_size=64,
        scene_objects=3,
        scene_scale=(0.45, 0.8),  # 29 to 51 pixels
        image_sizes=(64,),
        augment="none",  # a mirrored digit is no digit
        steps=1500,
        batch_size=8,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=1e-4,
        schedule="cosine",
        warmup_steps=20,
        clip=10.0,
    ),
    # sec. 3.1.3, 3.3, 4.1: SGD at 0.001, then 0.0001, images of 600 pixels, flipping; VGG-16 from ImageNet (give
    # --backbone-weights), conv1 and conv2 as they are. 70k steps of one image with the rate divided after 50k is the released
    # code's joint training on VOC 2007; the paper alternates between the stages
    "published": Config(
        model="faster_rcnn_vgg16",
        data="VOC2007",
        image_sizes=(600,),
        longest_side=1000,
        augment="flip",
        freeze=tuple(f"backbone.body.features.{i}." for i in (0, 2, 5, 7)),
        steps=70_000,
        batch_size=1,
        learning_rate=0.001,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="step",
        milestones=(5 / 7,),
        warmup_steps=0,
        workers=4,
    ),
}
