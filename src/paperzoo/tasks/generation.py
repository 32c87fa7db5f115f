"""Class-conditional image generation: from noise and a class to an image.

A batch is (images, labels): float32 (B, 3, H, W) in [-1, 1] and int64 (B,) in 0 … num_classes - 1. A generator maps
(latent (B, latent_dim) from a standard normal, labels (B,)) to images (B, 3, H, W) in [-1, 1]; a discriminator maps
(images, labels) to logits (B,), high for what looks real. A prediction is a `Generated`.

The Fréchet inception distance compares the mean and covariance of features of generated and real images. The features
of Inception-v3 need a download; the default here is a `Judge`: a small convolutional classifier of 64 features that is
trained, always in the same way, on the training images of the data set itself (300 steps, about two seconds), and kept
for the life of the process. Distances are comparable only between runs with the same features and data. So every
evaluation prints two anchors beside "fid": "fid_real", of the training images against the same held-out images, which
is as good as it gets, and "fid_noise", of uniform noise.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.transforms import v2
from torchvision.utils import make_grid

from paperzoo.data.images import Images, open_images
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, MissingExtra, PaperZooError, UnknownName

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


# -- features for the Fréchet distance -------------------------------------------------------------------------------

JUDGE_SIZE, JUDGE_STEPS, JUDGE_BATCH = 32, 300, 64


class Judge(nn.Module):
    """A small classifier whose 64 penultimate features measure images: (B, 3, H, W) in [-1, 1] -> (B, 64)."""

    num_features = 64

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        side = JUDGE_SIZE // 8
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * side * side, self.num_features), nn.ReLU())
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (JUDGE_SIZE, JUDGE_SIZE):
            images = F.interpolate(images, (JUDGE_SIZE, JUDGE_SIZE), mode="bilinear", antialias=True)
        return self.body(images)

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, num_classes)."""
        return self.head(self(images))


@functools.cache
def judge(data: str) -> Judge:
    """The judge of a data set, trained on its training images on the CPU: deterministic, once a process."""
    images = open_images(data, "train").with_transform(to_range(JUDGE_SIZE))
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # so that the order of sums, and with it every bit, does not depend on the number of threads
    try:
        return train_judge(images)
    finally:
        torch.set_num_threads(threads)


def train_judge(images: Images) -> Judge:
    """`JUDGE_STEPS` steps of AdamW, whatever context this is called in."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        network = Judge(len(images.labels)).train()
        optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=1e-2)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=JUDGE_STEPS)
        for _ in range(JUDGE_STEPS):
            pixels, labels = readable(images, torch.randint(len(images), (JUDGE_BATCH,)).tolist())
            loss = F.cross_entropy(network.logits(pixels), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    return network.eval().requires_grad_(False)


def readable(images: Images, rows: list[int]) -> tuple[Tensor, Tensor]:
    """The samples of these rows as a batch, without those whose file cannot be read."""
    samples = []
    for row in rows:
        try:
            samples.append(images[row])
        except DataError as error:
            problem = error
    if not samples:
        raise problem
    pixels, labels = zip(*samples, strict=True)
    return torch.stack(pixels), torch.tensor(labels)


def to_range(size: int, flip: bool = False) -> v2.Compose:
    """The transform from uint8 (3, H, W) to float32 (3, size, size) in [-1, 1]: the central square, resized."""
    mirror = [v2.RandomHorizontalFlip()] if flip else []
    resize = [v2.Resize(size, antialias=True), v2.CenterCrop(size)]
    return v2.Compose([*resize, *mirror, v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])


def inception_distance() -> FrechetInceptionDistance:
    """The distance on the 2048 features of Inception-v3, as papers report it. Its weights are downloaded once.

    Raises:
        MissingExtra: if torch-fidelity, which brings the network, is not installed.
    """
    try:
        return FrechetInceptionDistance(feature=2048, normalize=True, reset_real_features=False)
    except ModuleNotFoundError:
        raise MissingExtra("torch-fidelity", "fid", "the Fréchet distance on Inception features") from None


# -- pictures --------------------------------------------------------------------------------------------------------


def to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] as a PIL image."""
    pixels = ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def sheet(images: Tensor, columns: int, scale: int = 1) -> Image.Image:
    """(B, 3, H, W) in [-1, 1] as one picture with `columns` images a row, each pixel enlarged `scale` times."""
    grid = to_picture(make_grid(images.detach().float().cpu().clamp(-1, 1), nrow=columns, padding=1, pad_value=1.0))
    return grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)


# -- the recipe ------------------------------------------------------------------------------------------------------


class AdversarialRecipe(Recipe):
    """The task's default recipe. A paper with another game overrides the two losses, or `step`."""

    config: Config
    monitor = ("fid", "min")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if not self.facts:
            self.facts = {"labels": open_images(config.data, "train").labels}
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

    # -- data ----------------------------------------------------------------------------------------------------

    @cached_property
    def train_data(self) -> Images:
        transform = to_range(self.model.image_size, self.config.flip)
        return open_images(self.config.data, "train").with_transform(transform)

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

    # -- learning ------------------------------------------------------------------------------------------------

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
        if self.average is not None and self.runtime.micro == self.runtime.accumulate - 1:
            self.average.update_parameters(self.model)
        return {
            "discriminator_loss": discriminator_loss.detach(),
            "generator_loss": generator_loss.detach(),
            "logit_real": real.detach().mean(),
            "logit_fake": fake.detach().mean(),
        }

    # -- evaluation ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """The Fréchet distance of generated images to the real ones of a split, and whether their class is recognised.

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
        network = judge(self.config.data).to(self.runtime.device)
        distance = FrechetInceptionDistance(network, reset_real_features=False).to(self.runtime.device)
        hits = torch.zeros(4, dtype=torch.float64)  # right and all, generated and real
        for images, labels in self.real_images(split):
            distance.update(images, real=True)
            hits[2:] += torch.tensor([(network.logits(images).argmax(1) == labels).sum(), len(labels)]).cpu()
        for images, labels in self.generated_images():
            distance.update(images, real=False)
            hits[:2] += torch.tensor([(network.logits(images).argmax(1) == labels).sum(), len(labels)]).cpu()
        hits = self.runtime.mean(hits)
        metrics = {
            "fid": float(distance.compute()),
            "conditional_accuracy": float(hits[0] / hits[1]),
            "judge_accuracy": float(hits[2] / hits[3]),
        }
        return metrics | self.anchors(split, distance)

    def anchors(self, split: str, distance: FrechetInceptionDistance) -> dict[str, float]:
        """What the distance is for real images of the other split, and for noise."""
        kept = self.__dict__.setdefault("_anchors", {})
        if split not in kept:
            distance.reset()
            for images, _ in self.real_images("test" if split == "train" else "train"):
                distance.update(images, real=False)
            real = float(distance.compute())
            distance.reset()
            for images, _ in self.real_images(split):
                rng = torch.Generator().manual_seed(self.runtime.key("uniform noise", self.runtime.rank))
                distance.update(self.runtime.to_device(torch.rand(images.shape, generator=rng) * 2 - 1), real=False)
            kept[split] = {"fid_real": real, "fid_noise": float(distance.compute())}
        return kept[split]

    def real_images(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of a split."""
        data = open_images(self.config.data, split).with_transform(to_range(self.model.image_size))
        return iter(self.runtime.loader(data, 256, self.config.workers))

    def generated_images(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of `config.samples` generated images, the classes in turn; the same for every evaluation."""
        rng = torch.Generator().manual_seed(self.runtime.key("evaluation"))
        noise = torch.randn(self.config.samples, self.model.latent_dim, generator=rng)
        labels = torch.arange(self.config.samples) % len(self.facts["labels"])
        mine = slice(self.runtime.rank, None, self.runtime.world)
        for z, wanted in zip(noise[mine].split(250), labels[mine].split(250), strict=True):
            yield self.sample(z, wanted), self.runtime.to_device(wanted)

    # -- use -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def sample(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], float32, by the deployed generator."""
        device = self.runtime.device
        return self.deployed.eval()(noise.to(device), labels.to(device)).float()

    def predict(self, inputs: list) -> list[Generated]:
        """Each input asks for one image: a class by its label ("7") or number (7), "*" for any class; "7@42" fixes the
        seed, which otherwise counts the inputs from 0.

        Raises:
            UnknownName: for a class that does not exist.
        """
        wanted = [self.request(value, position) for position, value in enumerate(inputs)]
        results: list[Generated] = []
        for start in range(0, len(wanted), 64):
            part = wanted[start : start + 64]
            draws = [torch.Generator().manual_seed(seed) for _, seed in part]
            noise = torch.stack([torch.randn(self.model.latent_dim, generator=rng) for rng in draws])
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
        """A request for each of the first ten classes."""
        return self.facts["labels"][:10]

    def example(self) -> tuple[Tensor, Tensor]:
        noise = torch.randn(2, self.model.latent_dim, generator=torch.Generator().manual_seed(0))
        return noise, torch.arange(2) % len(self.facts["labels"])

    def draw(self, value: Any, result: Generated) -> Image.Image:
        scale = max(1, 128 // result.image.width)
        return result.image.resize((result.image.width * scale, result.image.height * scale), Image.Resampling.NEAREST)

    def figures(self) -> dict[str, Image.Image]:
        """A row of samples for each class, walks between two noises, and real images beside them."""
        count = min(10, len(self.facts["labels"]))
        rng = torch.Generator().manual_seed(0)
        noise = torch.randn(10, self.model.latent_dim, generator=rng)
        classes = torch.arange(count).repeat_interleave(10)
        samples = self.sample(noise.repeat(count, 1), classes)
        share = torch.linspace(0, 1, 10)[:, None] * torch.pi / 2
        path = share.cos() * noise[0] + share.sin() * noise[1]  # keeps the norm, which a straight line would not
        walks = self.sample(path.repeat(count, 1), classes)
        data = open_images(self.config.data, "test").with_transform(to_range(self.model.image_size))
        some = torch.randperm(len(data), generator=rng)[:50].tolist()
        real, _ = readable(data, some)
        scale = max(1, 64 // self.model.image_size)
        titles = ("Samples, one class a row", "From one noise to another, one class a row", "Real images, held out")
        return {t: sheet(images, 10, scale) for t, images in zip(titles, (samples, walks, real), strict=True)}
