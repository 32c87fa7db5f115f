"""PatchCore as a recipe: each step adds the features of a batch of normal images; the last step selects the coreset.

The method needs a pretrained backbone. `weights` is a classifier's file (torchvision's ResNet-18 or WideResNet-50-2), as the published
preset uses it. The embedded preset has none and trains its backbone for a moment first (see `PretrainedRecipe`), which is no part of the paper.
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
from paperzoo.papers.anomaly.patchcore.model import greedy_coreset, image_scores, nearest_neighbours
from paperzoo.tasks.anomaly import PretrainedRecipe

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Config:
    model: str = "patchcore_wide_resnet50_2"
    data: str = "mvtec/bottle"
    resize: Count = 256  # shorter side, sec. 4.1
    crop_size: Count = 224
    feature_dim: Count = 1024  # the authors' code
    coreset: Annotated[float, Field(gt=0, le=1)] = (
        0.1  # part of the features that is kept; the paper reports 25%, 10% and 1%
    )
    projected_dim: Count = 128  # of the random projection, the authors' code
    neighbours: Count = 9  # b of eq. 7; the paper does not say; 1: no re-weighting, as the authors' code
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
        model="patchcore_resnet18",
        data="defects_brick",
        resize=160,  # from 96: the first feature map has a stride of 8
        crop_size=160,
        feature_dim=256,
        coreset=0.05,
        batch_size=8,
        steps=36,  # 30 of the stand-in for ImageNet, 6 for the 48 normal images
        pretrain_steps=30,
    ),
    # one category at a time: --data mvtec/<category> for each of the 15, the headline is their mean;
    # --weights wide_resnet50_2-95faca4d.pth is torchvision's file (IMAGENET1K_V1, the one the paper's numbers were made with)
    "published": Config(workers=4),
}


class Collected:
    """The features of the normal images so far, image by image, so that neither their order nor the number of processes matters."""

    def __init__(self, images: int) -> None:
        self.features: Tensor = torch.zeros(0)  # (images, P, D) from the first batch on
        self.filled = torch.zeros(images, dtype=torch.bool)

    def add(self, rows: Tensor, features: Tensor) -> None:
        if not self.features.numel():
            self.features = features.new_zeros(len(self.filled), *features.shape[1:])
        self.features[rows] = features
        self.filled[rows] = True

    def take(self) -> Tensor:
        """All features (images that were read, P, D); nothing is kept."""
        features = self.features[self.filled] if self.features.numel() else self.features
        self.features, self.filled = torch.zeros(0), torch.zeros_like(self.filled)
        return features

    def state_dict(self) -> dict[str, Tensor]:
        return {"features": self.features, "filled": self.filled}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.features, self.filled = state["features"], state["filled"]


class PatchCoreRecipe(PretrainedRecipe):
    config: Config

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if runtime.accumulate != 1:
            raise PaperZooError(
                "accumulate must be 1 for patchcore: there is no gradient to average; raise batch_size instead"
            )
        images = self.facts["images"]
        if config.steps is None:
            self.config = replace(config, steps=config.pretrain_steps + -(-images // config.batch_size))
        self.model = runtime.place(create(config.model, feature_dim=config.feature_dim, neighbours=config.neighbours))
        # the last step always fills the memory
        self.prepare_backbone(self.model.backbone.stage_channels[2], self.model.load_backbone, self.config.steps)
        self.collected = Collected(images)

    def batch(self) -> Any:
        """Crops with labels while the backbone is trained; then the next images, with their numbers."""
        if self.pretraining:
            return self.crops.next()
        return self.normal_images(self.runtime.step - self.pretrain_steps)

    def deepest(self, images: Tensor) -> Tensor:
        return self.model.maps(images)[-1]

    # -- learning ------------------------------------------------------------------------------------------------

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
        if self.runtime.step == self.config.steps - 1:
            self.fill_memory()
        return {"images": int(self.collected.filled.sum()), "memory": len(self.model.memory_bank)}

    @torch.no_grad()
    def fill_memory(self) -> None:
        """The coreset of everything collected becomes the bank, and the threshold is set."""
        features = self.collected.take().to(self.runtime.device)
        if not features.numel():
            raise PaperZooError(f"{self.config.data}: no normal image could be read")
        flat = features.flatten(0, 1)
        count = max(1, int(len(flat) * self.config.coreset))
        generator = self.runtime.rng("coreset", per_rank=False)
        chosen = greedy_coreset(flat, count, generator, self.config.projected_dim)
        self.model.memory_bank = flat[chosen].clone()
        self.model.threshold.fill_(self.largest_normal_score(features, chosen // features.shape[1]))

    def largest_normal_score(self, features: Tensor, source: Tensor) -> float:
        """The largest score among the normal images, each judged by the bank rows that come from other images; inf for a single one.

        The paper leaves the threshold to the user; this one would have raised no alarm in training.
        """
        bank, largest = self.model.memory_bank, -float("inf")
        for i, patches in enumerate(features):
            others = bank[source != i]
            if len(others):
                distances, rows = nearest_neighbours(patches, others)
                score = image_scores(
                    distances[None, :, 0], rows[None, :, 0], patches[None], others, self.config.neighbours
                )
                largest = max(largest, float(score))
        return largest if largest > -float("inf") else float("inf")


RECIPE = PatchCoreRecipe
