"""How YOLOX learns (sec. 2.1): detection's default recipe with mosaic, mixup, batches of changing size and a plain end."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from paperzoo.papers.detection.yolox.technique import mixup, mosaic, random_affine, without_slivers
from paperzoo.tasks import detection
from paperzoo.tasks.classification import Count

NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Config(detection.Config):
    model: str = "yolox_s"
    normalise: str = "none"  # the network itself brings pixels to what its weights know
    mosaic: Share = 0.0  # so many of the images are mosaics; the others are resized and padded
    mosaic_scale: tuple[float, float] = (0.1, 2.0)
    mixup: Share = 0.0  # and so many of the mosaics are mixed with another image
    plain_steps: NonNegative = 0  # the last steps, without both and with the L1 loss
    batch_sizes: tuple[Count, ...] = ()  # the side that a step's images are resized to; none: as they are
    augment: str = "none"


class Mosaics(Dataset):
    """A detection data set as YOLOX learns from it: square images of the last of `image_sizes`, in pixels from 0 to 1."""

    def __init__(self, plain: detection.Prepared, config: Any) -> None:
        self.plain, self.config, self.size = plain, config, config.image_sizes[-1]
        # the released code shifts hue, saturation and value by up to 5, 30 and 30 of OpenCV's units
        self.after = v2.Compose([v2.ColorJitter(30 / 255, 0, 30 / 255, 5 / 180), v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.plain)

    def sample(self, index: int) -> dict[str, Tensor]:
        item = self.plain.data[index]
        solid = ~item["crowd"]
        labels = self.plain.labels[item["labels"]][solid]
        return {"image": item["image"], "boxes": item["boxes"][solid], "labels": labels}

    def another(self) -> dict[str, Tensor]:
        return self.sample(int(torch.randint(len(self), ())))

    def __getitem__(self, index: int) -> dict:
        c = self.config
        if float(torch.rand(())) >= c.mosaic:
            return self.plain[index]
        four = [self.sample(index), *(self.another() for _ in range(3))]
        made = random_affine(mosaic(four, self.size), self.size, scale=c.mosaic_scale)
        made = without_slivers(made)
        if len(made["boxes"]) and float(torch.rand(())) < c.mixup:
            made = without_slivers(mixup(made, self.another()))
        canvas = tuple(made["image"].shape[1:])
        boxes = tv_tensors.BoundingBoxes(made["boxes"], format="XYXY", canvas_size=canvas)
        made = self.after({"image": tv_tensors.Image(made["image"]), "boxes": boxes, "labels": made["labels"]})
        image = detection.to_network(made["image"].as_subclass(Tensor), c, self.plain.facts)
        return {"image": image, "boxes": made["boxes"].as_subclass(Tensor).float(), "labels": made["labels"]}


class YOLOXRecipe(detection.DetectionRecipe):
    """Detection's default recipe, and what the paper adds to it."""

    config: Config

    @cached_property
    def mosaics(self) -> Any:
        c, data = self.config, Mosaics(self.train_data, self.config)
        return self.runtime.batches(data, c.batch_size, workers=c.workers, collate=detection.Collate(c.multiple))

    @property
    def plain(self) -> bool:
        """Whether the strong augmentation is over."""
        return self.runtime.step >= self.config.steps - self.config.plain_steps

    def batch(self) -> dict:
        source = self.batches if self.plain or self.config.mosaic == 0 else self.mosaics
        return source.next()

    def step(self, batch: dict) -> dict:
        self.model.use_l1 = self.plain
        sides = self.config.batch_sizes
        if sides and not self.plain:
            choice = torch.randint(len(sides), (), generator=self.runtime.rng("side", per_rank=False))
            batch = resized(batch, sides[int(choice)])
        return super().step(batch)


def resized(batch: dict, side: int) -> dict:
    """The images of a batch with their longer side `side`, and the boxes with them."""
    height, width = batch["images"].shape[-2:]
    shape = [max(32, round(s * side / max(height, width) / 32) * 32) for s in (height, width)]
    factor = batch["images"].new_tensor([shape[1] / width, shape[0] / height]).repeat(2)
    images = F.interpolate(batch["images"], shape, mode="bilinear")
    return batch | {
        "images": images,
        "targets": [t | {"boxes": t["boxes"] * factor} for t in batch["targets"]],
    }


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
        learning_rate=3e-3,
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
