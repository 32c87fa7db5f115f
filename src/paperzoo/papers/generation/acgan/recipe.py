"""AC-GAN's game (section 3): the discriminator also names the class, and both networks want it to be named rightly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from paperzoo.data.images import Images
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.tasks import generation
from paperzoo.tasks.generation import AdversarialRecipe, Count
from paperzoo.tasks.generation_metrics import judge, ms_ssim


@dataclass(frozen=True)
class Config(generation.Config):
    """As the task's, with the values of appendix A."""

    model: str = "acgan_128"
    discriminator: str = "acgan_128_discriminator"
    batch_size: Count = 100
    learning_rate: generation.Positive = 2e-4
    discriminator_learning_rate: generation.Positive = 2e-4
    beta1: generation.Fraction = 0.5
    beta2: generation.Fraction = 0.999
    minimax: bool = (
        False  # the generator minimises log P(fake), the text's L_S, to the letter; else it maximises log P(real)
    )
    group: Annotated[int, Field(ge=0)] | None = None  # learn ten classes only: 0 … 9, 10 … 19 and so on
    pairs: Count = 100  # of images in each class, whose similarity shows collapse


def discriminator_losses(real: dict[str, Tensor], fake: dict[str, Tensor], labels: Tensor, wanted: Tensor) -> Tensor:
    """-(L_S + L_C) (equations 2 and 3): heads' logits on real images and on generated ones, their classes -> scalar."""
    source = F.softplus(-real["source"]).mean() + F.softplus(fake["source"]).mean()  # -log P(real), -log P(fake)
    return source + F.cross_entropy(real["classes"], labels) + F.cross_entropy(fake["classes"], wanted)


def generator_losses(fake: dict[str, Tensor], wanted: Tensor, minimax: bool = False) -> Tensor:
    """-(L_C - L_S) as far as the generator reaches: heads' logits on generated images, their classes -> scalar."""
    source = -F.softplus(fake["source"]).mean() if minimax else F.softplus(-fake["source"]).mean()
    return source + F.cross_entropy(fake["classes"], wanted)


class AuxiliaryClassifierRecipe(AdversarialRecipe):
    """The default recipe with two heads and their losses, and the paper's two measures of samples (sections 4.1 and 4.2)."""

    config: Config

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        if config.group is not None and config.features == "judge":
            raise PaperZooError("the judge knows all classes of the data: with group, features must be inception")
        super().__init__(config, runtime, facts)

    def open(self, split: str) -> Images:
        images, group = super().open(split), self.config.group
        if group is None:
            return images
        first = 10 * group
        labels = images.labels[first : first + 10]
        if not labels:
            raise PaperZooError(
                f"group is {group}; {len(images.labels)} classes make groups up to {(len(images.labels) - 1) // 10}"
            )
        some = images.subset([i for i, k in enumerate(images.targets) if first <= k < first + 10])
        some.labels, some.targets = labels, [k - first for k in some.targets]
        return some

    def step(self, batch: tuple[Tensor, Tensor]) -> dict:
        self.model.train()
        self.discriminator.train()
        rounds = self.config.discriminator_steps
        for i, (images, labels) in enumerate(zip(*(t.chunk(rounds) for t in batch), strict=True)):
            noise, wanted = self.latents(f"discriminator {i}")
            with torch.no_grad():
                fakes = self.model(noise, wanted)
            real, fake = self.discriminator(images), self.discriminator(fakes.to(images.dtype))
            discriminator_loss = discriminator_losses(real, fake, labels, wanted)
            self.runtime.update(self.discriminator_optimizer, discriminator_loss)
        noise, wanted = self.latents("generator")
        generator_loss = generator_losses(self.discriminator(self.model(noise, wanted)), wanted, self.config.minimax)
        self.runtime.update(self.optimizer, generator_loss)
        self.follow()
        return {
            "discriminator_loss": discriminator_loss.detach(),
            "generator_loss": generator_loss.detach(),
            "logit_real": real["source"].detach().mean(),
            "logit_fake": fake["source"].detach().mean(),
            "class_accuracy_real": (real["classes"].argmax(1) == labels).float().mean(),
        }

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """The task's measures; "ms_ssim", of pairs of samples in a class, with "ms_ssim_real" beside it; and the
        "conditional_accuracy_half" and "…_quarter" of samples that lost detail: resized to that share and back (section 4.1).
        """
        metrics = super().evaluate(split)
        with torch.autocast(self.runtime.device.type, enabled=False):
            metrics["ms_ssim"], per_class = self.similarity(self.pairs_generated())
            metrics["ms_ssim_worst"] = max(per_class)
            metrics["ms_ssim_real"], _ = self.similarity(self.pairs_real(split))
            if self.config.features == "judge":
                metrics |= self.discriminability()
        return metrics

    def similarity(self, pairs: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, list[float]]:
        """MS-SSIM, averaged over all pairs, and each class's mean."""
        values = [float(ms_ssim((a + 1) / 2, (b + 1) / 2).mean()) for a, b in pairs]
        return sum(values) / len(values), values

    def pairs_generated(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For each class `pairs` samples and as many others, always the same."""
        rng, count = torch.Generator().manual_seed(self.runtime.key("pairs")), self.config.pairs
        for k in range(len(self.facts["labels"])):
            images = self.sample(self.noise(2 * count, rng), torch.full((2 * count,), k))
            yield tuple(images.split(count))

    def pairs_real(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """For each class at most `pairs` real images and as many others."""
        data = self.open(split).with_transform(generation.to_range(self.model.image_size))
        targets, rng = torch.tensor(data.targets), torch.Generator().manual_seed(0)
        for k in range(len(self.facts["labels"])):
            rows = torch.nonzero(targets == k).flatten()
            rows = rows[torch.randperm(len(rows), generator=rng)]
            half = min(self.config.pairs, len(rows) // 2)
            if half:
                images, _ = generation.readable(data, rows[: 2 * half].tolist())
                yield images[: len(images) // 2], images[len(images) // 2 : 2 * (len(images) // 2)]

    def discriminability(self) -> dict[str, float]:
        """How often the judge still names the class of samples whose detail was taken away."""
        network, size = judge(self.config.data).to(self.runtime.device), self.model.image_size
        hits, count = {"half": 0, "quarter": 0}, 0
        for images, wanted in self.generated_images():
            count += len(images)
            for name, small in (("half", size // 2), ("quarter", size // 4)):
                coarse = F.interpolate(images, (small, small), mode="bilinear", antialias=True)
                again = F.interpolate(coarse, (size, size), mode="bilinear")
                hits[name] += int((network.logits(again).argmax(1) == wanted).sum())
        shares = self.runtime.mean(torch.tensor([*hits.values()], dtype=torch.float64) / count)
        return {f"conditional_accuracy_{name}": float(share) for name, share in zip(hits, shares, strict=True)}


RECIPE = AuxiliaryClassifierRecipe
PRESETS = {
    "embedded": Config(
        model="acgan_32_slim",
        discriminator="acgan_32_slim_discriminator",
        data="digits",
        steps=350,
        batch_size=32,
        learning_rate=2e-3,  # paper: 2e-4, over 50,000 steps
        discriminator_learning_rate=2e-3,
        ema_decay=0.98,
        pairs=30,
    ),
    "published": Config(data="imagenet", group=0, steps=50_000, features="inception", samples=50_000, workers=16),
    "cifar10": Config(
        model="acgan_32",
        discriminator="acgan_32_discriminator",
        data="cifar10",
        steps=50_000,
        features="inception",
        samples=50_000,
        workers=8,
    ),
}
