"""Noise2Noise: a network learns to restore from pairs of independently spoiled copies of the same pictures, and never sees a clean one.

    argmin over theta of E ||f_theta(x^) - y^||^2,   E[y^ | x^] = y                          (section 2, equation 6)

A squared error is smallest at the mean of its targets, so noise of mean zero on the targets changes nothing but the pace. An absolute error goes to their
median, and (|f - y^| + eps)^gamma with gamma from 2 to 0 to their mode, which is what survives random impulses (section 3.2). Any network will do.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.data.degradations import Degradation, drawn
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.tasks import image_restoration
from paperzoo.tasks.image_restoration import ImageRestorationRecipe, NotNegative, Patches, Positive

Share = Annotated[float, Field(ge=0, le=1)]
Noise = Literal["gaussian", "poisson", "impulse"]


@dataclass(frozen=True)
class Config(image_restoration.Config):
    """Defaults: the published setting of Gaussian noise.

    With `degraded`, a folder of second noisy copies of the pictures in `data`, recorded pairs are learned from and nothing is added.
    """

    noise: Noise = "gaussian"
    # of Poisson noise: the expected count of a white pixel; the smaller, the noisier
    peak: Positive | tuple[Positive, Positive] = (0.001, 50.0)
    share: Share | tuple[Share, Share] = (0.0, 0.95)  # of the pixels that an impulse replaces
    test_peak: Positive = 30.0
    test_share: Share = 0.5
    annealed: bool = False  # the loss (|f - y| + 1e-8)^gamma, gamma falling from 2 to 0, in place of `loss`
    ramp_down: NotNegative = 0.3  # the last share of the steps, in which the learning rate falls to 0


@dataclass(frozen=True)
class Corruption(Degradation):
    """Noise of three kinds. "gaussian": `sigma` / 255. "poisson": counts of mean peak * x, over peak. "impulse": a share of the pixels gets a random colour."""

    noise: Noise = "gaussian"
    peak: float | tuple[float, float] = 30.0
    share: float | tuple[float, float] = 0.5

    def __call__(self, clean: Tensor, rng: torch.Generator | None = None) -> Tensor:
        if self.noise == "gaussian":
            return super().__call__(clean, rng)
        if self.noise == "poisson":
            peak = drawn(self.peak, rng)
            return torch.poisson(clean.clamp(min=0) * peak, generator=rng) / peak
        replaced = torch.rand(1, *clean.shape[1:], generator=rng) < drawn(self.share, rng)
        return torch.where(replaced, torch.rand(clean.shape, generator=rng), clean)


class TwoCopies(Patches):
    """(one noisy copy, another noisy copy) of random patches: independent noise, the clean patch is let go."""

    def synthetic(self, clean: Tensor, degradation: Degradation) -> tuple[Tensor, Tensor]:
        first, part = super().synthetic(clean, degradation)
        return first, degradation(part)

    def recorded(self, degraded: Tensor, clean: Tensor, degradation: Degradation) -> tuple[Tensor, Tensor]:
        """Which of two recorded copies is the input is drawn: both are alike."""
        pair = super().recorded(degraded, clean, degradation)
        return pair[::-1] if int(torch.randint(2, ())) else pair


class Noise2Noise(ImageRestorationRecipe):
    """The task's recipe, learning from `TwoCopies`."""

    config: Config

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        if config.task != "denoise":
            raise PaperZooError(f"task is {config.task}; noise2noise needs noise that is drawn anew: denoise")
        super().__init__(config, runtime, facts)

    def degradations(self) -> list[list[Degradation]]:
        c = self.config
        return [[Corruption("denoise", sigma=c.sigma, noise=c.noise, peak=c.peak, share=c.share)]]

    def test_degradations(self) -> list[Degradation]:
        c = self.config
        return [self.degradations()[0][0].fixed(sigma=c.test_sigma, peak=c.test_peak, share=c.test_share)]

    def training_data(self) -> Dataset:
        c = self.config
        return TwoCopies(self.train_set, self.degradations(), c.patch_size, c.channels, c.flip)

    def learning_rate_factor(self, step: int) -> float:
        """The schedule's, and over the last share of the steps falling to 0 as in the released code."""
        import math

        factor, length = super().learning_rate_factor(step), self.config.ramp_down * self.config.steps
        passed = step - (self.config.steps - length)
        if passed <= 0 or not length:
            return factor
        return factor * (0.5 + 0.5 * math.cos(math.pi * min(1.0, passed / length) / 2)) ** 2

    def loss(self, restored: Tensor, noisy: Tensor) -> Tensor:
        if not self.config.annealed:
            return super().loss(restored, noisy)
        gamma = 2 * (1 - self.runtime.step / self.config.steps)  # section 3.2
        return ((restored.float() - noisy).abs() + 1e-8).pow(gamma).mean()


PUBLISHED = Config(
    model="n2n_unet",
    data="imagenet_validation",  # a folder: 50,000 pictures, parts of 256 x 256
    test_data="Kodak",
    sigma=(0.0, 50.0),
    test_sigma=25.0,
    patch_size=256,
    flip=False,
    loss="mse",
    steps=300_000,
    batch_size=4,
    learning_rate=3e-4,
    betas=(0.9, 0.99),
    schedule="constant",
    workers=4,
)


def like(config: Config, **changes: object) -> Config:
    return Config(**{f.name: getattr(config, f.name) for f in fields(config)} | changes)


PRESETS = {
    "embedded": Config(
        model="dncnn_slim",
        data="photographs",
        channels=1,
        sigma=25.0,
        patch_size=40,
        loss="mse",
        steps=450,
        batch_size=4,
        learning_rate=5e-3,
        schedule="cosine",
        ramp_down=0.0,
    ),
    "published": PUBLISHED,
    "published_poisson": like(PUBLISHED, noise="poisson"),
    "published_impulse": like(PUBLISHED, noise="impulse", annealed=True),
}
RECIPE = Noise2Noise


def with_clean_targets(config: Config) -> image_restoration.Config:
    """The same network, pictures, noise and steps, with the clean pictures as targets."""
    shared = {f.name for f in fields(image_restoration.Config)}
    return image_restoration.Config(**{name: getattr(config, name) for name in shared})


BASELINE: tuple[Any, Any] = (ImageRestorationRecipe, with_clean_targets(PRESETS["embedded"]))
