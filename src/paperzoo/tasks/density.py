"""Images and their likelihood: a network says how probable an image is, and makes new ones.

A batch is int64 (B, C, H, W): the level of each value, 0 … levels - 1 (256 for 8-bit images, 2 for binary ones); C is 1 or 3.
A network has

    log_likelihood(levels)         nats (B,), exact or, where its class says `exact = False`, a lower bound
    generate(noise, known, rows)   levels (B, C, H, W) from uniform noise (B, *noise_shape) in [0, 1); where `known` levels are
                                   given, their first `rows` rows are kept
    image_size, image_channels, levels, noise_shape

and is built with `image_size`, `image_channels` and `levels`. A prediction is a `Generated` (tasks/generation.py), asked for as
"image@seed". An evaluation gives "nll" (nats an image) and "bits_per_dim" over a whole split; beside them "nll_independent", of a
histogram for every pixel alone, and for binary images "nll_logistic", of a logistic regression on all pixels before; then, of
`config.samples` generated images, the task of generation's distances and diversity.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as pixels

from paperzoo.data.images import Images
from paperzoo.engine.models import create
from paperzoo.engine.recipe import running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.tasks.generation import Count, Fraction, GenerativeRecipe, Positive
from paperzoo.tasks.generation_metrics import bits_per_dimension
from paperzoo.tasks.generation_pictures import sheet
from paperzoo.tasks.training import make_optimizer

BASELINE_ROWS = 20_000  # training images that the two baselines learn from, at most


@dataclass(frozen=True)
class Config:
    """The default recipe: maximum likelihood by RMSProp."""

    model: str = "diagonal_bilstm_cifar10"
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)
    data: str = "digits"
    image_size: Count = 32
    image_channels: Literal[1, 3] = 3
    levels: Annotated[int, Field(ge=2, le=256)] = 256
    binarise: Literal["round", "draw"] = "round"  # two levels: the nearer, or drawn once for each pixel by its grey
    flip: bool = False
    steps: Count = 1000
    batch_size: Count = 16
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = "rmsprop"
    learning_rate: Positive = 1e-3
    momentum: Fraction = 0.0
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    decay_all: bool = False
    clip: Positive | None = None
    ema_decay: Fraction | None = None
    features: Literal["judge", "inception"] = "judge"
    samples: Annotated[int, Field(ge=0)] = 200  # generated for an evaluation; 0 measures the likelihood alone
    workers: Annotated[int, Field(ge=0)] = 0


# -- data ------------------------------------------------------------------------------------------------------------


class Levels(Dataset):
    """Images as levels: item i is int64 (C, S, S), the central square of image i, resized and quantised."""

    def __init__(self, images: Images, config: Config, flip: bool = False) -> None:
        self.images, self.config, self.flip = images, config, flip
        self.resize = v2.Compose([v2.Resize(config.image_size, antialias=True), v2.CenterCrop(config.image_size)])

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> str:
        return self.images.path(index)

    @cached_property
    def ready(self) -> Tensor | None:
        """All of a set that is in memory, (N, C, S, S); None where images are read from files."""
        whole = self.images.pixels
        return None if whole is None or len(whole) > BASELINE_ROWS else self.quantise(whole, range(len(whole)))

    def quantise(self, images: Tensor, rows: Any) -> Tensor:
        """uint8 (N, 3, H, W) -> int64 (N, C, S, S)."""
        values = self.resize(images).float() / 255
        if self.config.image_channels == 1:
            values = pixels.rgb_to_grayscale(values)
        if self.config.levels == 2 and self.config.binarise == "draw":
            shape = values.shape[1:]
            draws = [torch.rand(shape, generator=torch.Generator().manual_seed(i)) for i in rows]
            return (torch.stack(draws) < values).long()
        return (values * (self.config.levels - 1)).round().long()

    def __getitem__(self, index: int) -> Tensor:
        found = self.ready[index] if self.ready is not None else self.quantise(self.images[index][0][None], [index])[0]
        return found.flip(-1) if self.flip and torch.rand(()) < 0.5 else found


# -- baselines -------------------------------------------------------------------------------------------------------


def independent_nll(train: Tensor, test: Tensor, levels: int) -> float:
    """Nats an image of the levels (M, …) under a histogram of each pixel of (N, …), every level counted once more."""
    train, test = train.flatten(1), test.flatten(1)
    counts = torch.stack([(train == k).sum(0) for k in range(levels)]).double() + 1  # (levels, D)
    return float(-(counts / counts.sum(0)).log().gather(0, test).sum(1).mean())


def logistic_nll(train: Tensor, test: Tensor, penalty: float = 2e-3) -> float:
    """Nats an image of binary levels (M, …): a logistic regression of each pixel on all before it, learned from (N, …).

    A fully visible sigmoid network (Frey, Hinton and Dayan 1996), by 100 steps of L-BFGS with a squared penalty on its weights.
    """
    with torch.inference_mode(False), torch.enable_grad():
        train, test = (x.flatten(1).float().clone() for x in (train, test))
        before = torch.ones(train.shape[1], train.shape[1]).tril(-1)
        weight, bias = torch.zeros_like(before, requires_grad=True), torch.zeros(len(before), requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

        def nats(x: Tensor) -> Tensor:
            logits = F.linear(x, weight * before, bias)
            return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nats(train) + penalty * (weight * before).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return float(nats(test).detach())


# -- the recipe ------------------------------------------------------------------------------------------------------


class DensityRecipe(GenerativeRecipe):
    """The task's default recipe: maximum likelihood."""

    config: Config
    monitor = ("nll", "min")
    conditional = False
    any_size = False  # a likelihood is of images of one size

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        sizes = {k: getattr(config, k) for k in ("image_size", "image_channels", "levels")}
        self.model = runtime.place(create(config.model, **sizes, **config.model_arguments))
        self.optimizer = make_optimizer(config, self.model)
        self.average = running_average(self.model, config.ema_decay)

    def levels(self, split: str) -> Levels:
        return Levels(self.open(split), self.config, flip=self.config.flip and split == "train")

    @cached_property
    def batches(self):
        return self.runtime.batches(self.levels("train"), self.config.batch_size, workers=self.config.workers)

    def batch(self) -> Tensor:
        return self.batches.next()

    def step(self, batch: Tensor) -> dict:
        nats = -self.model.train().log_likelihood(batch).mean()
        bits = bits_per_dimension(float(nats.detach()), batch[0].numel())
        # the gradient is the mean's over values, whatever the image's size, so that learning rates mean the same
        return {"loss": nats / batch[0].numel(), "nll": nats.detach(), "bits_per_dim": bits}

    # -- measuring -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """See the module's docstring."""
        model, total = self.deployed.eval(), torch.zeros(2, dtype=torch.float64)
        with torch.autocast(self.runtime.device.type, enabled=False):
            for levels in self.runtime.loader(Levels(self.open(split), self.config), 64, self.config.workers):
                total += torch.stack([-model.log_likelihood(levels).double().sum(), torch.tensor(len(levels))]).cpu()
        total = self.runtime.mean(total)
        nll = float(total[0] / total[1])
        values = self.config.image_channels * self.config.image_size**2
        metrics = {"nll": nll, "bits_per_dim": bits_per_dimension(nll, values)} | self.baselines(split)
        return metrics | (super().evaluate(split) if self.config.samples else {})

    def baselines(self, split: str) -> dict[str, float]:
        """What needs no network, measured once."""
        kept = self.__dict__.setdefault("_baselines", {})
        if split not in kept:
            sets = (Levels(self.open(name), self.config) for name in ("train", split))
            train, test = (torch.stack([s[i] for i in range(min(len(s), BASELINE_ROWS))]) for s in sets)
            found = {"nll_independent": independent_nll(train, test, self.config.levels)}
            if self.config.levels == 2:
                found["nll_logistic"] = logistic_nll(train, test)
            kept[split] = found
        return kept[split]

    def real_images(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """As the network sees them: resized and quantised."""
        data = self.open(split)
        levels, targets = Levels(data, self.config), torch.tensor(data.targets)
        for rows in torch.arange(len(data))[self.runtime.rank :: self.runtime.world].split(256):
            some = torch.stack([levels[i] for i in rows.tolist()])
            yield self.runtime.to_device(self.pictures(some)), self.runtime.to_device(targets[rows])

    def pictures(self, levels: Tensor) -> Tensor:
        """Levels (B, C, H, W) as images (B, 3, H, W) in [-1, 1]."""
        return (levels.float() / (self.config.levels - 1) * 2 - 1).expand(-1, 3, -1, -1)

    # -- use -----------------------------------------------------------------------------------------------------

    def noise(self, count: int, rng: torch.Generator) -> Tensor:
        return torch.rand(count, *self.model.noise_shape, generator=rng)

    @torch.inference_mode()
    def sample(self, noise: Tensor, labels: Tensor) -> Tensor:
        return self.pictures(self.deployed.eval().generate(noise.to(self.runtime.device)))

    def example(self) -> tuple[Tensor]:
        levels = Levels(self.open("test"), self.config)
        return (torch.stack([levels[i] for i in range(2)]).float() / (self.config.levels - 1),)

    @torch.inference_mode()
    def figures(self) -> dict[str, Image.Image]:
        """Samples, completions of real images whose lower half was taken away, and real images."""
        data, size = Levels(self.open("test"), self.config), self.config.image_size
        rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:50].tolist()
        real, rng = torch.stack([data[i] for i in rows]), torch.Generator().manual_seed(0)
        samples = self.sample(self.noise(50, rng), torch.zeros(50, dtype=torch.int64))
        device, given = self.runtime.device, real[:10].repeat(5, 1, 1, 1)
        completed = self.deployed.eval().generate(self.noise(50, rng).to(device), given.to(device), size // 2)
        hidden = self.pictures(real[:10])
        hidden[:, :, size // 2 :] = 0
        completed = torch.cat([hidden, self.pictures(completed.cpu()), self.pictures(real[:10])])
        scale = max(1, 64 // size)
        return {
            "Samples": sheet(samples, 10, scale),
            "Upper half given, five completions, the real image": sheet(completed, 10, scale),
            "Real images, held out": sheet(self.pictures(real), 10, scale),
        }

    def samples(self, folder: Path) -> list[str]:
        return [f"image@{seed}" for seed in range(10)]
