"""Relevancy at work: a small vision transformer learns digits one at a time, and is asked for one of two.

Each image that is explained shows two different digits. Attention itself does not know which of them is asked for; the relevancy
for a class has to point at that digit and not at the other. Neither boxes nor pairs were ever trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from paperzoo.data.chalk_scenes import grid_scenes
from paperzoo.data.scenes import LABELS
from paperzoo.papers.detection.yolos.model import ViT
from paperzoo.papers.interpretability.generic_attention_explainability.technique import (
    TransformerRelevance,
    image_map,
    raw_attention,
    rollout,
)
from paperzoo.tasks import explanation
from paperzoo.tasks.classification import Count
from paperzoo.tasks.explanation import SCENES, ExplanationRecipe
from paperzoo.tasks.explanation_metrics import pointing_game


@dataclass(frozen=True)
class Config(explanation.Config):
    """The transformer, what it learns, and what is explained."""

    model: str = "vit"  # the recipe's own; its size follows
    width: Count = 64
    depth: Count = 4
    heads: Count = 4
    hidden: Count = 128
    patch: Count = 8


class Classifier(nn.Module):
    """A vision transformer whose class token becomes logits: (B, 3, H, W) -> (B, num_classes)."""

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__()
        size = (config.image_size, config.image_size)
        self.vit = ViT(config.width, config.depth, config.heads, config.hidden, config.patch, size, 0, False, 3, 1e-6)
        self.head = nn.Linear(config.width, num_classes)
        for position in (self.vit.embeddings.cls_token, self.vit.embeddings.position_embeddings):
            nn.init.trunc_normal_(position, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.vit(images)[:, 0])


class RelevanceRecipe(ExplanationRecipe):
    """The explanation recipe of a transformer."""

    config: Config

    def build(self) -> nn.Module:
        return Classifier(self.config, len(self.facts["labels"]))

    @property
    def layer(self) -> str:
        """None: the attention of every layer counts."""
        return ""

    def explain(self, model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        return TransformerRelevance(model)(images, classes)

    def by_attention(self, matrix: Callable, model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        """An explainer from attention alone: `raw_attention` or `rollout`."""
        attentions, _ = TransformerRelevance(model).attentions(images, classes)
        return image_map(matrix(attentions), tuple(images.shape[-2:]))

    # -- data ----------------------------------------------------------------------------------------------------------

    def scenes(self, split: str) -> list[dict[str, Tensor]]:
        """One digit each: what is learned, and what accuracy is measured on."""
        count = self.config.train_scenes if split == "train" else self.config.test_scenes
        return grid_scenes(count, self.config.image_size, split)

    def explained_scenes(self, split: str) -> list[dict[str, Tensor]]:
        """Two digits each, of which the first is asked for and alone counts as evidence."""
        found = grid_scenes(self.config.explained, self.config.image_size, split, digits=2, seed=1)
        return [scene | {"boxes": scene["boxes"][:1]} for scene in found]

    # -- measuring -----------------------------------------------------------------------------------------------------

    def own_measures(self, maps: Tensor, images: Tensor, labels: Tensor, instances: Tensor) -> dict[str, Tensor]:
        """raw_attention, rollout: their pointing game on the same images, by attention that knows no class."""
        inside = instances.any(1)
        return {
            matrix.__name__: pointing_game(self.by_attention(matrix, self.deployed, images, labels).cpu(), inside)
            for matrix in (raw_attention, rollout)
        }

    def own_figures(self, images: list, inputs: Tensor, results: list) -> dict[str, Image.Image]:
        """Images with two digits: relevancy for the one, for the other, and rollout, which is the same for both."""
        from paperzoo.engine.pictures import tile

        if self.config.data != SCENES:
            return {}
        found = self.explained_scenes("test")[:8]
        pair = torch.stack([self.as_input(s["image"]) for s in found]).to(self.runtime.device)
        classes = torch.stack([s["labels"] for s in found]).to(self.runtime.device)
        rows = []
        for column in (0, 1):
            maps = self.explain(self.deployed, pair, classes[:, column]).cpu()
            names = [f"{LABELS[c]}?" for c in classes[:, column].tolist()]
            rows += [self.heat(s["image"], m, n) for s, m, n in zip(found, maps, names, strict=True)]
        maps = self.by_attention(rollout, self.deployed, pair, classes[:, 0]).cpu()
        rows += [self.heat(s["image"], m, "rollout") for s, m in zip(found, maps, strict=True)]
        return {"One of two digits": tile(rows, len(found))}


PRESETS = {
    "embedded": Config(
        image_size=32,
        depth=3,
        augment="none",
        steps=300,
        batch_size=48,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=0.05,
        schedule="cosine",
        warmup_steps=20,
        explained=128,
    ),
    # sec. 5: ViT-B/16 trained on ImageNet's class folders (as DeiT trains it), explained on its validation images
    "published": Config(
        data="imagenet",
        image_size=224,
        width=768,
        depth=12,
        heads=12,
        hidden=3072,
        patch=16,
        augment="randaugment",
        normalise="imagenet",
        steps=300 * 1251,
        batch_size=1024,
        optimizer="adamw",
        learning_rate=1e-3,
        weight_decay=0.05,
        schedule="cosine",
        warmup_steps=5 * 1251,
        mixup=0.8,
        cutmix=1.0,
        erase=0.25,
        label_smoothing=0.1,
        workers=8,
    ),
}
RECIPE = RelevanceRecipe
