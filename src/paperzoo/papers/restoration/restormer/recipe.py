"""Restormer learns from ever larger patches: sec. 3.3, progressive learning.

Statistics of channels that are taken over small patches are not those of whole images. So patches grow during learning while batches shrink, that
a step takes as long. The rate is constant while patches are smallest and falls by a cosine from there on, as in the released options.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.tasks.image_restoration import Config as TaskConfig
from paperzoo.tasks.image_restoration import ImageRestorationRecipe, Patches

Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Config(TaskConfig):
    """The task's settings, and the stages of progressive learning: `patch_size` and `batch_size` are those of the first.

    larger_from: at which share of the steps each further stage begins. larger_patches, larger_batches: what it has.
    lowest_rate: where the cosine ends, as a factor of `learning_rate`.
    """

    larger_from: tuple[Share, ...] = ()
    larger_patches: tuple[Count, ...] = ()
    larger_batches: tuple[Count, ...] = ()
    lowest_rate: Annotated[float, Field(ge=0, le=1)] = 0.0


class RestormerRecipe(ImageRestorationRecipe):
    """The task's default recipe with progressive learning."""

    config: Config

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        lengths = {len(config.larger_from), len(config.larger_patches), len(config.larger_batches)}
        if len(lengths) > 1 or list(config.larger_from) != sorted(config.larger_from):
            raise PaperZooError(
                "larger_from, larger_patches and larger_batches have a value for each further stage, in order"
            )
        super().__init__(config, runtime, facts)
        self._batches: dict[int, Any] = {}

    def stage(self, step: int) -> int:
        return sum(step >= share * self.config.steps for share in self.config.larger_from)

    def batch(self) -> tuple[Tensor, Tensor]:
        """A batch of the step's stage."""
        c, stage = self.config, self.stage(self.runtime.step)
        if stage not in self._batches:
            patch, count = [(c.patch_size, c.batch_size), *zip(c.larger_patches, c.larger_batches, strict=True)][stage]
            data = Patches(self.train_set, self.degradations(), patch, c.channels, c.flip)
            self._batches = {stage: self.runtime.batches(data, count, workers=c.workers)}
        return self._batches[stage].next()

    def learning_rate_factor(self, step: int) -> float:
        c = self.config
        if c.schedule != "cosine" or not c.larger_from:
            return super().learning_rate_factor(step)
        flat = c.larger_from[0] * c.steps
        progress = min(1.0, max(0.0, (step - flat) / max(1.0, c.steps - flat)))
        return c.lowest_rate + (1 - c.lowest_rate) * 0.5 * (1 + math.cos(math.pi * progress))


# Sec. 4 and the released options: AdamW, rate 3e-4 for 92,000 iterations, then by a cosine to 1e-6 in 208,000; patches of 128, 160, 192,
# 256, 320 and 384 pixels in batches of 64, 40, 32, 16, 8 and 8 (on 8 GPUs), L1, gradients clipped at 0.01.
ITERATIONS = (92_000, 64_000, 48_000, 36_000, 36_000, 24_000)
PUBLISHED = Config(
    model="restormer_denoising",
    data="DFWB",
    test_data="CBSD68",
    sigma=(0.0, 50.0),
    test_sigma=15.0,
    patch_size=128,
    batch_size=64,
    steps=sum(ITERATIONS),
    larger_from=tuple(sum(ITERATIONS[:i]) / sum(ITERATIONS) for i in range(1, 6)),
    larger_patches=(160, 192, 256, 320, 384),
    larger_batches=(40, 32, 16, 8, 8),
    lowest_rate=1 / 300,
    optimizer="adamw",
    learning_rate=3e-4,
    weight_decay=1e-4,
    schedule="cosine",
    clip=0.01,
    workers=16,
)

PRESETS = {
    # What bicubic interpolation leaves blurred: the published tasks need more than seconds to pass classical methods.
    "embedded": Config(
        model="restormer_small",
        data="photographs",
        task="super_resolution",
        factor=2,
        patch_size=24,
        batch_size=8,
        steps=150,
        larger_from=(0.4, 0.8),
        larger_patches=(32, 48),
        larger_batches=(4, 2),
        optimizer="adamw",
        learning_rate=4e-3,
        weight_decay=1e-4,
        schedule="cosine",
    ),
    "published": PUBLISHED,
    "published_grey": replace(PUBLISHED, channels=1, test_data="BSD68"),
    "published_real_noise": replace(PUBLISHED, data="SIDD", test_data=None),
    "published_deraining": replace(PUBLISHED, model="restormer", data="Rain13K", test_data=None),
    "published_motion_blur": replace(PUBLISHED, model="restormer", data="GoPro", test_data=None, task="deblur"),
}
RECIPE = RestormerRecipe
