"""TIRG's settings, losses and learning rates; everything else is the task's.

Vo et al., "Composing Text and Image for Image Retrieval", CVPR 2019; the released code (google/tirg) gives what the paper leaves open.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from paperzoo.papers.retrieval.tirg.technique import composition_loss
from paperzoo.tasks import composed_retrieval
from paperzoo.tasks.classification import Positive
from paperzoo.tasks.composed_retrieval import ComposedRecipe
from paperzoo.tasks.training import learning_rate_factor, make_optimizer


@dataclass(frozen=True)
class Config(composed_retrieval.Config):
    """The released code's commands: 160,000 steps of 32 queries, SGD at 0.01, weight decay 1e-6."""

    loss: Literal["softmax", "soft_triplet"] = "softmax"  # the second for CSS and MIT-States
    backbone_rate: Positive = 1.0  # the pretrained layers' rate, as a factor: 0.1 on photographs


class TirgRecipe(ComposedRecipe):
    config: Config
    engine_parts = ("forward", "embed_image")  # the query, and the gallery's pictures

    def make_learner(self) -> None:
        """The image encoder without its last layer learns at `backbone_rate`."""
        config = self.config
        if config.backbone_rate == 1.0:
            return super().make_learner()
        head = getattr(self.model.img_model, "fc", None)
        fresh = [] if head is None else list(head.parameters())
        slow = [p for p in self.model.img_model.parameters() if not any(p is q for q in fresh)]
        self.optimizer = make_optimizer(config, self.model)
        for group in list(self.optimizer.param_groups):  # each is split in two
            mine = [p for p in group["params"] if any(p is q for q in slow)]
            group["params"] = [p for p in group["params"] if not any(p is q for q in mine)]
            if mine:
                others = {k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr")}
                self.optimizer.add_param_group(
                    {"params": mine, "lr": config.learning_rate * config.backbone_rate, **others}
                )
        factor = lambda step: learning_rate_factor(config, step)  # noqa: E731
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def loss(self, queries: Tensor, targets: Tensor) -> Tensor:
        scaled = self.model.normalization_layer
        return composition_loss(self.config.loss, scaled(queries), scaled(targets), self.runtime)


FASHION = Config(
    data="Fashion200k",
    backbone_rate=0.1,
    schedule="step",
    milestones=(50 / 160, 100 / 160, 150 / 160),
    workers=4,
)
PRESETS = {
    # small pictures, a small network, Adam for its few steps; what is measured is the composition
    "embedded": Config(
        data="composed_shapes",
        image_size=24,
        crop=False,
        normalise="data",
        embed_dim=64,
        model_arguments={"backbone": "resnet20_cifar"},
        steps=120,
        batch_size=32,
        optimizer="adamw",
        learning_rate=4e-3,
        weight_decay=0.01,
        schedule="cosine",
        warmup_steps=15,
    ),
    "published": FASHION,  # --backbone-weights is torchvision's ResNet-18
    "published_mit_states": replace(FASHION, data="mitstates", loss="soft_triplet", weight_decay=5e-5),
    # its queries are published as a pickle, which is refused: write them to a CSV; the image encoder learns at the full rate
    "published_css": Config(data="CSSDataset/queries.csv", loss="soft_triplet", workers=4),
}
RECIPE = TirgRecipe

# The paper's own comparison: the same encoders, both features side by side.
BASELINE = (TirgRecipe, replace(PRESETS["embedded"], model="tirg_concat"))
