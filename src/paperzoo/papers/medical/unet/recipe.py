"""U-Net learns by cross-entropy with a weight for every pixel, from elastically deformed pictures (sec. 3).

Pictures go through `paperzoo.tasks.segmentation`; what differs is here: the weight map, the deformations, and windows that are larger than
their masks, because the network's convolutions have no padding. Grey pictures fill the task's three channels.

Besides the task's metrics there is the cell tracking challenge's: every true object against the predicted object that covers more than half of
it, their IoU, 0 without one, averaged over all true objects. Objects are connected parts of a class, so two cells that are
predicted in one piece count once at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from paperzoo.data.masks import open_masks
from paperzoo.data.phantoms import Cells
from paperzoo.engine.models import create
from paperzoo.errors import PaperZooError
from paperzoo.papers.medical.unet.technique import balancing, border_weights, elastic_places, read
from paperzoo.tasks.segmentation import Config as SegmentationConfig
from paperzoo.tasks.segmentation import Count, NotNegative, Positive, SegmentationRecipe, metrics


@dataclass(frozen=True)
class Config(SegmentationConfig):
    """The task's settings and U-Net's own. `crop_size` is the side of the output, without the border that gives context."""

    scale: tuple[Positive, Positive] = (1.0, 1.0)  # the paper does not scale
    tile: Count = 388  # side of the output tiles in which larger pictures are answered
    border_weight: NotNegative = 10.0  # w_0 of eq. 2
    border_sigma: Positive = 5.0  # pixels
    balanced: bool = True  # w_c of eq. 2 by the frequency of the classes; else 1
    elastic: NotNegative = 10.0  # pixels, standard deviation of the random vectors
    elastic_grid: Annotated[int, Field(ge=2)] = 3  # vectors along each side
    rotate: NotNegative = 180.0  # degrees
    brightness: NotNegative = 0.1  # grey values plus up to this, in [0, 1]
    contrast: NotNegative = 0.2  # and times 1 +- this


class WeightedPatches(Dataset):
    """Deformed patches: (image float32 (3, S + 2 border, S + 2 border), mask int64 (S, S), weights float32 (S, S)).

    The weight map of a picture is computed once and deformed with it.
    """

    def __init__(self, data: Any, config: Config, facts: dict, border: int, class_weights: Tensor) -> None:
        self.data, self.config, self.facts, self.border = data, config, facts, border
        self.class_weights = class_weights
        self.kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.data)

    def path(self, i: int) -> str:
        return str(self.data.path(i))

    def weights(self, i: int, mask: Tensor) -> Tensor:
        if i not in self.kept:
            c = self.config
            found = border_weights(mask, self.class_weights, c.border_weight, c.border_sigma, c.ignore_index)
            self.kept[i] = found.half()  # two bytes a pixel: all maps stay in memory
        return self.kept[i].float()

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        image, mask = (part.as_subclass(Tensor) for part in self.data[i])
        c, border = self.config, self.border
        side = c.crop_size + 2 * border
        middle = [
            torch.rand(()) * (n - c.crop_size) + (c.crop_size - 1) / 2 if n > c.crop_size else torch.tensor((n - 1) / 2)
            for n in mask.shape
        ]
        places = elastic_places((side, side), c.elastic, c.elastic_grid, c.rotate, c.flip > 0)
        places = places / float(torch.empty(()).uniform_(*c.scale)) + torch.stack(middle)
        inner = places[border : side - border, border : side - border]
        picture = read(image / 255, places, nearest=False)
        picture = picture * (1 + c.contrast * (2 * torch.rand(()) - 1)) + c.brightness * (2 * torch.rand(()) - 1)
        shape = (3, 1, 1)
        picture = (picture - torch.tensor(self.facts["mean"]).view(shape)) / torch.tensor(self.facts["deviation"]).view(
            shape
        )
        truth = read(mask[None], inner, nearest=True)[0].long()
        return picture, truth, read(self.weights(i, mask)[None], inner, nearest=False)[0]


class UNetRecipe(SegmentationRecipe):
    config: Config
    monitor = ("object_iou", "max")

    def build(self, fresh: bool) -> nn.Module:
        config = self.config
        if config.hard_pixels is not None:
            raise PaperZooError("hard_pixels chooses pixels; U-Net weighs each of them, so it must be none")
        arguments = {"num_classes": len(self.facts["labels"]), "in_channels": 3, **config.model_arguments}
        if config.model != "unet_padded":
            arguments["tile"] = config.tile
        model = create(config.model, weights=config.weights, **arguments)
        fitting = model.legal(config.crop_size)
        if not model.padded and fitting != config.crop_size:
            raise PaperZooError(
                f"crop_size is {config.crop_size}; {config.model} makes squares of 4 + a multiple of {2**model.depth} pixels: {fitting}"
            )
        return model

    @cached_property
    def train_set(self):
        return Cells("train") if self.config.data == "cells" else open_masks(self.config.data, "train")

    @cached_property
    def test_set(self):
        return Cells("test") if self.config.data == "cells" else open_masks(self.config.data, "test")

    @cached_property
    def batches(self):
        classes = len(self.facts["labels"])
        weights = self.class_weights() if self.config.balanced else torch.ones(classes)
        patches = WeightedPatches(self.train_set, self.config, self.facts, self.model.border, weights)
        return self.runtime.batches(patches, self.config.batch_size, workers=self.config.workers)

    def class_weights(self) -> Tensor:
        """w_c from all training masks."""
        from tqdm import tqdm

        rows = tqdm(range(len(self.train_set)), desc="counting classes", delay=1.0, leave=False, disable=None)
        counts = sum(torch.bincount(self.train_set[i][1].as_subclass(Tensor).flatten(), minlength=256) for i in rows)
        return balancing(counts[: len(self.facts["labels"])])

    def step(self, batch: tuple[Tensor, Tensor, Tensor]) -> dict:
        """sum over pixels of w(x) times the cross-entropy (eq. 1), over the number of pixels."""
        images, masks, weights = batch
        self.model.train()
        logits = self.model.network(images).float()
        loss = F.cross_entropy(logits, masks, ignore_index=self.config.ignore_index, reduction="none")
        return {"loss": (loss * weights).mean()}

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """The task's metrics and the mean IoU of objects (see the module's docstring), over the whole split."""
        data = self.test_set if split == "test" else self.train_set
        found = torch.zeros(2, dtype=torch.float64)  # the sum over objects, and how many there are
        for i in range(self.runtime.rank, len(data), self.runtime.world):
            image, mask = (part.as_subclass(Tensor) for part in data[i])
            answer = self.predict([image])[0].mask
            ious = object_ious(answer.numpy(), mask.numpy(), self.config.ignore_index)
            found += torch.tensor([sum(ious), len(ious)], dtype=torch.float64)
        total, count = (self.runtime.mean(found) * self.runtime.world).tolist()
        return {"object_iou": total / max(1.0, count)} | metrics(self.confusion(split))

    def example(self) -> tuple[Tensor]:
        size = self.config.crop_size
        return (torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)),)


def object_ious(answer: np.ndarray, truth: np.ndarray, ignore: int = 255) -> list[float]:
    """Of every true object its IoU with the predicted object that covers more than half of it; 0 without one.

    Args:
        answer, truth: class ids (H, W), 0 the background. Where the truth is `ignore`, nothing counts.
    """
    from scipy.ndimage import label

    answer = np.where(truth == ignore, 0, answer)
    ious = []
    for k in np.unique(truth):
        if k in (0, ignore):
            continue
        objects, count = label(truth == k)
        parts, other = label(answer == k)
        table = np.bincount((objects * (other + 1) + parts).ravel(), minlength=(count + 1) * (other + 1))
        table = table.reshape(count + 1, other + 1)
        sizes, part_sizes = table.sum(1), table.sum(0)
        for n in range(1, count + 1):
            best = int(table[n, 1:].argmax()) + 1 if other else 0
            shared = int(table[n, best]) if best else 0
            covered = shared > 0.5 * sizes[n]
            ious.append(shared / (sizes[n] + part_sizes[best] - shared) if covered else 0.0)
    return ious


RECIPE = UNetRecipe

PRESETS = {
    "embedded": Config(
        model="unet_slim",
        data="cells",
        crop_size=60,
        tile=96,
        border_sigma=2.0,  # cells are three times smaller than the paper's
        elastic=2.0,
        steps=200,
        batch_size=4,
        optimizer="adamw",
        learning_rate=5e-3,
        weight_decay=0.0,
        power=0.9,
    ),
    # Sec. 3: Caffe's SGD with momentum 0.99, a batch of one large tile. The learning rate, its schedule and the number of steps are not in
    # the paper; these are of this project. PhC-U373 and DIC-HeLa of the cell tracking challenge, as images/ and masks/ (cells 1, borders and
    # background 0).
    "published": Config(
        model="unet",
        data="data/PhC-C2DH-U373",
        crop_size=388,
        tile=388,
        steps=60_000,
        batch_size=1,
        learning_rate=1e-3,
        momentum=0.99,
        weight_decay=0.0,
        power=0.9,
        workers=4,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config", "UNetRecipe"]
