"""TIRG against versions written from the paper and the released code's formulas, in float64: sentences one by one and word by word.

The released code (google/tirg) is for Python 2 and moves its tensors to a GPU by itself, so it is not run here. The references
below hold torchvision's ResNet-18 and parameters under the released names, and take our weights by `load_state_dict`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.retrieval.tirg import model as ours
from paperzoo.papers.retrieval.tirg.technique import draw_negatives, soft_triplet
from paperzoo.tasks.composed_retrieval import batch_softmax

SIZE, WORDS = 32, 20  # features, vocabulary


class LiteralText(nn.Module):
    """An LSTM cell as its equations have it, over the words of one sentence after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding_layer = nn.Embedding(WORDS, SIZE)
        self.lstm = nn.LSTM(SIZE, SIZE)  # holds the parameters
        self.fc_output = nn.Sequential(nn.Identity(), nn.Linear(SIZE, SIZE))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        cell, features = self.lstm, []
        for sentence, length in zip(tokens.tolist(), lengths.tolist(), strict=True):
            h = c = torch.zeros(SIZE, dtype=torch.float64)
            for word in sentence[:length]:
                x = self.embedding_layer.weight[word]
                gates = cell.weight_ih_l0 @ x + cell.bias_ih_l0 + cell.weight_hh_l0 @ h + cell.bias_hh_l0
                i, f, g, o = gates.split(SIZE)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
            features.append(self.fc_output(h))
        return torch.stack(features)


class Literal(nn.Module):
    """Composition after the last dense layer, or on the last map, or of features side by side."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        import torchvision

        self.kind, wide = kind, 2 * SIZE
        self.img_model = torchvision.models.resnet18()
        self.img_model.fc = nn.Sequential(nn.Linear(512, SIZE))
        self.text_model = LiteralText()
        self.normalization_layer = nn.Module()
        self.normalization_layer.norm_s = nn.Parameter(torch.tensor([4.0]))
        if kind != "concat":
            self.a = nn.Parameter(torch.zeros(4))
        if kind == "tirg":
            self.gated_feature_composer = nn.ModuleDict({"1": nn.BatchNorm1d(wide), "3": nn.Linear(wide, SIZE)})
            self.res_info_composer = nn.ModuleDict(
                {"1": nn.BatchNorm1d(wide), "3": nn.Linear(wide, wide), "5": nn.Linear(wide, SIZE)}
            )
        elif kind == "last_conv":
            channels = 512 + SIZE
            for name in ("mod2d", "mod2d_gate"):
                parts = {"0": nn.BatchNorm2d(channels), "1": nn.Conv2d(channels, channels, 3, padding=1)}
                self.add_module(name, nn.ModuleDict({**parts, "3": nn.Conv2d(channels, 512, 3, padding=1)}))
        else:
            self.composer = nn.Module()
            parts = {"0": nn.BatchNorm1d(wide), "2": nn.Linear(wide, wide), "3": nn.BatchNorm1d(wide)}
            self.composer.m = nn.ModuleDict({**parts, "6": nn.Linear(wide, SIZE)})

    def forward(self, images: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        text = self.text_model(tokens, lengths)
        if self.kind == "last_conv":
            net = self.img_model
            x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
            x = net.layer4(net.layer3(net.layer2(net.layer1(x))))
            both = torch.cat([x, text.reshape(*text.shape, 1, 1).repeat(1, 1, *x.shape[2:])], 1)
            changed = [part["3"](part["1"](part["0"](both)).clamp(min=0)) for part in (self.mod2d, self.mod2d_gate)]
            x = self.a[0] * x / (1 + torch.exp(-changed[1])) + self.a[1] * changed[0]
            return net.fc(x.mean((2, 3)))
        image = self.img_model(images)
        both = torch.cat([image, text], 1)
        if self.kind == "concat":
            m = self.composer.m
            return m["6"](m["3"](m["2"](m["0"](both).clamp(min=0))).clamp(min=0))
        gate, res = self.gated_feature_composer, self.res_info_composer
        g = gate["3"](gate["1"](both).clamp(min=0))
        r = res["5"](res["3"](res["1"](both).clamp(min=0)).clamp(min=0))
        return self.a[0] * image / (1 + torch.exp(-g)) + self.a[1] * r


def pair(kind: str, train: bool) -> tuple[nn.Module, nn.Module]:
    """Ours and the literal one with the same weights, in float64; dropout off, so that both see the same."""
    network = getattr(ours, {"tirg": "tirg", "last_conv": "tirg_last_conv", "concat": "tirg_concat"}[kind])(WORDS, SIZE)
    literal = Literal(kind)
    with torch.no_grad():
        for p in network.parameters():  # away from weights of one, biases of zero
            p.add_(0.02 * torch.randn_like(p))
    literal.load_state_dict(network.state_dict())
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network.double().train(train), literal.double().train(train)


def triplets_one_by_one(queries: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    features, count, losses = torch.cat([queries, targets]), len(queries), []
    for i, row in enumerate(negatives.tolist()):
        positive = (i + count) % (2 * count)
        for k in row:
            near = ((features[i] - features[positive]) ** 2).sum()
            far = ((features[i] - features[k]) ** 2).sum()
            losses.append(torch.log(1 + torch.exp(near - far)))
    return sum(losses) / len(losses)


def released_gradient(features: Tensor, negatives: Tensor) -> Tensor:
    """The backward pass that the released code writes by hand (`MyTripletLossFunc`)."""
    count, gradient = len(features) // 2, torch.zeros_like(features)
    for i, row in enumerate(negatives.tolist()):
        j = (i + count) % (2 * count)
        for k in row:
            near, far = ((features[i] - features[n]).square().sum() for n in (j, k))
            f = (1 - 1 / (1 + torch.exp(near - far))) / negatives.numel()
            for row_of, other, sign in ((i, j, 1), (j, i, 1), (i, k, -1), (k, i, -1)):
                gradient[row_of] += sign * f * (features[row_of] - features[other])
    return gradient


def our_gradient(features: Tensor, negatives: Tensor) -> Tensor:
    features = features.clone().requires_grad_(True)
    return torch.autograd.grad(soft_triplet(*features.chunk(2), negatives), features)[0]


def softmax_one_by_one(queries: Tensor, targets: Tensor) -> Tensor:
    losses = []
    for i, query in enumerate(queries):
        scores = [(query * target).sum() for target in targets]
        losses.append(-torch.log(torch.exp(scores[i]) / sum(torch.exp(s) for s in scores)))
    return sum(losses) / len(losses)


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    lengths = torch.tensor([3, 1, 6, 4])
    for kind in ("tirg", "last_conv", "concat"):
        for train in (False, True):
            network, literal = pair(kind, train)
            for size, rows in ((48, 4), (65, 3)) if not train else ((48, 4),):
                tokens = torch.randint(0, WORDS, (rows, 6))
                yield Case(
                    f"{kind}, {size} pixels, {rows} queries, {'training' if train else 'eval'}",
                    network,
                    literal,
                    (torch.randn(rows, 3, size, size, dtype=torch.float64), tokens, lengths[:rows]),
                    "eq. 1 to 3 written out, torchvision's ResNet-18, an LSTM word by word, float64",
                    gradients=True,
                    rtol=1e-6,
                    atol=1e-8,
                )
    network, literal = pair("tirg", False)
    yield Case(
        "an image's feature, and its scaled version",
        lambda x: network.normalization_layer(network.embed_image(x)),
        lambda x: (
            literal.normalization_layer.norm_s * literal.img_model(x) / literal.img_model(x).norm(dim=1, keepdim=True)
        ),
        (torch.randn(2, 3, 64, 64, dtype=torch.float64),),
        "torchvision resnet18",
        rtol=1e-9,
    )
    for count in (2, 5, 16):
        queries, targets = (torch.randn(count, 8, dtype=torch.float64) for _ in range(2))
        negatives = draw_negatives(count, torch.Generator().manual_seed(count))
        yield Case(
            f"soft triplet loss, batch of {count}",
            soft_triplet,
            triplets_one_by_one,
            (queries, targets, negatives),
            "eq. 5 as a loop over triplets, float64",
            gradients=True,
            rtol=1e-10,
            atol=1e-12,
        )
        yield Case(
            f"batch softmax, batch of {count}",
            batch_softmax,
            softmax_one_by_one,
            (queries, targets),
            "eq. 6 as a loop, float64",
            gradients=True,
            rtol=1e-10,
            atol=1e-12,
        )
        yield Case(
            f"the triplets' gradient, batch of {count}",
            our_gradient,
            lambda x, n: 2 * released_gradient(x, n),
            (torch.cat([queries, targets]), negatives),
            "google/tirg MyTripletLossFunc.backward, written out, times the 2 that it lacks",
            rtol=1e-10,
            atol=1e-12,
            note="the released code's gradient is half of its loss's",
        )
        yield Case(
            f"negatives are other pairs' and distinct, batch of {count}",
            lambda n, count=count: torch.tensor(
                [
                    len(set(row)) if not {i % count} & {k % count for k in row} else -1
                    for i, row in enumerate(n.tolist())
                ]
            ),
            lambda n, count=count: torch.full((2 * count,), min(3, 2 * count - 2)),
            (negatives,),
            "google/tirg compute_soft_triplet_loss_: up to 3 for each feature",
        )
    yield Case(
        "one learned scale: 4 at first, logits up to 16",
        lambda: batch_softmax(
            *(ours.NormalizationLayer()(torch.eye(2, dtype=torch.float64)) for _ in range(2))
        ).detach(),
        lambda: torch.tensor(math.log(1 + math.exp(-16.0)), dtype=torch.float64),
        (),
        "by hand: -log(e^16 / (e^16 + 1))",
        rtol=1e-3,
        atol=1e-9,
    )
