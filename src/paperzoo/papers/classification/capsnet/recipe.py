"""CapsNet learns by the margin loss and by drawing what it has seen (sec. 3, 4.1 and 5)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torchvision.transforms import v2

from paperzoo.data.images import open_images
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.papers.classification.capsnet.model import CapsNet, margin_loss, reconstruction_loss
from paperzoo.tasks import classification
from paperzoo.tasks.browser import of_each_class
from paperzoo.tasks.classification import ClassificationRecipe, Count, Fraction, Positive, readable


@dataclass(frozen=True)
class Config(classification.Config):
    """The task's settings, with the paper's values as defaults; Adam's are TensorFlow's own."""

    model: str = "capsnet"
    data: str = "mnist"
    image_size: Count = 28
    augment: Literal["none", "shift"] = "shift"
    shift: Count = 2  # pixels, in each direction, with zeros padded
    normalise: Literal["none", "data", "imagenet"] = "none"  # pixels in 0 … 1, which the decoder draws
    upper: Fraction = 0.9  # m+
    lower: Fraction = 0.1  # m-
    absent: Positive = 0.5  # lambda: the weight of classes that are not there
    reconstruction: Annotated[float, Field(ge=0)] = (
        0.0005  # the weight of the decoder's squared error; 0 for no decoder
    )
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = "adam"
    learning_rate: Positive = 1e-3
    schedule: Literal["decay", "constant", "cosine", "step"] = "decay"
    decay: Fraction = 0.96  # of the rate, each 2000 steps (authors' code)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Count = 128  # authors' code
    steps: Count = 100_000  # not stated


class CapsNetRecipe(ClassificationRecipe):
    """The task's recipe with the losses of capsules."""

    config: Config

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        if not facts and config.normalise == "none":
            facts = {"labels": open_images(config.data, "train").labels, "mean": [0.0] * 3, "deviation": [1.0] * 3}
        super().__init__(config, runtime, facts)
        if not isinstance(self.model, CapsNet):
            raise PaperZooError(
                f"the margin loss needs capsules; {config.model} has none (capsnet, capsnet_svhn, capsnet_digits do)"
            )
        if config.image_size != self.model.image_size:
            raise PaperZooError(
                f"{config.model} reads images of {self.model.image_size} pixels; image_size is {config.image_size}"
            )

    def augmentation(self) -> list[nn.Module]:
        size = self.config.image_size
        return self.view(size) + (
            [v2.RandomCrop(size, padding=self.config.shift)] if self.config.augment == "shift" else []
        )

    def learning_rate_factor(self, step: int) -> float:
        if self.config.schedule == "decay":
            return self.config.decay ** (step / 2000)
        return super().learning_rate_factor(step)

    def pixels(self, images: Tensor) -> Tensor:
        """What the decoder shall draw: normalised images (B, 3, H, W) as pixels in 0 … 1, grey where the network sees grey."""
        mean, deviation = (images.new_tensor(self.facts[k])[:, None, None] for k in ("mean", "deviation"))
        return self.model.grey(images * deviation + mean)

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        images, labels = batch
        c = self.config
        self.model.train()
        capsules = self.model.capsules(images)
        lengths = torch.linalg.vector_norm(capsules, dim=-1)
        margin = margin_loss(lengths, labels, c.upper, c.lower, c.absent)
        values = {"loss": margin, "margin_loss": margin.detach()}
        if c.reconstruction:
            drawn = reconstruction_loss(self.model.reconstruct(capsules, labels), self.pixels(images))
            values |= {"loss": margin + c.reconstruction * drawn, "reconstruction_error": drawn.detach()}
        return values | {"train_accuracy": (lengths.detach().argmax(1) == labels).float().mean()}

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """The task's metrics; and the squared error of a picture drawn from the longest capsule, summed over its pixels.

        The cross-entropy is that of the shares of the lengths.
        """
        metrics = super().evaluate(split)
        model, sums = self.deployed.eval(), torch.zeros(2, device=self.runtime.device)
        data = self.test_data if split == "test" else self.evaluation_data(split)
        for images, _ in self.runtime.loader(data, min(256, self.config.batch_size * 2), self.config.workers):
            error = (model.reconstruct(model.capsules(images)) - self.pixels(images)).square().sum()
            sums += torch.stack([error, sums.new_tensor(len(images))])
        error, count = self.runtime.mean(sums).unbind()
        return metrics | {"reconstruction_error": float(error / count)}

    # -- pictures --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def figures(self) -> dict[str, Image.Image]:
        """As fig. 3 and 4: images beside their reconstructions, and what the dimensions of a capsule stand for."""
        pictures = super().figures()
        if not self.config.reconstruction:
            return pictures
        model = self.deployed.eval()
        rows = of_each_class(self.test_data.targets, 16)
        images = [image for image, _ in readable(self.test_data, rows)]
        images = self.runtime.to_device(torch.stack(images))
        capsules = model.capsules(images)
        drawn = model.reconstruct(capsules)
        pairs = torch.cat([self.pixels(images), drawn], 3)
        pictures["Test images, each with the picture drawn from its longest capsule"] = sheet(pairs, 8)
        moved = torch.stack([perturbed(model, c) for c in capsules[::2][:8]])
        title = (
            "A dimension of the longest capsule moved from -0.25 to 0.25 (in the middle: not at all), an image a row"
        )
        return pictures | {title: sheet(moved.flatten(0, 1), moved.shape[1])}


def perturbed(model: CapsNet, capsules: Tensor, reach: float = 0.25, steps: int = 11) -> Tensor:
    """Fig. 4: pictures (steps, C, H, W) along the dimension of the longest capsule that changes its picture most.

    Args:
        capsules: of one image, (num_classes, size).
    """
    label = torch.linalg.vector_norm(capsules, dim=-1).argmax()
    tweaks = torch.linspace(-reach, reach, steps, device=capsules.device)
    size = capsules.shape[1]
    changed = capsules.repeat(size, steps, 1, 1)  # (dimension, tweak, class, size)
    for d in range(size):
        changed[d, :, label, d] += tweaks
    pictures = model.reconstruct(changed.flatten(0, 1), label.expand(size * steps)).unflatten(0, (size, steps))
    most = (pictures[:, -1] - pictures[:, 0]).square().flatten(1).sum(1).argmax()
    return pictures[most]


def sheet(pictures: Tensor, columns: int) -> Image.Image:
    """Pictures (N, 1 or 3, H, W) in 0 … 1, three times as large, in rows."""
    from paperzoo.engine.pictures import tile

    images = []
    for picture in (pictures.clamp(0, 1) * 255).round().to(torch.uint8).cpu().expand(-1, 3, -1, -1):
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        images.append(image.resize((image.width * 3, image.height * 3), Image.Resampling.NEAREST))
    return tile(images, columns)


PUBLISHED = Config()  # sec. 5; batch and decay are those of the authors' code, the number of steps is not stated
PRESETS = {
    "embedded": replace(
        PUBLISHED,
        model="capsnet_digits",
        data="digits",
        image_size=20,
        shift=1,
        steps=220,
        batch_size=64,
        learning_rate=2e-3,
    ),
    "published": PUBLISHED,
    "published_svhn": replace(PUBLISHED, model="capsnet_svhn", data="svhn", image_size=32, augment="none"),
}
RECIPE = CapsNetRecipe

__all__ = ["PRESETS", "RECIPE", "Config"]
