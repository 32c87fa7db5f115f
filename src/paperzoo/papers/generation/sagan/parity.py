"""SAGAN against slow, obvious versions of its equations and of the released code's layer order, and a published size."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.generation.sagan import model as sagan
from paperzoo.tasks.generation import hinge_discriminator_loss, hinge_generator_loss


def slow_attention(layer: sagan.SelfAttention, x: Tensor) -> Tensor:
    """Equations 1 to 3 one position at a time; keys and values max-pooled by two, as released."""
    f, g, h, v = (getattr(layer, name).weight.flatten(1) for name in "fghv")
    images = []
    for image in x:  # (C, H, W)
        _, height, width = image.shape
        keys, values = [], []
        for i in range(0, height, 2):
            for j in range(0, width, 2):
                window = image[:, i : i + 2, j : j + 2].flatten(1)  # (C, 4)
                keys.append((f @ window).amax(1))
                values.append((h @ window).amax(1))
        rows = []
        for i in range(height):
            row = []
            for j in range(width):
                query = g @ image[:, i, j]
                scores = [(query * key).sum().exp() for key in keys]
                beta = [score / sum(scores) for score in scores]
                attended = sum(b * value for b, value in zip(beta, values, strict=True))
                row.append(image[:, i, j] + layer.gamma * (v @ attended))
            rows.append(torch.stack(row, dim=-1))
        images.append(torch.stack(rows, dim=-2))
    return torch.stack(images)


def plain_attention(layer: sagan.SelfAttention, x: Tensor) -> Tensor:
    """The same with whole matrices and an explicit softmax."""
    batch, channels, height, width = x.shape
    queries = F.conv2d(x, layer.g.weight).reshape(batch, channels // 8, -1)
    keys = F.max_pool2d(F.conv2d(x, layer.f.weight), 2).reshape(batch, channels // 8, -1)
    values = F.max_pool2d(F.conv2d(x, layer.h.weight), 2).reshape(batch, channels // 2, -1)
    beta = torch.einsum("bcj,bci->bji", queries, keys).softmax(2)
    attended = torch.einsum("bji,bci->bcj", beta, values).reshape(batch, channels // 2, height, width)
    return x + layer.gamma * F.conv2d(attended, layer.v.weight)


def conditional_norm(layer: sagan.ConditionalBatchNorm2d, x: Tensor, labels: Tensor) -> Tensor:
    """Torch's own batch norm, once for each class with that class's scale and shift."""
    out = torch.empty_like(x)
    normal = batch_norm(layer.norm, x)
    for k in labels.unique():
        rows = labels == k
        scale, shift = layer.gamma.weight[k], layer.beta.weight[k]
        if layer.training:  # the statistics are the whole batch's, whatever the class
            out[rows] = normal[rows] * scale[:, None, None] + shift[:, None, None]
        else:
            mean, variance = layer.norm.running_mean, layer.norm.running_var
            out[rows] = F.batch_norm(x[rows], mean, variance, scale, shift, False, 0.0, layer.norm.eps)
    return out


def batch_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Torch's function, leaving the module's statistics alone."""
    kept = norm.running_mean.clone(), norm.running_var.clone()
    return F.batch_norm(x, *kept, norm.weight, norm.bias, norm.training, 0.0, norm.eps)


def convolve(layer: nn.Module, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)


def doubled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def halved(x: Tensor) -> Tensor:
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def plain_generator(network: sagan.Generator, latent: Tensor, labels: Tensor) -> Tensor:
    """The released code's generator, in its order: shortcuts are enlarged first and convolved after."""
    x = (latent @ network.linear.weight.T + network.linear.bias).reshape(len(latent), -1, 4, 4)
    for i, block in enumerate(network.blocks):
        y = convolve(block.conv1, doubled(conditional_norm(block.norm1, x, labels).clamp(min=0)))
        y = convolve(block.conv2, conditional_norm(block.norm2, y, labels).clamp(min=0))
        x = y + convolve(block.shortcut, doubled(x))
        if i == network.attention_after:
            x = plain_attention(network.attention, x)
    x = batch_norm(network.norm, x)
    return convolve(network.to_image, x.clamp(min=0)).tanh()


def plain_discriminator(network: sagan.Discriminator, images: Tensor, labels: Tensor) -> Tensor:
    """The released code's discriminator: later blocks convolve the shortcut first and pool after; then the projection."""
    x = images
    for i, block in enumerate(network.blocks):
        y = convolve(block.conv2, convolve(block.conv1, x if block.first else x.clamp(min=0)).clamp(min=0))
        shortcut = x if isinstance(block.shortcut, nn.Identity) else convolve(block.shortcut, x)
        x = halved(y) + halved(shortcut) if block.downsample else y + shortcut
        if i == network.attention_after:
            x = plain_attention(network.attention, x)
    phi = x.clamp(min=0).sum((2, 3))
    weight, bias, table = network.linear.weight[0], network.linear.bias[0], network.embedding.weight
    return torch.stack([p @ weight + bias + p @ table[k] for p, k in zip(phi, labels, strict=True)])


def awakened(network: nn.Module) -> nn.Module:
    """With attention switched on, classes that differ, and statistics that are not those of a fresh network."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, sagan.SelfAttention):
                module.gamma.fill_(0.7)
            if isinstance(module, sagan.ConditionalBatchNorm2d):
                module.gamma.weight.normal_(1.0, 0.2)
                module.beta.weight.normal_(0.0, 0.2)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0.0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return network


def largest_singular_value(layer: nn.Module) -> Tensor:
    """Of a spectrally normalised layer's weight after many passes in training mode, by a full decomposition."""
    layer.train()
    for _ in range(200):
        weight = layer.weight
    return torch.linalg.svdvals(weight.detach().flatten(1))[0]


def hinge_gradients(real: Tensor, fake: Tensor) -> list[Tensor]:
    """Autograd's gradients of the two losses: of the discriminator's by both logits, of the generator's by its logits."""
    real, fake = real.clone().requires_grad_(), fake.clone().requires_grad_()
    first = torch.autograd.grad(hinge_discriminator_loss(real, fake), (real, fake))
    return [*first, *torch.autograd.grad(hinge_generator_loss(fake), fake)]


def hinge_by_hand(real: Tensor, fake: Tensor) -> list[Tensor]:
    """Equation 4: only real logits below 1 and generated ones above -1 still push."""
    count = len(real)
    return [-(real < 1).float() / count, (fake > -1).float() / count, torch.full_like(fake, -1 / count)]


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    layer = awakened(nn.Sequential(sagan.SelfAttention(16))).eval()[0]
    x = torch.randn(2, 16, 4, 6)
    slow = partial(slow_attention, layer)
    yield Case("self-attention", layer, slow, (x,), "equations 1 to 3, one position at a time", gradients=True)
    fresh = sagan.SelfAttention(16).eval()
    yield Case("attention starts as the identity", fresh, lambda t: t, (x,), "gamma = 0 (sec. 3)", atol=0.0, rtol=0.0)
    beta = lambda t: layer.attention(t).sum(-1)  # noqa: E731
    yield Case("attention rows are distributions", beta, lambda t: torch.ones(2, 24), (x,), "equation 1")

    x, labels = torch.randn(8, 6, 5, 5) * 2 + 1, torch.tensor([0, 3, 1, 1, 2, 0, 3, 3])
    for mode in (True, False):
        norm = awakened(nn.Sequential(sagan.ConditionalBatchNorm2d(6, 4)))[0].train(mode)
        name = f"conditional batch norm, {'training' if mode else 'inference'}"
        slow = partial(conditional_norm, norm)
        yield Case(name, norm, slow, (x, labels), "F.batch_norm for each class", gradients=True)

    one = "singular value decomposition"
    for name, weight in (
        ("convolution", sagan.conv(6, 10, 3)),
        ("embedding", sagan.sagan_32_slim_discriminator().embedding),
    ):
        largest = partial(largest_singular_value, weight)
        yield Case(f"spectral norm of a {name} is 1", largest, lambda: 1.0, (), one, atol=1e-3)

    real, fake = torch.randn(16) * 2, torch.randn(16) * 2
    yield Case("hinge gradients", hinge_gradients, hinge_by_hand, (real, fake), "equation 4, by hand")

    labels = torch.tensor([1, 5, 5, 9])
    for mode in (True, False):
        generator = awakened(sagan.sagan_32_slim()).train(mode)
        for module in generator.modules():  # the power iteration moves in training; both sides must see one weight
            if "Spectral" in type(module).__name__:
                module.eval()
        latent, plain = torch.randn(4, generator.latent_dim), partial(plain_generator, generator)
        name = f"generator, {'training' if mode else 'inference'}"
        yield Case(name, generator, plain, (latent, labels), RELEASED, gradients=True, atol=1e-4, rtol=1e-3)
    critic = awakened(sagan.sagan_32_slim_discriminator()).eval()
    images, plain = torch.rand(4, 3, 32, 32) * 2 - 1, partial(plain_discriminator, critic)
    name = "projection discriminator, w.phi + b + e.phi"
    yield Case(name, critic, plain, (images, labels), RELEASED, gradients=True, atol=1e-4, rtol=1e-3)

    full = awakened(sagan.sagan_128()).eval()
    inputs = torch.randn(1, 128), torch.tensor([207])
    yield Case("generator at 128x128", full, partial(plain_generator, full), inputs, RELEASED, atol=1e-4)
    stated = "BigGAN (arXiv 1809.11096), table 1: 81.5M"
    yield Case("parameters of both networks, in millions", millions, lambda: 81.5, (), stated, atol=0.0, rtol=0.0)


RELEASED = "the released code's layers and order, in plain functions"


def millions() -> float:
    with torch.device("meta"):
        networks = sagan.sagan_128(), sagan.sagan_128_discriminator()
    return round(sum(p.numel() for n in networks for p in n.parameters()) / 1e6, 1)
