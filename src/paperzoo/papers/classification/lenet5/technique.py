"""How LeNet-5 was trained: the stochastic diagonal Levenberg-Marquardt method (appendix C), and distorted digits (sec. III-C)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from paperzoo.papers.classification.lenet5.model import AMPLITUDE, SLOPE, LeNet5, squash


class StochasticDiagonalLevenbergMarquardt(Optimizer):
    """w_k <- w_k - eta / (mu + h_kk) dE/dw_k (appendix C, eq. 18 and 21).

    h_kk, an estimate of the second derivative, is set from time to time by `set_curvature` and kept in between; before the
    first time it is 0.

    Args:
        params: tensors, or parameter groups.
        lr: eta, the global learning rate. The paper updates after each image: 5e-4 at first, 1e-5 in the end (sec. III-B).
        mu: keeps the step from growing where the curvature vanishes; the paper's 0.02.
    """

    def __init__(self, params: Iterable, lr: float = 5e-4, mu: float = 0.02) -> None:
        if not lr >= 0:
            raise ValueError(f"lr is {lr}; it must be 0 or more")
        if not mu > 0:
            raise ValueError(f"mu is {mu}; it must be above 0")
        super().__init__(params, {"lr": lr, "mu": mu})

    @torch.no_grad()
    def set_curvature(self, curvature: dict[nn.Parameter, Tensor]) -> None:
        """h_kk of each parameter, at least 0, of its shape; others keep theirs."""
        for group in self.param_groups:
            for p in group["params"]:
                if p in curvature:
                    self.state[p]["curvature"] = curvature[p].detach().to(p, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            steps = [self.state[p].get("curvature", torch.zeros_like(p)) for p in parameters]
            steps = torch._foreach_add(steps, group["mu"])
            torch._foreach_addcdiv_(parameters, [p.grad for p in parameters], steps, value=-group["lr"])
        return loss


def curvature(network: LeNet5, images: Tensor, labels: Tensor, rubbish: float) -> dict[nn.Parameter, Tensor]:
    """h_kk of every parameter, averaged over images: the diagonal second derivatives of the loss, propagated back.

    With a = linear(x, w), x' = f(a), and every approximation of appendix C:
    d2E/da2 = f'(a)^2 d2E/dx'^2 (the term with f'' dropped: Gauss-Newton, so nothing is negative),
    d2E/dx2 = sum w^2 d2E/da2, and for a shared weight d2E/dw2 = sum over its connections of x^2 d2E/da2.
    Those two sums are what backpropagation through the same layer gives when x and w are squared first.

    Args:
        images: (N, C, 32, 32), as the network takes them.
        labels: int64 (N,).
        rubbish: j of the loss.
    """
    layers = [network.c1, network.s2, network.c3, network.s4, network.c5, network.f6]
    with torch.no_grad():
        x, inputs, sums = network.grey(images), [], []
        for layer in layers:
            x = x.flatten(1) if layer is network.f6 else x
            inputs.append(x)
            sums.append(layer.linear(x, layer.weight, layer.bias))
            x = squash(sums[-1])
        second = output_curvature(x, network.output.codes, rubbish) / len(labels)
    found = {}
    for layer, x, a in zip(reversed(layers), reversed(inputs), reversed(sums), strict=True):
        slope = AMPLITUDE * SLOPE * (1 - torch.tanh(SLOPE * a).square())
        second = second.reshape(a.shape) * slope.square()
        squares = [t.detach().square().requires_grad_() for t in (x, layer.weight, layer.bias)]
        with torch.enable_grad():
            second, by_weight, by_bias = torch.autograd.grad(layer.linear(*squares), squares, second)
        found |= {layer.weight: by_weight, layer.bias: by_bias}
    return found


def output_curvature(x: Tensor, codes: Tensor, rubbish: float) -> Tensor:
    """d2E/dx_j^2 of eq. (9) at the states of F6 (N, 84), exactly: 2 p_rubbish + the variance over classes of dy_i/dx_j.

    The right class adds a constant 2 whichever it is, and the competition takes away 2 sum_i p_i.
    """
    slopes = 2 * (x[:, None] - codes)  # (N, K, 84); the rubbish class has slope 0
    penalties = (x[:, None] - codes).square().sum(2)
    logits = torch.cat([-penalties, torch.full_like(penalties[:, :1], -rubbish)], 1)
    p = logits.softmax(1)[:, :-1, None]
    mean = (p * slopes).sum(1)
    return 2 * (1 - p.sum(1)) + (p * slopes.square()).sum(1) - mean.square()


class Distort(nn.Module):
    """Translation, scaling, squeezing and horizontal shearing, drawn at random, of uint8 images (C, S, S) (sec. III-C, fig. 6).

    Nine images in ten are distorted, as the paper's training set of 60,000 originals and 540,000 distortions has them. It names
    the maps but not their ranges; these are ours, by the eye from its figure. What comes in from outside is background, 0.
    """

    shift, scale, squeeze, shear = (
        0.1,
        0.15,
        0.15,
        0.3,
    )  # of the side; log; log; horizontal pixels for each vertical one
    share = 0.9

    def forward(self, image: Tensor) -> Tensor:
        chance, x, y, size, squeeze, shear = torch.rand(6).tolist()
        if chance >= self.share:
            return image
        size, squeeze = (2 * size - 1) * self.scale, (2 * squeeze - 1) * self.squeeze
        wide, high = torch.tensor([size + squeeze, size - squeeze]).exp().tolist()
        lean = (2 * shear - 1) * self.shear
        # from a place in the result to its source: moved back, straightened, divided by the scales; the side is 2 long
        right, down = 2 * (2 * x - 1) * self.shift, 2 * (2 * y - 1) * self.shift
        back = [[1 / wide, -lean / wide, (lean * down - right) / wide], [0.0, 1 / high, -down / high]]
        grid = F.affine_grid(torch.tensor([back]), [1, *image.shape], align_corners=False)
        moved = F.grid_sample(image[None].float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return moved[0].round().clamp(0, 255).to(torch.uint8)


class InMiddle(nn.Module):
    """Images (C, H, W) of at most `size` pixels a side in the middle of an empty square of that size; larger ones resized to it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: Tensor) -> Tensor:
        from torchvision.transforms.v2 import functional

        height, width = image.shape[-2:]
        if height > self.size or width > self.size:
            return functional.resize(image, [self.size, self.size], antialias=True)
        top, left = (self.size - height) // 2, (self.size - width) // 2
        return F.pad(image, (left, self.size - width - left, top, self.size - height - top))
