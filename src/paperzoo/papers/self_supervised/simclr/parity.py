"""Checks of SimCLR against pytorch-metric-learning, timm, torchvision, scikit-learn and slow, obvious versions."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from paperzoo.engine.parity import Case
from paperzoo.papers.self_supervised.simclr.technique import (
    LARS,
    ColourDistortion,
    NTXent,
    ProjectionHead,
    gaussian_blur,
    lars_groups,
    linear_probe,
    nearest_neighbours,
    turn_hue,
    warmup_cosine,
)


def nt_xent_by_loops(first, second, temperature):
    """Eq. 1 and algorithm 1 read aloud: z_2k-1 and z_2k are the views of image k."""
    z = [row for pair in zip(first, second, strict=True) for row in pair]
    total = 0.0
    for i in range(len(z)):
        j = i + 1 if i % 2 == 0 else i - 1
        similar = [(z[i] @ z[k]) / (z[i].norm() * z[k].norm()) / temperature for k in range(len(z))]
        total = total - (similar[j] - torch.stack([s for k, s in enumerate(similar) if k != i]).logsumexp(0))
    return total / len(z)


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    yield from loss_cases()
    yield from head_cases()
    yield from optimizer_cases()
    yield from augmentation_cases()
    yield from evaluation_cases()


def loss_cases() -> Iterator[Case]:
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    for batch, width, temperature in ((2, 3, 1.0), (5, 8, 0.1), (16, 32, 0.5)):
        views = torch.randn(batch, width), torch.randn(batch, width)
        about = f"NT-Xent, B={batch}, T={temperature}"
        yield Case(
            about,
            NTXent(temperature),
            SelfSupervisedLoss(NTXentLoss(temperature)),
            views,
            against="pytorch-metric-learning 2.9.0 NTXentLoss",
            gradients=True,
        )
        yield Case(
            about + ", loops",
            NTXent(temperature),
            lambda a, b, t=temperature: nt_xent_by_loops(a, b, t),
            views,
            against="slow loop over pairs, eq. 1",
            gradients=True,
        )

    class TwoProcesses:
        """Gathers from a list of what the processes hold."""

        world = 2

        def __init__(self, rank: int, everyone: list) -> None:
            self.rank, self.everyone = rank, iter(everyone)

        def gather(self, own):
            return torch.cat(next(self.everyone))

    def on_two(first, second):
        parts = [[F.normalize(x, dim=1) for x in view.chunk(2)] for view in (first, second)]
        both = zip(first.chunk(2), second.chunk(2), strict=True)
        losses = [NTXent(0.2, TwoProcesses(rank, parts))(a, b) for rank, (a, b) in enumerate(both)]
        return sum(losses) / 2

    yield Case(
        "NT-Xent over two processes",
        on_two,
        NTXent(0.2),
        (torch.randn(6, 4), torch.randn(6, 4)),
        against="the whole batch on one",
        gradients=True,
        note="the mean of the processes' losses, with gradients through the gathered rows",
    )
    equal = F.normalize(torch.randn(1, 4), dim=1).expand(4, 4)
    yield Case(
        "NT-Xent of equal representations",
        lambda: NTXent(0.5)(equal, equal),
        lambda: math.log(7),
        against="log(2N - 1) when all similarities are equal",
    )


def head_cases() -> Iterator[Case]:
    head = ProjectionHead(8, 4).train()
    first, last = head[0].weight, head[3].weight

    def by_hand(h):
        def normal(x):
            return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()

        return normal(normal(h @ first.T).clamp(min=0) @ last.T)

    yield Case(
        "projection head",
        head,
        by_hand,
        (torch.randn(16, 8),),
        against="W2 ReLU(W1 h) with batch norm, by hand",
        gradients=True,
    )
    sizes = [p.numel() for p in ProjectionHead(2048).parameters() if p.requires_grad]
    yield Case(
        "projection head of ResNet-50",
        lambda: sum(sizes),
        lambda: 2048 * 2048 + 2 * 2048 + 2048 * 128 + 128,
        against="released code: two layers, batch norm after each, no shift after the last",
    )


def optimizer_cases() -> Iterator[Case]:
    def train(make, steps=6, moving=False):
        torch.manual_seed(3)
        network = nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double()
        nn.init.zeros_(network[3].bias)
        optimizer = make(network)
        for k in range(steps):
            if moving:
                for group in optimizer.param_groups:
                    group["lr"] = 0.3 * (k + 1)
            optimizer.zero_grad()
            network(torch.randn(9, 6, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        return {name: p.detach() for name, p in network.named_parameters()}

    class Slow:
        """SimCLR's released optimizer, a number at a time."""

        def __init__(self, network, lr, decay, nesterov=False):
            self.params, self.decay, self.nesterov = list(network.parameters()), decay, nesterov
            self.velocity = [[0.0] * p.numel() for p in self.params]
            self.param_groups = [{"lr": lr}]

        def zero_grad(self):
            for p in self.params:
                p.grad = None

        def step(self):
            for p, velocity in zip(self.params, self.velocity, strict=True):
                w, g = p.detach().flatten().tolist(), p.grad.flatten().tolist()
                plain = p.ndim == 1
                if not plain:
                    g = [gi + self.decay * wi for gi, wi in zip(g, w, strict=True)]
                norm_w, norm_g = math.sqrt(sum(x * x for x in w)), math.sqrt(sum(x * x for x in g))
                trust = 1.0 if plain or norm_w == 0 or norm_g == 0 else 0.001 * norm_w / norm_g
                rate = self.param_groups[0]["lr"] * trust
                for i in range(len(w)):
                    velocity[i] = 0.9 * velocity[i] + rate * g[i]
                    w[i] -= 0.9 * velocity[i] + rate * g[i] if self.nesterov else velocity[i]
                p.data.copy_(torch.tensor(w, dtype=p.dtype).view_as(p))

    for decay, nesterov, moving in ((0.0, False, False), (0.1, False, True), (0.1, True, True)):
        yield Case(
            f"LARS, weight decay {decay}{', Nesterov' * nesterov}{', moving learning rate' * moving}",
            lambda d=decay, n=nesterov, m=moving: train(
                lambda net: LARS(lars_groups([net], d), 0.5, 0.9, nesterov=n), moving=m
            ),
            lambda d=decay, n=nesterov, m=moving: train(lambda net: Slow(net, 0.5, d, n), moving=m),
            against="slow version of the released tf2/lars_optimizer.py, classic momentum",
            rtol=1e-9,
            atol=1e-12,
        )

    def timm_lars(network):
        from timm.optim import Lars

        return Lars(network.parameters(), lr=0.5, momentum=0.9, trust_coeff=0.001, eps=1e-12, always_adapt=True)

    yield Case(
        "LARS on every parameter, no weight decay, constant learning rate",
        lambda: train(lambda net: LARS(net.parameters(), 0.5, 0.9)),
        lambda: train(timm_lars),
        against="timm 1.0.31 Lars",
        rtol=1e-7,
        atol=1e-9,
        note="timm takes |g| + wd |w| where the released code has |g + wd w|, and applies the rate after the momentum",
    )
    steps, warmup = 100, 10
    yield Case(
        "schedule",
        lambda: [warmup_cosine(k, steps, warmup) for k in (0, 5, 10, 55, 100)],
        lambda: [0.0, 0.5, 1.0, 0.5, 0.0],
        against="linear warm-up, then half a cosine, by hand",
    )


def augmentation_cases() -> Iterator[Case]:
    from torchvision.transforms.v2 import functional as TF

    images, turn = torch.rand(5, 3, 6, 7), torch.tensor([0.0, 0.13, -0.2, 0.45, -0.5])
    images[0, :, 0, 0] = 0.4  # a grey pixel has no hue
    yield Case(
        "hue",
        turn_hue,
        lambda x, t: torch.stack([TF.adjust_hue(a, float(b)) for a, b in zip(x, t, strict=True)]),
        (images, turn),
        against="torchvision 0.29.2 adjust_hue, one image at a time",
    )
    sigma = torch.tensor([0.1, 0.5, 1.0, 1.7, 2.0])

    def blur(x, s, size=5):
        pairs = zip(F.pad(x, (4, 4, 4, 4)), s, strict=True)
        return torch.stack([TF.gaussian_blur(a, [size, size], [float(b)] * 2)[:, 4:-4, 4:-4] for a, b in pairs])

    against = "torchvision 0.29.2 gaussian_blur"
    yield Case("blur", lambda x, s: gaussian_blur(x, s, 5), blur, (images, sigma), against=against)

    adjust = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation]

    def one_by_one(x, noise):
        out = []
        for image, row in zip(x, noise, strict=True):
            amount = 2 * row[4:8] - 1
            if row[8] < 0.8:
                for kind in row[:4].argsort().tolist():
                    if kind == 3:
                        image = TF.adjust_hue(image, 0.1 * float(amount[3]))
                    else:
                        image = adjust[kind](image, 1 + 0.4 * float(amount[kind]))
            if row[9] < 0.2:
                image = TF.rgb_to_grayscale(image, 3)
            if row[10] < 0.5:
                image = blur(image[None], torch.tensor([0.1 + 1.9 * float(row[11])]), 3)[0]
            out.append(image)
        return torch.stack(out)

    many = torch.rand(24, 3, 12, 12)
    distort = ColourDistortion(0.5)
    yield Case(
        "colour distortion",
        distort,
        one_by_one,
        (many, torch.rand(24, distort.noise)),
        against="torchvision 0.29.2, one image and one operation at a time",
        rtol=1e-3,
        atol=1e-3,
        note="greyscale weights differ in the fourth digit",
    )


def evaluation_cases() -> Iterator[Case]:
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    labels = torch.arange(60) % 3
    features = torch.randn(60, 5) + 1.5 * F.one_hot(labels, 5)
    queries = torch.randn(30, 5) + 1.5 * F.one_hot(torch.arange(30) % 3, 5)

    def sklearn_probe(x, y, q):
        mean, scale = x.mean(0), x.std(0, correction=0)
        model = LogisticRegression(C=1 / (1e-2 * len(x)), tol=1e-9, max_iter=2000)
        model.fit(((x - mean) / scale).numpy(), y.numpy())
        return torch.from_numpy(model.predict_proba(((q - mean) / scale).numpy()))

    yield Case(
        "linear probe",
        lambda x, y, q: linear_probe(x, y, 3, decay=1e-2)(q).softmax(1),
        sklearn_probe,
        (features, labels, queries),
        against="scikit-learn 1.9.1 LogisticRegression",
        atol=1e-3,
        rtol=1e-3,
        note="two minimisers of one convex objective",
    )

    def neighbours(x, y, q, k):
        weights = "uniform" if k == 1 else lambda distance: np.exp((1 - distance) / 0.07)
        model = KNeighborsClassifier(k, metric="cosine", weights=weights).fit(x.numpy(), y.numpy())
        return torch.from_numpy(model.predict(q.numpy()))

    for k in (1, 5, 20):
        yield Case(
            f"{k} nearest neighbours, weighted",
            lambda x, y, q, k=k: nearest_neighbours(x, y, q, 3, k),
            lambda x, y, q, k=k: neighbours(x, y, q, k),
            (features, labels, queries),
            against="scikit-learn 1.9.1 KNeighborsClassifier, cosine, weights exp(s / 0.07)",
        )
