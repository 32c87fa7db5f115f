"""CutPaste as a recipe: tell normal images from made-up defects, from scratch; the last step fits the Gaussian of normal features.

`RotationRecipe` is for comparison, as the paper does in table 1: the same in everything, but the pretext task is to tell by how many
quarter turns an image was rotated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from paperzoo.engine.models import create
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.papers.anomaly.cutpaste.technique import CutPaste, CutPasteScar, fit_density, mahalanobis
from paperzoo.papers.anomaly.patchcore.recipe import Collected
from paperzoo.tasks.anomaly import AnomalyRecipe

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Config:
    model: str = "cutpaste_resnet18"
    data: str = "mvtec/bottle"
    resize: Count = 256  # appendix A
    crop_size: Count = 256
    pretext: Literal["3-way", "cutpaste", "scar"] = "3-way"
    crop: Count | None = None  # pixels of the crops to learn from; None: whole images
    scar_width: tuple[int, int] = (2, 16)
    scar_length: tuple[int, int] = (10, 25)
    jitter: Annotated[float, Field(ge=0)] = 0.1  # of the colours of what is pasted
    image_jitter: Annotated[float, Field(ge=0)] = 0.1  # of the colours of whole images
    shift: Annotated[float, Field(ge=0, lt=1)] = (
        0.1  # largest random translation of whole images, as a part of their size
    )
    fit_stride: Count | None = None  # between the patches whose features the Gaussian is fitted to; None: the network's
    batch_size: Count = 64  # normal images; each comes with its pasted copies
    test_batch_size: Count = 8
    steps: Count = 65536  # 256 epochs of 256 updates
    learning_rate: Annotated[float, Field(gt=0)] = 0.03
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 3e-5
    workers: NotNegative = 0


PRESETS = {
    "embedded": Config(
        model="cutpaste_patch_resnet8",
        data="defects_brick",
        resize=96,
        crop_size=96,
        crop=32,
        scar_width=(2, 6),
        scar_length=(8, 20),
        image_jitter=0.0,
        fit_stride=16,
        batch_size=24,
        steps=80,
    ),
    # one category at a time: --data mvtec/<category> for each of the 15, the headline is their mean
    "published": Config(workers=8),
    # localisation, sec. 4.2
    "published_patches": Config(model="cutpaste_patch_resnet18", crop=64, fit_stride=32, test_batch_size=1, workers=8),
}


class Views(Dataset):
    """A normal image in all the versions that the pretext task tells apart: float32 (K, 3, S, S), normalised."""

    def __init__(self, data: Any, prepare: v2.Transform, versions: list[v2.Transform], finish: v2.Transform) -> None:
        self.data, self.prepare, self.versions, self.finish = data, prepare, versions, finish

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Tensor:
        image = self.prepare(self.data[i][0])
        return torch.stack([self.finish(version(image)) for version in self.versions])


class QuarterTurns(v2.Transform):
    def __init__(self, turns: int) -> None:
        super().__init__()
        self.turns = turns

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return torch.rot90(inpt, self.turns, (-2, -1))


class CutPasteRecipe(AnomalyRecipe):
    config: Config
    any_size = False  # patches must cover the images

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        self.model = runtime.place(create(config.model, num_classes=len(self.versions())))
        patch = getattr(self.model, "patch_size", None)
        if patch != config.crop:
            raise PaperZooError(
                f"crop is {config.crop}, but {config.model} looks at {patch or 'whole images'}; they must agree"
            )
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, config.steps)

    def versions(self) -> list[v2.Transform]:
        """The classes of the pretext task, normal first."""
        config = self.config
        pasted = CutPaste(jitter=config.jitter)
        scar = CutPasteScar(config.scar_width, config.scar_length, jitter=config.jitter)
        return [v2.Identity(), *{"3-way": [pasted, scar], "cutpaste": [pasted], "scar": [scar]}[config.pretext]]

    @cached_property
    def pretext(self):
        config, normalise = self.config, v2.Normalize(self.facts["mean"], self.facts["deviation"])
        size = [v2.Resize(config.resize, antialias=True), v2.CenterCrop(config.crop_size)]
        place = v2.RandomCrop(config.crop) if config.crop else v2.RandomAffine(0, (config.shift, config.shift))
        jitter = v2.ColorJitter(*[config.image_jitter] * 4) if config.image_jitter else v2.Identity()
        finish = v2.Compose([v2.ToDtype(torch.float32, scale=True), normalise])
        views = Views(self.train_set, v2.Compose([*size, place, jitter]), self.versions(), finish)
        return self.runtime.batches(views, config.batch_size, "pretext", config.workers)

    def batch(self) -> Tensor:
        return self.pretext.next()

    def step(self, batch: Tensor) -> dict:
        """Which version is it? One batch holds all versions of each image."""
        self.model.train()
        labels = torch.arange(batch.shape[1], device=batch.device).repeat(len(batch))
        logits = self.model.logits(batch.flatten(0, 1)).float()
        loss, runtime = F.cross_entropy(logits, labels), self.runtime
        runtime.update(self.optimizer, loss)
        if runtime.micro == runtime.accumulate - 1:
            self.scheduler.step()
            if runtime.step == self.config.steps - 1:
                self.fit()
        return {"pretext_loss": loss.detach(), "pretext_accuracy": (logits.argmax(1) == labels).float().mean()}

    @torch.no_grad()
    def fit(self) -> None:
        """The Gaussian of the normal images' features, as they are, and the threshold."""
        model, images = self.model.eval(), len(self.prepared)
        collected = Collected(images)
        for at in range(-(-images // self.config.test_batch_size)):
            rows, batch, read = self.normal_images(at)
            features = model.views(batch, self.config.fit_stride).float()
            rows, read = rows.to(features.device), read.to(features.device)
            rows, read, features = (self.runtime.gather(t).cpu() for t in (rows, read, features))
            collected.add(rows[read], features[read])
        features = collected.take()
        if not features.numel():
            raise PaperZooError(f"{self.config.data}: no normal image could be read")
        mean, precision = fit_density(features.flatten(0, 1))
        distances = mahalanobis(features.flatten(0, 1).double(), mean, precision)
        model.mean.copy_(mean)
        model.precision.copy_(precision)
        model.threshold.fill_(
            float(distances.max())
        )  # the paper leaves it to the user; this one raises no alarm in training


class RotationRecipe(CutPasteRecipe):
    """The pretext task of RotNet in place of CutPaste's."""

    def versions(self) -> list[v2.Transform]:
        return [QuarterTurns(turns) for turns in range(4)]


RECIPE = CutPasteRecipe
