"""Checks of knowledge distillation: identities the paper states, a slow loss, brute-force minimisers, stated sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from paperzoo.engine.parity import Case
from paperzoo.papers.compression.knowledge_distillation.model import distillation_mlp800, distillation_mlp1200
from paperzoo.papers.compression.knowledge_distillation.technique import (
    DistillationLoss,
    combine_specialists,
    confusable_clusters,
    correct_dustbin,
    limit_weights,
    lump,
    soften,
    specialist_labels,
    specialist_weights,
)


def loss_by_loops(logits, teacher, labels, temperature, weight):
    """Section 2 read aloud, a class at a time: cross entropy with the soft targets, less the teacher's entropy."""
    total = 0.0
    for z, v, label in zip(logits, teacher, labels, strict=True):
        q, p = [(x / temperature).exp() / (x / temperature).exp().sum() for x in (z, v)]
        soft = sum(p[i] * (p[i].log() - q[i].log()) for i in range(len(z)))
        hard = -(z[label].exp() / z.exp().sum()).log()
        total = total + weight * temperature**2 * soft + (1 - weight) * hard
    return total / len(logits)


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    yield from loss_cases()
    yield from model_cases()
    yield from specialist_cases()


def loss_cases() -> Iterator[Case]:
    for batch, classes, temperature, weight in ((1, 3, 1.0, 0.5), (6, 10, 4.0, 0.9), (5, 7, 20.0, 1.0)):
        logits, teacher = torch.randn(batch, classes), 3 * torch.randn(batch, classes)
        labels = torch.randint(classes, (batch,))
        yield Case(
            f"loss, T={temperature:g}, soft weight {weight:g}",
            lambda z, v, t=temperature, w=weight, y=labels: DistillationLoss(t, w)(z, v.detach(), y),
            lambda z, v, t=temperature, w=weight, y=labels: loss_by_loops(z, v.detach(), y, t, w),
            (logits, teacher),
            against="slow loop over images and classes, sec. 2",
            gradients=True,
        )
    z = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    v = torch.randn(4, 6, dtype=torch.float64)

    def gradient(temperature):
        return torch.autograd.grad(DistillationLoss(temperature, 1.0)(z, v) * len(z), z)[0]

    yield Case(
        "gradient",
        lambda: gradient(3.0) / 3.0**2,
        lambda: (soften(z, 3.0) - soften(v, 3.0)) / 3.0,
        against="eq. 2: (q_i - p_i) / T for each image",
        rtol=1e-9,
        atol=1e-12,
    )
    centred = z.detach() - z.detach().mean(1, keepdim=True), v - v.mean(1, keepdim=True)
    yield Case(
        "high temperature matches logits",
        lambda: gradient(1e4),
        lambda: (centred[0] - centred[1]) / 6,
        against="eq. 4: (z_i - v_i) / (N T^2) for logits of mean zero, here times T^2",
        rtol=1e-3,
        atol=1e-4,
    )


def model_cases() -> Iterator[Case]:
    for make, width, count in ((distillation_mlp1200, 1200, 2_395_210), (distillation_mlp800, 800, 1_276_810)):
        torch.manual_seed(1)
        ours = make().eval()
        layers = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
        plain = nn.Sequential(nn.Flatten(), *layers)
        plain.load_state_dict(dict(zip(plain.state_dict(), ours.state_dict().values(), strict=True)))
        grey = torch.rand(3, 1, 28, 28)
        yield Case(
            f"{make.__name__}",
            lambda x, m=ours: m(x.expand(-1, 3, -1, -1)),
            plain,
            (grey,),
            against="784-n-n-10 as a plain stack of layers",
        )
        yield Case(
            f"{make.__name__}, parameters",
            lambda m=ours: sum(p.numel() for p in m.parameters()),
            lambda c=count: c,
            against="785 n + (n + 1) n + 10 (n + 1)",
        )
    layer = nn.Linear(5, 4)
    weights = 3 * torch.randn(4, 5)

    def limited(w):
        layer.weight.data.copy_(w)
        limit_weights(layer, 2.0)
        return layer.weight.detach()

    yield Case(
        "weight constraint",
        limited,
        lambda w: torch.stack([row * min(1.0, 2.0 / float(row.norm())) for row in w]),
        (weights,),
        against="slow loop over units",
    )


def specialist_cases() -> Iterator[Case]:
    # three groups of classes; the generalist spreads its probability within the group of the true class
    groups = [[0, 4, 7], [1, 2], [3, 5, 6]]
    home = {k: group for group in groups for k in group}
    labels = torch.arange(800) % 8
    logits = torch.randn(800, 8) + 4 * torch.tensor([[float(j in home[k]) for j in range(8)] for k in labels.tolist()])
    yield Case(
        "confusable clusters",
        lambda: sorted(confusable_clusters(logits.softmax(1), 3)),
        lambda: groups,
        against="the groups that the predictions were made from",
    )
    yield Case(
        "specialist labels",
        lambda: specialist_labels(torch.tensor([4, 1, 7, 0, 5]), groups[0]),
        lambda: torch.tensor([1, 3, 2, 0, 3]),
        against="hand-computed example; 3 is the dustbin",
    )
    weights, correction = specialist_weights(labels, groups[1])
    own = torch.isin(labels, torch.tensor(groups[1]))
    yield Case(
        "sampling of a specialist",
        lambda: (float(weights[own].sum()), float(weights[~own].sum()), correction),
        lambda: (0.5, 0.5, math.log(3.0)),
        against="half of the images are special (sec. 5.2), which oversamples 2 classes of 8 threefold",
    )

    # a Bayes-optimal specialist on the biased sample, corrected, is Bayes-optimal on the unbiased one
    true = torch.randn(5, 8, dtype=torch.float64).softmax(1)
    special, rest = true[:, groups[1]], 1 - true[:, groups[1]].sum(1, keepdim=True)
    biased = torch.cat([3 * special, rest], 1)
    yield Case(
        "dustbin's correction",
        lambda: correct_dustbin((biased / biased.sum(1, keepdim=True)).log(), correction).softmax(1),
        lambda: torch.cat([special, rest], 1),
        against="Bayes' rule under the biased sampling",
        rtol=1e-9,
        atol=1e-12,
    )
    exact = [(groups[1], torch.cat([special, rest], 1)), (groups[0], lump(true.log(), groups[0]).exp())]
    yield Case(
        "specialists that agree change nothing",
        lambda: combine_specialists(true, exact),
        lambda: true,
        against="eq. 5 is zero at q = p_g",
        atol=1e-4,
    )
    yield Case(
        "no active specialist",
        lambda: combine_specialists(torch.tensor([[0.7, 0.2, 0.1]]), [([1, 2], torch.tensor([[0.1, 0.8, 0.1]]))]),
        lambda: torch.tensor([[0.7, 0.2, 0.1]]),
        against="sec. 5.4: the specialist does not know the most probable class",
        atol=1e-4,
    )

    def on_a_grid():
        """Eq. 5 evaluated at every q on a fine grid of the simplex."""
        generalist = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        specialist = torch.tensor([0.2, 0.6, 0.2], dtype=torch.float64)  # of classes 0 and 1; the dustbin is class 2
        best, at = math.inf, None
        for i, j in itertools.product(range(1, 100), repeat=2):
            if i + j < 100:
                q = torch.tensor([i, j, 100 - i - j], dtype=torch.float64) / 100
                value = float((generalist * (generalist / q).log()).sum() + (specialist * (specialist / q).log()).sum())
                if value < best:
                    best, at = value, q
        return at

    yield Case(
        "generalist and specialist combined",
        lambda: combine_specialists(torch.tensor([[0.5, 0.3, 0.2]]), [([0, 1], torch.tensor([[0.2, 0.6, 0.2]]))])[0],
        on_a_grid,
        against="eq. 5 minimised by brute force on a grid of 1/100",
        atol=6e-3,
    )
    student = F.one_hot(torch.tensor([2, 0]), 4).double().clamp(1e-9)
    yield Case(
        "lumped probabilities",
        lambda: lump(student.log(), [1, 2]).exp(),
        lambda: torch.stack([student[:, 1], student[:, 2], student[:, 0] + student[:, 3]], 1),
        against="sum over the classes of the dustbin",
    )
