"""MobileViT learns by the task's default recipe with a multi-scale sampler (sec. 3.2): each step has a size of its own.

Small images come in larger batches, so that every step costs about the same: b_t = b (H_max W_max) / (H_t W_t).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.feeding import Batches
from paperzoo.tasks.classification import ClassificationRecipe, Count, augmentation
from paperzoo.tasks.classification import Config as ClassificationConfig

EPOCH = 1_281_167 // 1024  # whole batches of 1024 images


@dataclass(frozen=True)
class Config(ClassificationConfig):
    """The task's settings, and the sizes of the sampler; `batch_size` is that of the largest, `image_size` is for evaluation."""

    model: str = "mobilevit_s"
    image_size: Count = 256
    sampler_sizes: tuple[Count, ...] = (160, 192, 256, 288, 320)  # pixels


class SizedBatches(Batches):
    """Batches of the most rows that a size allows; each step takes as many of them as its own size does."""

    def __init__(self, recipe: MultiScaleRecipe) -> None:
        most = max(recipe.rows_at(size) for size in recipe.config.sampler_sizes) * recipe.runtime.world
        super().__init__(recipe.runtime, recipe.train_data, most, "data", recipe.config.workers, None)
        self.recipe = recipe

    def rows(self, position: int) -> list[int]:
        return super().rows(position)[: self.recipe.rows_at(self.recipe.size_at(position))]


class MultiScaleRecipe(ClassificationRecipe):
    """Sec. 3.2. The augmented image has the largest size; a step's images are brought to the step's size together."""

    config: Config

    def size_at(self, position: int) -> int:
        """The size of a batch, the same on every rank and whenever the run is resumed."""
        sizes = self.config.sampler_sizes
        return sizes[self.runtime.key("size", position) % len(sizes)]

    def rows_at(self, size: int) -> int:
        """How many images of this size a rank takes."""
        share = self.runtime.share(self.config.batch_size)
        return max(1, share * max(self.config.sampler_sizes) ** 2 // size**2)

    def augmentation(self) -> list[nn.Module]:
        return augmentation(self.config.augment, max(self.config.sampler_sizes), self.config.magnitude)

    @cached_property
    def batches(self) -> SizedBatches:
        return SizedBatches(self)

    def batch(self) -> tuple[Tensor, Tensor]:
        images, labels = self.batches.next()
        size = self.size_at(self.runtime.position)
        if size != images.shape[-1]:
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        return images, labels


RECIPE = MultiScaleRecipe

EMBEDDED = Config(
    model="mobilevit_digits",
    data="digits",
    image_size=32,
    sampler_sizes=(24, 32),
    augment="shift",  # a mirrored digit is no digit
    steps=220,
    batch_size=48,
    optimizer="adamw",
    learning_rate=4e-3,
    weight_decay=0.01,
    schedule="cosine",
    warmup_steps=20,
    label_smoothing=0.1,
)

PRESETS = {
    "embedded": EMBEDDED,
    "one_size": replace(EMBEDDED, sampler_sizes=(32,)),
    # Sec. 4.1: AdamW for 300 epochs, effective batch 1024, rate 2e-4 to 2e-3 in 3000 steps and back on a cosine, weight decay
    # 0.01, label smoothing 0.1, random crops and flips alone, running average of the weights. Sec. 3.2: five sizes.
    "published": Config(
        model="mobilevit_s",
        data="imagenet",
        augment="crop_flip",
        normalise="imagenet",
        drop_rate=0.1,
        steps=300 * EPOCH,
        batch_size=1024,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=0.01,
        schedule="cosine",
        warmup_steps=3000,
        label_smoothing=0.1,
        ema_decay=0.9995,
        workers=16,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
