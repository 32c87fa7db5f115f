"""MaskFormer learns semantic and panoptic segmentation by the same loss: the recipes of both tasks with one optimizer, and their settings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from paperzoo.engine.recipe import Recipe
from paperzoo.engine.runtime import Runtime
from paperzoo.tasks import panoptic_segmentation, segmentation
from paperzoo.tasks.detection import batch_norms
from paperzoo.tasks.segmentation import Count, SegmentationRecipe
from paperzoo.tasks.training import learning_rate_factor

Factor = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Config(panoptic_segmentation.Config):
    """Panoptic segmentation."""

    model: str = "maskformer_panoptic_resnet50"
    backbone_factor: Factor = 0.1  # the backbone's learning rate, relative
    one_thing: bool = False  # learn where things are and not what: all countable categories of the data are one


@dataclass(frozen=True)
class SemanticConfig(segmentation.Config):
    """Semantic segmentation."""

    model: str = "maskformer_resnet50"
    backbone_factor: Factor = 0.1
    freeze_norms: bool = False  # batch norms keep their statistics and do not learn
    colour: bool = True  # random brightness, contrast, saturation and hue
    side: Count | None = None  # images are resized first, so that their shorter side has so many pixels; also at test


def parameter_groups(model: nn.Module, weight_decay: float, rate: float, factor: float) -> list[dict]:
    """AdamW's groups, as the released code has them: the backbone's learning rate is lower, norms and queries have no decay."""
    free = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
    kept = {id(p) for m in model.modules() if isinstance(m, free) for p in m.parameters(recurse=False)}
    groups = []
    for of_backbone in (True, False):
        for decayed in (True, False):
            chosen = [
                p
                for name, p in model.named_parameters()
                if p.requires_grad and name.startswith("backbone.") == of_backbone and (id(p) not in kept) == decayed
            ]
            if chosen:
                own = {"weight_decay": weight_decay if decayed else 0.0, "lr": rate * (factor if of_backbone else 1.0)}
                groups.append({"params": chosen} | own)
    return groups


# -- panoptic segmentation ---------------------------------------------------------------------------------------------


class OneThing(Dataset):
    """A panoptic data set whose things are all called "thing"; its stuff is as it was."""

    things = frozenset([0])

    def __init__(self, data: Any) -> None:
        stuff = [k for k in range(len(data.labels)) if k not in data.things]
        self.data, self.labels = data, ["thing", *(data.labels[k] for k in stuff)]
        self.numbers = [1 + stuff.index(k) if k in stuff else 0 for k in range(len(data.labels))]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        item = self.data[index]
        return item | {"map": panoptic_segmentation.renamed(item["map"], self.numbers)}

    def path(self, index: int) -> str:
        return self.data.path(index)


class Kept(Dataset):
    """Samples that are the same each time, made once: small pictures are learned from faster than they are prepared."""

    def __init__(self, data: Dataset) -> None:
        self.samples = [data[i] for i in range(len(data))]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        return self.samples[index]


class MaskFormerRecipe(panoptic_segmentation.PanopticSegmentationRecipe):
    """The task's recipe with AdamW on `parameter_groups`; generated scenes that are not transformed are kept in memory."""

    config: Config

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        groups = parameter_groups(self.model, config.weight_decay, config.learning_rate, config.backbone_factor)
        self.optimizer = torch.optim.AdamW(groups, config.learning_rate)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(config, step)
        )

    def open(self, split: str) -> Any:
        data = super().open(split)
        return OneThing(data) if self.config.one_thing else data

    @cached_property
    def train_data(self) -> Dataset:
        c = self.config
        data = panoptic_segmentation.PreparedPanoptic(self.open("train"), self, train=True)
        same = (
            c.augment == "none" and len(c.image_sizes) == 1 and c.scale == (1.0, 1.0) and c.crop is None and not c.zoom
        )
        return Kept(data) if c.data == "panoptic_scenes" and same else data


# -- semantic segmentation ---------------------------------------------------------------------------------------------


class SemanticMaskFormerRecipe(SegmentationRecipe):
    """The task's recipe; the network has the loss, as it is one of masks and not of pixels."""

    config: SemanticConfig

    def build(self, fresh: bool) -> nn.Module:
        model = super().build(fresh)
        if self.config.freeze_norms:
            for norm in batch_norms(model):
                for parameter in norm.parameters():
                    parameter.requires_grad_(False)
        return model

    def groups(self) -> list[dict]:
        c = self.config
        return parameter_groups(self.model, c.weight_decay, c.learning_rate, c.backbone_factor)

    @property
    def sized(self) -> list[nn.Module]:
        return [] if self.config.side is None else [v2.Resize(self.config.side, antialias=True)]

    def augmentation(self) -> list[nn.Module]:
        colour = [v2.RandomPhotometricDistort()] if self.config.colour else []
        return self.sized + super().augmentation() + colour

    def begin_training(self) -> None:
        self.model.train()
        if self.config.freeze_norms:
            for norm in batch_norms(self.model):
                norm.eval()

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        images, masks = batch
        self.begin_training()
        losses = self.model(images, [{"semantic": mask} for mask in masks])
        return {"loss": sum(losses.values())} | {f"{name}_loss": loss.detach() for name, loss in losses.items()}

    def logits(self, images: Tensor) -> Tensor:
        """As the task's, of images at the size of training where `side` is given; the logits have the images' own size."""
        if self.config.side is None:
            return super().logits(images)
        factor = self.config.side / min(images.shape[-2:])
        size = [max(1, round(s * factor)) for s in images.shape[-2:]]
        found = super().logits(F.interpolate(images, size, mode="bilinear", antialias=True))
        return F.interpolate(found, images.shape[-2:], mode="bilinear", align_corners=False)


def recipe(config: Config | SemanticConfig, runtime: Runtime, facts: dict | None = None) -> Recipe:
    """Semantic or panoptic segmentation, as the settings say."""
    kind = SemanticMaskFormerRecipe if isinstance(config, SemanticConfig) else MaskFormerRecipe
    return kind(config, runtime, facts)


RECIPE = recipe

PRESETS = {
    # queries that start from nothing learn in this time where things are, but not what they are
    "embedded": Config(
        model="maskformer_panoptic_tiny",
        model_arguments={"confidence": 0.5, "overlap": 0.6},  # what has learned for so short a time is sure of little
        backbone_factor=1.0,  # it starts from nothing
        data="panoptic_scenes",
        one_thing=True,
        scenes=1024,
        scene_size=64,
        scene_objects=3,
        scene_scale=(0.3, 0.5),  # 19 to 32 pixels
        image_sizes=(64,),
        augment="none",  # shapes are turned already
        steps=200,
        batch_size=12,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=1e-4,
        schedule="cosine",
        warmup_steps=20,
        clip=1.0,
    ),
    "embedded_semantic": SemanticConfig(
        model="maskformer_tiny",
        backbone_factor=1.0,
        data="shape_masks",
        crop_size=64,
        scale=(1.0, 1.0),
        flip=0.5,
        colour=False,
        steps=200,
        batch_size=16,
        optimizer="adamw",
        learning_rate=2e-3,
        warmup_steps=20,
        clip=1.0,
    ),
    # sec. 4.1, ADE20K: AdamW at 1e-4 ("poly"), a tenth of it for a backbone that starts from ImageNet (give --backbone-weights), 160k
    # steps of 16 crops of 512 x 512 after scaling by 0.5 to 2. As the released code: batch norms frozen, gradients clipped at 0.01
    "published": SemanticConfig(
        model="maskformer_resnet50",
        data="ADEChallengeData2016",
        crop_size=512,
        side=512,
        scale=(0.5, 2.0),
        flip=0.5,
        freeze_norms=True,
        steps=160_000,
        batch_size=16,
        optimizer="adamw",
        learning_rate=1e-4,
        weight_decay=1e-4,
        power=0.9,
        clip=0.01,
        workers=8,
    ),
    # the same on Swin-L, the paper's best: 6e-5 for all of it, crops of 640, stronger weight decay, 1500 steps of warm-up
    "swin_large": SemanticConfig(
        model="maskformer_swin_large",
        backbone_factor=1.0,
        data="ADEChallengeData2016",
        crop_size=640,
        side=640,
        scale=(0.5, 2.0),
        flip=0.5,
        steps=160_000,
        batch_size=16,
        optimizer="adamw",
        learning_rate=6e-5,
        weight_decay=0.01,
        power=0.9,
        warmup_steps=1500,
        clip=0.01,
        workers=8,
    ),
    # sec. 4.1, COCO panoptic: 300 epochs of 64 images as DETR learns, a tenth of the rate after 200
    "panoptic": Config(
        model="maskformer_panoptic_resnet50",
        data="coco",
        image_sizes=tuple(range(480, 801, 32)),
        longest_side=1333,
        augment="flip",
        zoom=True,
        freeze_norms=True,
        steps=554_400,
        batch_size=64,
        optimizer="adamw",
        learning_rate=1e-4,
        weight_decay=1e-4,
        schedule="step",
        milestones=(2 / 3,),
        warmup_steps=10,
        clip=0.01,
        workers=8,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config", "SemanticConfig"]
