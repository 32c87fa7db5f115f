"""Image generation: from noise, and for conditional models a class, to an image.

A batch is (images, labels): float32 (B, 3, H, W) in [-1, 1] and int64 (B,) in 0 … num_classes - 1. Two recipes are built on:

    GenerativeRecipe    whatever makes images: how they are asked for, drawn and measured. A model brings `sample(noise, labels)`
    AdversarialRecipe   the default: a generator (latent (B, latent_dim) from a standard normal, labels (B,)) -> images
                        (B, 3, H, W) in [-1, 1], and a discriminator (images, labels) -> logits (B,), high for what looks real

Likelihood models go on in `tasks/density.py`. A prediction is a `Generated`.

An evaluation measures `config.samples` images, always of the same noise, against the held-out real ones (see
`tasks/generation_metrics.py`): "fid" and "kid" on a judge's features (or Inception's), "swd" on patches; with them the
anchors "fid_real", "kid_real", "swd_real", of the training images, which is as good as it gets, and "…_noise", of uniform noise.
Collapse shows in "classes_covered", "class_divergence" (nats, 0 is best) and "diversity" (1 is as diverse as real, 0 is one image).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from paperzoo.data.images import Images, open_images
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError, UnknownName
from paperzoo.tasks.generation_metrics import (
    class_divergence,
    covered_classes,
    frechet_distance,
    inception_distance,
    judge,
    kernel_distance,
    readable,
    relative_diversity,
    sliced_wasserstein,
    to_range,
)
from paperzoo.tasks.generation_pictures import sheet, to_picture, walk

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Generated:
    """One image that was made for a class; the same label and seed give the same image again."""

    label: str
    index: int
    seed: int
    image: Image.Image


@dataclass(frozen=True)
class Config:
    """The default recipe: two networks, two Adam optimizers of unequal rates, the hinge loss."""

    model: str = "sagan_128"  # the generator
    discriminator: str = "sagan_128_discriminator"
    data: str = "digits"
    flip: bool = False  # mirror half of the training images
    steps: Count = 1000  # of the generator
    batch_size: Count = 64
    learning_rate: Positive = 1e-4  # of the generator
    discriminator_learning_rate: Positive = 4e-4
    beta1: Fraction = 0.0
    beta2: Fraction = 0.9
    discriminator_steps: Count = 1  # for each step of the generator, each on a batch of its own
    ema_decay: Fraction | None = None  # deploy a running average of the generator
    features: Literal["judge", "inception"] = "judge"  # what the Fréchet distance is measured on
    samples: Count = 1000  # how many are generated for an evaluation
    workers: Annotated[int, Field(ge=0)] = 0


# -- losses ----------------------------------------------------------------------------------------------------------


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))]: logits (B,) of real and of generated images -> scalar."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """-E[D(G(z))]: logits (B,) of generated images -> scalar."""
    return -fake.mean()


# -- whatever makes images -------------------------------------------------------------------------------------------


class GenerativeRecipe(Recipe):
    """What every generator shares: asking for images, drawing and measuring them.

    The config has `data`, `batch_size`, `samples`, `features` and `workers`. A subclass brings `self.model`, which has
    `image_size`, `step`, and either a network (latent, labels) -> images with `latent_dim`, or its own `noise` and `sample`.
    `facts["labels"]` are the classes; an unconditional model has the one label "image".
    """

    monitor = ("fid", "min")
    conditional: bool = True
    together: ClassVar[int] = 250  # how many images are generated at once

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if not self.facts:
            self.facts = {"labels": self.open("train").labels if self.conditional else ["image"]}

    # -- what a model may bring ----------------------------------------------------------------------------------

    def open(self, split: str) -> Images:
        """The images of a split, uint8 (3, H, W)."""
        return open_images(self.config.data, split)

    def noise(self, count: int, rng: torch.Generator) -> Tensor:
        """The noise that `count` images are made from: (count, latent_dim), standard normal."""
        return torch.randn(count, self.model.latent_dim, generator=rng)

    @torch.inference_mode()
    def sample(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], float32, by the deployed generator: a pure function of noise and labels."""
        device = self.runtime.device
        return self.deployed.eval()(noise.to(device), labels.to(device)).float()

    # -- measuring -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """The distances of generated images to the real ones of a split, how diverse they are, and whether their class is recognised.

        "conditional_accuracy" is the share of generated images that the judge gives the class they were made for;
        "judge_accuracy" is how often it is right on the real images of the split. With Inception features, "fid" alone.
        """
        with torch.autocast(self.runtime.device.type, enabled=False):
            if self.config.features == "inception":
                distance = inception_distance().to(self.runtime.device)
                for images, _ in self.real_images(split):
                    distance.update((images + 1) / 2, real=True)
                for images, _ in self.generated_images():
                    distance.update((images + 1) / 2, real=False)
                return {"fid": float(distance.compute())}
            return self.judged(split)

    def judged(self, split: str) -> dict[str, float]:
        real, features, found, labels = self.seen(split)
        fake, fake_features, fake_found, wanted = self.seen(None)
        classes = len(judge(self.config.data).head.bias)
        metrics = self.distances(real, features, fake, fake_features)
        if self.conditional:
            metrics["conditional_accuracy"] = float((fake_found == wanted).float().mean())
        metrics |= {
            "judge_accuracy": float((found == labels).float().mean()),
            "classes_covered": float(covered_classes(fake_found, classes)),
            "class_divergence": class_divergence(fake_found, found, classes),
            "diversity": relative_diversity(fake_features, fake_found, features, found),
        }
        return metrics | self.anchors(split, real, features)

    def seen(self, split: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images, at most `config.samples` a rank, and all judge's features and classes, and labels: of a split, or generated; on the CPU."""
        network = judge(self.config.data).to(self.runtime.device)
        total = len(self.open(split)) if split else self.config.samples
        apart = -(
            -total // max(1, self.config.samples)
        )  # images are kept at this distance: folders are sorted by class
        rows, place = [], 0
        for images, labels in self.real_images(split) if split else self.generated_images():
            features = network(images)
            rows.append((images[-place % apart :: apart], features, network.head(features).argmax(1), labels))
            place += len(images)
        parts = [torch.cat(part) for part in zip(*rows, strict=True)]
        if self.runtime.world > 1:  # ranks may have unequal numbers of rows
            parts = [torch.cat(gather_all_tensors(part.contiguous())) for part in parts]
        return tuple(part.cpu() for part in parts)

    def distances(self, real: Tensor, features: Tensor, fake: Tensor, fake_features: Tensor) -> dict[str, float]:
        """Fréchet, kernel and sliced Wasserstein distance, the last averaged over its scales."""
        by_scale = sliced_wasserstein(real, fake)
        return {
            "fid": frechet_distance(features, fake_features),
            "kid": kernel_distance(features, fake_features),
            "swd": sum(by_scale.values()) / len(by_scale),
        }

    def anchors(self, split: str, real: Tensor, features: Tensor) -> dict[str, float]:
        """What the distances are for real images of the other split, and for noise."""
        kept = self.__dict__.setdefault("_anchors", {})
        if split not in kept:
            others, their_features, *_ = self.seen("test" if split == "train" else "train")
            found = {"real": self.distances(real, features, others, their_features)}
            rng = torch.Generator().manual_seed(self.runtime.key("uniform noise"))
            static = torch.rand(real.shape, generator=rng) * 2 - 1
            theirs = judge(self.config.data).to(self.runtime.device)(self.runtime.to_device(static)).cpu()
            found["noise"] = self.distances(real, features, static, theirs)
            kept[split] = {f"{k}_{name}": v for name, values in found.items() for k, v in values.items()}
        return kept[split]

    def real_images(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of a split."""
        data = self.open(split).with_transform(to_range(self.model.image_size))
        return iter(self.runtime.loader(data, 256, self.config.workers))

    def generated_images(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of `config.samples` generated images, the classes in turn; the same for every evaluation."""
        rng = torch.Generator().manual_seed(self.runtime.key("evaluation"))
        noise = self.noise(self.config.samples, rng)
        labels = torch.arange(self.config.samples) % len(self.facts["labels"])
        mine = slice(self.runtime.rank, None, self.runtime.world)
        for z, wanted in zip(noise[mine].split(self.together), labels[mine].split(self.together), strict=True):
            yield self.sample(z, wanted), self.runtime.to_device(wanted)

    # -- use -----------------------------------------------------------------------------------------------------

    def predict(self, inputs: list) -> list[Generated]:
        """Each input asks for one image: a class by its label ("7") or number (7), "*" for any class; "7@42" fixes the
        seed, which otherwise counts the inputs from 0. An unconditional model has the one label "image".

        Raises:
            UnknownName: for a class that does not exist.
        """
        wanted = [self.request(value, position) for position, value in enumerate(inputs)]
        results: list[Generated] = []
        for start in range(0, len(wanted), 64):
            part = wanted[start : start + 64]
            noise = torch.cat([self.noise(1, torch.Generator().manual_seed(seed)) for _, seed in part])
            images = self.sample(noise, torch.tensor([index for index, _ in part]))
            for (index, seed), image in zip(part, images, strict=True):
                results.append(Generated(self.facts["labels"][index], index, seed, to_picture(image)))
        return results

    def request(self, value: Any, position: int) -> tuple[int, int]:
        """Class number and seed that one input of `predict` asks for."""
        labels = self.facts["labels"]
        name, _, seed = ("*" if value is None else str(value)).partition("@")
        if seed and not seed.isdigit():
            raise PaperZooError(f"'{value}': what follows @ is the seed, a whole number such as {name}@42")
        number = int(seed) if seed else position
        if name == "*":
            return zlib.crc32(str(number).encode()) % len(labels), number
        if name in labels:
            return labels.index(name), number
        if isinstance(value, int) and 0 <= value < len(labels):
            return value, number
        raise UnknownName("class", name, labels)

    def samples(self, folder: Path) -> list[str]:
        """A request for each of the first ten classes; ten seeds of a model without classes."""
        return self.facts["labels"][:10] if self.conditional else [f"image@{seed}" for seed in range(10)]

    def example(self) -> tuple[Tensor, Tensor]:
        noise = torch.randn(2, self.model.latent_dim, generator=torch.Generator().manual_seed(0))
        return noise, torch.arange(2) % len(self.facts["labels"])

    def draw(self, value: Any, result: Generated) -> Image.Image:
        scale = max(1, 128 // result.image.width)
        return result.image.resize((result.image.width * scale, result.image.height * scale), Image.Resampling.NEAREST)

    def figures(self) -> dict[str, Image.Image]:
        """Samples and walks between two noises, a row for each class where there are classes, and real images beside them."""
        rng, rows = torch.Generator().manual_seed(0), min(10, len(self.facts["labels"])) if self.conditional else 5
        classes = torch.arange(rows).repeat_interleave(10) if self.conditional else torch.zeros(50, dtype=torch.int64)
        if self.conditional:
            noise = self.noise(10, rng)
            pictures = [z.repeat(rows, 1) for z in (noise, walk(noise[0], noise[1], 10))]
        else:
            noise = self.noise(50, rng)
            pictures = [noise, torch.cat([walk(noise[2 * i], noise[2 * i + 1], 10) for i in range(rows)])]
        more, scale = ", one class a row" if self.conditional else "", max(1, 64 // self.model.image_size)
        shown = zip((f"Samples{more}", f"From one noise to another{more}"), pictures, strict=True)
        sheets = {title: sheet(self.sample(z, classes), 10, scale) for title, z in shown}
        return sheets | {"Real images, held out": sheet(self.some_real(50), 10, scale)}

    def some_real(self, count: int) -> Tensor:
        """Held-out images (count, 3, S, S) in [-1, 1], always the same ones."""
        data = self.open("test").with_transform(to_range(self.model.image_size))
        rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count]
        return readable(data, rows.tolist())[0]


# -- the default recipe ----------------------------------------------------------------------------------------------


class AdversarialRecipe(GenerativeRecipe):
    """The task's default recipe. A paper with another game overrides the two losses, or `step`."""

    config: Config

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if config.discriminator_steps > 1 and runtime.accumulate > 1:
            raise PaperZooError(
                "accumulate must be 1 where discriminator_steps is more than 1; raise batch_size instead"
            )
        classes = len(self.facts["labels"])
        self.model = runtime.place(create(config.model, num_classes=classes))
        self.discriminator = runtime.place(create(config.discriminator, num_classes=classes))
        betas = (config.beta1, config.beta2)
        self.optimizer = torch.optim.Adam(self.model.parameters(), config.learning_rate, betas)
        rate = config.discriminator_learning_rate
        self.discriminator_optimizer = torch.optim.Adam(self.discriminator.parameters(), rate, betas)
        self.average = running_average(self.model, config.ema_decay)

    @cached_property
    def train_data(self) -> Images:
        transform = to_range(self.model.image_size, self.config.flip)
        return self.open("train").with_transform(transform)

    @cached_property
    def batches(self):
        size = self.config.batch_size * self.config.discriminator_steps
        return self.runtime.batches(self.train_data, size, workers=self.config.workers)

    def batch(self) -> tuple[Tensor, Tensor]:
        return self.batches.next()

    def latents(self, stream: str) -> tuple[Tensor, Tensor]:
        """This rank's noise (B, latent_dim) and random classes (B,) for the step."""
        rng, count = self.runtime.rng(stream, per_rank=False), self.config.batch_size
        noise = torch.randn(count, self.model.latent_dim, generator=rng)
        labels = torch.randint(len(self.facts["labels"]), (count,), generator=rng)
        return tuple(self.runtime.to_device(self.runtime.shard(t)) for t in (noise, labels))

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return hinge_discriminator_loss(real, fake)

    def generator_loss(self, fake: Tensor) -> Tensor:
        return hinge_generator_loss(fake)

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        self.model.train()
        self.discriminator.train()
        rounds = self.config.discriminator_steps
        for i, (images, labels) in enumerate(zip(*(t.chunk(rounds) for t in batch), strict=True)):
            noise, wanted = self.latents(f"discriminator {i}")
            with torch.no_grad():
                fakes = self.model(noise, wanted)
            # One pass over both halves: spectral norm's power iteration advances once, as in the released code.
            logits = self.discriminator(torch.cat([images, fakes.to(images.dtype)]), torch.cat([labels, wanted]))
            real, fake = logits.chunk(2)
            discriminator_loss = self.discriminator_loss(real, fake)
            self.runtime.update(self.discriminator_optimizer, discriminator_loss)
        noise, wanted = self.latents("generator")
        generator_loss = self.generator_loss(self.discriminator(self.model(noise, wanted), wanted))
        self.runtime.update(self.optimizer, generator_loss)
        self.follow()
        return {
            "discriminator_loss": discriminator_loss.detach(),
            "generator_loss": generator_loss.detach(),
            "logit_real": real.detach().mean(),
            "logit_fake": fake.detach().mean(),
        }

    def follow(self) -> None:
        """The running average takes the generator in, once a step."""
        if self.average is not None and self.runtime.micro == self.runtime.accumulate - 1:
            self.average.update_parameters(self.model)
