"""The gradient-enhanced loss, and residual-based adaptive refinement.

Yu, Lu, Meng, Karniadakis, "Gradient-enhanced physics-informed neural networks for forward and inverse PDE problems", CMAME 393, 2022,
arXiv 2111.02801. Plain torch: works with any network and any residual that autograd can follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Residual = Callable[[Tensor, Tensor], Tensor]  # (points (N, d), network outputs (N, m)) -> (N, 1) or (N, equations)


def gradient(values: Tensor, points: Tensor) -> Tensor:
    """The derivatives of one value a point with respect to that point: (N, 1) or (N,), (N, d) -> (N, d).

    All points at once: a value depends on its own point only, so the gradient of the sum holds every point's.
    """
    (found,) = torch.autograd.grad(values.sum(), points, create_graph=True, allow_unused=True)
    return torch.zeros_like(points) if found is None else found


def residual_and_gradient(network: nn.Module, residual: Residual, points: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The residual f at the points (N, equations), and for each coordinate its derivative ∂f/∂x_i (N, equations)."""
    points = points.detach().clone().requires_grad_(True)
    f = residual(points, network(points))
    slopes = torch.stack([gradient(f[:, i], points) for i in range(f.shape[1])], dim=1)  # (N, equations, d)
    return f, list(slopes.unbind(2))


class GradientEnhancedLoss(nn.Module):
    """L_f + Σ_i w_i L_{g_i} (eqs. 3 and 4): the mean squared residual and the mean squared derivatives of the residual.

    Args:
        weights: w_i, one for each coordinate. All zero gives the loss of a plain physics-informed network, and no
            derivative of the residual is computed.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.weights = tuple(weights)

    def forward(
        self, network: nn.Module, residual: Residual, points: Tensor, importance: Tensor | None = None
    ) -> Tensor:
        """Args:
        points: (N, d) collocation points.
        importance: (N,) factors of the points in the sum; None averages over them.
        """
        if len(self.weights) != points.shape[1]:
            raise ValueError(f"there are {len(self.weights)} weights for points with {points.shape[1]} coordinates")
        if importance is None:
            importance = points.new_full((len(points),), 1 / len(points))

        def mean_square(values: Tensor) -> Tensor:
            return (importance * values.square().sum(1)).sum()

        if not any(self.weights):
            points = points.detach().clone().requires_grad_(True)
            return mean_square(residual(points, network(points)))
        f, slopes = residual_and_gradient(network, residual, points)
        return mean_square(f) + sum(w * mean_square(g) for w, g in zip(self.weights, slopes, strict=True))


def refine(
    network: nn.Module, residual: Residual, candidates: Tensor, count: int, chunk: int = 10_000
) -> tuple[Tensor, float]:
    """Residual-based adaptive refinement (algorithm 1): the `count` candidates (N, d) with the largest residual.

    Returns them, (count, d), and the mean absolute residual over all candidates, the algorithm's stopping quantity.
    """
    sizes = []
    for part in candidates.split(chunk):
        part = part.detach().clone().requires_grad_(True)
        sizes.append(residual(part, network(part)).detach().abs().sum(1))
    size = torch.cat(sizes)
    return candidates[size.topk(count).indices], float(size.mean())


class FullyConnected(nn.Module):
    """A tanh network (N, d) -> (N, outputs), Glorot-initialised with zero biases; layers are named as in DeepXDE."""

    def __init__(self, inputs: int, outputs: int, width: int, depth: int, normal: bool = False) -> None:
        super().__init__()
        sizes = [inputs] + [width] * depth + [outputs]
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        for layer in self.linears:
            (nn.init.xavier_normal_ if normal else nn.init.xavier_uniform_)(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.linears[:-1]:
            x = torch.tanh(layer(x))
        return self.linears[-1](x)
