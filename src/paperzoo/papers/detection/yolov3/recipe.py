"""YOLOv3 learns by detection's default recipe; here are priors from the data, the authors' weight files, and the settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from paperzoo.engine.models import create
from paperzoo.papers.detection.yolov3.darknet_file import (
    classes_in,
    is_darknet_file,
    load_darknet_weights,
    read_darknet_weights,
)
from paperzoo.papers.detection.yolov3.technique import kmeans_anchors
from paperzoo.tasks import detection


@dataclass(frozen=True)
class Config(detection.Config):
    model: str = "yolov3"
    normalise: Literal["imagenet", "none"] = "none"
    anchors: Literal["model", "data"] = "model"  # the model's own priors (COCO's), or nine clusters of the data's boxes


class YOLOv3Recipe(detection.DetectionRecipe):
    """Detection's default recipe; `weights` and `backbone_weights` may also be Darknet's own files."""

    config: Config

    def model_arguments(self) -> dict[str, Any]:
        arguments = super().model_arguments()
        if self.config.anchors == "data":
            if "anchors" not in self.facts:
                self.facts["anchors"] = data_anchors(self)
            arguments["anchors"] = self.facts["anchors"]
        return arguments

    def build(self) -> nn.Module:
        config = self.config
        files = {name: getattr(config, name) for name in ("weights", "backbone_weights")}
        files = {name: path for name, path in files.items() if is_darknet_file(path)}
        self.config = replace(config, **dict.fromkeys(files))
        try:
            model = super().build()
        finally:
            self.config = config
        if "weights" in files:
            classes = classes_in(read_darknet_weights(files["weights"]), model)
            other = create(config.model, num_classes=max(1, classes), **self.model_arguments())
            load_darknet_weights(other, files["weights"])
            if classes != model.num_classes:
                other.reset_classifier(model.num_classes)
            model.load_state_dict(other.state_dict())
        if "backbone_weights" in files:
            load_darknet_weights(model.backbone, files["backbone_weights"])
        return model


def data_anchors(recipe: detection.DetectionRecipe, most: int = 2000) -> list[list[list[float]]]:
    """Nine priors from the boxes of at most `most` images, as large as the network sees them; three for each stride, 32 first."""
    data = recipe.open("train")
    sizes = []
    for i in range(0, len(data), -(-len(data) // most)):
        item = data[i]
        boxes = item["boxes"][~item["crowd"]] * network_scale(item["image"], recipe.config)
        sizes.append(boxes[:, 2:] - boxes[:, :2])
    anchors = kmeans_anchors(torch.cat(sizes), 9).view(3, 3, 2).flip(0).tolist()
    return [[[round(side, 1) for side in anchor] for anchor in level] for level in anchors]


def network_scale(image: Tensor, config: Config) -> Tensor:
    """What boxes are multiplied with, (4,), when an image is resized for evaluation. Computed on shapes alone."""
    shape = torch.empty(image.shape, device="meta")
    return detection.scale(image, detection.resized(shape, config.resize, config.image_sizes[-1], config.longest_side))


RECIPE = YOLOv3Recipe

PRESETS = {
    "embedded": Config(
        model="yolov3_slim",
        anchors="data",
        data="shape_scenes",
        scenes=1024,
        scene_size=64,
        scene_objects=2,
        scene_scale=(0.45, 0.8),  # 29 to 51 pixels
        image_sizes=(64,),
        augment="flip",
        steps=800,
        batch_size=8,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=1e-4,
        schedule="cosine",
        warmup_steps=20,
        clip=10.0,
        show_above=0.3,
    ),
    # sec. 2.1 to 2.4 and yolov3.cfg: 64 images a step, SGD of 0.001, a tenth of it after 400,000 and after 450,000 of 500,200 steps,
    # 1,000 of warm-up; the longer side is drawn anew every ten steps. Colours, crops and flips as mmdet's recipe, which the paper
    # leaves open ("lots of data augmentation"). The backbone starts from ImageNet: --backbone-weights darknet53.conv.74
    "published": Config(
        model="yolov3",
        data="coco",
        image_sizes=(608,),
        longest_side=608,
        augment="ssd",
        batch_sizes=tuple(range(320, 609, 32)),
        batch_sizes_every=10,
        steps=500_200,
        batch_size=64,
        learning_rate=1e-3,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="step",
        milestones=(400_000 / 500_200, 450_000 / 500_200),
        warmup_steps=1000,
        workers=8,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
