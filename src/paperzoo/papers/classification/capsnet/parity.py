"""CapsNet against its equations as loops over capsules, the layout of the gram-ai implementation, and the paper's counts."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.classification.capsnet import model as capsnet


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    loops = "procedure 1, one capsule at a time"
    vectors = torch.randn(5, 7, 3, **double) * torch.logspace(-3, 2, 5, **double)[:, None, None]
    yield Case("squash", capsnet.squash, slow_squash, (vectors,), "eq. (1)", gradients=True, atol=1e-9)
    yield Case(
        "squash of 0 and its gradient", zero_gradient, lambda: torch.zeros(2, 3), (), "eq. (1): v ~ |s| s near 0"
    )
    yield Case("length of a squashed vector", lambda s: capsnet.squash(s).norm(dim=-1), hyperbola, (vectors,), "|s|^2 / (1 + |s|^2)")  # fmt: skip
    for upper, lower, size, iterations in ((3, 6, 4, 1), (4, 5, 2, 2), (3, 7, 4, 3), (2, 3, 5, 5)):
        predictions = torch.randn(2, upper, lower, size, **double)
        yield Case(f"routing {lower} to {upper}, {iterations} iterations", lambda u, r=iterations: capsnet.route(u, r),
                   lambda u, r=iterations: slow_route(u, r), (predictions,), loops, gradients=True, atol=1e-9)  # fmt: skip

    for batch, options in (
        (2, {}),
        (1, {"iterations": 1, "in_channels": 3}),
        (3, {"image_size": 20, "num_classes": 4}),
    ):
        net = small(**options).double()
        slow = Slow(net)
        x = torch.rand(batch, 3, net.image_size, net.image_size, **double)
        yield Case(
            f"capsules, batch {batch} {options or ''}".strip(),
            Capsules(net),
            slow,
            (x,),
            loops,
            gradients=True,
            atol=1e-9,
        )
        labels = torch.arange(batch) % net.num_classes
        yield Case(f"training step, batch {batch}", Step(net, labels), SlowStep(slow, labels), (x,),
                   "eq. (4) and sec. 4.1 as loops", gradients=True, atol=1e-9)  # fmt: skip
    yield Case("the call: logarithms of the lengths", net, lambda x: slow(x).norm(dim=-1).log(), (x,), loops)
    yield Case("a picture of the longest capsule", lambda x: net.reconstruct(net.capsules(x)),
               lambda x: slow.draw(slow(x), slow(x).norm(dim=-1).argmax(1)), (x,), loops)  # fmt: skip

    lengths = torch.tensor([[0.95, 0.3, 0.05], [0.5, 0.2, 0.1]])
    # first row, class 0: 0 + 0.5 * 0.2^2 + 0; second row, class 1: 0.5 * 0.4^2 + 0.7^2 + 0
    yield Case("margin loss by hand", lambda v: capsnet.margin_loss(v, torch.tensor([0, 1])),
               lambda v: torch.tensor((0.02 + 0.08 + 0.49) / 2), (lengths,), "eq. (4), worked example")  # fmt: skip
    several = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    yield Case("margin loss, two classes in a picture", lambda v: capsnet.margin_loss(v, several), lambda v: slow_margin(v, several),
               (lengths,), "eq. (4)")  # fmt: skip

    theirs = Released()
    ours = capsnet.capsnet(image_size=24, channels=12, types=5, hidden=(20, 30)).eval()
    ours.load_state_dict(capsnet.from_official(theirs.state_dict()))
    images = torch.rand(3, 1, 24, 24)
    layout = "the layout of gram-ai/capsule-networks, with the paper's softmax over the upper capsules"
    yield Case("converted weights: capsules", ours.capsules, theirs, (images,), layout, gradients=True)
    yield Case(
        "converted weights: pictures",
        lambda x: ours.reconstruct(ours.capsules(x)).flatten(1),
        theirs.pictures,
        (images,),
        layout,
    )
    couplings = torch.randn(2, 3, 6, 4)
    yield Case("gram-ai's own softmax, over the lower capsules, one iteration", lambda u: stretched(capsnet.route(u, 1)) / 2,
               lambda u: u.mean(2), (couplings,), "its coupling 1 / lower against 1 / upper", note="6 lower, 3 upper: twice as long")  # fmt: skip

    yield Case(
        "parameters in millions, with and without the decoder", counted, lambda: [8.2, 6.8], (), "stated in sec. 5"
    )


# -- one capsule at a time -----------------------------------------------------------------------------------------------------


def slow_squash(s: Tensor) -> Tensor:
    square = (s * s).sum(-1, keepdim=True)
    return square / (1 + square) * (s / square.sqrt())


def hyperbola(s: Tensor) -> Tensor:
    square = (s * s).sum(-1)
    return square / (1 + square)


def stretched(v: Tensor) -> Tensor:
    """What was squashed to v: |s| = sqrt(|v| / (1 - |v|))."""
    length = v.norm(dim=-1, keepdim=True)
    return v / length * (length / (1 - length)).sqrt()


def zero_gradient() -> Tensor:
    s = torch.zeros(2, 3, requires_grad=True)
    v = capsnet.squash(s)
    return v.detach() + torch.autograd.grad(v.sum(), s)[0]


def slow_route(predictions: Tensor, iterations: int) -> Tensor:
    batch, upper, lower, _ = predictions.shape
    images = []
    for n in range(batch):
        u = predictions[n]
        b = [[u.new_zeros(()) for _ in range(upper)] for _ in range(lower)]
        for _ in range(iterations):
            c = []
            for i in range(lower):
                weights = [torch.exp(b[i][j]) for j in range(upper)]
                c.append([w / sum(weights) for w in weights])
            v = [slow_squash(sum(c[i][j] * u[j, i] for i in range(lower))) for j in range(upper)]
            for i in range(lower):
                for j in range(upper):
                    b[i][j] = b[i][j] + (u[j, i] * v[j]).sum()
        images.append(torch.stack(v))
    return torch.stack(images)


class Slow(nn.Module):
    """The network with its weights: every capsule of every place cut out and multiplied by its own matrix."""

    def __init__(self, net: capsnet.CapsNet) -> None:
        super().__init__()
        self.conv1, self.primary_capsules = net.conv1, net.primary_capsules
        self.digit_capsules, self.decoder = net.digit_capsules, net.decoder
        self.shape = (net.in_channels, net.image_size, net.size, net.iterations)

    def forward(self, x: Tensor) -> Tensor:
        channels, _, size, iterations = self.shape
        if channels == 1 and x.shape[1] == 3:
            x = (x[:, :1] + x[:, 1:2] + x[:, 2:]) / 3
        maps = self.primary_capsules.conv(F.relu(self.conv1(x)))
        matrices = self.digit_capsules.route_weights
        lower = []
        for kind in range(maps.shape[1] // size):
            for row in range(maps.shape[2]):
                for column in range(maps.shape[3]):
                    lower.append(slow_squash(maps[:, kind * size : (kind + 1) * size, row, column]))
        predictions = [torch.stack([u @ matrices[j, i] for i, u in enumerate(lower)], 1) for j in range(len(matrices))]
        return slow_route(torch.stack(predictions, 1), iterations)

    def draw(self, capsules: Tensor, labels: Tensor) -> Tensor:
        masked = torch.zeros_like(capsules)
        for n, label in enumerate(labels.tolist()):
            masked[n, label] = capsules[n, label]
        h = masked.reshape(len(capsules), -1)
        for layer in (0, 2):
            h = (h @ self.decoder[layer].weight.T + self.decoder[layer].bias).clamp_min(0)
        h = 1 / (1 + torch.exp(-(h @ self.decoder[4].weight.T + self.decoder[4].bias)))
        channels, side = self.shape[:2]
        return h.reshape(-1, channels, side, side)


class Capsules(nn.Module):
    """A network whose call gives the capsules, under the same parameter names."""

    def __init__(self, net: capsnet.CapsNet) -> None:
        super().__init__()
        self.conv1, self.primary_capsules, self.digit_capsules = net.conv1, net.primary_capsules, net.digit_capsules
        self.capsules = net.capsules

    def forward(self, x: Tensor) -> Tensor:
        return self.capsules(x)


class Step(nn.Module):
    def __init__(self, net: capsnet.CapsNet, labels: Tensor) -> None:
        super().__init__()
        self.net, self.labels = net, labels

    def forward(self, x: Tensor) -> Tensor:
        capsules = self.net.capsules(x)
        drawn = capsnet.reconstruction_loss(self.net.reconstruct(capsules, self.labels), self.net.grey(x))
        return capsnet.margin_loss(capsules.norm(dim=-1), self.labels) + 0.0005 * drawn


class SlowStep(nn.Module):
    def __init__(self, net: Slow, labels: Tensor) -> None:
        super().__init__()
        self.net, self.labels = net, labels

    def forward(self, x: Tensor) -> Tensor:
        capsules = self.net(x)
        pixels = x.mean(1, keepdim=True) if self.net.shape[0] == 1 else x
        drawn = self.net.draw(capsules, self.labels)
        there = torch.zeros(capsules.shape[:2], dtype=x.dtype)
        for n, label in enumerate(self.labels.tolist()):
            there[n, label] = 1
        total = slow_margin(capsules.norm(dim=-1), there)
        for n in range(len(x)):
            total = total + 0.0005 / len(x) * ((drawn[n] - pixels[n]) ** 2).sum()
        return total


def slow_margin(lengths: Tensor, there: Tensor) -> Tensor:
    total = lengths.new_zeros(())
    for n, row in enumerate(lengths):
        for k, length in enumerate(row):
            zero = torch.zeros_like(length)
            term = (
                torch.maximum(zero, 0.9 - length) ** 2 if there[n, k] else 0.5 * torch.maximum(zero, length - 0.1) ** 2
            )
            total = total + term / len(lengths)
    return total


def small(**options) -> capsnet.CapsNet:
    """Few capsules, with weights large enough that they are long and routing has something to decide."""
    net = capsnet.CapsNet(**({"num_classes": 3, "image_size": 18, "channels": 6, "types": 4, "size": 3, "class_size": 5,
                              "hidden": (7, 8)} | options))  # fmt: skip
    for weights in (net.conv1.weight, net.primary_capsules.conv.weight):
        nn.init.normal_(weights, std=2 / weights[0].numel() ** 0.5)
    nn.init.normal_(net.digit_capsules.route_weights, std=1.0)
    return net


# -- the gram-ai implementation ------------------------------------------------------------------------------------------------


class Released(nn.Module):
    """Parameters under its names and in its shapes: a convolution for each of the eight dimensions, the class's capsule decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 9)
        self.primary_capsules = nn.Module()
        self.primary_capsules.capsules = nn.ModuleList(nn.Conv2d(12, 5, 9, 2) for _ in range(8))
        self.digit_capsules = nn.Module()
        self.digit_capsules.route_logits = nn.Parameter(torch.zeros(10, 1, 80, 1, 1))
        self.digit_capsules.route_weights = nn.Parameter(torch.randn(10, 80, 8, 16))
        self.decoder = nn.Sequential(
            nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 24 * 24), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        u = slow_squash(torch.stack([c(x).flatten(1) for c in self.primary_capsules.capsules], dim=-1))
        priors = u[None, :, :, None] @ self.digit_capsules.route_weights[:, None]  # (class, B, node, 1, 16)
        logits = torch.zeros_like(priors[..., :1])
        for _ in range(3):
            outputs = slow_squash((logits.softmax(0) * priors).sum(2, keepdim=True))
            logits = logits + (priors * outputs).sum(-1, keepdim=True)
        return outputs[:, :, 0, 0].transpose(0, 1)

    def pictures(self, x: Tensor) -> Tensor:
        capsules = self(x)
        longest = (capsules**2).sum(-1).argmax(1)
        return self.decoder(torch.stack([c[k] for c, k in zip(capsules, longest, strict=True)]))


def counted() -> list[float]:
    with torch.device("meta"):
        net = capsnet.capsnet()
    counts = {name: math.prod(p.shape) for name, p in net.named_parameters()}
    without = sum(n for name, n in counts.items() if not name.startswith("decoder."))
    return [round(sum(counts.values()) / 1e6, 1), round(without / 1e6, 1)]
