"""LeNet-5 against itself map by map, the paper's tables of counts, worked examples, scipy, and the textbook's network."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.classification.lenet5 import model as lenet
from paperzoo.papers.classification.lenet5 import technique


def cases() -> Iterator[Case]:
    import scipy
    from scipy.spatial.distance import cdist

    torch.manual_seed(0)
    net = lenet.lenet5().double()
    slow = MapByMap(net)
    unit = "sec. II-B, one map at a time"
    for count, channels in ((1, 1), (3, 1), (2, 3)):
        x = torch.randn(count, channels, 32, 32, dtype=torch.float64)
        yield Case(f"network, {count} images of {channels} channels", net, slow, (x,), unit, gradients=True, atol=1e-9)
    labels = torch.tensor([7, 2])
    step = Case("a training step by eq. (9)", Step(net, lenet.MAPLoss(20.0), labels), Step(slow, slow_loss, labels), (x,), unit,
                gradients=True, atol=1e-9)  # fmt: skip
    yield step
    wide = torch.randn(1, 1, 44, 36, dtype=torch.float64)
    yield Case("maps of another size", net.stages, slow.stages, (wide,), unit, atol=1e-9)
    other = lenet.lenet5(3, 2).double()
    yield Case("three classes, two channels", other, MapByMap(other), (torch.randn(2, 2, 32, 32, dtype=torch.float64),), unit,
               gradients=True, atol=1e-9)  # fmt: skip

    states = torch.randn(4, 84, dtype=torch.float64)
    yield Case("radial basis units", net.output, lambda s: -cdist(s, net.output.codes, "sqeuclidean"), (states,),
               f"scipy {scipy.__version__} cdist")  # fmt: skip
    four = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    yield Case(
        "subsampling by hand", halving, lambda x: 1.7159 * math.tanh(2 / 3 * (0.5 * 10 - 1)), (four,), "worked example"
    )
    ends = torch.tensor([-1.0, 1.0])
    yield Case("f(1) = 1 and f(-1) = -1", lenet.squash, lambda a: a, (ends,), "appendix A", atol=1e-4)
    yield Case("parameters of C1 … F6, and in all", lambda: counted(net), lambda: [156, 12, 1516, 32, 48_120, 10_164, 60_000],
               (), "stated in sec. II-B")  # fmt: skip
    yield Case("connections of C1 … F6", lambda: connections(net), lambda: [122_304, 5_880, 151_600, 2_000, 48_120, 10_164],
               (), "stated in sec. II-B", note="the paper's sum, 340,908, is not that of its own figures, 340,068")  # fmt: skip

    exact = torch.func.vmap(
        lambda s: torch.func.hessian(lambda v: slow_loss(net.output(v[None]), labels[:1]))(s).diagonal()
    )
    near = net.output.codes[[7, 2]] + torch.randn(2, 84, dtype=torch.float64) * 0.3
    for name, place in (("far from the codes", states), ("near them", near)):
        yield Case(f"curvature of the loss at F6, {name}", lambda s: technique.output_curvature(s, net.output.codes, 20.0), exact,
                   (place,), f"torch {torch.__version__.split('+')[0]} hessian")  # fmt: skip
    x = torch.randn(2, 1, 32, 32, dtype=torch.float64) * 0.5
    yield Case("curvature of every weight", lambda x: by_name(net, technique.curvature(net, x, labels, 20.0)),
               lambda x: slow_curvature(net, x, labels), (x,), "appendix C with a matrix of connections a layer", atol=1e-9)  # fmt: skip
    yield Case("three steps of the optimizer", lambda: descended(technique.StochasticDiagonalLevenbergMarquardt, True),
               lambda: descended(None, True), (), "appendix C as loops", atol=1e-9)  # fmt: skip
    yield Case("without curvature: rate eta / mu", lambda: descended(technique.StochasticDiagonalLevenbergMarquardt, False),
               lambda: descended(torch.optim.SGD, False), (), f"torch {torch.__version__.split('+')[0]} SGD", atol=1e-9)  # fmt: skip
    picture = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    yield Case("a distortion", lambda: seeded(technique.Distort(), picture).float(), lambda: scipy_distortion(picture), (),
               f"scipy {scipy.__version__} affine_transform", rtol=0.0, atol=1.0, note="rounded to 255 levels")  # fmt: skip

    theirs = book()
    ours = lenet.lenet5_textbook()
    ours.load_state_dict({f"net.{k}": v for k, v in theirs.state_dict().items()})
    small = torch.randn(3, 1, 28, 28)
    yield Case(
        "lenet5_textbook",
        lambda x: ours(F.pad(x, (2,) * 4)),
        theirs,
        (small,),
        "Dive into Deep Learning 7.6",
        gradients=True,
    )


# -- one map at a time --------------------------------------------------------------------------------------------------------


class MapByMap(nn.Module):
    """The network with its weights, from the text: each unit adds its inputs times its weights, and its bias."""

    def __init__(self, net: lenet.LeNet5) -> None:
        super().__init__()
        for name in ("c1", "s2", "c3", "s4", "c5", "f6", "output"):
            self.add_module(name, copy.deepcopy(getattr(net, name)))

    def stages(self, x: Tensor) -> list[Tensor]:
        if x.shape[1] == 3:
            x = (x[:, :1] + x[:, 1:2] + x[:, 2:]) / 3
        everything = tuple(range(x.shape[1]))
        c1 = convolved(x, [list(k) for k in self.c1.weight], self.c1.bias, [everything] * 6)
        s2 = subsampled(c1, self.s2.weight, self.s2.bias)
        s4 = subsampled(convolved(s2, self.c3_kernels(), self.c3.bias, TABLE_1), self.s4.weight, self.s4.bias)
        return [s2, s4]

    def c3_kernels(self) -> list[list[Tensor]]:
        rest = list(self.c3.weight)
        return [[rest.pop(0) for _ in seen] for seen in TABLE_1]

    def forward(self, x: Tensor) -> Tensor:
        s4 = self.stages(x)[-1]
        c5 = convolved(s4, [list(k) for k in self.c5.weight], self.c5.bias, [range(16)] * 120)[:, :, 0, 0]
        f6 = torch.stack([f((c5 * w).sum(1) + b) for w, b in zip(self.f6.weight, self.f6.bias, strict=True)], 1)
        return torch.stack([-((f6 - code) ** 2).sum(1) for code in self.output.codes], 1)


# Table I as the paper prints it: a row a map of S2, a column a map of C3.
PRINTED = """
X...XXX..XXXX.XX
XX...XXX..XXXX.X
XXX...XXX..X.XXX
.XXX..XXXX..X.XX
..XXX..XXXX.XX.X
...XXX..XXXX.XXX
"""
TABLE_1 = [[i for i, row in enumerate(PRINTED.split()) if row[k] == "X"] for k in range(16)]


def f(a: Tensor) -> Tensor:
    return 1.7159 * (1 - 2 / (torch.exp(2 * (2 / 3) * a) + 1))


def convolved(x: Tensor, kernels: list, biases: Tensor, seen: list) -> Tensor:
    """A map at a time: each kernel times the 5 x 5 inputs of every unit."""
    windows = x.unfold(2, 5, 1).unfold(3, 5, 1)  # (B, C, H - 4, W - 4, 5, 5)
    maps = []
    for mine, bias, sources in zip(kernels, biases, seen, strict=True):
        maps.append(f(sum((windows[:, i] * k).sum((3, 4)) for k, i in zip(mine, sources, strict=True)) + bias))
    return torch.stack(maps, 1)


def subsampled(x: Tensor, coefficients: Tensor, biases: Tensor) -> Tensor:
    corners = x[:, :, 0::2, 0::2] + x[:, :, 1::2, 0::2] + x[:, :, 0::2, 1::2] + x[:, :, 1::2, 1::2]
    return torch.stack([f(corners[:, k] * w + b) for k, (w, b) in enumerate(zip(coefficients, biases, strict=True))], 1)


def slow_loss(logits: Tensor, labels: Tensor, j: float = 20.0) -> Tensor:
    penalties = -logits
    right = penalties.gather(1, labels[:, None])[:, 0]
    return (right + (math.exp(-j) + (-penalties).exp().sum(1)).log()).mean()


class Step(nn.Module):
    """The loss of a network, so that its gradients are compared."""

    def __init__(self, net: nn.Module, loss, labels: Tensor) -> None:
        super().__init__()
        self.net, self.loss, self.labels = net, loss, labels

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.net(x), self.labels)


# -- counts ----------------------------------------------------------------------------------------------------------------------

LAYERS = ("c1", "s2", "c3", "s4", "c5", "f6")


def halving(x: Tensor) -> float:
    layer = lenet.Subsampling(1)
    nn.init.constant_(layer.weight, 0.5)
    nn.init.constant_(layer.bias, -1.0)
    return float(layer(x).detach())


def counted(net: nn.Module) -> list[int]:
    layers = [sum(p.numel() for p in getattr(net, name).parameters()) for name in LAYERS]
    return [*layers, sum(p.numel() for p in net.parameters())]


def connections(net: lenet.LeNet5) -> list[int]:
    """Inputs of every unit that its state depends on, and its bias: non-zero entries of each layer's matrix."""
    x = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    counts = []
    for name in LAYERS:
        layer = getattr(net, name)
        x = x.flatten(1) if name == "f6" else x
        counts.append(int((matrix(layer, x) != 0).sum()) + layer(x).numel())
        x = layer(x)
    return counts


def matrix(layer: lenet.Layer, x: Tensor) -> Tensor:
    """The strengths of all connections u (units, inputs) of a layer: what each input alone, set to 1, does."""
    alone = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape[1:])
    return layer.linear(alone, layer.weight, 0 * layer.bias).flatten(1).T.detach()


# -- appendix C --------------------------------------------------------------------------------------------------------------------


def by_name(net: nn.Module, found: dict) -> dict[str, Tensor]:
    return {name: found[p] for name, p in net.named_parameters()}


def slow_curvature(net: lenet.LeNet5, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Image by image, each layer as a matrix of connections."""
    total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for image in images:
        x, kept = image[None], []
        for name in LAYERS:
            x = x.flatten(1) if name == "f6" else x
            kept.append((name, x.detach()))
            x = getattr(net, name)(x)
        h = torch.func.hessian(lambda v: slow_loss(net.output(v[None]), labels[:1]))(x[0].detach()).diagonal()
        for name, x in reversed(kept):
            layer = getattr(net, name)
            a = layer.linear(x, layer.weight, layer.bias).flatten()
            slope = torch.autograd.grad(f(a).sum(), a)[0]
            h = slope**2 * h
            total[f"{name}.weight"] += squared_inputs(name, x, h).reshape(layer.weight.shape) / len(images)
            total[f"{name}.bias"] += h.reshape(len(layer.bias), -1).sum(1) / len(images)
            h = (matrix(layer, x) ** 2).T @ h
    return total


def squared_inputs(name: str, x: Tensor, h: Tensor) -> Tensor:
    """For each weight, over the connections that share it: the square of what comes in, times the curvature at the unit."""
    if name == "f6":
        return h[:, None] * x**2
    if name in ("s2", "s4"):
        squares = F.unfold((x**2).transpose(0, 1), 2, stride=2).sum(1)  # four connections share a coefficient
        return (h.reshape(len(squares), -1) * squares).sum(1)
    windows = x[0].unfold(1, 5, 1).unfold(2, 5, 1)  # (C, H - 4, W - 4, 5, 5)
    h = h.reshape(-1, *windows.shape[1:3], 1, 1)
    seen = TABLE_1 if name == "c3" else [range(len(windows))] * len(h)
    return torch.stack([(h[k] * windows[i] ** 2).sum((0, 1)) for k, sources in enumerate(seen) for i in sources])


def descended(kind, curved: bool) -> list[Tensor]:
    """Three steps down a quadratic bowl with two parameters; `kind` None is the loop."""
    a, b = (
        torch.tensor([1.0, -2.0, 3.0]).double().requires_grad_(),
        torch.tensor([[0.5, 4.0]]).double().requires_grad_(),
    )
    h = {a: torch.tensor([0.0, 1.0, 2.0]).double(), b: torch.tensor([[3.0, 0.5]]).double()} if curved else {}
    optimizer = None
    if kind is torch.optim.SGD:
        optimizer = kind([a, b], 0.004 / 0.02)
    elif kind:
        optimizer = kind([a, b], 0.004)
        optimizer.set_curvature(h)
    for _ in range(3):
        loss = (a**2).sum() + (b**4).sum() / 50
        grads = torch.autograd.grad(loss, (a, b))
        if optimizer:
            a.grad, b.grad = grads
            optimizer.step()
        else:
            for p, g in zip((a, b), grads, strict=True):
                for i in product(*map(range, p.shape)):
                    p.data[i] -= 0.004 / (0.02 + h[p][i]) * g[i]
    return [a.detach(), b.detach()]


# -- distortions, the textbook ---------------------------------------------------------------------------------------------------


def seeded(transform: nn.Module, picture: Tensor) -> Tensor:
    torch.manual_seed(5)
    return transform(picture)


def scipy_distortion(picture: Tensor) -> Tensor:
    """The same map in pixels: a place in the result is moved back, straightened, and divided by the scales."""
    from scipy.ndimage import affine_transform

    torch.manual_seed(5)
    chance, x, y, size, squeeze, shear = torch.rand(6).tolist()
    assert chance < 0.9
    wide = math.exp(0.15 * (2 * size - 1) + 0.15 * (2 * squeeze - 1))
    high = math.exp(0.15 * (2 * size - 1) - 0.15 * (2 * squeeze - 1))
    lean, right, down = 0.3 * (2 * shear - 1), 3.2 * (2 * x - 1), 3.2 * (2 * y - 1)
    back = torch.tensor([[1 / high, 0.0], [-lean / wide, 1 / wide]])  # row, column
    offset = 15.5 - back @ torch.tensor([15.5 + down, 15.5 + right])
    planes = [
        affine_transform(p.float().numpy(), back.numpy(), offset.numpy(), order=1, mode="grid-constant")
        for p in picture
    ]
    return torch.stack([torch.as_tensor(p) for p in planes]).round()


def book() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, kernel_size=5, padding=2), nn.Sigmoid(), nn.AvgPool2d(kernel_size=2, stride=2),
        nn.Conv2d(6, 16, kernel_size=5), nn.Sigmoid(), nn.AvgPool2d(kernel_size=2, stride=2), nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120), nn.Sigmoid(), nn.Linear(120, 84), nn.Sigmoid(), nn.Linear(84, 10),
    )  # fmt: skip
