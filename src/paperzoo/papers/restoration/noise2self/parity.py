"""Noise2Self against scikit-image's version for classical denoisers, the released masks written out as loops, and the paper's identity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy
import torch
from torch import Tensor, nn

from paperzoo.data.degradations import Degradation
from paperzoo.data.restoration import Pictures
from paperzoo.engine.parity import Case
from paperzoo.papers.restoration.noise2self.recipe import PRESETS, Noise2Self, NoisyPatches, grid, invariant, without

CROSS = ((0.0, 1.0, 0.0), (1.0, 0.0, 1.0), (0.0, 1.0, 0.0))  # scikit-image's neighbours


def masked_by_loops(images: Tensor, spacing: int, phase: int) -> Tensor:
    """The released rule pixel by pixel, with a mirrored border."""
    out, (height, width) = images.clone(), images.shape[-2:]
    inside = lambda i, n: -i if i < 0 else 2 * (n - 1) - i if i >= n else i  # noqa: E731
    for i in range(height):
        for j in range(width):
            if i % spacing == phase % spacing and j % spacing == (phase // spacing) % spacing:
                total = torch.zeros(images.shape[:2], dtype=images.dtype)
                for y in (-1, 0, 1):
                    for x in (-1, 0, 1):
                        weight = 0.0 if y == x == 0 else 1.0 if y == 0 or x == 0 else 0.5
                        total += weight * images[:, :, inside(i + y, height), inside(j + x, width)]
                out[:, :, i, j] = total / 6
    return out


def of_skimage(images: Tensor, strength: float) -> Tensor:
    from skimage.restoration import denoise_invariant, denoise_tv_chambolle

    found = [
        denoise_invariant(image[0].numpy(), denoise_tv_chambolle, stride=4, denoiser_kwargs={"weight": strength})
        for image in images
    ]
    return torch.from_numpy(numpy.stack(found))[:, None]


def of_ours(images: Tensor, strength: float) -> Tensor:
    from skimage.restoration import denoise_tv_chambolle

    def denoise(batch: Tensor) -> Tensor:
        return torch.stack([torch.from_numpy(denoise_tv_chambolle(x[0].numpy(), weight=strength))[None] for x in batch])

    return invariant(denoise, images, 4, CROSS)


class Step(nn.Module):
    """One step's loss through the recipe, as a function of the noisy patches."""

    def __init__(self, network: nn.Module, phase: int) -> None:
        super().__init__()
        self.network, self.phase = network, phase

    def forward(self, noisy: Tensor) -> Tensor:
        recipe = Noise2Self.__new__(Noise2Self)
        recipe.config = replace(PRESETS["embedded"], width=3)
        recipe.model, recipe.runtime = self.network, type("At", (), {"step": self.phase + 9})()
        return recipe.step(noisy)["loss"]


class PlainStep(Step):
    """The released loss: both sides times the mask, here over the number of pixels that count."""

    def forward(self, noisy: Tensor) -> Tensor:
        answer = self.network(masked_by_loops(noisy, 3, self.phase))
        height, width = noisy.shape[-2:]
        mask = torch.zeros(height, width, dtype=noisy.dtype)
        mask[self.phase % 3 :: 3, self.phase // 3 :: 3] = 1
        return ((answer * mask - noisy * mask) ** 2).sum() / (mask.sum() * noisy.shape[0] * noisy.shape[1])


def influence(network: nn.Module) -> Tensor:
    """How much each pixel of the J-invariant version depends on itself: the largest derivative of a pixel's answer by the pixel."""
    x = torch.rand(1, 1, 9, 10, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda t: invariant(network, t, 4), x)
    return jacobian.reshape(90, 90).diagonal().abs().max()


def identity() -> tuple[Tensor, Tensor]:
    """Proposition 1 over a grey picture with fine lines: the self-supervised error, and the true one plus the noise's."""
    rng = torch.Generator().manual_seed(0)
    wave = torch.sin(torch.arange(512) * 0.2)
    clean = (0.5 + 0.3 * wave[:, None] * wave[None, :])[None, None]
    noisy = Degradation(sigma=40.0)(clean, rng)
    box = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    answer = invariant(box, noisy, 4)
    return (answer - noisy).square().mean(), (answer - clean).square().mean() + (noisy - clean).square().mean()


def given_out() -> Tensor:
    """The largest difference between patches and the one noisy copy of a picture; and the smallest distance to the clean picture in 1/255."""
    clean = torch.full((3, 40, 40), 100, dtype=torch.uint8)
    data = NoisyPatches(Pictures([clean]), Degradation(sigma=25.0), 40, 3, False, 7)
    again = NoisyPatches(Pictures([clean]), Degradation(sigma=25.0), 40, 3, False, 7)
    difference = (data[0] - again[0]).abs().max()
    return torch.stack([difference, (data[0] - 100 / 255).std() * 255])


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 1, 5, padding=2)).double()


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    images = torch.rand(2, 3, 11, 13)
    for spacing, phase in ((4, 0), (4, 7), (3, 8), (2, 3)):
        yield Case(
            f"replaced pixels, grid {phase} of {spacing**2}",
            lambda x, s=spacing, p=phase: without(x, grid(11, 13, s, p)),
            lambda x, s=spacing, p=phase: masked_by_loops(x, s, p),
            (images,),
            "the released masks, pixel by pixel",
            note="the released code pads the border with zeros, which darkens it; here it is mirrored, as in scikit-image",
        )
    cover = lambda: sum(grid(9, 10, 4, p).int() for p in range(16))  # noqa: E731
    yield Case("the grids cover every pixel once", cover, lambda: torch.ones(9, 10), (), "a partition", atol=0, rtol=0)
    for phase in (0, 5):
        network = small()
        yield Case(
            f"loss of a step, grid {phase}, every gradient", Step(network, phase), PlainStep(network, phase),
            (torch.rand(2, 1, 10, 12, dtype=torch.float64),), "the released loss", gradients=True, rtol=1e-5, atol=1e-7,
        )  # fmt: skip
    noisy = torch.rand(2, 1, 24, 28, dtype=torch.float64)
    for strength in (0.1, 0.3):
        yield Case(
            f"J-invariant total variation, weight {strength}",
            of_ours,
            of_skimage,
            (noisy, strength),
            "scikit-image denoise_invariant",
            rtol=1e-8,
            atol=1e-10,
        )
    yield Case(
        "no pixel sees itself",
        lambda: influence(small()),
        lambda: 0.0,
        (),
        "the definition of J-invariance",
        atol=1e-12,
    )
    yield Case(
        "self-supervised error", lambda: identity()[0], lambda: identity()[1], (), "proposition 1", rtol=0.01, atol=0
    )
    yield Case(
        "one noisy copy, the clean picture never",
        given_out,
        lambda: torch.tensor([0.0, 25.0]),
        (),
        "the data that are given out",
        rtol=0.05,
        atol=1e-7,
    )
