"""GoogLeNet learns by the task's default recipe, with the losses of the auxiliary classifiers added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from paperzoo.tasks import classification
from paperzoo.tasks.classification import ClassificationRecipe


@dataclass(frozen=True)
class Config(classification.Config):
    auxiliary: Annotated[float, Field(ge=0)] = 0.3  # weight of either auxiliary loss (sec. 5); 0 builds none


class GoogLeNetRecipe(ClassificationRecipe):
    config: Config

    def build(self) -> nn.Module:
        model = super().build()
        if self.config.auxiliary:
            model.add_auxiliary(len(self.facts["labels"]))
            model.paperzoo["arguments"]["aux_logits"] = True
        return model

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        if not self.config.auxiliary:
            return super().step(batch)
        images, labels = batch
        self.model.train()
        logits, late, early = self.model(images)
        main = self.loss(logits, labels)
        total = main + self.config.auxiliary * (self.loss(late, labels) + self.loss(early, labels))
        hits = (logits.detach().argmax(1) == labels).float().mean()
        return {"loss": total, "main_loss": main.detach(), "train_accuracy": hits}


RECIPE = GoogLeNetRecipe
EPOCH = 40_037  # steps of 32 images over ImageNet's 1.28 million

PRESETS = {
    "embedded": Config(
        model="googlenet_slim",
        data="digits",
        image_size=32,
        augment="shift",  # a mirrored digit is no digit
        steps=230,
        batch_size=64,
        learning_rate=0.02,
        weight_decay=1e-4,
        schedule="cosine",
        warmup_steps=20,
    ),
    # Sec. 6: asynchronous gradient descent, momentum 0.9, the rate times 0.96 every 8 epochs, the weights averaged at the end;
    # crops of 8% to 100% of the image. Batch, first rate, weight decay and length are not stated: they are those of Caffe's
    # public copy (32, 0.01, 2e-4, 2.4 million steps), which is 60 epochs.
    "published": Config(
        model="googlenet_2014",
        data="imagenet",
        image_size=224,
        augment="crop_flip",
        normalise="imagenet",
        drop_rate=0.4,
        steps=60 * EPOCH,
        batch_size=32,
        learning_rate=0.01,
        nesterov=False,
        weight_decay=2e-4,
        schedule="step",
        milestones=tuple(n * 8 / 60 for n in range(1, 8)),
        gamma=0.96,
        ema_decay=0.9999,
        workers=16,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
