"""STFPM as a recipe: the student follows the teacher on normal images; a part of them, held out, picks its best epoch.

The teacher needs pretrained weights: `weights`, torchvision's ResNet-18, as the published preset uses it. The embedded preset has none
and trains the teacher for a moment first (see `PretrainedRecipe`), which is no part of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Subset

from paperzoo.engine.feeding import note_broken
from paperzoo.engine.models import create
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError
from paperzoo.tasks.anomaly import PretrainedRecipe

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Config:
    model: str = "stfpm_resnet18"
    data: str = "mvtec/bottle"
    resize: Count = 256  # sec. 4.1
    crop_size: Count = 256
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2  # of the normal images, the authors' code
    weights: str | None = None  # a classifier's file for the teacher
    batch_size: Count = 32
    epochs: Count = 100
    steps: Count | None = None  # None: pretrain_steps, and `epochs` passes over the normal images that are not held out
    learning_rate: Annotated[float, Field(gt=0)] = 0.4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    pretrain_steps: NotNegative = 0
    pretrain_size: Count = 64  # pixels of a crop
    pretrain_batch_size: Count = 32
    pretrain_rate: Annotated[float, Field(gt=0)] = 5e-4
    workers: NotNegative = 0


PRESETS = {
    "embedded": Config(
        data="defects_brick",
        resize=64,  # from 96
        crop_size=64,
        batch_size=8,
        steps=80,  # 10 of the stand-in for ImageNet, 70 of the student
        pretrain_steps=10,
        pretrain_size=48,
    ),
    # one category at a time: --data mvtec/<category> for each of the 15, the headline is their mean;
    # --weights resnet18-f37072fd.pth is torchvision's file (IMAGENET1K_V1)
    "published": Config(workers=4),
}


class BestStudent:
    """The student of the epoch with the smallest error on held-out normal images."""

    def __init__(self) -> None:
        self.error, self.weights = float("inf"), {}

    def offer(self, error: float, student: nn.Module) -> None:
        if error < self.error:
            self.error = error
            self.weights = {name: value.detach().clone() for name, value in student.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return {"error": self.error, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.error, self.weights = state["error"], state["weights"]


class STFPMRecipe(PretrainedRecipe):
    config: Config

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        images = self.facts["images"]
        if images < 2:
            raise PaperZooError(
                f"{config.data}: has {images} normal image; it takes one to learn from and one to hold out"
            )
        self.kept = images - min(images - 1, max(1, round(config.held_out * images)))
        self.epoch = -(-self.kept // config.batch_size)  # steps
        if config.steps is None:
            self.config = replace(config, steps=config.pretrain_steps + config.epochs * self.epoch)
        self.model = runtime.place(create(config.model))
        self.prepare_backbone(self.backbone.stage_channels[-1], self.model.load_teacher, self.config.steps)
        self.optimizer = torch.optim.SGD(
            self.model.student.parameters(),
            config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.best = BestStudent()

    @property
    def backbone(self) -> nn.Module:
        return self.model.teacher

    @cached_property
    def split(self) -> tuple[Subset, Subset]:
        """The normal images to learn from, and those held out."""
        generator = torch.Generator().manual_seed(self.runtime.key("held out"))
        order = torch.randperm(self.facts["images"], generator=generator).tolist()
        return Subset(self.prepared, order[: self.kept]), Subset(self.prepared, order[self.kept :])

    @cached_property
    def normal(self):
        return self.runtime.batches(self.split[0], self.config.batch_size, "normal", self.config.workers)

    def batch(self) -> Any:
        return self.crops.next() if self.pretraining else self.normal.next()

    def step(self, batch: Any) -> dict:
        if self.pretraining:
            return self.pretrain(*batch)
        self.model.train()
        loss, runtime = self.model.loss(batch[0]), self.runtime
        runtime.update(self.optimizer, loss)
        values = {"matching_loss": loss.detach()}
        done = runtime.step - self.pretrain_steps + 1
        last = runtime.step == self.config.steps - 1
        if runtime.micro == runtime.accumulate - 1 and (last or done % self.epoch == 0):
            maps, scores = self.held_out_outputs()
            self.best.offer(float(maps), self.model.student)
            values["held_out_error"] = maps
            if last:
                self.model.student.load_state_dict(self.best.weights)
                # the paper leaves the threshold to the user; this one raises no alarm on held-out normal images
                self.model.threshold.fill_(self.held_out_outputs()[1])
        return values

    @torch.no_grad()
    def held_out_outputs(self) -> tuple[Tensor, Tensor]:
        """The mean of all maps of held-out images, and the largest of their scores, on every rank."""
        model, means, scores, batch = self.model.eval(), [], [], self.config.batch_size
        images = [image for image in map(self.held_out_image, range(len(self.split[1]))) if image is not None]
        if not images:
            raise PaperZooError(f"{self.config.data}: none of the held-out images could be read")
        for start in range(0, len(images), batch):
            output = model(self.runtime.to_device(torch.stack(images[start : start + batch])))
            means.append(output["map"].float().mean((1, 2)))
            scores.append(output["score"].float())
        return torch.cat(means).mean(), torch.cat(scores).max()

    def held_out_image(self, i: int) -> Tensor | None:
        """None, and a note in the run's log, where the file is broken."""
        try:
            return self.split[1][i][0]
        except DataError as error:
            note_broken(self.runtime, [(error.path, error.problem)], len(self.prepared))
            return None


RECIPE = STFPMRecipe
