"""How CNNGeo learns: single pictures, bent by random maps, and the loss on a grid; sec. 4 and 5."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from paperzoo.data.keypoint_pairs import Photographs, open_photographs
from paperzoo.papers.classification.spatial_transformer.technique import Affine
from paperzoo.papers.correspondence.cnngeometric.technique import (
    CROP,
    grid_loss,
    random_affine,
    random_moves,
    training_pairs,
)
from paperzoo.tasks import geometric_matching
from paperzoo.tasks.geometric_matching import Count, Fraction, MatchingRecipe, normalised


@dataclass(frozen=True)
class Config(geometric_matching.Config):
    """The paper's settings; the ranges of the random maps are the released code's."""

    photographs: str = "bent_photographs"  # pictures to learn from; `data` are pairs to measure on
    photograph_size: tuple[Count, Count] = (480, 640)  # height and width they are brought to
    crop: Annotated[float, Field(gt=0, le=1)] = CROP
    grid_size: Annotated[int, Field(ge=2)] = 20  # points of the loss along each side
    reach: Fraction = 0.4  # how far control points and corners move, of half a side
    light: Fraction = 0.0  # how much darker or brighter a target may become; not of the paper
    train_features: bool = False  # else only the regression learns


class CNNGeoRecipe(MatchingRecipe):
    """Each stage learns from pairs of its own, as two networks that learn one after the other would; they share the source's features."""

    config: Config
    any_size = False  # the regression's layers fit one size of correlation maps

    def check_data(self) -> None:
        _ = self.pictures

    @cached_property
    def pictures(self) -> Photographs:
        return open_photographs(self.config.photographs, "train")

    @cached_property
    def batches(self):
        data = Sized(self.pictures, tuple(self.config.photograph_size))
        return self.runtime.batches(data, self.config.batch_size, workers=self.config.workers)

    def build(self, fresh: bool) -> nn.Module:
        model = super().build(fresh)
        model.FeatureExtraction.requires_grad_(self.config.train_features)
        return model

    def truths(self, count: int) -> list[Tensor]:
        """Random parameters (count, P) for each stage."""
        return [
            random_affine(count) if isinstance(transform, Affine) else random_moves(transform, count, self.config.reach)
            for transform in self.model.maps
        ]

    def step(self, batch: dict[str, Tensor]) -> dict:
        config, model = self.config, self.model.train()
        if not config.train_features:
            model.FeatureExtraction.eval()
        pictures = batch["pictures"]
        truths = [truth.to(pictures.device) for truth in self.truths(len(pictures))]
        with torch.autocast(pictures.device.type, enabled=False):
            source, targets = training_pairs(pictures, model.maps, truths, config.image_size, config.crop)
            if config.light:
                targets = [relit(target, config.light) for target in targets]
            seen = normalised(torch.cat([source, *targets]))
        with torch.set_grad_enabled(config.train_features and torch.is_grad_enabled()):
            features = model.FeatureExtraction(seen).split(len(pictures))
        losses = {}
        for stage, (transform, truth) in enumerate(zip(model.maps, truths, strict=True)):
            theta = model.theta(stage, features[0], features[1 + stage]).float()
            losses[f"{model.transforms[stage]}_loss"] = grid_loss(transform, theta, truth, config.grid_size)
        return {"loss": sum(losses.values())} | {name: loss.detach() for name, loss in losses.items()}


def relit(pictures: Tensor, light: float) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1], each darker or brighter by up to `light`, and shifted by a tenth of that."""
    gain, shift = 2 * torch.rand(2, len(pictures), 1, 1, 1, device=pictures.device) - 1
    return ((1 + light * gain) * pictures + 0.1 * light * shift).clamp(0, 1)


class Sized(Dataset):
    """Pictures of one size, float32 in [0, 1]."""

    def __init__(self, pictures: Photographs, size: tuple[int, int]) -> None:
        self.pictures, self.size = pictures, size

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        picture = self.pictures[i][None].float() / 255
        if tuple(picture.shape[2:]) != self.size:  # as the released code, which reads corner pixels at the corners
            picture = F.interpolate(picture, self.size, mode="bilinear", align_corners=True)
        return {"pictures": picture[0]}


RECIPE = CNNGeoRecipe

PRESETS = {
    "embedded": Config(
        model="cnngeo_slim",
        image_size=64,
        length="image",
        photograph_size=(112, 112),
        light=0.25,
        steps=250,
        batch_size=32,
        learning_rate=3e-3,
        schedule="cosine",
        warmup_steps=10,
    ),
    # Sec. 5: pictures of Pascal VOC 2011 or street views bent at random, VGG-16 as learned on ImageNet (--backbone_weights vgg16.pth), batches of 16,
    # Adam at 0.001, ten epochs of about 20,000 pictures; measured on PF-WILLOW, alpha 0.1 of the points' box.
    "published": Config(
        photographs="VOC2011/JPEGImages",
        data="proposal-flow-willow",
        steps=12_500,
        workers=8,
    ),
}
