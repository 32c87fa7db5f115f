"""Noise2Self: a network learns to denoise from the noisy pictures alone, one copy of each, because it never sees the pixel that it has to answer.

    E ||f(x) - x||^2 = E ||f(x) - y||^2 + E ||x - y||^2     for every J-invariant f and noise of mean zero that is independent between pixels
                                                                                                        (proposition 1, equation 3)
    g(x)_J = f(1_J * s(x) + 1_(J^c) * x)_J      is J-invariant: the pixels of J are replaced before the network sees them (equation 6)

J is one of the width^2 grids of pixels that lie `width` apart; s(x) is the mean of a pixel's neighbours without the pixel. The loss counts the pixels
of J alone. Any network will do.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.data.degradations import Degradation
from paperzoo.data.picture_files import as_float, with_channels
from paperzoo.data.restoration import Pictures
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.tasks import image_restoration
from paperzoo.tasks.image_restoration import ImageRestorationRecipe, dihedral, last, mirrored

KEPT = 256 * 2**20  # bytes of noisy pictures that are kept; others get the same noise again
NEIGHBOURS = ((0.5, 1.0, 0.5), (1.0, 0.0, 1.0), (0.5, 1.0, 0.5))  # over 6: what a pixel of J is replaced by


@dataclass(frozen=True)
class Config(image_restoration.Config):
    """Defaults: the released example of a network on pictures, at the task's budget."""

    noisy: bool = False  # the pictures at `data` are noisy already: nothing is added to them
    width: Annotated[int, Field(ge=2, le=16)] = 4  # pixels between those of a grid
    # one pass of the network over the whole noisy picture, in place of its J-invariant version, which takes width^2 passes
    single_pass: bool = False


def grid(height: int, width: int, spacing: int, phase: int, device: torch.device | None = None) -> Tensor:
    """The pixels of J, bool (H, W): those whose row and column leave the phase's remainders; phases 0 … spacing^2 - 1 cover all."""
    rows = torch.arange(height, device=device) % spacing == phase % spacing
    columns = torch.arange(width, device=device) % spacing == phase // spacing % spacing
    return rows[:, None] & columns[None, :]


def neighbours(images: Tensor, kernel: tuple = NEIGHBOURS) -> Tensor:
    """s(x): each pixel's mean of its eight neighbours, the nearer four counting twice, without itself; (B, C, H, W).

    The border is mirrored without its last pixel, so that no pixel comes back as its own neighbour. Both sides have at least two pixels.
    """
    weights = images.new_tensor(kernel)
    weights = weights / weights.sum()
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, weights.expand(images.shape[1], 1, 3, 3), groups=images.shape[1])


def without(images: Tensor, mask: Tensor) -> Tensor:
    """The images with the pixels of a mask (H, W) replaced by their neighbours' mean."""
    return torch.where(mask, neighbours(images), images)


class NoisyPatches(Dataset):
    """Random patches (C, p, p) of one noisy copy of each picture, which stays the same for the whole training. Clean pictures are not given out.

    Args:
        degradation: what is done to each picture once, with noise that follows from its number; None where the pictures are noisy already.
    """

    def __init__(
        self, pictures: Pictures, degradation: Degradation | None, patch_size: int, channels: int, flip: bool, key: int
    ) -> None:
        self.pictures, self.degradation, self.key = pictures, degradation, key
        self.patch_size, self.channels, self.flip = patch_size, channels, flip
        self.kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.pictures)

    def noisy(self, index: int) -> Tensor:
        """The noisy picture, float32 (C, H, W)."""
        if index in self.kept:
            return self.kept[index]
        image = with_channels(as_float(self.pictures[index][1]), self.channels)
        if self.degradation is not None:
            image = self.degradation(image, torch.Generator().manual_seed(self.key + index))
        if sum(t.nbytes for t in self.kept.values()) + image.nbytes <= KEPT:
            self.kept[index] = image
        return image

    def __getitem__(self, index: int) -> Tensor:
        p = self.patch_size
        image = mirrored(self.noisy(index), p, p)
        top, left = (int(torch.randint(n - p + 1, ())) for n in image.shape[1:])
        patch = image[:, top : top + p, left : left + p]
        return (dihedral(patch, int(torch.randint(8, ()))) if self.flip else patch).contiguous()


class Noise2Self(ImageRestorationRecipe):
    """The task's recipe, learning from `NoisyPatches` by the loss on the pixels that the network does not see."""

    config: Config

    def __init__(self, config: Config, runtime: Runtime, facts: dict | None = None) -> None:
        if config.task != "denoise":
            raise PaperZooError(
                f"task is {config.task}; noise2self needs noise that is independent between pixels: denoise"
            )
        super().__init__(config, runtime, facts)

    def training_data(self) -> Dataset:
        c = self.config
        kind = None if c.noisy else self.degradations()[0][0]
        return NoisyPatches(self.train_set, kind, c.patch_size, c.channels, c.flip, self.runtime.key("noisy") >> 1)

    def step(self, batch: Tensor) -> dict:
        self.model.train()
        c = self.config
        mask = grid(*batch.shape[-2:], c.width, self.runtime.step % c.width**2, batch.device)
        answer = last(self.model(without(batch, mask)))
        return {"loss": self.loss(answer[..., mask], batch[..., mask])}

    def loss(self, restored: Tensor, noisy: Tensor) -> Tensor:
        """The mean over the pixels of J, (B, C, pixels)."""
        difference = restored.float() - noisy
        return difference.abs().mean() if self.config.loss == "l1" else difference.square().mean()

    def once(self, images: Tensor) -> Tensor:
        """The J-invariant answer; each tile of a large picture has its own grids."""
        if self.config.single_pass:
            return super().once(images)
        return invariant(super().once, images, self.config.width)


def invariant(function: Any, images: Tensor, width: int, kernel: tuple = NEIGHBOURS) -> Tensor:
    """The J-invariant version of a function of images: each pixel is answered from a picture in which its grid is replaced (equation 6)."""
    result = torch.zeros_like(images)
    replaced = neighbours(images, kernel)
    for phase in range(width**2):
        mask = grid(*images.shape[-2:], width, phase, images.device)
        result = torch.where(mask, function(torch.where(mask, replaced, images)), result)
    return result


class WithoutMask(Noise2Self):
    """What is left without the idea: the same noisy pictures as inputs and as targets."""

    def step(self, batch: Tensor) -> dict:
        self.model.train()
        return {"loss": self.loss(last(self.model(batch)), batch)}


def like(config: Config, **changes: object) -> Config:
    return Config(**{f.name: getattr(config, f.name) for f in fields(config)} | changes)


PUBLISHED = Config(
    model="dncnn_s",
    data="imagenet_validation",  # a folder: the paper takes 60,000 parts of 128 x 128 of ImageNet
    sigma=25.0,
    patch_size=128,
    loss="mse",
    steps=94_000,  # 50 epochs
    batch_size=32,
    learning_rate=1e-3,
    schedule="cosine",
    workers=4,
)
PRESETS = {
    "embedded": Config(
        model="dncnn_slim",
        data="photographs",
        channels=1,
        sigma=25.0,
        patch_size=40,
        loss="mse",
        steps=400,
        batch_size=4,
        learning_rate=5e-3,
        schedule="cosine",
    ),
    "published": PUBLISHED,
    "published_unet": like(PUBLISHED, model="n2n_unet"),
}
RECIPE = Noise2Self
BASELINE: tuple[Any, Any] = (WithoutMask, PRESETS["embedded"])
