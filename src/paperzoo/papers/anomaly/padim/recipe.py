"""PaDiM as a recipe: each step adds the features of a batch of normal images; the last step fits the Gaussians.

The method needs a pretrained backbone: `weights`, a classifier's file, as the published preset uses it. The embedded preset has none
and trains its backbone for a moment first (see `PretrainedRecipe`), which is no part of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from paperzoo.engine.models import create
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.papers.anomaly.padim.model import fit_gaussians, left_out_distances
from paperzoo.papers.anomaly.patchcore.recipe import Collected
from paperzoo.tasks.anomaly import PretrainedRecipe

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Config:
    model: str = "padim_wide_resnet50_2"
    data: str = "mvtec/bottle"
    resize: Count = 256  # shorter side, sec. IV-B
    crop_size: Count = 224
    features: Count = 550  # d, sec. V-A
    epsilon: Annotated[float, Field(gt=0)] = 0.01  # sec. III-B
    weights: str | None = None  # a classifier's file for the backbone
    batch_size: Count = 8
    steps: Count | None = None  # None: pretrain_steps, and one pass over the normal images
    pretrain_steps: NotNegative = 0
    pretrain_size: Count = 64  # pixels of a crop
    pretrain_batch_size: Count = 32
    pretrain_rate: Annotated[float, Field(gt=0)] = 5e-4
    workers: NotNegative = 0


PRESETS = {
    "embedded": Config(
        model="padim_resnet18",
        data="defects_flower",
        resize=96,
        crop_size=96,
        features=140,  # as many as take little memory at 24 x 24 places
        batch_size=8,
        steps=26,  # 20 of the stand-in for ImageNet, 6 for the 48 normal images
        pretrain_steps=20,
    ),
    # one category at a time: --data mvtec/<category> for each of the 15, the headline is their mean;
    # --weights wide_resnet50_2-95faca4d.pth is torchvision's file (IMAGENET1K_V1)
    "published": Config(workers=4),
}


class PaDiMRecipe(PretrainedRecipe):
    config: Config
    any_size = False  # every place has its own Gaussian

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if runtime.accumulate != 1:
            raise PaperZooError(
                "accumulate must be 1 for padim: there is no gradient to average; raise batch_size instead"
            )
        images = self.facts["images"]
        if config.steps is None:
            self.config = replace(config, steps=config.pretrain_steps + -(-images // config.batch_size))
        self.model = runtime.place(create(config.model, features=config.features))
        self.collected = Collected(images)
        self.prepare_backbone(self.backbone.stage_channels[-1], self.model.load_backbone, self.config.steps)

    def batch(self) -> Any:
        """Crops with labels while the backbone is trained; then the next images, with their numbers."""
        return self.crops.next() if self.pretraining else self.normal_images(self.runtime.step - self.pretrain_steps)

    def step(self, batch: Any) -> dict:
        if self.pretraining:
            return self.pretrain(*batch)
        rows, images, read = batch
        self.model.eval()
        with torch.no_grad():
            patches = self.model.features(images).float().flatten(2).transpose(1, 2).contiguous()
        device = self.runtime.device
        rows, read, patches = (self.runtime.gather(t.to(device)).cpu() for t in (rows, read, patches))
        self.collected.add(rows[read], patches[read])
        images = int(self.collected.filled.sum())
        if self.runtime.step == self.config.steps - 1:
            self.fit()
        return {"images": images}

    @torch.no_grad()
    def fit(self) -> None:
        """The Gaussians of everything collected, and the threshold; on the CPU, as not every device has float64."""
        features = self.collected.take()
        if not features.numel():
            raise PaperZooError(f"{self.config.data}: no normal image could be read")
        mean, inverse = fit_gaussians(features, self.config.epsilon)
        self.model.mean, self.model.inverse_covariance = mean.to(self.runtime.device), inverse.to(self.runtime.device)
        self.model.threshold.fill_(self.largest_normal_score(features))

    def largest_normal_score(self, features: Tensor) -> float:
        """The largest score among the normal images, each judged by the Gaussians of all others; inf for fewer than three.

        The paper leaves the threshold to the user; this one would have raised no alarm in training.
        """
        if len(features) < 3:
            return float("inf")
        size = self.config.crop_size
        side = round(features.shape[1] ** 0.5)
        distances = left_out_distances(features, self.config.epsilon)
        return max(float(self.model.to_maps(d[None], (side, side), (size, size)).max()) for d in distances)


RECIPE = PaDiMRecipe
