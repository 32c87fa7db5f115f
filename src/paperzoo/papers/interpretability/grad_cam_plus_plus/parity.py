"""Grad-CAM++ against the grad-cam package, the authors' steps, and the derivatives that the closed form stands for."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.classification.resnet.model import resnet18
from paperzoo.papers.classification.resnet.parity import settled
from paperzoo.papers.interpretability.grad_cam.parity import Small, fingerprint
from paperzoo.papers.interpretability.grad_cam.technique import GradCAM
from paperzoo.papers.interpretability.grad_cam_plus_plus.technique import GradCAMPlusPlus, coefficients


def cases() -> Iterator[Case]:
    from pytorch_grad_cam import GradCAMPlusPlus as Package
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    package = f"grad-cam {version('grad-cam')}"
    torch.manual_seed(0)

    def reference(net: nn.Module, layer: str, classes: list[int]):
        def maps(x: Tensor) -> Tensor:
            with Package(net, [net.get_submodule(layer)]) as cam:
                return torch.from_numpy(cam(x, [ClassifierOutputTarget(c) for c in classes]))

        return maps

    net, x, classes = Small("plain").eval(), torch.randn(4, 3, 22, 26), [0, 4, 2, 2]
    for layer in ("conv2", "relu1"):
        ours = GradCAMPlusPlus(net, layer, epsilon=1e-6)
        yield Case(f"hidden layer behind {layer}", lambda x, ours=ours: ours(x, classes),
                   reference(net, layer, classes), (x,), package, atol=1e-4)  # fmt: skip
    net, x = settled(resnet18(num_classes=10)).eval(), torch.randn(2, 3, 96, 64)
    for layer in ("layer4", "layer3", "layer2.1.conv2"):
        ours = GradCAMPlusPlus(net, layer, epsilon=1e-6)
        yield Case(f"resnet18 {layer}", lambda x, ours=ours: ours(x, [7, 1]),
                   reference(net, layer, [7, 1]), (x,), package, atol=1e-4)  # fmt: skip

    # The same as the authors' TensorFlow code does it, one image and one map at a time.
    net, x = Small("plain").eval(), torch.randn(3, 3, 22, 26)
    for normalise in (False, True):
        ours = GradCAMPlusPlus(net, "relu2", normalise=normalise)
        yield Case("coarse map, alphas " + ("normalised" if normalise else "as they are"),
                   lambda x, ours=ours: scaled(ours.coarse(x, 1)),
                   lambda x, n=normalise: torch.stack([scaled(slow(net, row, 1, n)) for row in x]), (x,),
                   "misc/utils.py of the authors, step by step", rtol=1e-4, atol=1e-6)  # fmt: skip

    # The closed form (eq. 19) is eq. (10) with the true derivatives of exp(score), which autograd can take one by one.
    head = nn.Sequential(nn.Flatten(), nn.Linear(2 * 3 * 3, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    maps = torch.rand(1, 2, 3, 3, dtype=torch.float64)

    def closed(a: Tensor) -> Tensor:
        a = a.clone().requires_grad_()
        g = torch.autograd.grad(head(a)[0, 2], a)[0]
        return coefficients(a.detach(), g, g**2, g**3)

    def derived(a: Tensor) -> Tensor:
        first, second, third = (torch.zeros_like(a) for _ in range(3))
        for place in torch.cartesian_prod(*(torch.arange(n) for n in a.shape)).tolist():
            at = tuple(place)

            def y(value: Tensor, at: tuple = at) -> Tensor:
                return head(a.index_put(tuple(torch.tensor(i) for i in at), value))[0, 2].exp()

            value = a[at].clone().requires_grad_()
            one = torch.autograd.grad(y(value), value, create_graph=True)[0]
            two = torch.autograd.grad(one, value, create_graph=True)[0]
            first[at], second[at], third[at] = one, two, torch.autograd.grad(two, value)[0]
        return coefficients(a, first, second, third)

    yield Case(
        "alpha of exp(score)", closed, derived, (maps,), "eq. (10), derivatives by autograd", rtol=1e-9, atol=1e-12
    )

    # With alpha = 1 / Z everywhere and no negative gradient it is Grad-CAM (sec. 3.1).
    net = settled(resnet18(num_classes=10)).eval()
    net.fc.weight.data.abs_()
    x = torch.randn(2, 3, 64, 64)
    yield Case("equal alphas, positive gradients: Grad-CAM",
               lambda x: scaled(GradCAMPlusPlus(net, "layer4", normalise=True).coarse(x, 3)),
               lambda x: scaled(GradCAM(net, "layer4").coarse(x, 3)), (x,), "Grad-CAM", atol=1e-6)  # fmt: skip

    net = settled(resnet18(num_classes=10)).train()
    before = fingerprint(net)

    def after() -> dict:
        with torch.inference_mode():
            GradCAMPlusPlus(net, "layer4")(x)
        return fingerprint(net)

    yield Case("the model is left as it was", after, lambda: before, (), "its state before, hooks and flags included",
               rtol=0, atol=0)  # fmt: skip


def scaled(maps: Tensor) -> Tensor:
    """Maps over their maximum: a factor exp(score) does not count."""
    return maps / maps.amax((-2, -1), keepdim=True).clamp_min(1e-12)


def slow(net: Small, image: Tensor, target: int, normalise: bool) -> Tensor:
    """One image (C, H, W): the authors' steps with exp(score) in all three derivatives, in double precision, a map at a time."""
    a = net.relu2(net.conv2(net.relu1(net.conv1(image[None])))).detach().requires_grad_()
    score = net.out(net.relu3(net.head(F.adaptive_avg_pool2d(a, 4).flatten(1))))[0, target]
    gradient, y = torch.autograd.grad(score, a)[0][0].double(), (score.double() - 5).exp().item()
    total = torch.zeros(a.shape[2:], dtype=torch.float64)
    for g, m in zip(gradient, a[0].detach().double(), strict=True):
        first, second, third = y * g, y * g * g, y * g * g * g
        denominator = 2 * second + third * m.sum()
        alphas = second / torch.where(denominator != 0, denominator, torch.ones_like(denominator))
        weights = first.clamp_min(0)
        if normalise:
            constant = torch.where(weights > 0, alphas, torch.zeros_like(alphas)).sum()
            alphas = alphas / (constant if constant != 0 else 1)
        total += (weights * alphas).sum() * m
    return total.clamp_min(0).float()
