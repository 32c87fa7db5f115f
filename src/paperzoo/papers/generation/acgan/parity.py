"""AC-GAN against the tables of its appendix written out in plain functions, and its losses against their equations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.generation.acgan import model as acgan
from paperzoo.papers.generation.acgan.recipe import discriminator_losses, generator_losses

TABLE_1 = {  # ImageNet: operation, feature maps (appendix A); a linear layer makes a 4x4 map
    "generator": [("linear", 768), ("up", 384), ("up", 256), ("up", 192), ("up", 64), ("up", 3)],
    "discriminator": [(2, 16), (1, 32), (2, 64), (1, 128), (2, 256), (1, 512)],
}
TABLE_2 = {  # CIFAR-10
    "generator": [("linear", 384), ("up", 192), ("up", 96), ("up", 3)],
    "discriminator": [(2, 16), (1, 32), (2, 64), (1, 128), (2, 256), (1, 512)],
}


def counted(table: dict[str, list], size: int, classes: int = 10, latent: int = 100) -> list[int]:
    """Parameters of both networks, summed over the rows of a table: weights, biases, two for each normalised map."""
    generator, inputs = 0, latent + classes
    for i, (kind, maps) in enumerate(table["generator"]):
        normalised = 0 < i < len(table["generator"]) - 1
        generator += (inputs + 1) * maps * 16 if kind == "linear" else (inputs * 25 + 1) * maps
        generator += 2 * maps * normalised
        inputs = maps
    discriminator, inputs = 0, 3
    for i, (stride, maps) in enumerate(table["discriminator"]):
        discriminator += (inputs * 9 + 1) * maps + 2 * maps * (i > 0)
        inputs, size = maps, size // stride
    return [generator, discriminator + (inputs * size * size + 1) * (classes + 1)]


def built(names: list[str]) -> list[int]:
    with torch.device("meta"):
        return [sum(p.numel() for p in getattr(acgan, name)().parameters()) for name in names]


def spread(layer: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """A transposed convolution of stride 2 that doubles the size: zeros between pixels, then the flipped kernel slides."""
    batch, channels, height, width = x.shape
    wide = x.new_zeros(batch, channels, 2 * height, 2 * width)
    wide[:, :, ::2, ::2] = x
    return F.conv2d(wide, layer.weight.flip(2, 3).transpose(0, 1), layer.bias, padding=2)


def norm(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Identity):
        return x
    if layer.training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    else:
        mean, variance = layer.running_mean, layer.running_var
    scaled = (x - mean[:, None, None]) / (variance[:, None, None] + layer.eps).sqrt()
    return scaled * layer.weight[:, None, None] + layer.bias[:, None, None]


def plain_generator(network: acgan.Generator, latent: Tensor, labels: Tensor) -> Tensor:
    rows = [torch.cat([z, torch.eye(network.num_classes)[k]]) for z, k in zip(latent, labels, strict=True)]
    x = (torch.stack(rows) @ network.linear.weight.T + network.linear.bias).clamp(min=0)
    x = x.reshape(len(latent), -1, 4, 4)
    for layer, scale in zip(network.layers[:-1], network.norms, strict=True):
        x = norm(scale, spread(layer, x)).clamp(min=0)
    return spread(network.layers[-1], x).tanh()


def plain_discriminator(network: acgan.Discriminator, images: Tensor) -> dict[str, Tensor]:
    x = images
    for i, (layer, scale) in enumerate(zip(network.layers, network.norms, strict=True)):
        y = F.conv2d(F.pad(x, (1, 1, 1, 1)), layer.weight, layer.bias)  # stride 1, then every other position
        y = norm(scale, y[:, :, ::2, ::2] if i % 2 == 0 else y)
        x = torch.where(y > 0, y, 0.2 * y)
    heads = torch.cat([network.source.weight, network.classes.weight])
    logits = x.reshape(len(x), -1) @ heads.T + torch.cat([network.source.bias, network.classes.bias])
    return {"source": logits[:, 0], "classes": logits[:, 1:]}


def awakened(network: nn.Module) -> nn.Module:
    """With statistics and scales that are not those of a fresh network; fresh weights of deviation 0.02 are nearly nothing."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                module.weight.mul_(4)
                module.bias.normal_(0.0, 0.1)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0.0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
    return network


def log_likelihoods(real: Tensor, fake: Tensor, labels: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """L_S and L_C (equations 2 and 3) from joint logits (B, 1 + K), through probabilities."""
    p_real, p_fake = real[:, 0].sigmoid(), 1 - fake[:, 0].sigmoid()
    source = p_real.log().mean() + p_fake.log().mean()
    named = [p.softmax(1)[torch.arange(len(p)), k] for p, k in ((real[:, 1:], labels), (fake[:, 1:], wanted))]
    return source, named[0].log().mean() + named[1].log().mean()


def heads(logits: Tensor) -> dict[str, Tensor]:
    return {"source": logits[:, 0], "classes": logits[:, 1:]}


def ours(real: Tensor, fake: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    return discriminator_losses(heads(real), heads(fake), labels, wanted)


def theirs(real: Tensor, fake: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    return -sum(log_likelihoods(real, fake, labels, wanted))


def generator_minimax(real: Tensor, fake: Tensor, labels: Tensor, wanted: Tensor) -> list[Tensor]:
    """The gradient by the generated images' logits; those of real images are constant to the generator."""
    fake = fake.clone().requires_grad_()
    return list(torch.autograd.grad(generator_losses(heads(fake), wanted, minimax=True), fake))


def generator_by_equation(real: Tensor, fake: Tensor, labels: Tensor, wanted: Tensor) -> list[Tensor]:
    fake = fake.clone().requires_grad_()
    source, classes = log_likelihoods(real, fake, labels, wanted)
    return list(torch.autograd.grad(-(classes - source), fake))


def alternative(fake: Tensor, wanted: Tensor) -> Tensor:
    """-log P(S = real | X_fake) - log P(C = c | X_fake), through probabilities."""
    named = fake[:, 1:].softmax(1)[torch.arange(len(fake)), wanted]
    return -fake[:, 0].sigmoid().log().mean() - named.log().mean()


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    names = ["acgan_128", "acgan_128_discriminator", "acgan_32", "acgan_32_discriminator"]
    expected = counted(TABLE_1, 128) + counted(TABLE_2, 32)
    sums = "appendix A, tables 1 and 2, summed row by row"
    yield Case("parameters of the four networks", partial(built, names), lambda: expected, (), sums, atol=0, rtol=0)

    rows = "appendix A's rows in plain functions"
    for mode in (True, False):
        word = "training" if mode else "inference"
        for count in (4, 3):
            generator = awakened(acgan.acgan_32_slim()).train(mode)
            inputs = torch.randn(count, generator.latent_dim), torch.tensor([1, 5, 5, 9])[:count]
            plain = partial(plain_generator, generator)
            name = f"generator, batch of {count}, {word}"
            yield Case(name, generator, plain, inputs, rows, gradients=True, rtol=1e-3, atol=1e-4)
        critic = awakened(acgan.acgan_32_slim_discriminator(drop_rate=0.0, noise=0.0)).train(mode)
        images, plain = torch.rand(4, 3, 32, 32) * 2 - 1, partial(plain_discriminator, critic)
        name = f"discriminator's two heads, {word}"
        yield Case(name, critic, plain, (images,), rows, gradients=True, rtol=1e-3, atol=1e-4)
    full = awakened(acgan.acgan_128()).eval()
    inputs = torch.randn(1, 100), torch.tensor([7])
    yield Case("generator at 128x128", full, partial(plain_generator, full), inputs, rows, atol=1e-4)
    full = awakened(acgan.acgan_128_discriminator()).eval()
    images = torch.rand(1, 3, 128, 128) * 2 - 1
    yield Case(
        "discriminator at 128x128", full, partial(plain_discriminator, full), (images,), rows, atol=1e-4, rtol=1e-3
    )

    logits = torch.randn(6, 11) * 2, torch.randn(6, 11) * 2
    labels = torch.tensor([0, 1, 2, 3, 4, 9]), torch.tensor([9, 9, 0, 5, 6, 7])
    equations = "equations 2 and 3, through probabilities"
    yield Case("the discriminator's loss", ours, theirs, (*logits, *labels), equations, gradients=True)
    by_hand = "the gradient of L_C - L_S by the generated images"
    yield Case(
        "the generator's loss, as written", generator_minimax, generator_by_equation, (*logits, *labels), by_hand
    )
    mine = lambda fake, wanted: generator_losses(heads(fake), wanted)  # noqa: E731
    usual = "-log P(real) - log P(c), through probabilities"
    yield Case("the generator's loss, as used", mine, alternative, (logits[1], labels[1]), usual, gradients=True)
