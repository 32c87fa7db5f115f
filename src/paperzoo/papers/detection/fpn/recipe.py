"""How FPN is judged on its own (paper, sec. 5.1): region proposals from the pyramid, against proposals from C4 alone.

The recipe is detection's default one with every object of one class. The measure is the average recall over IoU 0.5 to
0.95 with the best k proposals of an image. `BASELINE` is table 1 (a): the same backbone, anchors, data and steps, but no
pyramid.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from paperzoo.data.coco import DetectionData
from paperzoo.tasks.detection import Config, DetectionRecipe


class Objects(DetectionData):
    """Another detection data set with a single class, "object"."""

    labels = ["object"]

    def __init__(self, data: DetectionData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        item = self.data[index]
        return item | {"labels": torch.zeros_like(item["labels"])}

    def path(self, index: int) -> str:
        return self.data.path(index)


class ProposalRecipe(DetectionRecipe):
    """A region proposal network learns where objects are, whatever they are."""

    monitor = ("AR10", "max")

    def open(self, split: str) -> DetectionData:
        return Objects(super().open(split))

    def metric(self) -> Any:
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision(
            box_format="xyxy", iou_type="bbox", max_detection_thresholds=[10, 100, 1000], backend="pycocotools"
        )
        metric.warn_on_many_detections = False  # a thousand proposals an image is the protocol
        return metric.to(self.runtime.device)

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """AR10, AR100, AR1000: average recall over IoU 0.5 to 0.95 with so many proposals an image; by size with 1000."""
        return {name: value for name, value in super().evaluate(split).items() if name.startswith("AR")}


RECIPE = ProposalRecipe

PRESETS = {
    "embedded": Config(
        model="rpn_tiny_fpn",
        data="digit_scenes",
        scenes=512,
        scene_size=96,
        scene_objects=6,
        scene_scale=(0.1, 0.6),  # 10 to 58 pixels: the more sizes, the more a pyramid is for
        image_sizes=(96,),
        augment="flip",
        steps=200,
        batch_size=16,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=1e-4,
        schedule="cosine",
        warmup_steps=20,
        clip=1.0,
    ),
    # sec. 5.1: 8 GPUs with 2 images each, 256 anchors an image, SGD at 0.02 for 30k steps and 0.002 for 10k, images of 800
    # pixels, ResNet-50 from ImageNet (give --backbone-weights), all batch norms frozen
    "published": Config(
        model="rpn_resnet50_fpn",
        data="coco",
        image_sizes=(800,),
        longest_side=1333,
        augment="flip",
        freeze=("backbone.body.conv1", "backbone.body.bn1", "backbone.body.layer1"),
        freeze_norms=True,
        steps=40_000,
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

BASELINE = (ProposalRecipe, replace(PRESETS["embedded"], model="rpn_tiny_c4"))
