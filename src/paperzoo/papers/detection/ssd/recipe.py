"""SSD learns by detection's default recipe, with pixels as its VGG wants them; here are its settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from paperzoo.engine.runtime import Runtime
from paperzoo.tasks import detection

VGG_PIXELS = {"mean": [0.48235, 0.45882, 0.40784], "deviation": [1 / 255] * 3}
"""What VGG-16 of Caffe was trained on: 0 to 255 less the mean of ImageNet. torchvision's SSD weights have it as well."""


@dataclass(frozen=True)
class Config(detection.Config):
    normalise: Literal["imagenet", "none", "vgg"] = "vgg"


class SSDRecipe(detection.DetectionRecipe):
    """Detection's default recipe with `normalise="vgg"`."""

    config: Config

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if not facts and config.normalise == "vgg":
            self.facts.update(VGG_PIXELS)


RECIPE = SSDRecipe

# sec. 3.1 and 3.6 for VOC2007+2012: 300 pixels, 32 images, SGD at 1e-3, a tenth after 80k and 100k of 120k steps; distortion,
# zoom-out, crops by IoU and flipping (sec. 2.2, 3.6). The backbone starts from ImageNet (give --backbone-weights)
VOC = Config(
    model="ssd300_vgg16_voc",
    data="voc",
    resize="square",
    image_sizes=(300,),
    multiple=1,
    augment="ssd",
    steps=120_000,
    batch_size=32,
    learning_rate=1e-3,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="step",
    milestones=(2 / 3, 5 / 6),
    warmup_steps=0,
    workers=8,
)

PRESETS = {
    "embedded": Config(
        model="ssd64_slim",
        data="digit_scenes",
        scenes=1024,
        scene_size=64,
        scene_objects=3,
        scene_scale=(0.45, 0.8),  # 29 to 51 pixels
        resize="square",
        image_sizes=(64,),
        multiple=1,
        normalise="imagenet",
        augment="none",  # a mirrored digit is no digit
        steps=1200,
        batch_size=8,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=1e-4,
        schedule="cosine",
        warmup_steps=20,
        clip=10.0,
    ),
    "published": VOC,
    # sec. 3.4: 160k, 40k and 40k steps
    "coco": replace(VOC, model="ssd300_vgg16", data="coco", steps=240_000),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
