"""Deep Image Prior against plain versions: the hourglass as two loops, the Lanczos filter by its formula, the average by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.restoration.deep_image_prior.model import Hourglass, dip_skip, dip_skip_slim
from paperzoo.papers.restoration.deep_image_prior.recipe import Prior
from paperzoo.tasks.restoration import LanczosDownsample, Mask


def normalised(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Batch norm from its formula."""
    mean, variance = norm.running_mean, norm.running_var
    if norm.training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    mean, variance, weight, bias = (t[:, None, None] for t in (mean, variance, norm.weight, norm.bias))
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def unit(block: nn.Sequential, x: Tensor, stride: int = 1) -> Tensor:
    """Pad by reflection, convolve, normalise, LeakyReLU of 0.2."""
    layer = next(m for m in block if isinstance(m, nn.Conv2d))
    norm = next(m for m in block if isinstance(m, nn.BatchNorm2d))
    pad = layer.weight.shape[-1] // 2
    x = F.pad(x, (pad,) * 4, mode="reflect") if pad else x
    y = normalised(norm, F.conv2d(x, layer.weight, layer.bias, stride=stride))
    return torch.where(y > 0, y, 0.2 * y)


def plain_hourglass(network: Hourglass, noise: Tensor) -> Tensor:
    """All scales down, then all scales up, as two loops."""
    scale, x, passed = network.scales, noise, []
    while isinstance(scale, nn.Module) and hasattr(scale, "down"):
        passed.append((scale, x))
        x = unit(scale.down[1], unit(scale.down[0], x, stride=2))
        scale = scale.inner
    for scale, entered in reversed(passed):
        x = F.interpolate(x, scale_factor=2, mode=scale.enlarge.mode)
        if scale.skip is not None:
            x = torch.cat([unit(scale.skip, entered), x], 1)
        x = normalised(scale.norm, x)
        for block in scale.up:
            x = unit(block, x)
    return 1 / (1 + (-F.conv2d(x, network.to_image.weight, network.to_image.bias)).exp())


def lanczos(x: float) -> float:
    """sinc(x) sinc(x/2) for |x| < 2: the Lanczos window with two lobes."""
    if x == 0:
        return 1.0
    return 2 * math.sin(math.pi * x) * math.sin(math.pi * x / 2) / (math.pi * x) ** 2 if abs(x) < 2 else 0.0


def slow_lanczos(images: Tensor, factor: int) -> Tensor:
    """Every small pixel as the weighted mean of the large pixels around its centre; edges repeated."""
    _, _, height, width = images.shape
    out = images.new_zeros(*images.shape[:2], height // factor, width // factor)
    for i in range(height // factor):
        for j in range(width // factor):
            middle = ((i + 0.5) * factor - 0.5, (j + 0.5) * factor - 0.5)
            total = weights = 0.0
            for y in range(math.ceil(middle[0] - 2 * factor), math.floor(middle[0] + 2 * factor) + 1):
                for x in range(math.ceil(middle[1] - 2 * factor), math.floor(middle[1] + 2 * factor) + 1):
                    weight = lanczos((y - middle[0]) / factor) * lanczos((x - middle[1]) / factor)
                    pixel = images[:, :, min(max(y, 0), height - 1), min(max(x, 0), width - 1)]
                    total, weights = total + weight * pixel, weights + weight
            out[:, :, i, j] = total / weights
    return out


def averaged(outputs: list[Tensor], decay: float) -> Tensor:
    """The answer after these outputs."""
    prior = Prior(nn.Identity(), torch.zeros(1, 3, 4, 4), 4, 4)
    for output in outputs:
        prior.remember(output, decay)
    return prior.average


def averaged_by_hand(outputs: list[Tensor], decay: float) -> Tensor:
    """decay^n for the first output, (1 - decay) decay^k for the one k steps before the last."""
    n = len(outputs) - 1
    return decay**n * outputs[0] + sum((1 - decay) * decay ** (n - i) * outputs[i] for i in range(1, n + 1))


PLAINLY = "the supplementary material's layers, as two loops"


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    shapes = (
        ("slim", dip_skip_slim(), (2, 16, 32, 48)),
        ("no skips", Hourglass(3, (8, 16), (0, 0), kernel_size=5, upsample="nearest", mix=False), (1, 3, 16, 16)),
        ("skips at the coarse scales", Hourglass(3, (8, 8, 16), (0, 0, 4)), (1, 3, 32, 24)),
    )
    for name, network, shape in shapes:
        for mode in (True, False):
            # float64: with batch norm over a few coarse pixels, float32 gradients carry rounding of a thousandth
            one = copy.deepcopy(network).double().train(mode)
            noise = torch.rand(shape, dtype=torch.float64) * 0.1
            title = f"hourglass, {name}, {'training' if mode else 'inference'}"
            yield Case(
                title, one, partial(plain_hourglass, one), (noise,), PLAINLY, gradients=True, rtol=1e-6, atol=1e-8
            )
    full, noise = dip_skip().train(), torch.rand(1, 32, 64, 64) * 0.1
    same = partial(plain_hourglass, full)
    yield Case("hourglass at its published width", full, same, (noise,), PLAINLY, atol=1e-4)
    count = lambda: sum(p.numel() for p in full.parameters())  # noqa: E731
    yield Case("parameters", count, lambda: 2_217_831, (), "the authors' models/skip.py, counted", atol=0, rtol=0)

    images = torch.rand(1, 3, 24, 16)
    for factor in (2, 3, 4, 8):
        shape = images[:, :, : 24 - 24 % factor, : 16 - 16 % factor]
        slow = partial(slow_lanczos, factor=factor)
        yield Case(
            f"Lanczos by {factor}", LanczosDownsample(factor), slow, (shape,), "the formula, pixel by pixel", atol=1e-5
        )
    mask = (torch.rand(1, 1, 24, 16) > 0.5).float()
    yield Case("mask", Mask(mask), lambda x: torch.where(mask > 0, x, 0.0), (images,), "equation 5", gradients=False)
    outputs = [torch.rand(1, 3, 4, 4) for _ in range(6)]
    yield Case("average of the outputs", averaged, averaged_by_hand, (outputs, 0.9), "the sum it stands for")
