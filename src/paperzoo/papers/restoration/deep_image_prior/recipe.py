"""Deep Image Prior: one image is the whole data set, and the structure of an untrained network the only prior.

    theta* = argmin over theta of ||A(f_theta(z)) - y||^2,   x* = f_theta*(z)          (equation 2)

by Adam from random weights with a fixed random z, stopped early: the network is quick to explain what looks natural and
slow to explain noise (section 2). Two tricks of the supplementary material: z is jittered anew at every step, and the
answer is a running average of the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from paperzoo.engine.models import create
from paperzoo.engine.runtime import Runtime
from paperzoo.tasks import restoration
from paperzoo.tasks.restoration import (
    Count,
    Fraction,
    Kind,
    NotNegative,
    Positive,
    RestorationRecipe,
    TotalVariationRecipe,
)


@dataclass(frozen=True)
class Config:
    """Defaults: denoising at sigma 25, as the authors' released notebook does it."""

    model: str = "dip_skip"
    data: str = "astronaut"  # a photograph that is always there, or the path of an image
    task: Kind = "denoise"
    degraded: bool = (
        False  # the image at `data` is degraded already: nothing is added to it, nothing known to compare with
    )
    crop: Count | None = None  # only a central square of this side
    sigma: NotNegative = 25.0  # of the noise, in 1/255
    mask: str | None = None  # an image of the same size, black where pixels are missing
    missing: Fraction = 0.5  # without a mask: the share of pixels that is hidden at random
    factor: Annotated[int, Field(ge=2, le=8)] = 4  # of super-resolution
    input: Literal["noise", "meshgrid"] = "noise"  # z: uniform noise, or the pixels' coordinates (for smooth images)
    input_scale: Positive = 0.1  # z ~ U(0, input_scale)
    jitter: NotNegative = 1 / 30  # deviation of the normal noise added to z at every step
    average_decay: Fraction = 0.99  # of the running average of outputs; 0: the last output
    steps: Count = 3000  # the early stopping
    learning_rate: Positive = 0.01


class Prior(nn.Module):
    """The network with its z and its answer: what has to be kept to see the restored image again.

    `forward(noise)`: (B, C, H', W') -> (B, 3, H, W), where H' and W' are H and W rounded up to what the network takes.
    """

    def __init__(self, network: nn.Module, noise: Tensor, height: int, width: int) -> None:
        super().__init__()
        self.network, self.height, self.width = network, height, width
        self.register_buffer("noise", noise)
        self.register_buffer("average", torch.zeros(1, 3, height, width))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, noise: Tensor) -> Tensor:
        return self.network(noise)[..., : self.height, : self.width]

    @torch.no_grad()
    def remember(self, output: Tensor, decay: float) -> None:
        """average <- decay * average + (1 - decay) * output, starting from the first output."""
        keep = torch.where(self.count == 0, 0.0, decay)
        self.average.mul_(keep).add_(output.to(self.average.dtype) * (1 - keep))
        self.count.add_(1)


class DeepImagePrior(RestorationRecipe):
    """See the module's docstring."""

    config: Config
    engine_parts = ()  # the answer is a picture that learning kept; another one is learned anew

    def __init__(
        self, config: Config, runtime: Runtime, facts: dict | None = None, image: Tensor | None = None
    ) -> None:
        super().__init__(config, runtime, facts, image)
        arguments = {"in_channels": 2} if config.input == "meshgrid" else {}
        network = create(config.model, **arguments)
        height, width = self.facts["height"], self.facts["width"]
        sides = [-(-side // network.multiple) * network.multiple for side in (height, width)]
        z = self.coordinates(*sides) if config.input == "meshgrid" else self.noise(network.in_channels, *sides)
        self.model = runtime.place(Prior(network, z, height, width))
        self.optimizer = torch.optim.Adam(self.model.parameters(), config.learning_rate)

    def noise(self, channels: int, height: int, width: int) -> Tensor:
        rng = torch.Generator().manual_seed(self.runtime.key("z"))
        return torch.rand(1, channels, height, width, generator=rng) * self.config.input_scale

    @staticmethod
    def coordinates(height: int, width: int) -> Tensor:
        """x and y of each pixel in [0, 1]: (1, 2, H, W)."""
        y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
        return torch.stack([x, y])[None]

    def step(self, batch: None) -> dict:
        self.model.train()
        rng = self.runtime.rng("jitter", per_rank=False)
        jitter = torch.randn(self.model.noise.shape, generator=rng).to(self.runtime.device)
        output = self.model(self.model.noise + self.config.jitter * jitter)
        loss = F.mse_loss(self.problem.operator(output.float()), self.problem.observed)
        self.model.remember(output.detach(), self.config.average_decay)
        return {"loss": loss, "psnr_fit": -10 * loss.detach().log10()}

    def restored(self) -> Tensor:
        return self.model.average

    def example(self) -> tuple[Tensor]:
        return (self.model.noise.detach().cpu().repeat(2, 1, 1, 1),)


PRESETS = {
    # half of a photograph's pixels are hidden; paper: jitter 0.03 and 11000 steps on a network of 128 channels
    "embedded": Config(
        model="dip_skip_slim",
        data="astronaut",
        crop=96,
        task="inpaint",
        missing=0.5,
        jitter=0.01,
        average_decay=0.98,
        steps=1000,
    ),
    # figure 4 and the released notebooks; the image is the user's: F16, zebra, kate, barbara
    "published": Config(crop=512),
    "published_super_resolution_4": Config(
        task="super_resolution", factor=4, jitter=0.03, average_decay=0.0, steps=2000, crop=512
    ),
    "published_super_resolution_8": Config(
        task="super_resolution", factor=8, jitter=0.05, average_decay=0.0, steps=4000, crop=512
    ),
    "published_text": Config(model="dip_skip_text", task="inpaint", jitter=0.03, average_decay=0.0, steps=6000),
    "published_pixels": Config(
        task="inpaint", missing=0.5, jitter=0.03, average_decay=0.0, learning_rate=0.001, steps=11000
    ),
    "published_hole": Config(model="dip_skip_hole", task="inpaint", jitter=0.0, average_decay=0.0, steps=3000),
}
RECIPE = DeepImagePrior


def without_network(config: Config) -> restoration.Config:
    """The task's default recipe for the same problem and steps: the pixels themselves, under the best total variation."""
    shared = {f.name for f in fields(restoration.Config)} & {f.name for f in fields(Config)}
    weight = {"denoise": 0.06, "inpaint": 0.003, "super_resolution": 0.001}[config.task]  # the best of a search
    return restoration.Config(**{name: getattr(config, name) for name in shared}, prior_weight=weight)


BASELINE: tuple[Any, Any] = (TotalVariationRecipe, without_network(PRESETS["embedded"]))
