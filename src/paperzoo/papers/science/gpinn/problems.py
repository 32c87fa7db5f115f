"""The problems of the paper's section 3: equation, domain, hard constraints, observations, exact solution.

Points are (N, d), the time last; coordinates and outputs carry no units. Exact solutions are differentiable torch functions
where there is a formula, else computed by an independent method in float64.
"""

from __future__ import annotations

import functools
import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from paperzoo.papers.science.gpinn.technique import gradient

Unknowns = dict[str, Tensor]


class Problem:
    """An equation to be solved. `unknowns` holds the true values of what an inverse problem infers."""

    name: ClassVar[str]
    low: ClassVar[tuple[float, ...]]
    high: ClassVar[tuple[float, ...]]
    coordinates: ClassVar[tuple[str, ...]] = ("x",)
    outputs: ClassVar[tuple[str, ...]] = ("u",)
    unknowns: ClassVar[dict[str, float]] = {}
    with_boundary: ClassVar[bool] = False  # whether uniform points include the ends of the interval

    def constrain(self, x: Tensor, y: Tensor) -> Tensor:
        """The network's output made to satisfy the boundary and initial conditions exactly."""
        return y

    def residual(self, x: Tensor, y: Tensor, unknowns: Unknowns) -> Tensor:
        """The equation's residual, (N, 1), from points with gradient and the constrained outputs at them."""
        raise NotImplementedError(f"{type(self).__name__} has no equation")

    def exact(self, x: Tensor) -> Tensor:
        """The true outputs (N, outputs) at points (N, d)."""
        raise NotImplementedError(f"{type(self).__name__} has no solution")

    def exact_gradient(self, x: Tensor) -> Tensor | None:
        """The true derivatives of the first output, (N, d); None where they are not known."""
        x = x.detach().clone().requires_grad_(True)
        return gradient(self.exact(x)[:, :1], x).detach()

    def observations(self) -> Tensor | None:
        """Where an inverse problem's solution has been measured, (N, d) float64."""
        return None

    def points(self, count: int) -> Tensor:
        """`count` collocation points, (count, d) float64: uniform in one dimension, a Hammersley set in two."""
        low, high = torch.tensor(self.low, dtype=torch.float64), torch.tensor(self.high, dtype=torch.float64)
        if len(self.low) == 1:
            ends = torch.linspace(0, 1, count if self.with_boundary else count + 2, dtype=torch.float64)
            # DeepXDE's "uniform" interior points, which the released scripts use: i / (n + 1), i = 1 … n
            places = (ends if self.with_boundary else ends[1:-1])[:, None]
        else:
            places = hammersley(count)
        return low + (high - low) * places

    def grid(self, points: int) -> Tensor:
        """A regular grid with `points` along each axis, ends included, for evaluation: (points ** d, d) float64."""
        axes = [torch.linspace(a, b, points, dtype=torch.float64) for a, b in zip(self.low, self.high, strict=True)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(axes))


class Function(Problem):
    """Sec. 3.1: approximate u(x) = -(1.4 - 3x) sin 18x on [0, 1] from samples, with its slope."""

    name = "function"
    low, high = (0.0,), (1.0,)
    with_boundary = True

    def residual(self, x: Tensor, y: Tensor, unknowns: Unknowns) -> Tensor:
        return y - self.exact(x)

    def exact(self, x: Tensor) -> Tensor:
        return -(1.4 - 3 * x) * torch.sin(18 * x)


class Poisson(Problem):
    """Sec. 3.2.1: -u'' = Σ_{i=1..4} i sin ix + 8 sin 8x on [0, π], u(0) = 0, u(π) = π."""

    name = "poisson"
    low, high = (0.0,), (math.pi,)

    def constrain(self, x: Tensor, y: Tensor) -> Tensor:
        return x + torch.tanh(x) * torch.tanh(math.pi - x) * y

    def residual(self, x: Tensor, y: Tensor, unknowns: Unknowns) -> Tensor:
        force = sum(i * torch.sin(i * x) for i in range(1, 5)) + 8 * torch.sin(8 * x)
        return -gradient(gradient(y, x), x) - force

    def exact(self, x: Tensor) -> Tensor:
        return x + sum(torch.sin(i * x) / i for i in (1, 2, 3, 4, 8))


class DiffusionReaction(Problem):
    """Sec. 3.2.2: u_t = u_xx + R(x, t) on [-π, π] x [0, 1], with R such that u = e^-t Σ sin(ix)/i, i = 1, 2, 3, 4, 8."""

    name = "diffusion_reaction"
    low, high = (-math.pi, 0.0), (math.pi, 1.0)
    coordinates = ("x", "t")
    waves = (1, 2, 3, 4, 8)

    def constrain(self, x: Tensor, y: Tensor) -> Tensor:
        place, time = x[:, :1], x[:, 1:]
        initial = sum(torch.sin(i * place) / i for i in self.waves)
        return (place**2 - math.pi**2) * (1 - torch.exp(-time)) * y + initial

    def residual(self, x: Tensor, y: Tensor, unknowns: Unknowns) -> Tensor:
        first = gradient(y, x)
        second = gradient(first[:, :1], x)[:, :1]
        source = torch.exp(-x[:, 1:]) * sum((i * i - 1) / i * torch.sin(i * x[:, :1]) for i in self.waves)
        return first[:, 1:] - second - source

    def exact(self, x: Tensor) -> Tensor:
        return torch.exp(-x[:, 1:]) * sum(torch.sin(i * x[:, :1]) / i for i in self.waves)


class BrinkmanForchheimer(Problem):
    """Sec. 3.3.1: -ν_e/ε u'' + ν u / K = g on [0, 1], u = 0 at the walls; ν_e is inferred from 5 observations.

    g = 1, ν = K = 1e-3, ε = 0.4 and the true ν_e is 1e-3.
    """

    name = "brinkman_viscosity"
    low, high = (0.0,), (1.0,)
    unknowns = {"effective_viscosity": 1e-3}
    viscosity, permeability, porosity, force = 1e-3, 1e-3, 0.4, 1.0

    def constrain(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(x) * torch.tanh(1 - x) * y

    def residual(self, x: Tensor, y: Tensor, unknowns: Unknowns) -> Tensor:
        permeability = unknowns.get("permeability", self.permeability)
        curvature = gradient(gradient(y, x), x)
        return (
            -unknowns["effective_viscosity"] / self.porosity * curvature
            + self.viscosity * y / permeability
            - self.force
        )

    def exact(self, x: Tensor) -> Tensor:
        r = math.sqrt(self.viscosity * self.porosity / (1e-3 * self.permeability))
        return self.force * self.permeability / self.viscosity * (1 - torch.cosh(r * (x - 0.5)) / math.cosh(r / 2))

    def observations(self) -> Tensor:
        return torch.linspace(0, 1, 7, dtype=torch.float64)[1:-1, None]


class BrinkmanTwo(BrinkmanForchheimer):
    """Sec. 3.3.1, second case: the effective viscosity and the permeability are both inferred."""

    name = "brinkman_viscosity_permeability"
    unknowns = {"effective_viscosity": 1e-3, "permeability": 1e-3}


class ReactionRate(Problem):
    """Sec. 3.3.2: λ u'' - k(x) u = sin 2πx on [0, 1], u = 0 at the ends, λ = 0.01; the function k is inferred.

    The true k(x) = 0.1 + exp(-(x - 0.5)² / (2 · 0.15²)); u is observed at 8 points. The second output is k.
    """

    name = "reaction_rate"
    low, high = (0.0,), (1.0,)
    outputs = ("u", "k")
    with_boundary = True
    diffusion = 0.01

    def constrain(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x * (1 - x) * y[:, :1], y[:, 1:]], dim=1)

    def residual(self, x: Tensor, y: Tensor, unknowns: Unknowns) -> Tensor:
        u, k = y[:, :1], y[:, 1:]
        return self.diffusion * gradient(gradient(u, x), x) - k * u - torch.sin(2 * math.pi * x)

    @staticmethod
    def rate(x: np.ndarray) -> np.ndarray:
        return 0.1 + np.exp(-0.5 * (x - 0.5) ** 2 / 0.15**2)

    def exact(self, x: Tensor) -> Tensor:
        place = x.detach().cpu().double().numpy()
        values = np.concatenate([reaction_solution()(place), self.rate(place)], axis=1)
        return torch.from_numpy(values).to(x)

    def exact_gradient(self, x: Tensor) -> Tensor:
        return torch.from_numpy(reaction_solution().deriv()(x.detach().cpu().double().numpy())).to(x)

    def observations(self) -> Tensor:
        return torch.linspace(0, 1, 8, dtype=torch.float64)[:, None]


class Burgers(Problem):
    """Sec. 3.4.1: u_t + u u_x = ν u_xx on [-1, 1] x [0, 1], ν = 0.01 / π, u(x, 0) = -sin πx, u(±1, t) = 0."""

    name = "burgers"
    low, high = (-1.0, 0.0), (1.0, 1.0)
    coordinates = ("x", "t")
    viscosity = 0.01 / math.pi

    def constrain(self, x: Tensor, y: Tensor) -> Tensor:
        place, time = x[:, :1], x[:, 1:]
        return (1 - place) * (1 + place) * (1 - torch.exp(-time)) * y - torch.sin(math.pi * place)

    def residual(self, x: Tensor, y: Tensor, unknowns: Unknowns) -> Tensor:
        first = gradient(y, x)
        second = gradient(first[:, :1], x)[:, :1]
        return first[:, 1:] + y * first[:, :1] - self.viscosity * second

    def exact(self, x: Tensor) -> Tensor:
        place, time = x.detach().cpu().double().numpy().T
        return torch.from_numpy(burgers_solution(place, time, self.viscosity))[:, None].to(x)

    def exact_gradient(self, x: Tensor) -> None:
        return None


class AllenCahn(Problem):
    """Sec. 3.4.2: u_t = 0.001 u_xx + 5 (u - u³) on [-1, 1] x [0, 1], u(x, 0) = x² cos πx, u(±1, t) = -1."""

    name = "allen_cahn"
    low, high = (-1.0, 0.0), (1.0, 1.0)
    coordinates = ("x", "t")
    diffusion = 0.001

    def constrain(self, x: Tensor, y: Tensor) -> Tensor:
        place, time = x[:, :1], x[:, 1:]
        return time * (1 + place) * (1 - place) * y + place**2 * torch.cos(math.pi * place)

    def residual(self, x: Tensor, y: Tensor, unknowns: Unknowns) -> Tensor:
        first = gradient(y, x)
        second = gradient(first[:, :1], x)[:, :1]
        return first[:, 1:] - self.diffusion * second + 5 * (y**3 - y)

    def exact(self, x: Tensor) -> Tensor:
        place, time = x.detach().cpu().double().numpy().T
        return torch.from_numpy(allen_cahn_solution()(place, time))[:, None].to(x)

    def exact_gradient(self, x: Tensor) -> None:
        return None


PROBLEMS: dict[str, type[Problem]] = {
    kind.name: kind
    for kind in (
        Function,
        Poisson,
        DiffusionReaction,
        BrinkmanForchheimer,
        BrinkmanTwo,
        ReactionRate,
        Burgers,
        AllenCahn,
    )
}


class Solution(nn.Module):
    """What is learned: one network for each output, the hard constraints, and the unknowns of an inverse problem.

    (N, d) -> (N, outputs).
    """

    def __init__(self, problem: Problem, networks: list[nn.Module]) -> None:
        super().__init__()
        self.problem = problem
        self.networks = nn.ModuleList(networks)
        self.raw = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in problem.unknowns})

    def forward(self, x: Tensor) -> Tensor:
        return self.problem.constrain(x, torch.cat([network(x) for network in self.networks], dim=1))

    def unknowns(self) -> Unknowns:
        """The current values of the inferred constants: 0.1 softplus(raw), positive, as the released scripts have it."""
        return {name: 0.1 * nn.functional.softplus(value) for name, value in self.raw.items()}

    def residual(self, x: Tensor, y: Tensor) -> Tensor:
        return self.problem.residual(x, y, self.unknowns())


def hammersley(count: int) -> Tensor:
    """`count` evenly spread points in the unit square, without its edges: ((i + 1/2) / n, the bits of i + 1 mirrored)."""
    places = torch.arange(count, dtype=torch.float64)
    number, second, scale = torch.arange(1, count + 1), torch.zeros(count, dtype=torch.float64), 0.5
    while int(number.max()) > 0:
        second += scale * (number % 2)
        number, scale = number // 2, scale / 2
    return torch.stack([(places + 0.5) / count, second], dim=1)


@functools.cache
def reaction_solution() -> np.polynomial.Chebyshev:
    """u of the reaction-rate problem by Chebyshev collocation, as a polynomial of degree 80."""
    degree = 80
    basis = [np.polynomial.Chebyshev.basis(i, domain=[0, 1]) for i in range(degree + 1)]
    nodes = 0.5 - 0.5 * np.cos(np.pi * np.arange(degree + 1) / degree)
    values = np.stack([b(nodes) for b in basis], axis=1)
    curvature = np.stack([b.deriv(2)(nodes) for b in basis], axis=1)
    system = ReactionRate.diffusion * curvature - ReactionRate.rate(nodes)[:, None] * values
    right = np.sin(2 * np.pi * nodes)
    system[[0, -1]], right[[0, -1]] = values[[0, -1]], 0.0
    return np.polynomial.Chebyshev(np.linalg.solve(system, right), domain=[0, 1])


def burgers_solution(place: np.ndarray, time: np.ndarray, viscosity: float, nodes: int = 200) -> np.ndarray:
    """Cole-Hopf with Gauss-Hermite quadrature for the initial condition -sin πx (Basdevant et al., 1986): (N,), (N,) -> (N,)."""
    z, weight = np.polynomial.hermite.hermgauss(nodes)
    y = place[:, None] - z * np.sqrt(4 * viscosity * np.maximum(time, 0.0))[:, None]
    exponent = -np.cos(np.pi * y) / (2 * np.pi * viscosity)
    kernel = weight * np.exp(exponent - exponent.max(axis=1, keepdims=True))
    return -(np.sin(np.pi * y) * kernel).sum(1) / kernel.sum(1)


@functools.cache
def allen_cahn_solution(intervals: int = 1600):
    """u(x, t) of the Allen-Cahn problem: fourth-order differences on half the interval, and an implicit solver in time."""
    from scipy.integrate import solve_ivp
    from scipy.interpolate import RectBivariateSpline
    from scipy.sparse import diags

    x = np.linspace(0, 1, intervals // 2 + 1)  # the solution is even in x
    n, h = len(x), x[1] - x[0]
    stencil = np.array([-1, 16, -30, 16, -1]) / (12 * h * h)
    second = diags(stencil, [-2, -1, 0, 1, 2], shape=(n, n)).tolil()
    second[0, :3] = np.array([-30, 32, -2]) / (12 * h * h)  # even about 0
    second[1, :4] = np.array([16, -31, 16, -1]) / (12 * h * h)
    second[n - 2] = 0
    second[n - 2, n - 3 :] = np.array([1, -2, 1]) / h**2  # flat there: the solution is -1 at the wall
    second[n - 1] = 0
    second = second.tocsr()

    def slope(_: float, u: np.ndarray) -> np.ndarray:
        found = AllenCahn.diffusion * (second @ u) + 5 * (u - u**3)
        found[-1] = 0.0
        return found

    times = np.linspace(0, 1, 201)
    jacobian = lambda _, u: AllenCahn.diffusion * second + diags(np.append(5 - 15 * u[:-1] ** 2, 0.0))  # noqa: E731
    start = x**2 * np.cos(np.pi * x)
    found = solve_ivp(slope, (0, 1), start, method="Radau", t_eval=times, jac=jacobian, rtol=1e-8, atol=1e-9)
    spline = RectBivariateSpline(x, times, found.y)
    return lambda place, time: spline.ev(np.abs(place), time)
