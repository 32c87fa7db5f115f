"""HED's training: the task's default recipe with a learning rate for each kind of layer (sec. 3.1 and the released solver)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paperzoo.papers.segmentation.hed.model import HED
from paperzoo.tasks import edges
from paperzoo.tasks.edges import EdgeRecipe, NotNegative


@dataclass(frozen=True)
class Config(edges.Config):
    """Sec. 3.1: SGD in single pictures, ten of which make an update, 1e-6, divided by 10 every 10,000 of 30,000 updates, momentum 0.9,
    weight decay 2e-4; edges are what three annotators or more drew, everything else is not; scales of 0.5 to 1.5, mirrors, turns.
    """

    last_stage_factor: NotNegative = 1.0  # learning rates, relative to `learning_rate`; biases have twice as much
    side_factor: NotNegative = 1.0
    fuse_factor: NotNegative = 1.0
    bias_factor: NotNegative = 1.0


class HEDRecipe(EdgeRecipe):
    config: Config
    model: HED

    def make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        if config.optimizer != "sgd":
            return super().make_optimizer()
        last = self.model.ends[-2]
        parts: list[tuple[nn.Module, float]] = [(self.model.features[:last], 1.0)]
        parts += [(self.model.features[last:], config.last_stage_factor)]
        parts += [(self.model.side, config.side_factor), (self.model.fuse, config.fuse_factor)]
        groups = []
        for part, factor in parts:
            for ending, own, decay in (("weight", 1.0, config.weight_decay), ("bias", config.bias_factor, 0.0)):
                chosen: list[Tensor] = [p for name, p in part.named_parameters() if name.endswith(ending)]
                groups.append({"params": chosen, "lr": config.learning_rate * factor * own, "weight_decay": decay})
        return torch.optim.SGD(groups, config.learning_rate, config.momentum)


PRESETS = {
    "embedded": Config(
        model="hed_slim",
        data="shape_edges",
        crop_size=64,
        scale=(1.0, 1.0),
        steps=220,
        batch_size=8,
        optimizer="adamw",
        learning_rate=5e-3,
        weight_decay=1e-2,
        schedule="cosine",
        warmup_steps=10,
        tolerance=0.018,  # a pixel and a half: of a diagonal of 90 pixels the benchmark's 0.0075 would be less than one
        thresholds=19,
        border=0,
    ),
    # --backbone-weights takes an ImageNet VGG-16's file. The authors turned and scaled the pictures beforehand.
    "published": Config(
        model="hed_vgg16",
        data="bsds500",
        pixels="caffe",
        turn=180.0,
        agreed=0.49,  # three of five or six annotators
        last_stage_factor=100.0,
        side_factor=0.01,
        fuse_factor=0.001,
        bias_factor=2.0,
        workers=8,
    ),
}

RECIPE = HEDRecipe

__all__ = ["PRESETS", "RECIPE", "Config"]
