"""Saliency against captum; the ascent and the graph cut against what they are by definition."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from importlib.metadata import version

import numpy
import torch
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.classification.resnet.model import resnet18
from paperzoo.papers.classification.resnet.parity import settled
from paperzoo.papers.interpretability.deep_inside_saliency.graph_cut import Mixture, graph_cut, pairs
from paperzoo.papers.interpretability.deep_inside_saliency.technique import Saliency, class_images
from paperzoo.papers.interpretability.grad_cam.parity import Small, fingerprint


def cases() -> Iterator[Case]:
    from captum.attr import Saliency as Captum

    captum = f"captum {version('captum')}"
    torch.manual_seed(0)
    resnet = settled(resnet18(num_classes=10)).eval()
    for net, x, classes in (
        (Small("plain").eval(), torch.randn(4, 3, 22, 26), torch.tensor([0, 4, 2, 2])),
        (Small("inplace").eval(), torch.randn(1, 3, 31, 23), torch.tensor([1])),
        (resnet, torch.randn(2, 3, 64, 96), torch.tensor([7, 1])),
    ):

        def reference(x: Tensor, net: nn.Module = net, classes: Tensor = classes) -> Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return Captum(net).attribute(x.clone(), target=classes).amax(1)

        ours = Saliency(net)
        yield Case(f"{type(net).__name__}, batch of {len(x)}", lambda x, o=ours, c=classes: o.magnitude(x, c), reference,
                   (x,), captum, rtol=1e-5, atol=1e-9)  # fmt: skip

    # The gradient is the linear model of the score near the image (sec. 3): Taylor, in double precision.
    smooth = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3)).double()
    x, step = torch.randn(2, 3, 8, 8).double(), 1e-6 * torch.randn(2, 3, 8, 8).double()
    yield Case("first order of the score", lambda x: (Saliency(smooth).gradient(x, 1) * step).sum((1, 2, 3)) * 1e6,
               lambda x: (smooth(x + step) - smooth(x - step))[:, 1] / 2 * 1e6, (x,), "differences", atol=1e-7)  # fmt: skip

    # Of a linear score the best image is known: w / (2 lambda).
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 5 * 4, 6))
    yield Case("class model of a linear network", lambda: class_images(linear, [2, 5], (3, 5, 4), 400, 1.0, 0.05),
               lambda: linear[1].weight[[2, 5]].view(2, 3, 5, 4).detach() / 0.1, (), "argmax of eq. (1)")  # fmt: skip

    def ascent() -> Tensor:
        found = []
        for target in (3, 8):
            image = nn.Parameter(torch.zeros(1, 3, 32, 32))
            optimizer = torch.optim.SGD([image], lr=0.5, weight_decay=0.04)
            for _ in range(12):
                optimizer.zero_grad()
                (-resnet(image)[0, target]).backward()
                optimizer.step()
            found.append(image.detach()[0])
        resnet.zero_grad()
        return torch.stack(found)

    yield Case("class models of a network", lambda: class_images(resnet, [3, 8], (3, 32, 32), 12, 0.5, 0.02), ascent, (),
               "torch.optim.SGD with weight decay, a class at a time", rtol=1e-3, atol=1e-4)  # fmt: skip

    rng = numpy.random.default_rng(0)
    for height, width, gamma in ((3, 4, 1.0), (4, 3, 0.3), (1, 9, 2.0)):
        colours, object_cost, background_cost = rng.random((height, width, 3)), *rng.random((2, height, width)) * 3
        yield Case(f"graph cut of {height} x {width}",
                   lambda c=colours, a=object_cost, b=background_cost, g=gamma: graph_cut(c, a, b, g).astype(float),
                   lambda c=colours, a=object_cost, b=background_cost, g=gamma: exhaustive(c, a, b, g), (),
                   "the least energy of all labellings")  # fmt: skip

    colours = rng.random((40, 3))
    one = numpy.diag(colours.var(0) + 1e-3)
    away = colours - colours.mean(0)
    density = -0.5 * ((away @ numpy.linalg.inv(one)) * away).sum(1) - 0.5 * numpy.log(
        numpy.linalg.det(2 * numpy.pi * one)
    )
    yield Case("colour model of one Gaussian", lambda: Mixture(colours, 1).log_density(colours[None])[0],
               lambda: density, (), "the density of a normal distribution", atol=1e-6)  # fmt: skip

    net = settled(resnet18(num_classes=10)).train()
    before, x = fingerprint(net), torch.randn(2, 3, 32, 32)

    def after() -> dict:
        with torch.inference_mode():
            Saliency(net)(x)
            class_images(net, [1], (3, 32, 32), steps=2)
        return fingerprint(net)

    yield Case("the model is left as it was", after, lambda: before, (), "its state before, hooks and flags included",
               rtol=0, atol=0)  # fmt: skip


def exhaustive(colours: numpy.ndarray, object_cost: numpy.ndarray, background_cost: numpy.ndarray, gamma: float):
    """The labelling of least energy, among all of them."""
    first, second, cost = pairs(colours, gamma)
    least, best = numpy.inf, None
    for labels in itertools.product((0, 1), repeat=object_cost.size):
        x = numpy.array(labels)
        energy = numpy.where(x == 1, object_cost.ravel(), background_cost.ravel()).sum()
        energy += cost[x[first] != x[second]].sum()
        if energy < least:
            least, best = energy, x.reshape(object_cost.shape).astype(float)
    return best
