"""Adversarial autoencoders against their layers written out, their game against its equations, and their priors against counting."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.generation.adversarial_autoencoder import model as aae
from paperzoo.papers.generation.adversarial_autoencoder.measures import cluster_labels, sliced_distance
from paperzoo.papers.generation.adversarial_autoencoder.recipe import PRESETS, RECIPE

LAYERS = {"plain": {}, "gaussian": {"posterior": "gaussian"}, "universal": {"posterior": "universal", "noise_dim": 5}}


def counted(values: int, code: int, width: int, classes: int) -> int:
    """Weights and biases of encoder, heads and decoder, by hand."""
    encoder = (values + 1) * width + (width + 1) * width + (width + 1) * (code + classes)
    return encoder + (code + classes + 1) * width + (width + 1) * width + (width + 1) * values


def built() -> list[int]:
    with torch.device("meta"):
        networks = aae.aae(), aae.aae_semi_supervised(), aae.aae_clustering(), aae.aae_critic()
    return [sum(p.numel() for p in n.parameters()) for n in networks]


def stated() -> list[int]:
    """Appendix A: 784 pixels; codes of 8, 10 and 5; labels of 10, clusters of 16."""
    critic = 9 * 1000 + 1001 * 1000 + 1001
    return [counted(784, 8, 1000, 0), counted(784, 10, 1000, 10), counted(784, 5, 3000, 16), critic]


def dense(x: Tensor, *layers: nn.Linear) -> Tensor:
    """Affine, rectified, affine, rectified."""
    for layer in layers:
        x = (x @ layer.weight.T + layer.bias).clamp(min=0)
    return x


def plain(network: aae.AdversarialAutoencoder, images: Tensor, noise: Tensor | None) -> list[Tensor]:
    """Codes, and reconstructions from them, one matrix at a time."""
    x = images.reshape(len(images), -1)
    if network.posterior == "universal":
        x = torch.cat([x, noise], 1)
    x = dense(x, network.encoder[0], network.encoder[2])
    code = x @ network.to_code.weight.T + network.to_code.bias
    if network.posterior == "gaussian":
        deviation = torch.exp(x @ network.log_variance.weight.T + network.log_variance.bias) ** 0.5
        code = code + deviation * noise
    read = code
    if network.classes is not None:
        scores = torch.exp(x @ network.classes.weight.T + network.classes.bias)
        read = torch.cat([scores / scores.sum(1, keepdim=True), code], 1)
    y = dense(read, network.decoder[0][0], network.decoder[0][2])
    y = 1 / (1 + torch.exp(-(y @ network.decoder[1].weight.T + network.decoder[1].bias)))
    return [code, y.reshape(images.shape)]


def ours(network: aae.AdversarialAutoencoder, images: Tensor, noise: Tensor | None) -> list[Tensor]:
    code, logits = network.encode(images, noise)
    return [code, network.decode(code, None if logits is None else logits.softmax(1))]


def small(**more: object) -> aae.AdversarialAutoencoder:
    torch.manual_seed(3)
    return aae.AdversarialAutoencoder(4, 1, 3, 7, deviation=0.5, **more)


# -- one step of the recipe ------------------------------------------------------------------------------------------


def recipe() -> RECIPE:
    from dataclasses import replace

    from paperzoo.engine.runtime import Runtime

    config = replace(
        PRESETS["semi_supervised_digits"],
        image_size=8,
        width=12,
        batch_size=10,
        steps=4,
        initial_deviation=0.5,
        ema_decay=None,
    )
    torch.manual_seed(5)
    return RECIPE(config, Runtime())


def stepped() -> list[Tensor]:
    """All parameters after one step."""
    made = recipe()
    made.step(made.batch())
    return [p.detach() for n in (made.model, made.critic, made.class_critic) for p in n.parameters()]


def literal() -> list[Tensor]:
    """The same phases with `torch.autograd.grad` and the rule of momentum's first step: w - rate * gradient."""
    made = recipe()
    model, critic, namer = made.model, made.critic, made.class_critic
    batch, config = made.batch(), made.config
    images, (named, classes) = batch["images"], batch["named"]
    everything = list(model.parameters())
    encoder = [*model.encoder.parameters(), *model.to_code.parameters(), *model.classes.parameters()]

    def descend(loss: Tensor, parameters: list[Tensor], rate: float) -> None:
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    parameter -= rate * gradient

    code, logits = model.encode(images)
    shown = model.decode(code, logits.softmax(1))
    error = sum(((a - b) ** 2).sum() / 2 for a, b in zip(shown, images, strict=True)) / len(images)
    descend(error, everything, config.learning_rate)
    noise = made.noise(config.batch_size, made.runtime.rng("prior", per_rank=False))
    one_hot = torch.eye(10)[(noise[:, -1] * 10).long()]
    code, logits = (x.detach() for x in model.encode(images))
    for network, true, false in ((critic, noise[:, :-1], code), (namer, one_hot, logits.softmax(1))):
        value = network(true).sigmoid().log().mean() + (1 - network(false).sigmoid()).log().mean()
        descend(-value, list(network.parameters()), config.adversarial_learning_rate)
    code, logits = model.encode(images)
    won = critic(code).sigmoid().log().mean() + namer(logits.softmax(1)).sigmoid().log().mean()
    descend(-won, encoder, config.adversarial_learning_rate)
    chosen = model.encode(named)[1].softmax(1)[torch.arange(len(classes)), classes]
    descend(
        -chosen.log().mean(),
        [*model.encoder.parameters(), *model.classes.parameters()],
        config.semi_supervised_learning_rate,
    )
    return [p.detach() for n in (model, critic, namer) for p in n.parameters()]


# -- priors ----------------------------------------------------------------------------------------------------------


def draws(kind: str, label: int, count: int = 40_000) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    noise, uniform = torch.randn(count, 2, generator=rng), torch.rand(count, generator=rng)
    return aae.from_prior(kind, noise, uniform, torch.full((count,), label), 10, 1.0)


def mixture_moments(label: int) -> list[Tensor]:
    codes = draws("mixture", label)
    return [codes.mean(0), codes.T.cov()]


def moments_by_hand(label: int) -> list[Tensor]:
    """Of a Gaussian at distance 1.4, of deviation 0.4 outwards and 0.1 across, turned by `label` tenths."""
    angle = 2 * math.pi * label / 10
    out, across = torch.tensor([math.cos(angle), math.sin(angle)]), torch.tensor([-math.sin(angle), math.cos(angle)])
    return [1.4 * out, 0.16 * out.outer(out) + 0.01 * across.outer(across)]


def parts_of_the_whole(kind: str) -> float:
    """The distance of the unlabelled prior to the labelled ones, drawn in turn."""
    together = torch.cat([draws(kind, k, 2000) for k in range(10)])
    return sliced_distance(draws(kind, -1, 20_000), together)


def roll_lengths() -> Tensor:
    """The share of the roll's points in ten pieces of equal length: without noise, radius is angle / 2 pi."""
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    nothing = torch.zeros(len(uniform), 2, dtype=torch.float64)
    codes = aae.from_prior("swiss_roll", nothing, uniform, torch.full((20_000,), -1), 10, 1.0)
    turns = codes.norm(dim=1)  # the radius, from 0 to 2 turns; a spiral's length is nearly proportional to its square
    return torch.histc((turns / 2) ** 2, 10, 0, 1) / 20_000


def cases() -> Iterator[Case]:
    yield Case("parameters of the networks", built, stated, (), "appendix A, summed by hand", atol=0, rtol=0)
    for name, arguments in LAYERS.items():
        for classes in (0, 4):
            network = small(**arguments, num_classes=classes)
            width = {"gaussian": 3, "universal": 5}.get(name)
            for count in (3, 1):
                images = torch.rand(count, 1, 4, 4)
                inputs = images, None if width is None else torch.randn(count, width)
                text = f"{name} posterior, {classes} classes, batch of {count}"
                mine, theirs = partial(ours, network), partial(plain, network)
                yield Case(text, mine, theirs, inputs, "appendix A, one matrix at a time", gradients=True)
    given = small(num_classes=4, labelled=True)
    code, classes = torch.randn(2, 3), torch.eye(4)[[1, 3]]
    read = lambda z: given.decode(z, classes)  # noqa: E731
    shift = given.decoder[0][0].weight[:, [1, 3]].T

    def shifted(z: Tensor) -> Tensor:
        """A class is a bias of the first layer, and no more."""
        x = (z @ given.decoder[0][0].weight[:, 4:].T + given.decoder[0][0].bias + shift).clamp(min=0)
        x = dense(x, given.decoder[0][2])
        return torch.sigmoid(x @ given.decoder[1].weight.T + given.decoder[1].bias).reshape(2, 1, 4, 4)

    yield Case("a given class", read, shifted, (code,), "section 4", gradients=True)
    critic = aae.Critic(3, 7, 11, deviation=0.5)
    labels = F.one_hot(torch.tensor([0, 10]), 11).float()

    def criticised(z: Tensor) -> Tensor:
        x = dense(torch.cat([z, labels], 1), critic.layers[0][0], critic.layers[0][2])
        return (x @ critic.layers[1].weight.T + critic.layers[1].bias)[:, 0]

    yield Case("critic with labels", lambda z: critic(z, labels), criticised, (code,), "section 2.3", gradients=True)
    yield Case("one step: three phases", stepped, literal, (), "section 2, update by update", atol=1e-6)

    for label in (0, 3):
        mine, theirs = partial(mixture_moments, label), partial(moments_by_hand, label)
        yield Case(f"mixture, part {label}: mean and covariance", mine, theirs, (), "by hand", atol=1e-2)
    for kind in ("mixture", "swiss_roll"):
        whole = partial(parts_of_the_whole, kind)
        yield Case(
            f"{kind}: its parts make the whole", whole, lambda: 0.0, (), "sliced Wasserstein distance", atol=0.02
        )
    tenth = lambda: torch.full((10,), 0.1)  # noqa: E731
    yield Case("the roll is drawn evenly", roll_lengths, tenth, (), "arc length", atol=1e-3)
    logits, labels = torch.tensor([[3.0, 0.0], [0.0, 0.5], [1.0, 4.0]]), torch.tensor([7, 8, 9])
    owner = lambda: cluster_labels(logits, labels)  # noqa: E731
    yield Case("a cluster's class", owner, lambda: torch.tensor([7, 9]), (), "section 6, by hand", atol=0, rtol=0)
