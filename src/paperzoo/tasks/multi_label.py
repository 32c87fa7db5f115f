"""Multi-label image classification: any number of labels an image.

A batch is (images, labels): float32 (B, 3, H, W), normalised; float32 (B, num_classes) of 0 and 1. A network maps images to
logits (B, num_classes); a label is given where its logit is above zero. A prediction is a `Labels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchmetrics.classification import MultilabelAveragePrecision, MultilabelF1Score
from torchvision.transforms import v2

from paperzoo.data.images import to_image
from paperzoo.data.multi_label import MultiLabelImages, open_multi_label
from paperzoo.errors import DataError
from paperzoo.tasks.classification import ClassificationRecipe, captioned, readable
from paperzoo.tasks.classification import Config as ClassificationConfig


@dataclass(frozen=True)
class Labels:
    """The answer for one image: the labels above the threshold, most probable first, and the probability of every class."""

    labels: list[str]
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Config(ClassificationConfig):
    """The default recipe: binary cross-entropy for each class."""

    data: str = "digit_scenes"
    image_size: int = 64
    augment: str = "shift"
    threshold: float = 0.5  # a label is given where its probability is above

    def __post_init__(self) -> None:
        if self.labels_per_class is not None or self.mixup or self.cutmix:
            raise ValueError("labels_per_class, mixup and cutmix are for images with one label each")


class MultiLabelRecipe(ClassificationRecipe):
    """The task's default recipe."""

    config: Config
    monitor = ("mean_average_precision", "max")

    def open(self, split: str) -> MultiLabelImages:
        return open_multi_label(self.config.data, split)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Binary cross-entropy, summed over classes and averaged over images; smoothed labels lie between."""
        smoothing = self.config.label_smoothing
        return F.binary_cross_entropy_with_logits(
            logits, labels * (1 - smoothing) + smoothing / 2, reduction="sum"
        ) / len(labels)

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        images, labels = batch
        self.model.train()
        logits = self.model(images)
        hits = ((logits.detach() > 0) == labels.bool()).float().mean()
        return {"loss": self.loss(logits, labels), "train_accuracy": hits}

    def same_answers(self, expected: Tensor, found: Tensor) -> Tensor:
        """Each label of each image, given or not."""
        return (expected > 0) == (found > 0)

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """Mean average precision over the classes, and F1 at the threshold over classes (CF1) and over all answers (OF1).

        Classes without a positive image in the split do not count in the means, as the field's protocol has it.
        """
        average, f1 = self.scores(split)
        seen = ~average.isnan()
        metrics = {"mean_average_precision": float(average[seen].mean())}
        return metrics | {"class_f1": float(f1[0]), "overall_f1": float(f1[1])}

    def scores(self, split: str) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Average precision of each class (num_classes,), and F1 by class and over all answers."""
        model, classes = self.deployed.eval(), len(self.facts["labels"])
        shape = {"num_labels": classes}
        precision = MultilabelAveragePrecision(**shape, average="none").to(self.runtime.device)
        by_class = MultilabelF1Score(**shape, threshold=self.config.threshold, average="macro").to(self.runtime.device)
        overall = MultilabelF1Score(**shape, threshold=self.config.threshold, average="micro").to(self.runtime.device)
        data = self.test_data if split == "test" else self.evaluation_data(split)
        for images, labels in self.runtime.loader(data, min(256, self.config.batch_size * 2), self.config.workers):
            probabilities, truth = model(images).float().sigmoid(), labels.long()
            for metric in (precision, by_class, overall):
                metric.update(probabilities, truth)
        return precision.compute(), (by_class.compute(), overall.compute())

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[Labels]:
        """Paths, PIL images or arrays to their labels."""
        transform = v2.Compose(self.view(self.config.image_size) + self.to_input())
        model, results = self.deployed.eval(), []
        for start in range(0, len(inputs), 64):
            images = torch.stack([transform(to_image(value)) for value in inputs[start : start + 64]])
            for row in model(images.to(self.runtime.device)).float().sigmoid().cpu():
                results.append(self.answer(row))
        return results

    def answer(self, probabilities: Tensor) -> Labels:
        names = self.facts["labels"]
        order = probabilities.argsort(descending=True).tolist()
        given = [names[i] for i in order if probabilities[i] > self.config.threshold]
        return Labels(given, {name: float(p) for name, p in zip(names, probabilities, strict=True)})

    @cached_property
    def shown(self) -> list[tuple[Tensor, Tensor]]:
        """Sixteen held-out images, spread over the set."""
        raw = self.test_data.with_transform(None)
        return list(readable(raw, range(0, len(raw), max(1, len(raw) // 16))))[:16]

    def samples(self, folder: Path) -> list[str]:
        """Eight held-out images, written as PNG files named by their labels."""
        paths = []
        for i, (image, target) in enumerate(self.shown[:8]):
            names = [self.facts["labels"][k] for k in target.nonzero().flatten().tolist()]
            label = "".join(c if c.isalnum() else "_" for c in "_".join(names)) or "nothing"
            paths.append(str(folder / f"{i}_has_{label[:40]}.png"))
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(paths[-1])
        return paths

    def draw(self, value: Any, result: Labels) -> Image.Image:
        return captioned(to_image(value), " ".join(result.labels) or "nothing")

    def figures(self) -> dict[str, Image.Image]:
        """Held-out images with what was found, and what is there where that differs."""
        from paperzoo.engine.pictures import tile

        pictures = []
        for (image, target), result in zip(self.shown, self.predict([x for x, _ in self.shown]), strict=True):
            truth = [self.facts["labels"][k] for k in target.nonzero().flatten().tolist()]
            right = set(truth) == set(result.labels)
            caption = " ".join(sorted(result.labels)) or "nothing"
            pictures.append(captioned(image, caption if right else f"{caption}, has {' '.join(truth)}"))
        return {"Held-out images: what was found, and what is there where that differs": tile(pictures, 8)}

    def browser(self) -> dict | None:
        return None

    def evaluation_data(self, split: str) -> MultiLabelImages:
        data = self.open(split)
        if data.labels != self.facts["labels"]:
            raise DataError(
                self.config.data,
                f"its labels {data.labels[:5]} are not those that were learned: {self.facts['labels'][:5]}",
            )
        return data.with_transform(v2.Compose(self.view(self.config.image_size) + self.to_input()))
