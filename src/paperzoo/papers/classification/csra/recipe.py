"""CSRA learns by binary cross-entropy, the head ten times as fast as the backbone (sec. 4.1, released code)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torchvision.transforms import v2

from paperzoo.engine.models import create
from paperzoo.engine.runtime import Runtime
from paperzoo.engine.weights import read_state
from paperzoo.errors import PaperZooError
from paperzoo.papers.classification.csra.model import AttentiveClassifier
from paperzoo.tasks import multi_label
from paperzoo.tasks.classification import Count, Positive
from paperzoo.tasks.multi_label import MultiLabelRecipe
from paperzoo.tasks.training import parameter_groups

EPOCH = 5_011 // 16  # whole batches over the trainval split of VOC 2007


@dataclass(frozen=True)
class Config(multi_label.Config):
    """The task's settings, with the release's values for VOC 2007 as defaults."""

    model: str = "csra"
    data: str = "voc2007.csv"
    num_heads: Literal[1, 2, 4, 6, 8] = 1
    lam: Annotated[float, Field(ge=0)] = 0.1  # weight of the attention; with 0 it is plain average pooling
    backbone_weights: str | None = None  # of a classifier, for example ImageNet's; None starts from random ones
    head_rate: Positive = 10.0  # the head's learning rate, of the backbone's
    image_size: Count = 448
    augment: Literal["none", "shift", "flip_shift", "crop_flip", "randaugment", "large_crop"] = "large_crop"
    normalise: Literal["none", "data", "imagenet"] = "none"  # pixels in 0 … 1
    learning_rate: Positive = 0.01
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    batch_size: Count = 16
    steps: Count = 30 * EPOCH
    warmup_steps: Annotated[int, Field(ge=0)] = 2 * EPOCH
    schedule: Literal["constant", "cosine", "step"] = "step"
    milestones: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = tuple(n / 30 for n in range(4, 30, 4))


class CSRARecipe(MultiLabelRecipe):
    """The task's recipe with residual attention."""

    config: Config

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        self.config = config
        if not facts and config.normalise == "none":
            facts = {"labels": self.open("train").labels, "mean": [0.0] * 3, "deviation": [1.0] * 3}
        super().__init__(config, runtime, facts)
        if config.head_rate != 1:
            groups = []
            for part, rate in ((self.model.backbone, 1.0), (self.model.classifier, config.head_rate)):
                for group in parameter_groups(part, config.weight_decay, config.decay_all):
                    groups.append(group | {"lr": config.learning_rate * rate})
            self.optimizer = type(self.optimizer)(groups, **self.optimizer.defaults)
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.learning_rate_factor)

    def build(self) -> nn.Module:
        c = self.config
        if c.weights is not None:
            return super().build()
        model = create(c.model, num_classes=len(self.facts["labels"]), num_heads=c.num_heads, lam=c.lam)
        if c.backbone_weights is not None:
            path = Path(c.backbone_weights).expanduser()
            try:
                model.backbone.load_body(read_state(path))
            except (ValueError, RuntimeError) as error:
                raise PaperZooError(f"{path}: these weights do not fit the backbone of {c.model}: {error}") from None
        return model

    def augmentation(self) -> list[nn.Module]:
        """ "large_crop": at least 70% of the picture, mirrored or not, as the release has it."""
        if self.config.augment == "large_crop":
            crop = v2.RandomResizedCrop(self.config.image_size, scale=(0.7, 1.0), antialias=True)
            return [v2.RandomHorizontalFlip(), crop]
        return super().augmentation()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Binary cross-entropy, averaged over classes and images."""
        smoothing = self.config.label_smoothing
        return F.binary_cross_entropy_with_logits(logits, labels * (1 - smoothing) + smoothing / 2)

    @torch.inference_mode()
    def figures(self) -> dict[str, Image.Image]:
        """Held-out images beside the places that count for the classes they have."""
        pictures = super().figures()
        model = self.deployed.eval()
        if isinstance(model, AttentiveClassifier) and self.shown:
            transform = v2.Compose(self.view(self.config.image_size) + self.to_input())
            images = torch.stack([transform(image) for image, _ in self.shown])
            maps = model.attention(self.runtime.to_device(images)).cpu()
            title = "Held-out images, and where the first head looks for the classes that are there"
            pictures[title] = attended(
                [image for image, _ in self.shown], [t for _, t in self.shown], maps, self.facts["labels"]
            )
        return pictures


def attended(
    images: list[Tensor], targets: list[Tensor], maps: Tensor, labels: list[str], side: int = 96
) -> Image.Image:
    """Each uint8 image (3, H, W), and beside it once more, lit by the attention map of each of at most three of its classes."""
    from paperzoo.engine.pictures import tile
    from paperzoo.tasks.classification import captioned

    rows = []
    for image, target, attention in list(zip(images, targets, maps, strict=True))[:8]:
        square = v2.functional.resize(image, [side, side], antialias=True)
        row = [captioned(square, "", side)]
        for k in target.nonzero().flatten().tolist()[:3]:
            light = F.interpolate(attention[None, k : k + 1], size=(side, side), mode="bilinear", align_corners=False)[
                0
            ]
            lit = square.float() * (0.35 + 0.65 * light / light.max().clamp_min(1e-12))
            row.append(captioned(lit.round().to(torch.uint8), labels[k], side))
        blank = Image.new("RGB", row[0].size, "white")
        rows += row + [blank] * (4 - len(row))
    return tile(rows, 8)


VOC = Config()  # give --data a table of the images and their labels, and ResNet-101 of ImageNet as --backbone-weights
EMBEDDED = replace(
    VOC, model="csra_digits", data="digit_scenes", image_size=48, augment="none", normalise="data", lam=1.0, head_rate=1.0,
    steps=650, batch_size=16, optimizer="adam", learning_rate=2e-3, weight_decay=0.0, schedule="cosine", warmup_steps=60,
)  # fmt: skip
PRESETS = {
    "embedded": EMBEDDED,
    "published": VOC,
    # README of the release: six heads, started from a ResNet-101 that was trained with CutMix
    "published_coco": replace(
        VOC, data="coco2014.csv", num_heads=6, lam=0.5, steps=30 * (82_081 // 16), warmup_steps=2 * (82_081 // 16),
        milestones=tuple(n / 30 for n in range(5, 30, 5)),
    ),
}  # fmt: skip
RECIPE = CSRARecipe
BASELINE = (CSRARecipe, replace(EMBEDDED, lam=0.0))  # the same network with average pooling

__all__ = ["BASELINE", "PRESETS", "RECIPE", "Config"]
