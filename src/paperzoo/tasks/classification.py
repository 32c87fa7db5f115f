"""Image classification: one label an image.

A batch is (images, labels): float32 (B, 3, H, W), normalised with the mean and deviation in `facts`; int64 (B,) in
0 … num_classes - 1. A network maps images to logits (B, num_classes). A prediction is a `Classification`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from pydantic import Field
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
from torchvision.transforms import v2

from paperzoo.data.images import Images, open_images, to_image
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError
from paperzoo.tasks import browser
from paperzoo.tasks.training import learning_rate_factor, make_optimizer, mix

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Classification:
    """The answer for one image: the most probable class, and the probability of every class."""

    label: str
    index: int
    probability: float
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Config:
    """The default recipe: stochastic gradient descent with cross-entropy."""

    model: str = "wide_resnet28_10"
    data: str = "digits"
    image_size: Count = 32  # pixels; images are resized to this square
    augment: Literal["none", "shift", "flip_shift", "crop_flip", "randaugment"] = "flip_shift"
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9  # of "randaugment", two operations an image
    erase: Fraction = 0.0  # the share of training images of which a random rectangle is overwritten
    mixup: Annotated[float, Field(ge=0)] = 0.0  # alpha of mixup, 0 for none; with cutmix, one of them each step
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    normalise: Literal["data", "imagenet"] = "data"  # with the set's own statistics, or ImageNet's
    labels_per_class: Count | None = None  # use only so many labelled images of each class
    weights: str | None = None  # start from these weights; a head of another size is replaced
    drop_rate: Fraction = 0.0
    drop_path_rate: Fraction = 0.0  # stochastic depth, for networks that have it
    steps: Count = 1000
    batch_size: Count = 128
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = "sgd"
    learning_rate: Positive = 0.1
    momentum: Fraction = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    decay_all: bool = True  # False: no weight decay on biases and normalisation layers
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # each layer's learning rate, of the one after it
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    milestones: tuple[Fraction, ...] = (0.5, 0.75)  # of the steps, for "step"
    gamma: Positive = 0.1  # the factor at a milestone
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    label_smoothing: Fraction = 0.0
    clip: Positive | None = None
    ema_decay: Fraction | None = None
    workers: Annotated[int, Field(ge=0)] = 0


def augmentation(kind: str, size: int, randaugment: int = 9) -> list[nn.Module]:
    """The random transforms of an augmentation's name, on uint8 (3, H, W), to size x size."""
    if kind in ("crop_flip", "randaugment"):  # as ImageNet networks are trained
        crop = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        return crop + ([v2.RandAugment(num_ops=2, magnitude=randaugment)] if kind == "randaugment" else [])
    resize = v2.Resize((size, size), antialias=True)
    shift = v2.RandomCrop(size, padding=size // 8)  # paper after paper on CIFAR: 4 of 32 pixels
    kinds = {"none": [resize], "shift": [resize, shift], "flip_shift": [resize, shift, v2.RandomHorizontalFlip()]}
    return kinds[kind]


class ClassificationRecipe(Recipe):
    """The task's default recipe. Methods that hold or change it override `augmentation`, `loss` or `step`."""

    config: Config
    reads_images = True
    monitor = ("accuracy", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if not self.facts:
            train = self.open("train")
            mean, deviation = statistics(train) if config.normalise == "data" else IMAGENET
            self.facts = {"labels": train.labels, "mean": mean, "deviation": deviation}
        self.model = runtime.place(self.build())
        self.optimizer = make_optimizer(config, self.model)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.learning_rate_factor)
        self.average = running_average(self.model, config.ema_decay)

    def build(self) -> nn.Module:
        """The network, with a head for the data's classes."""
        classes = len(self.facts["labels"])
        rates = {name: getattr(self.config, name, 0.0) for name in ("drop_rate", "drop_path_rate")}
        arguments = {name: rate for name, rate in rates.items() if rate}
        if self.config.weights is None:
            return create(self.config.model, num_classes=classes, **arguments)
        model = create(self.config.model, weights=self.config.weights, **arguments)
        model.reset_classifier(classes)
        model.paperzoo["arguments"]["num_classes"] = classes
        return model

    # -- data ----------------------------------------------------------------------------------------------------

    def augmentation(self) -> list[nn.Module]:
        """The random transforms of training images."""
        return augmentation(self.config.augment, self.config.image_size, getattr(self.config, "magnitude", 9))

    def to_input(self) -> list[nn.Module]:
        """What makes the network's input of a uint8 image of the right size."""
        return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.facts["mean"], self.facts["deviation"])]

    def view(self, size: int) -> list[nn.Module]:
        """The fixed transforms of evaluation: resized to the square; "crop_flip" networks see the central 7/8."""
        if self.config.augment in ("crop_flip", "randaugment"):
            return [v2.Resize(round(size * 8 / 7), antialias=True), v2.CenterCrop(size)]
        return [v2.Resize((size, size), antialias=True)]

    def open(self, split: str) -> Images:
        """The raw images of a split; recipes with data of their own override this alone."""
        return open_images(self.config.data, split)

    @cached_property
    def train_data(self) -> Images:
        data = self.open("train")
        if self.config.labels_per_class is not None:
            data = data.few(self.config.labels_per_class, self.runtime.seed)
        erase = getattr(self.config, "erase", 0.0)
        after = [v2.RandomErasing(erase)] if erase else []
        return data.with_transform(v2.Compose(self.augmentation() + self.to_input() + after))

    @cached_property
    def test_data(self) -> Images:
        return self.evaluation_data("test")

    def evaluation_data(self, split: str) -> Images:
        """A split as evaluation sees it.

        Raises:
            DataError: if its classes are not those that were learned.
        """
        data = self.open(split)
        if data.labels != self.facts["labels"]:
            known = self.facts["labels"]
            raise DataError(
                self.config.data,
                f"its classes {data.labels[:5]} are not the {len(known)} that were learned: {known[:5]}",
            )
        return data.with_transform(v2.Compose(self.view(self.config.image_size) + self.to_input()))

    @cached_property
    def batches(self):
        return self.runtime.batches(self.train_data, self.config.batch_size, workers=self.config.workers)

    def batch(self) -> tuple[Tensor, Tensor]:
        return self.batches.next()

    # -- learning ------------------------------------------------------------------------------------------------

    def learning_rate_factor(self, step: int) -> float:
        return learning_rate_factor(self.config, step)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        images, labels = batch
        self.model.train()
        mixup, cutmix = getattr(self.config, "mixup", 0.0), getattr(self.config, "cutmix", 0.0)
        if mixup or cutmix:
            images, labels = mix(images, labels, len(self.facts["labels"]), mixup, cutmix)
        logits = self.model(images)
        truth = labels if labels.ndim == 1 else labels.argmax(1)
        hits = (logits.detach().argmax(1) == truth).float().mean()
        return {"loss": self.loss(logits, labels), "train_accuracy": hits}

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """Top-1 accuracy, cross-entropy and, with more than ten classes, top-5 accuracy over the whole split."""
        confusion, loss, count = self.confusion(split)
        hits, total = confusion.diag().sum(), confusion.sum()
        metrics = {"accuracy": float(hits / total), "cross_entropy": float(loss / count)}
        if self._top5 is not None:
            metrics["top5_accuracy"] = self._top5
        return metrics

    @torch.inference_mode()
    def confusion(self, split: str = "test") -> tuple[Tensor, Tensor, Tensor]:
        """The confusion matrix (true, predicted) over a split, the summed cross-entropy and the number of images."""
        model, classes = self.deployed.eval(), len(self.facts["labels"])
        matrix = MulticlassConfusionMatrix(classes).to(self.runtime.device)
        top5 = MulticlassAccuracy(classes, top_k=5, average="micro").to(self.runtime.device) if classes > 10 else None
        sums = torch.zeros(2, device=self.runtime.device)
        data = self.test_data if split == "test" else self.evaluation_data(split)
        for images, labels in self.runtime.loader(data, min(256, self.config.batch_size * 2), self.config.workers):
            logits = model(images).float()
            matrix.update(logits, labels)
            if top5 is not None:
                top5.update(logits, labels)
            sums += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), sums.new_tensor(len(labels))])
        self._top5 = None if top5 is None else float(top5.compute())
        loss, count = self.runtime.mean(sums).unbind()
        return matrix.compute(), loss, count

    # -- use -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[Classification]:
        """Paths, PIL images or arrays (see `paperzoo.data.images.to_image`) to their classes."""
        transform = v2.Compose(self.view(self.config.image_size) + self.to_input())
        model = self.deployed.eval()
        results: list[Classification] = []
        for start in range(0, len(inputs), 64):
            images = torch.stack([transform(to_image(value)) for value in inputs[start : start + 64]])
            rows = model(images.to(self.runtime.device)).float().softmax(1).cpu()
            results += [answer(row, self.facts["labels"]) for row in rows]
        return results

    def samples(self, folder: Path) -> list[str]:
        """Eight held-out images, written as PNG files."""
        raw, paths = self.test_data.with_transform(None), []
        for i, (image, target) in enumerate(readable(raw, range(0, len(raw), max(1, len(raw) // 8)))):
            label = "".join(c if c.isalnum() else "_" for c in self.facts["labels"][target])
            paths.append(str(folder / f"{i}_is_{label}.png"))
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(paths[-1])
        return paths[:8]

    def example(self) -> tuple[Tensor]:
        size = self.config.image_size
        return (torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)),)

    def same_answers(self, expected: Tensor, found: Tensor) -> Tensor:
        """The most likely classes."""
        return expected.argmax(1) == found.argmax(1)

    def browser(self) -> dict | None:
        """A drawing where the data are the embedded digits, else a picture, to the probabilities of the classes."""
        if type(self).predict is not ClassificationRecipe.predict:
            return None
        size, raw = self.config.image_size, self.test_data.with_transform(None)
        resize: dict[str, Any] = {"rule": "square", "to": size, "antialias": True}
        if self.config.augment in ("crop_flip", "randaugment"):
            resize = {"rule": "shortest", "to": round(size * 8 / 7), "crop": size, "antialias": True}
        kind: dict[str, Any] = {"kind": "image"}
        if self.config.data == "digits":
            kind = {"kind": "drawing", "drawing": DIGIT_DRAWING}
        rows = browser.of_each_class(raw.targets, browser.SHOWN)
        samples = [
            {"image": browser.picture_url(image), "truth": self.facts["labels"][target]}
            for image, target in readable(raw, rows)
        ]
        return {
            "input": {**kind, "size": [size, size], "resize": resize},
            "output": {"kind": "classes", "labels": self.facts["labels"]},
            "samples": samples,
            **browser.about(self.config.data),
        }

    def browser_network(self) -> tuple[nn.Module, tuple]:
        """Pixels (1, 3, H, W) in [0, 1] -> probabilities (1, num_classes)."""
        size = self.config.image_size
        network = nn.Sequential(browser.Normalise(self.facts), self.deployed, nn.Softmax(1))
        return network, (torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)),)

    def draw(self, value: Any, result: Classification) -> Image.Image:
        return captioned(to_image(value), f"{result.label} {result.probability:.0%}")

    def figures(self) -> dict[str, Image.Image]:
        """The confusion matrix, and held-out images that came out right and wrong."""
        from paperzoo.engine.pictures import confusion_matrix, tile

        labels = self.facts["labels"]
        raw = self.test_data.with_transform(None)
        order = torch.randperm(len(raw), generator=torch.Generator().manual_seed(0))[:384].tolist()
        shown: dict[bool, list[Image.Image]] = {True: [], False: []}
        for start in range(0, len(order), 32):  # a few at a time: a user's photographs may be large
            samples = list(readable(raw, order[start : start + 32]))
            for (image, target), result in zip(samples, self.predict([x for x, _ in samples]), strict=True):
                right, truth = result.index == target, labels[target]
                caption = result.label if right else f"{result.label}, is {truth}"
                if len(shown[right]) < 16:
                    shown[right].append(captioned(image, f"{caption} {result.probability:.0%}"))
        pictures = {"Confusion matrix": confusion_matrix(self.confusion("test")[0].cpu(), labels)}
        if shown[True]:
            pictures["Right"] = tile(shown[True], 8)
        if shown[False]:
            pictures["Wrong"] = tile(shown[False], 8)
        return pictures


def readable(data: Images, rows: Iterable[int]) -> Iterator[tuple[Tensor, int]]:
    """The samples of these rows, without those whose files are broken."""
    for row in rows:
        with contextlib.suppress(DataError):
            yield data[row]


# How the scans of "digits" came about, for pictures drawn by hand: the ink fills 32 x 32 black-and-white pixels from top to
# bottom and is about 6 of 8 columns wide, centred; the pixels of each 4 x 4 block are counted (0 … 16), and these 8 x 8 counts
# are enlarged to 32 x 32 bicubically. Pixels; a stroke of 6 leaves as much ink as the scans have, a third of the picture.
DIGIT_DRAWING = {"size": 32, "block": 4, "stroke": 6.0, "narrowest": 23, "widest": 27}

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def statistics(data: Images, count: int = 2000) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel in [0, 1], over at most `count` images spread over the set."""
    rows = range(0, len(data), max(1, len(data) // count))
    sums, squares, pixels = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0
    for image, _ in readable(data, rows):  # a broken file is reported and counted when it is fed
        image = image.double() / 255
        sums, squares = sums + image.sum((1, 2)), squares + image.square().sum((1, 2))
        pixels += image[0].numel()
    mean = sums / max(1, pixels)
    deviation = (squares / max(1, pixels) - mean**2).clamp(min=1e-6).sqrt()
    return [round(float(m), 4) for m in mean], [round(float(d), 4) for d in deviation]


def answer(probabilities: Tensor, labels: list[str]) -> Classification:
    best = int(probabilities.argmax())
    table = {label: float(p) for label, p in zip(labels, probabilities, strict=True)}
    return Classification(labels[best], best, float(probabilities[best]), table)


def captioned(image: Tensor, text: str, size: int = 96) -> Image.Image:
    """A uint8 image (3, H, W) enlarged to `size` pixels with a line of text below."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.NEAREST)
    framed = Image.new("RGB", (size, size + 14), "white")
    framed.paste(picture, (0, 0))
    ImageDraw.Draw(framed).text((2, size + 1), text, fill="black")
    return framed
