"""The paper's comparison: one network, one budget, trained by Adam, AdaMax, AdaGrad, or SGD (section 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torchvision.transforms import v2

from paperzoo.data.images import open_images
from paperzoo.engine.models import create
from paperzoo.engine.runtime import Runtime
from paperzoo.papers.optimization.adam.technique import Adam, AdaMax
from paperzoo.tasks import classification
from paperzoo.tasks.classification import ClassificationRecipe, Fraction, Positive
from paperzoo.tasks.training import learning_rate_factor, parameter_groups

Optimizers = Literal["adam", "adamax", "adagrad", "sgd"]


@dataclass(frozen=True)
class Config(classification.Config):
    """The default classification recipe's settings, with the paper's optimizers and their constants."""

    model: str = "logistic_regression"  # a model's name, or the paper's: logistic_regression, mlp
    image_size: Annotated[int, Field(ge=1)] = 28
    augment: Literal["none", "shift", "flip_shift", "crop_flip"] = "none"
    optimizer: Optimizers = "adam"
    learning_rate: Positive = 1e-3  # alpha
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: Annotated[float, Field(ge=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "cosine", "step", "inverse_sqrt"] = "constant"  # inverse_sqrt: alpha / sqrt(t)


class LogisticRegression(nn.Module):
    """One linear layer over the pixels of the first channel. (B, 3, H, W) -> logits (B, num_classes)."""

    def __init__(self, image_size: int, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(image_size**2, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x[:, 0].flatten(1))


class MultilayerPerceptron(nn.Module):
    """Two hidden layers of 1000 with ReLU, and dropout (section 6.2). (B, 3, H, W) -> logits (B, num_classes)."""

    def __init__(self, image_size: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(image_size**2, 1000), nn.Linear(1000, 1000)
        self.head = nn.Linear(1000, num_classes)
        self.dropout = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.relu(self.first(x[:, 0].flatten(1))))
        return self.head(self.dropout(F.relu(self.second(x))))


class OptimizerRecipe(ClassificationRecipe):
    """The default recipe with another optimizer; it also measures the training cost, which the paper plots."""

    config: Config
    monitor = ("training_cost", "min")

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        self.optimizer = self.make_optimizer()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.factor)

    def build(self) -> nn.Module:
        config, classes = self.config, len(self.facts["labels"])
        if config.model == "logistic_regression":
            return LogisticRegression(config.image_size, classes)
        if config.model == "mlp":
            return MultilayerPerceptron(config.image_size, classes, config.drop_rate)
        return create(config.model, num_classes=classes, weights=config.weights)

    def make_optimizer(self) -> torch.optim.Optimizer:
        c = self.config
        groups = parameter_groups(self.model, c.weight_decay, c.decay_all)
        if c.optimizer == "sgd":
            return torch.optim.SGD(groups, c.learning_rate, momentum=c.momentum, nesterov=c.nesterov and c.momentum > 0)
        if c.optimizer == "adagrad":
            return torch.optim.Adagrad(groups, c.learning_rate)
        kind = Adam if c.optimizer == "adam" else AdaMax
        return kind(groups, c.learning_rate, betas=(c.beta1, c.beta2), eps=c.eps)

    def factor(self, step: int) -> float:
        """The learning rate of a step, as a factor of the config's."""
        return (step + 1) ** -0.5 if self.config.schedule == "inverse_sqrt" else learning_rate_factor(self.config, step)

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """What the default recipe measures, and the mean cross-entropy over the training set."""
        return super().evaluate(split) | {"training_cost": self.training_cost()}

    @torch.inference_mode()
    def training_cost(self) -> float:
        """The mean negative log-likelihood over the whole training set, without augmentation or dropout."""
        data = open_images(self.config.data, "train")
        data = data.with_transform(v2.Compose(self.view(self.config.image_size) + self.to_input()))
        model, sums = self.deployed.eval(), torch.zeros(2, device=self.runtime.device)
        for images, labels in self.runtime.loader(data, 256, self.config.workers):
            loss = F.cross_entropy(model(images).float(), labels, reduction="sum")
            sums += torch.stack([loss, sums.new_tensor(len(labels))])
        total, count = self.runtime.mean(sums).tolist()
        return total / count


RECIPE = OptimizerRecipe

PRESETS = {
    # sec. 6.2's network on scans of digits, sixty minibatches; the rate is the best of 0.001, 0.003, 0.01, 0.03, 0.1
    "embedded": Config(model="mlp", data="digits", image_size=16, steps=60, batch_size=128, learning_rate=0.003),
    # sec. 6.1: logistic regression on MNIST in minibatches of 128, alpha / sqrt(t), 45 passes; alpha was searched over
    "published": Config(
        data="mnist", image_size=28, steps=45 * 469, batch_size=128, learning_rate=1e-3, schedule="inverse_sqrt"
    ),
}

# the same network, data, minibatches and number of steps by plain stochastic gradient descent; 0.3 is the best rate of 0.03,
# 0.1, 0.3, 1 and 3
BASELINE = (
    OptimizerRecipe,
    Config(model="mlp", data="digits", image_size=16, steps=60, optimizer="sgd", momentum=0.0, learning_rate=0.3),
)

__all__ = ["BASELINE", "PRESETS", "RECIPE", "Config"]
