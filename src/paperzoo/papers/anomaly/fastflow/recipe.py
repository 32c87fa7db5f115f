"""FastFlow as a recipe: flows learn the likelihood of normal images' features, the backbone stays as it is.

The method needs a pretrained backbone: `weights`, a classifier's file, as the published preset uses it. The embedded preset has none
and trains its backbone for a moment first (see `PretrainedRecipe`), which is no part of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any

import torch
from pydantic import Field

from paperzoo.engine.models import create
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.tasks.anomaly import PretrainedRecipe

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Config:
    model: str = "fastflow_resnet18"
    data: str = "mvtec/bottle"
    resize: Count = 256  # sec. 4.2
    crop_size: Count = 256
    flow_steps: Count = 8  # table 6
    only_3x3: bool = True
    hidden_ratio: Annotated[float, Field(gt=0)] = 1.0
    clamp: Annotated[float, Field(gt=0)] = 2.0
    weights: str | None = None  # a classifier's file for the backbone
    batch_size: Count = 32
    epochs: Count = 500
    steps: Count | None = None  # None: pretrain_steps, and `epochs` passes over the normal images
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-5
    clip: float | None = None
    pretrain_steps: NotNegative = 0
    pretrain_size: Count = 64  # pixels of a crop
    pretrain_batch_size: Count = 32
    pretrain_rate: Annotated[float, Field(gt=0)] = 5e-4
    workers: NotNegative = 0


PRESETS = {
    "embedded": Config(
        data="defects_brick",
        resize=96,
        crop_size=96,
        flow_steps=4,
        batch_size=8,
        steps=80,  # 10 of the stand-in for ImageNet, 70 of the flows
        pretrain_steps=10,
    ),
    # one category at a time: --data mvtec/<category> for each of the 15, the headline is their mean;
    # --weights resnet18-f37072fd.pth is torchvision's file (IMAGENET1K_V1)
    "published": Config(workers=4),
}


class FastFlowRecipe(PretrainedRecipe):
    config: Config
    any_size = False  # the layer norms have a weight for each place
    floor = -1.0  # minus the likelihood of what is most likely

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if config.steps is None:
            passes = config.epochs * -(-self.facts["images"] // config.batch_size)
            self.config = replace(config, steps=config.pretrain_steps + passes)
        options = {"steps": config.flow_steps, "only_3x3": config.only_3x3, "hidden_ratio": config.hidden_ratio}
        try:
            model = create(config.model, image_size=config.crop_size, clamp=config.clamp, **options)
        except ValueError as error:
            raise PaperZooError(f"crop_size: {error}") from None
        self.model = runtime.place(model)
        self.prepare_backbone(self.backbone.stage_channels[-1], self.model.load_backbone, self.config.steps)
        self.optimizer = torch.optim.Adam(self.model.learned(), config.learning_rate, weight_decay=config.weight_decay)

    @cached_property
    def normal(self):
        return self.runtime.batches(self.prepared, self.config.batch_size, "normal", self.config.workers)

    def batch(self) -> Any:
        return self.crops.next() if self.pretraining else self.normal.next()

    def step(self, batch: Any) -> dict:
        if self.pretraining:
            return self.pretrain(*batch)
        self.model.train()
        loss, runtime = self.model.loss(batch[0]), self.runtime
        runtime.update(self.optimizer, loss, clip=self.config.clip)
        if runtime.step == self.config.steps - 1 and runtime.micro == runtime.accumulate - 1:
            # the paper leaves the threshold to the user; this one would have raised no alarm in training
            scores = [output["score"].max() for output, _, _ in self.outputs("train")]
            largest = torch.stack(scores).max() if scores else torch.tensor(-1.0, device=runtime.device)
            self.model.threshold.copy_(runtime.gather(largest[None]).max())
        dimensions = sum(norm.weight.numel() for norm in self.model.norms)
        return {"nats_per_dimension": loss.detach() / dimensions}


RECIPE = FastFlowRecipe
