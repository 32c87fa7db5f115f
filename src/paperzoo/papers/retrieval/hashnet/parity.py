"""HashNet against a loop over pairs, the formulas of the released code written out, and the codes' own arithmetic.

The released PyTorch code needs PyTorch 0.3 and a GPU, the Caffe code a Caffe of its own; their formulas are short and are written out
here: thuml/HashNet, `pairwise_loss`, `pairwise_loss_updated` and the scale of `ResNetFc.forward`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from paperzoo.blocks.search import Index
from paperzoo.engine.parity import Case
from paperzoo.papers.retrieval.hashnet.model import HashNet
from paperzoo.papers.retrieval.hashnet.technique import PairwiseLikelihood, continuous_similarity, growing_beta


def literal(
    first: Tensor, second: Tensor, a: Tensor, b: Tensor, alpha: float, balance: float | str, continuous: str
) -> Tensor:
    """Eq. 2 to 4, pair by pair."""
    pairs = []
    for i in range(len(first)):
        for j in range(len(second)):
            if a.ndim == 1:
                similar, c = bool(a[i] == b[j]), 1.0
            else:
                one, other = set(a[i].nonzero().flatten().tolist()), set(b[j].nonzero().flatten().tolist())
                similar, c = bool(one & other), 1.0
                if similar and continuous == "jaccard":
                    c = len(one & other) / len(one | other)
                if similar and continuous == "cosine":
                    c = 4 * len(one & other) ** 2 / (len(one) * len(other))
            product = alpha * sum(first[i, k] * second[j, k] for k in range(first.shape[1]))
            pairs.append((similar, c * (torch.log(1 + torch.exp(product)) - float(similar) * product)))
    similar, all_pairs = sum(s for s, _ in pairs), len(pairs)
    other = all_pairs - similar
    if balance == "pairs":
        weights = [all_pairs / similar if s else all_pairs / other for s, _ in pairs]
        return sum(w * loss for w, (_, loss) in zip(weights, pairs, strict=True)) / all_pairs
    weights = [float(balance) if s else 1.0 for s, _ in pairs]
    return sum(w * loss for w, (_, loss) in zip(weights, pairs, strict=True)) / sum(weights)


def released(first: Tensor, second: Tensor, a: Tensor, b: Tensor, alpha: float, class_num: float) -> Tensor:
    """`pairwise_loss`: above 15 the logarithm is taken to be its argument."""
    similar = a.float() @ b.float().T > 0
    product = alpha * first @ second.T
    small = torch.log(1 + torch.exp(product.clamp(max=15))) - similar * product
    loss = torch.where(product > 15, product * ~similar, small)
    weight = torch.where(similar, class_num, 1.0)
    return (weight * loss).sum() / weight.sum()


def released_updated(first: Tensor, second: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`pairwise_loss_updated`: alpha is 1, weights are counted in the batch."""
    similar = a.float() @ b.float().T > 0
    product = first @ second.T
    loss = torch.log(1 + torch.exp(-product.abs())) + product.clamp(min=0) - similar * product
    count = torch.tensor(float(similar.numel()), dtype=product.dtype)
    weight = torch.where(similar, count / similar.sum(), count / (~similar).sum())
    return (weight * loss).sum() / count


class ReleasedScale:
    """The counter of `ResNetFc.forward`."""

    def __init__(self) -> None:
        self.count, self.scale = 0, 1.0

    def __call__(self) -> float:
        self.count += 1
        if self.count % 200 == 0:
            self.scale = 1.0 * math.pow(1.0 + 0.005 * self.count, 0.5)
        return self.scale


def released_scales(count: int) -> Tensor:
    scale = ReleasedScale()
    return torch.tensor([scale() for _ in range(count)], dtype=torch.float64)


class Literal(nn.Module):
    """The network written out: pooled features, the hash layer, tanh of beta times it."""

    def __init__(self, network: HashNet) -> None:
        super().__init__()
        self.backbone, self.hash_layer, self.beta = network.backbone, network.hash_layer, float(network.beta)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.backbone.stages(x)[-1].mean((2, 3))
        z = self.beta * (pooled @ self.hash_layer.weight.T + self.hash_layer.bias)
        return (z.exp() - (-z).exp()) / (z.exp() + (-z).exp())


def hot(rows: int, classes: int, generator: torch.Generator) -> Tensor:
    """Labels of images with one to three of the classes."""
    labels = torch.zeros(rows, classes)
    for row in labels:
        row[torch.randperm(classes, generator=generator)[: int(torch.randint(1, 4, (), generator=generator))]] = 1
    return labels


def cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    kinds = [
        (4, 5, 8, "pairs", "jaccard"),
        (7, 3, 12, "pairs", "none"),
        (6, 6, 48, 5.0, "cosine"),
        (5, 8, 16, 1.0, "none"),
    ]
    for rows, columns, bits, balance, continuous in kinds:
        codes = [torch.rand(n, bits, generator=generator, dtype=torch.float64) * 2 - 1 for n in (rows, columns)]
        for several in (False, True):
            if several:
                labels = [hot(n, 6, generator) for n in (rows, columns)]
            else:
                labels = [torch.randint(0, 3, (n,), generator=generator) for n in (rows, columns)]
            labels[1][0] = labels[0][0]  # there is a similar pair
            alpha = 10 / bits
            yield Case(
                f"loss of {rows} x {columns} pairs, {bits} bits, {'several labels' if several else 'one label'}, {balance}, {continuous}",
                PairwiseLikelihood(alpha, balance, continuous),
                lambda a, b, c, d, w=alpha, x=balance, y=continuous: literal(a, b, c, d, w, x, y),
                (*codes, *labels),
                "eq. 2 to 4 as a loop over pairs, float64",
                gradients=True,
                rtol=1e-10,
                atol=1e-12,
            )
    first, second = (torch.tanh(3 * torch.randn(36, 48, generator=generator, dtype=torch.float64)) for _ in range(2))
    labels = hot(36, 10, generator), hot(36, 10, generator)
    for class_num in (1.0, 5.0, 100.0):
        yield Case(
            f"loss, class_num {class_num:g}",
            PairwiseLikelihood(10 / 48, class_num, "none"),
            lambda a, b, c, d, w=class_num: released(a, b, c, d, 10 / 48, w),
            (first, second, *labels),
            "thuml/HashNet pairwise_loss, written out",
            gradients=True,
            rtol=1e-9,
            atol=1e-12,
        )
    yield Case(
        "loss, weights counted in the batch",
        PairwiseLikelihood(1.0, "pairs", "none"),
        released_updated,
        (first, second, *labels),
        "thuml/HashNet pairwise_loss_updated, written out",
        gradients=True,
        rtol=1e-9,
        atol=1e-12,
    )
    large = torch.ones(2, 64) * torch.tensor([[1.0], [-1.0]])
    yield Case(
        "loss where the exponential overflows",
        PairwiseLikelihood(4.0, 1.0, "none"),
        lambda a, b, c, d: torch.tensor((0.0 + 256.0 + 256.0 + 0.0) / 4),
        (large, large, torch.tensor([0, 1]), torch.tensor([0, 0])),
        "by hand: <h, h> is 64 or -64, and two of the four pairs are on the wrong side",
    )
    yield Case(
        "continuous similarity",
        lambda a: continuous_similarity(a, a),
        lambda a: torch.tensor([[1.0, 1 / 3, 1.0], [1 / 3, 1.0, 1 / 2], [1.0, 1 / 2, 1.0]]),
        (torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]]),),
        "by hand",
    )
    yield Case(
        "beta over 10,000 iterations",
        lambda: torch.tensor([growing_beta(t) for t in range(10_000)], dtype=torch.float64),
        lambda: released_scales(10_000),
        (),
        "the counter of thuml/HashNet ResNetFc.forward",
        rtol=1e-12,
        atol=0,
    )
    torch.manual_seed(1)
    for size, batch, beta in ((16, 2, 1.0), (33, 3, 4.0)):
        model = HashNet("resnet20_cifar", 12, deviation=0.1).double().eval()
        model.beta.fill_(beta)
        yield Case(
            f"network, {size} pixels, batch of {batch}, beta {beta:g}",
            model,
            Literal(model),
            (torch.randn(batch, 3, size, size, dtype=torch.float64),),
            "the layers written out",
            gradients=True,
            rtol=1e-8,
            atol=1e-10,
        )
    signs = torch.where(torch.rand(40, 20, generator=generator) > 0.5, 1.0, -1.0)
    yield Case(
        "Hamming distance of codes",
        lambda a: Index(a, "hamming").distances(a).double(),
        lambda a: (a.shape[1] - a.double() @ a.double().T) / 2,
        (signs,),
        "sec. 3: dist_H = (K - <h_i, h_j>) / 2",
        rtol=0,
        atol=0,
    )
