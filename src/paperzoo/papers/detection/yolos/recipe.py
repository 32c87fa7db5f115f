"""YOLOS learns by detection's default recipe, if wanted without telling classes apart; here are its settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from torch.utils.data import Dataset

from paperzoo.data.coco import DetectionData
from paperzoo.tasks import detection


@dataclass(frozen=True)
class Config(detection.Config):
    one_class: bool = False  # learn where objects are and not what: all classes of the data are one


class OneClass(DetectionData):
    """A data set whose objects are all called "object"."""

    def __init__(self, data: DetectionData) -> None:
        self.data, self.labels = data, ["object"]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        item = self.data[index]
        return item | {"labels": item["labels"].new_zeros(len(item["labels"]))}

    def path(self, index: int) -> str:
        return self.data.path(index)


class Kept(Dataset):
    """Samples that are the same each time, made once: small pictures are learned from faster than they are prepared."""

    def __init__(self, data: detection.Prepared) -> None:
        self.samples = [data[i] for i in range(len(data))]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        return self.samples[index]


class YOLOSRecipe(detection.DetectionRecipe):
    """Detection's default recipe, with `one_class`; generated scenes that are not transformed are kept in memory."""

    config: Config

    @cached_property
    def train_data(self) -> Dataset:
        data, c = detection.Prepared(self.open("train"), self, train=True), self.config
        return Kept(data) if c.data in detection.SCENES and c.augment == "none" and len(c.image_sizes) == 1 else data

    def open(self, split: str) -> DetectionData:
        data = super().open(split)
        return OneClass(data) if self.config.one_class else data


RECIPE = YOLOSRecipe

EPOCH = 14_786  # steps of 8 of COCO train2017's 118,287 images

# sec. 3.1 and the released code for YOLOS-B: 150 epochs of AdamW on 8 images a step, 2.5e-5 with a cosine, weight decay 1e-4, sides
# of 480 to 800 pixels. The transformer starts from DeiT-B (give --backbone-weights), the rest from nothing
BASE = Config(
    model="yolos_base",
    data="coco",
    resize="shortest",
    image_sizes=tuple(range(480, 801, 32)),
    longest_side=1333,
    multiple=16,
    normalise="imagenet",
    augment="flip",
    steps=150 * EPOCH,
    batch_size=8,
    optimizer="adamw",
    learning_rate=2.5e-5,
    weight_decay=1e-4,
    schedule="cosine",
    warmup_steps=0,
    clip=0.1,
    workers=8,
)

PRESETS = {
    # a transformer that starts from nothing learns in this time where things are, but not what they are
    "embedded": Config(
        model="yolos_mini",
        data="shape_scenes",
        one_class=True,
        scenes=2048,
        scene_size=32,
        scene_objects=1,
        scene_scale=(0.4, 0.75),  # 13 to 24 pixels
        resize="square",
        image_sizes=(32,),
        multiple=8,
        augment="none",
        steps=700,
        batch_size=64,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=1e-4,
        schedule="cosine",
        warmup_steps=50,
        clip=1.0,
    ),
    "published": BASE,
    # YOLOS-Ti: 300 epochs on 16 images a step, smaller sides
    "tiny": replace(
        BASE,
        model="yolos_tiny",
        image_sizes=tuple(range(272, 513, 16)),
        longest_side=853,
        steps=300 * EPOCH // 2,
        batch_size=16,
        learning_rate=5e-5,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
