"""How YOLOX learns (sec. 2.1): detection's default recipe with mosaic, mixup, batches of changing size and a plain end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from paperzoo.tasks import detection

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Config(detection.Config):
    model: str = "yolox_s"
    normalise: str = "none"  # the network itself brings pixels to what its weights know
    mosaic: Share = 0.0  # so many of the images are mosaics; the others are resized and padded
    mosaic_scale: tuple[float, float] = (0.1, 2.0)
    mixup: Share = 0.0  # and so many of the mosaics are mixed with another image
    augment: detection.Augment = "none"  # of the images that are no mosaics, and of the plain steps


class YOLOXRecipe(detection.DetectionRecipe):
    """Detection's default recipe, with the paper's shares of mosaics and the L1 loss at the end."""

    config: Config

    @property
    def mosaic_shares(self) -> tuple[float, float]:
        return self.config.mosaic, self.config.mixup

    def step(self, batch: dict) -> dict:
        self.model.use_l1 = self.plain
        return super().step(batch)


RECIPE = YOLOXRecipe

EPOCH = 924  # steps of 128 of COCO train2017's 118,287 images

PRESETS = {
    "embedded": Config(
        model="yolox_slim",
        data="digit_scenes",
        scenes=1024,
        scene_size=64,
        scene_objects=3,
        scene_scale=(0.45, 0.8),  # 29 to 51 pixels
        image_sizes=(64,),
        steps=1400,
        plain_steps=175,
        batch_size=8,
        optimizer="adamw",
        learning_rate=1e-3,  # with more it depends on the last bits whether classes are told apart in time
        weight_decay=1e-4,
        schedule="cosine",
        warmup_steps=20,
        clip=10.0,
    ),
    # sec. 2.1: 300 epochs, 5 of warm-up, SGD of 0.01 x batch / 64 with a cosine, 448 to 832 pixels, a running average;
    # mosaic, mixup and flipping, but for the last 15 epochs. The rest as the released code. Nothing is pre-trained
    "published": Config(
        model="yolox_x",
        data="coco",
        image_sizes=(640,),
        longest_side=640,
        augment="flip",
        mosaic=1.0,
        mixup=1.0,
        plain_steps=15 * EPOCH,
        batch_sizes=tuple(range(448, 833, 32)),
        steps=300 * EPOCH,
        batch_size=128,
        learning_rate=0.02,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        decay_all=False,
        schedule="cosine",
        warmup_steps=5 * EPOCH,
        ema_decay=0.9998,
        workers=8,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
