"""LeNet-5 learns by eq. (9) and the stochastic diagonal Levenberg-Marquardt method, in passes through the data (sec. III-B)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from paperzoo.data.images import open_images
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.papers.classification.lenet5.model import LeNet5, MAPLoss
from paperzoo.papers.classification.lenet5.technique import (
    Distort,
    InMiddle,
    StochasticDiagonalLevenbergMarquardt,
    curvature,
)
from paperzoo.tasks import classification
from paperzoo.tasks.classification import ClassificationRecipe, Count, Positive, readable

# Sec. III-B: the global learning rate of each of 20 passes, of the first one's 5e-4.
PASSES = (1.0,) * 2 + (0.4,) * 3 + (0.2,) * 3 + (0.1,) * 4 + (0.02,) * 8


@dataclass(frozen=True)
class Config(classification.Config):
    """The task's settings, with the paper's values as defaults."""

    model: str = "lenet5"
    data: str = "mnist"
    image_size: Literal[32] = 32
    augment: Literal["none", "shift", "distort"] = "none"
    normalise: Literal["ink", "data", "imagenet"] = "ink"  # background -0.1, ink 1.175
    rubbish: Positive = 20.0  # j of eq. (9); the paper does not state it
    optimizer: Literal["sdlm", "sgd", "adam", "adamw", "rmsprop"] = "sdlm"
    learning_rate: Positive = 5e-4
    mu: Positive = 0.02  # of "sdlm"
    curvature_samples: Count = 500  # that the curvature is estimated from, before each pass through the data
    schedule: Literal["passes", "constant", "cosine", "step"] = "passes"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # of the others
    batch_size: Count = 1
    steps: Count = 20 * 60_000


class LeNet5Recipe(ClassificationRecipe):
    """The task's recipe with the paper's input, loss, optimizer and schedule."""

    config: Config

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        if not facts and config.normalise == "ink":
            labels = open_images(config.data, "train").labels
            facts = {"labels": labels, "mean": [0.1 / 1.275] * 3, "deviation": [1 / 1.275] * 3}
        super().__init__(config, runtime, facts)
        self.objective = MAPLoss(config.rubbish)
        if config.optimizer == "sdlm":
            if not isinstance(self.model, LeNet5):
                raise PaperZooError(
                    f"optimizer 'sdlm' knows the layers of lenet5 alone; with {config.model} use sgd or adam"
                )
            parameters = self.model.parameters()
            self.optimizer = StochasticDiagonalLevenbergMarquardt(parameters, config.learning_rate, config.mu)
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.learning_rate_factor)

    def view(self, size: int) -> list[nn.Module]:
        """28 x 28 pixels are centred in a field of 32 x 32, not enlarged (sec. III-A)."""
        return [InMiddle(size)]

    def augmentation(self) -> list[nn.Module]:
        if self.config.augment == "shift":
            return super().augmentation()
        return self.view(self.config.image_size) + ([Distort()] if self.config.augment == "distort" else [])

    def learning_rate_factor(self, step: int) -> float:
        if self.config.schedule == "passes":
            return PASSES[min(len(PASSES) - 1, step * len(PASSES) // self.config.steps)]
        return super().learning_rate_factor(step)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.objective(logits, labels) if isinstance(self.model, LeNet5) else super().loss(logits, labels)

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        a_pass = -(-len(self.train_data) // self.config.batch_size)
        if self.config.optimizer == "sdlm" and self.runtime.step % a_pass == 0:
            self.optimizer.set_curvature(self.measured_curvature())
        return super().step(batch)

    def measured_curvature(self) -> dict[nn.Parameter, Tensor]:
        """Over images drawn for this step."""
        order = torch.randperm(len(self.train_data), generator=self.runtime.rng("curvature", per_rank=False))
        samples = list(readable(self.train_data, order[: self.config.curvature_samples].tolist()))
        images = self.runtime.to_device(torch.stack([image for image, _ in samples]))
        labels = self.runtime.to_device(torch.tensor([label for _, label in samples]))
        with torch.autocast(self.runtime.device.type, enabled=False):
            found = curvature(self.model, images, labels, self.config.rubbish)
        return {p: self.runtime.mean(h) for p, h in found.items()}

    @torch.inference_mode()
    def figures(self) -> dict[str, Image.Image]:
        """Digits beside what F6 makes of them: the bitmap of their class, if all went well."""
        pictures = super().figures()
        model = self.deployed.eval()
        if isinstance(model, LeNet5):
            rows = range(0, len(self.test_data), max(1, len(self.test_data) // 24))
            images = torch.stack([image for image, _ in readable(self.test_data, rows)][:24])
            states = model.embed(self.runtime.to_device(images)).cpu().reshape(-1, 12, 7)
            pictures["Digits, and the states of F6 as a bitmap"] = side_by_side(images, states)
            wanted = model.output.codes.cpu().reshape(-1, 12, 7)
            pictures["The codes of the classes, which F6 shall draw"] = side_by_side(None, wanted)
        return pictures

    def browser(self) -> dict | None:
        """None where images are put in the middle of a field: a page does not know that way of resizing."""
        return super().browser() if self.config.data == "digits" else None


def side_by_side(images: Tensor | None, states: Tensor) -> Image.Image:
    """Images (N, 3, 32, 32), ink light, each with its bitmap (N, 12, 7), enlarged, on one sheet."""
    from paperzoo.engine.pictures import tile

    pictures = []
    for i, state in enumerate(states):
        bitmap = grey(state / 2 + 0.5).resize((56, 96), Image.Resampling.NEAREST)
        pair = Image.new("RGB", (56 if images is None else 160, 96), "white")
        if images is not None:
            pair.paste(grey((images[i].mean(0) + 0.1) / 1.275).resize((96, 96), Image.Resampling.NEAREST), (0, 0))
        pair.paste(bitmap, (pair.width - 56, 0))
        pictures.append(pair)
    return tile(pictures, 6 if images is not None else 10, gap=12)


def grey(values: Tensor) -> Image.Image:
    """(H, W) in 0 … 1, as ink on paper."""
    return Image.fromarray(((1 - values.clamp(0, 1)) * 255).to(torch.uint8).numpy())


PUBLISHED = Config()  # sec. III-B: one image a step, 20 passes through MNIST
PRESETS = {
    "embedded": replace(PUBLISHED, data="digits", steps=2400, batch_size=4, learning_rate=1e-3),
    "published": PUBLISHED,
    # sec. III-C: ten times the data by distortions, the same number of steps; 0.8% instead of 0.95%
    "published_distorted": replace(PUBLISHED, augment="distort"),
}
RECIPE = LeNet5Recipe

__all__ = ["PRESETS", "RECIPE", "Config"]
