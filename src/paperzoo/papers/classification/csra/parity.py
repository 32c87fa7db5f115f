"""CSRA against its equations place by place, the released formula, torchvision's ResNet, and the identities of the paper."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.classification.csra import model as csra


def cases() -> Iterator[Case]:
    import torchvision

    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    places = "eq. (2) to (6), place by place: features first, scores after"
    for temperature, lam, shape in ((1.0, 0.1, (2, 5, 3, 4)), (3.0, 0.7, (1, 6, 7, 7)), (math.inf, 0.4, (3, 4, 2, 5))):
        head = csra.ResidualAttention(shape[1], 4, temperature, lam).double()
        nn.init.normal_(head.head.weight, std=2.0)
        x = torch.randn(*shape, **double) * 2
        yield Case(
            f"a head, T = {temperature:g}, lam = {lam}",
            head,
            PlaceByPlace(head),
            (x,),
            places,
            gradients=True,
            atol=1e-9,
        )
        yield Case(
            f"its attention, T = {temperature:g}",
            head.attention,
            PlaceByPlace(head).attention,
            (x,),
            "eq. (2)",
            atol=1e-9,
        )
    for heads in csra.TEMPERATURES:
        module = csra.MultiHead(6, 3, heads, 0.3).double()
        yield Case(f"{heads} heads", module, Released(module, heads, 0.3), (torch.randn(2, 6, 5, 4, **double),),
                   "the released formula: scores divided by the norms of the classifiers, T = 99 a maximum", gradients=True, atol=1e-9)  # fmt: skip

    x = torch.randn(2, 6, 4, 4, **double)
    for temperature in (1.0, math.inf):
        plain = csra.ResidualAttention(6, 3, temperature, 0.0).double()
        yield Case(f"lam = 0, T = {temperature:g}: average pooling", plain,
                   lambda x, m=plain: x.mean((2, 3)) @ F.normalize(m.head.weight[:, :, 0, 0], dim=1).T, (x,), "sec. 3.2")  # fmt: skip
    hot, limit = (csra.ResidualAttention(6, 3, t, 0.5).double() for t in (1e4, math.inf))
    limit.load_state_dict(hot.state_dict())
    yield Case("T towards infinity: the maximum", hot, limit, (x,), "sec. 3.2, the limit", atol=1e-6)
    one = csra.ResidualAttention(6, 3, 2.0, 0.5).double()
    yield Case(
        "a single place: 1 + lam times its score",
        one,
        lambda x: 1.5 * one.scores(x)[:, :, 0, 0],
        (x[:, :, :1, :1],),
        "eq. (2)",
    )
    # two places, m = (1, 0), scores 0 and 1, T = ln 3: s = (1/4, 3/4); 1/2 + 0.2 * 3/4
    hand = csra.ResidualAttention(2, 1, math.log(3), 0.2)
    nn.init.constant_(hand.head.weight, 0.0)
    hand.head.weight.data[0, 0] = 7.0
    yield Case(
        "two places by hand",
        hand,
        lambda x: torch.tensor([[0.65]]),
        (torch.tensor([[[[0.0, 1.0]], [[5.0, -5.0]]]]),),
        "worked example",
    )

    peer = f"torchvision {torchvision.__version__.split('+')[0]} ResNet with the released head"
    theirs = ReleasedNetwork(torchvision.models.resnet50(), 2048, 5, 4, 0.2)
    settle(theirs)
    ours = csra.csra(num_classes=5, backbone="resnet50", num_heads=4, lam=0.2)
    ours.load_state_dict(csra.from_official(theirs.official()))
    for size in ((1, 3, 64, 96), (2, 3, 65, 65)):
        yield Case(
            f"ResNet-50, four heads, {size[0]} x {size[2]} x {size[3]}",
            ours.eval(),
            theirs.eval(),
            (torch.randn(size),),
            peer,
        )
    labels = torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 0, 1, 0]])
    theirs = ReleasedNetwork(torchvision.models.resnet18(), 512, 5, 1, 0.1)
    ours = csra.csra(num_classes=5, backbone="resnet18")
    ours.load_state_dict(csra.from_official(theirs.official()))
    yield Case("a training step, ResNet-18", Step(ours.train(), labels), Step(theirs.train(), labels), (torch.randn(2, 3, 64, 64),),
               peer, gradients=True)  # fmt: skip


class PlaceByPlace(nn.Module):
    """The features of every class are formed, one place after the other, and then scored."""

    def __init__(self, head: csra.ResidualAttention) -> None:
        super().__init__()
        self.head, self.temperature, self.lam = head.head, head.temperature, head.lam

    def parts(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        columns = [image[:, r, c] for r in range(image.shape[1]) for c in range(image.shape[2])]
        classifiers = self.head.weight[:, :, 0, 0]
        return columns, classifiers / (classifiers**2).sum(1, keepdim=True).sqrt()

    def shares(self, columns: list[Tensor], m: Tensor) -> list[Tensor]:
        scores = [column @ m for column in columns]
        if math.isinf(self.temperature):
            best = max(range(len(scores)), key=lambda j: float(scores[j].detach()))
            return [m.new_tensor(float(j == best)) for j in range(len(scores))]
        powers = [torch.exp(self.temperature * score) for score in scores]
        return [power / sum(powers) for power in powers]

    def forward(self, x: Tensor) -> Tensor:
        answers = []
        for image in x:
            columns, classifiers = self.parts(image)
            g = sum(columns) / len(columns)
            row = []
            for m in classifiers:
                a = sum(s * column for s, column in zip(self.shares(columns, m), columns, strict=True))
                row.append(m @ (g + self.lam * a))
            answers.append(torch.stack(row))
        return torch.stack(answers)

    def attention(self, x: Tensor) -> Tensor:
        maps = []
        for image in x:
            columns, classifiers = self.parts(image)
            maps.append(torch.stack([torch.stack(self.shares(columns, m)) for m in classifiers]))
        return torch.stack(maps).reshape(len(x), -1, *x.shape[2:])


class Released(nn.Module):
    """The formula of the released code: a convolution, divided by the norms; temperatures by the number of heads, 99 is a maximum."""

    TEMPERATURES = {1: [1], 2: [1, 99], 4: [1, 2, 4, 99], 6: [1, 2, 3, 4, 5, 99], 8: [1, 2, 3, 4, 5, 6, 7, 99]}

    def __init__(self, module: csra.MultiHead, heads: int, lam: float) -> None:
        super().__init__()
        self.multi_head, self.temperatures, self.lam = module.multi_head, self.TEMPERATURES[heads], lam

    def forward(self, x: Tensor) -> Tensor:
        total = 0
        for temperature, part in zip(self.temperatures, self.multi_head, strict=True):
            weight = part.head.weight
            score = (F.conv2d(x, weight) / weight.square().sum((1, 2, 3)).sqrt()[None, :, None, None]).flatten(2)
            pooled = score.max(2)[0] if temperature == 99 else (score * torch.softmax(score * temperature, 2)).sum(2)
            total = total + score.mean(2) + self.lam * pooled
        return total


class ReleasedNetwork(nn.Module):
    """torchvision's ResNet up to its last map, then the released head."""

    def __init__(self, network: nn.Module, channels: int, classes: int, heads: int, lam: float) -> None:
        super().__init__()
        network.fc = nn.Sequential()
        self.network = network
        self.classifier = Released(csra.MultiHead(channels, classes, heads, lam), heads, lam)

    def forward(self, x: Tensor) -> Tensor:
        n = self.network
        x = n.maxpool(n.relu(n.bn1(n.conv1(x))))
        return self.classifier(n.layer4(n.layer3(n.layer2(n.layer1(x)))))

    def official(self) -> dict[str, Tensor]:
        """The names of the release, whose network is a ResNet with one more part."""
        return {name.removeprefix("network."): value for name, value in self.state_dict().items()}


def settle(network: nn.Module) -> None:
    """Statistics of batch norms as after some training."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


class Step(nn.Module):
    """The loss of a batch, the mean of the binary cross-entropies."""

    def __init__(self, network: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.network, self.labels = network, labels

    def forward(self, x: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.network(x), self.labels)
