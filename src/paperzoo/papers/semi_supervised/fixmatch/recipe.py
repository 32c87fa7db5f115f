"""FixMatch: a few labelled images, many without, and a network that teaches itself where it is sure.

Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence", 2020, algorithm 1.
Any image classifier can be trained; the paper's is Wide ResNet-28-2 on CIFAR-10 and SVHN.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torchvision.transforms import v2

from paperzoo.data.images import Images, open_images
from paperzoo.engine.runtime import Runtime
from paperzoo.papers.semi_supervised.fixmatch.technique import (
    FixMatchLoss,
    FlipAndShift,
    RandAugmentCutout,
    cosine_7_16,
)
from paperzoo.tasks import classification
from paperzoo.tasks.classification import ClassificationRecipe, Count, Fraction, Positive


@dataclass(frozen=True)
class Config:
    """Section 4.1 and table 4: one set of values for CIFAR-10, CIFAR-100 (weight decay 1e-3 there), SVHN and STL-10."""

    model: str = "wide_resnet28_2"
    data: str = "cifar10"
    unlabelled: str | None = None  # where images without labels are, in class folders of any name; None: all of `data`
    image_size: Count = 32  # pixels; images are resized to this square
    labels_per_class: Count | None = 4  # the labels that may be used; None: all of `data` is labelled
    augment: Literal["shift", "flip_shift"] = "flip_shift"  # the weak augmentation
    shift: Fraction = 0.125  # of the side
    operations: Count = 2  # of the strong augmentation, for each image
    operation_probability: Annotated[float, Field(ge=0, le=1)] = 0.5  # authors' code
    cutout_size: Fraction = 0.5  # of the side; authors' code: 16 of 32 pixels
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.95  # tau
    unlabelled_weight: Annotated[float, Field(ge=0)] = 1.0  # lambda_u
    unlabelled_ratio: Count = 7  # mu: unlabelled images for each labelled one
    batch_size: Count = 64  # labelled images
    steps: Count = 2**20
    optimizer: Literal["sgd", "adam"] = "sgd"  # table 5: Adam is no better and harder to tune
    learning_rate: Positive = 0.03
    momentum: Fraction = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    decay_all: bool = False  # kernels only, as the authors' code
    schedule: Literal["cosine_7_16", "cosine", "constant"] = "cosine_7_16"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    ema_decay: Fraction | None = 0.999
    normalise: Literal["data", "imagenet"] = "data"
    weights: str | None = None
    drop_rate: Fraction = 0.0
    clip: Positive | None = None
    workers: Annotated[int, Field(ge=0)] = 0


class FixMatch(ClassificationRecipe):
    """The task's default recipe, learning from weakly and strongly augmented unlabelled images as well."""

    config: Config

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if config.schedule == "cosine_7_16":
            factor = lambda step: cosine_7_16(step, config.steps)  # noqa: E731
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.weak = FlipAndShift(config.augment == "flip_shift", config.shift)
        self.strong = RandAugmentCutout(config.operations, config.operation_probability, config.cutout_size)
        self.objective = FixMatchLoss(config.threshold, config.unlabelled_weight)
        self.normalise = v2.Compose(self.to_input())

    # -- data: images of one size leave the loader as uint8; views are made on the device, a batch at a time -----------

    def augmentation(self) -> list[torch.nn.Module]:
        return self.view(self.config.image_size)

    def to_square(self, data: Images) -> Images:
        return data.with_transform(v2.Compose(self.view(self.config.image_size)))

    @cached_property
    def labelled_data(self) -> Images:
        data = open_images(self.config.data, "train")
        few = self.config.labels_per_class
        return self.to_square(data if few is None else data.few(few, self.runtime.seed))

    @cached_property
    def unlabelled_data(self) -> Images:
        """As the authors: every training image, those with a label included."""
        return self.to_square(open_images(self.config.unlabelled or self.config.data, "train"))

    @cached_property
    def batches(self):
        size, workers = self.config.batch_size, self.config.workers
        labelled = self.runtime.batches(self.labelled_data, size, "labelled", workers)
        return labelled, self.runtime.batches(
            self.unlabelled_data, size * self.config.unlabelled_ratio, "unlabelled", workers
        )

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weak views (B, 3, H, W) and labels (B,), then weak and strong views of mu B unlabelled images, all uint8."""
        labelled, unlabelled = self.batches
        images, labels = labelled.next()
        others, _ = unlabelled.next()
        return (
            self.augmented(images, self.weak, "labelled views"),
            labels,
            self.augmented(others, self.weak, "weak views"),
            self.augmented(self.augmented(others, self.weak, "before strong"), self.strong, "strong views"),
        )

    def augmented(self, images: Tensor, augment: Any, stream: str) -> Tensor:
        """Random views; the numbers are drawn for the whole batch over all processes, and each takes its rows."""
        count = len(images) * self.runtime.world
        noise = torch.rand(count, augment.noise, generator=self.runtime.rng(stream, per_rank=False))
        return augment(images, self.runtime.shard(noise))

    # -- learning ------------------------------------------------------------------------------------------------

    def step(self, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict:
        """Algorithm 1. All views pass the network together, so that batch norm sees the whole mixture."""
        images, labels, weak, strong = batch
        self.model.train()
        logits = self.model(self.normalise(torch.cat([images, weak, strong])))
        logits, logits_weak, logits_strong = logits.split([len(images), len(weak), len(strong)])
        loss, parts = self.objective(logits, labels, logits_weak, logits_strong)
        return {"loss": loss, **parts}

    # -- the report ----------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, Image.Image]:
        from paperzoo.engine.pictures import tile

        images, _, weak, strong = (t.cpu() for t in self.batch())
        pictures = [
            Image.fromarray(view.permute(1, 2, 0).numpy()).resize((64, 64), Image.Resampling.NEAREST)
            for views in (images, weak, strong)
            for view in views[torch.arange(8) % len(views)]
        ]
        return super().figures() | {"Labelled, weak and strong views": tile(pictures, 8)}


PRESETS = {
    # 40 labels, 4 a digit. Smaller than the paper in everything that costs time; a short run averages over fewer.
    "embedded": Config(
        model="wide_resnet10_2",
        data="digits",
        image_size=16,
        augment="shift",
        steps=320,
        batch_size=12,
        ema_decay=0.98,
    ),
    "published": Config(workers=8),  # CIFAR-10 with 40 labels
}
RECIPE = FixMatch


def supervised(config: Config) -> classification.Config:
    """The task's default recipe: the same network, labels, weak augmentation, steps and optimizer, a larger batch."""
    return classification.Config(
        model=config.model,
        data=config.data,
        image_size=config.image_size,
        augment=config.augment,
        labels_per_class=config.labels_per_class,
        steps=config.steps,
        batch_size=4 * config.batch_size,  # more than all of its 40 images
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        decay_all=config.decay_all,
        ema_decay=config.ema_decay,
    )


BASELINE = (ClassificationRecipe, supervised(PRESETS["embedded"]))
