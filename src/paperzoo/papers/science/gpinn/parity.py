"""Checks of gPINN: DeepXDE with our weights, exact solutions in float64, derivatives by hand and by the released formulas."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from paperzoo.engine.parity import Case
from paperzoo.papers.science.gpinn.problems import PROBLEMS, Problem, Solution
from paperzoo.papers.science.gpinn.technique import (
    FullyConnected,
    GradientEnhancedLoss,
    gradient,
    refine,
    residual_and_gradient,
)

CLOSED_FORM = ("function", "poisson", "diffusion_reaction", "brinkman_viscosity", "brinkman_viscosity_permeability")


def solution(name: str, width: int = 8, depth: int = 2) -> Solution:
    """A random network for a problem, float64."""
    problem = PROBLEMS[name]()
    axes = len(problem.coordinates)
    return Solution(problem, [FullyConnected(axes, 1, width, depth) for _ in problem.outputs]).double()


class Exact(torch.nn.Module):
    """A problem's true solution in place of a network, with the true values of the unknowns."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem

    def forward(self, x: Tensor) -> Tensor:
        return self.problem.exact(x)

    def residual(self, x: Tensor, y: Tensor) -> Tensor:
        values = {name: torch.tensor(value, dtype=torch.float64) for name, value in self.problem.unknowns.items()}
        return self.problem.residual(x, y, values)


def deepxde_terms(model: Solution, points: Tensor, jacobian, hessian, clear) -> list[Tensor]:
    """Residual and its derivatives as the released scripts spell them out, with DeepXDE's differentiation."""
    name, x = model.problem.name, points.detach().clone().requires_grad_(True)
    y = model(x)
    clear()
    if name == "poisson":
        force = 8 * torch.sin(8 * x) + sum(i * torch.sin(i * x) for i in range(1, 5))
        slope = 64 * torch.cos(8 * x) + sum(i**2 * torch.cos(i * x) for i in range(1, 5))
        second = hessian(y, x)
        return [-second - force, -jacobian(second, x) - slope]
    if name == "brinkman_viscosity":
        effective, second = model.unknowns()["effective_viscosity"], hessian(y, x)
        first = -effective / 0.4 * second + 1e-3 * y / 1e-3 - 1
        return [first, -effective / 0.4 * jacobian(second, x) + 1e-3 / 1e-3 * jacobian(y, x)]
    if name == "reaction_rate":
        u, k = y[:, :1], y[:, 1:]
        second = hessian(y, x, component=0)
        first = 0.01 * second - k * u - torch.sin(2 * math.pi * x)
        slope = 0.01 * jacobian(second, x) - k * jacobian(y, x, i=0) - u * jacobian(y, x, i=1)
        return [first, slope - 2 * math.pi * torch.cos(2 * math.pi * x)]
    u_x, u_t = jacobian(y, x, i=0, j=0), jacobian(y, x, i=0, j=1)
    u_xx, u_xt, u_tt = hessian(y, x, i=0, j=0), hessian(y, x, i=0, j=1), hessian(y, x, i=1, j=1)
    u_xxx, u_xxt = jacobian(u_xx, x, j=0), jacobian(u_xx, x, j=1)
    if name == "burgers":
        nu = 0.01 / math.pi
        return [
            u_t + y * u_x - nu * u_xx,
            u_xt + u_x * u_x + y * u_xx - nu * u_xxx,
            u_tt + u_t * u_x + y * u_xt - nu * u_xxt,
        ]
    if name == "allen_cahn":
        return [
            u_t - 0.001 * u_xx + 5 * (y**3 - y),
            u_xt - 0.001 * u_xxx + 5 * (3 * y**2 * u_x - u_x),
            u_tt - 0.001 * u_xxt + 5 * (3 * y**2 * u_t - u_t),
        ]
    place, decay = x[:, :1], torch.exp(-x[:, 1:])
    factors = {2: 3, 3: 8, 4: 15, 8: 63}
    source = decay * sum(f / i * torch.sin(i * place) for i, f in factors.items())
    slope = decay * sum(f * torch.cos(i * place) for i, f in factors.items())
    return [u_t - u_xx - source, u_xt - u_xxx - slope, u_tt - u_xxt + source]


def our_terms(model: Solution, points: Tensor) -> list[Tensor]:
    f, slopes = residual_and_gradient(model, model.residual, points)
    return [f, *slopes]


def cases() -> Iterator[Case]:
    os.environ.setdefault("DDE_BACKEND", "pytorch")
    import deepxde
    from deepxde.gradients import clear, hessian, jacobian

    against = f"DeepXDE {deepxde.__version__} and the formulas of the released scripts"
    exact_to = {"rtol": 1e-8, "atol": 1e-9}
    torch.manual_seed(0)
    for name in PROBLEMS:
        if name in ("function", "brinkman_viscosity_permeability"):
            continue
        model = solution(name)
        points = model.problem.points(7)
        theirs = lambda x, m=model: deepxde_terms(m, x, jacobian, hessian, clear)  # noqa: E731
        yield Case(
            f"residual and its slopes, {name}",
            lambda x, m=model: our_terms(m, x),
            theirs,
            (points,),
            against,
            **exact_to,
        )

        def parameter_gradients(terms, m=model, x=points) -> list[Tensor]:
            weights = [1.0, 0.01, 0.01]
            loss = sum(w * t.square().mean() for w, t in zip(weights, terms, strict=False))
            found = torch.autograd.grad(loss, list(m.parameters()), allow_unused=True)
            return [loss.detach()] + [g for g in found if g is not None]

        axes = len(model.problem.coordinates)
        enhanced = GradientEnhancedLoss([0.01] * axes)

        def ours(m=model, x=points, loss=enhanced) -> list[Tensor]:
            value = loss(m, m.residual, x)
            found = torch.autograd.grad(value, list(m.parameters()), allow_unused=True)
            return [value.detach()] + [g for g in found if g is not None]

        released = lambda m=model, x=points, f=theirs, g=parameter_gradients: g(f(x), m, x)  # noqa: E731
        yield Case(f"loss and its gradient, {name}", ours, released, (), against, **exact_to)

    for name in CLOSED_FORM:
        truth = Exact(PROBLEMS[name]())
        points = truth.problem.points(9)
        zero = [torch.zeros(9, 1, dtype=torch.float64)] * (1 + len(truth.problem.coordinates))
        note = "the solution the paper states solves the equation, and its residual is flat"
        yield Case(
            f"exact solution, {name}",
            lambda x, m=truth: our_terms(m, x),
            lambda _, z=zero: z,
            (points,),
            "zero",
            atol=1e-9,
            note=note,
        )

    for name in PROBLEMS:
        problem = PROBLEMS[name]()
        if name == "function":
            continue
        corners = problem.grid(11)
        axis = corners[:, 0]
        edge = (axis == problem.low[0]) | (axis == problem.high[0])
        if len(problem.low) == 2:
            edge |= corners[:, 1] == 0
        model, where = solution(name), corners[edge]
        yield Case(
            f"boundary and initial conditions, {name}",
            lambda x, m=model: m(x)[:, :1],
            lambda x, p=problem: p.exact(x)[:, :1],
            (where,),
            "the exact solution there",
            rtol=1e-9,
            atol=1e-9,
        )

    network = FullyConnected(1, 1, 5, 1).double()
    a, b = network.linears[0].weight[:, 0].detach(), network.linears[0].bias.detach()
    c = network.linears[1].weight[0].detach()
    x = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]

    def by_hand(x: Tensor) -> Tensor:
        t = torch.tanh(x * a + b)
        return ((1 - t**2) * (6 * t**2 - 2) * a**3 * c).sum(1, keepdim=True)  # tanh''' = (1 - tanh²)(6 tanh² - 2)

    def three_times(x: Tensor) -> Tensor:
        x = x.detach().clone().requires_grad_(True)
        return gradient(gradient(gradient(network(x), x), x), x)

    yield Case("third derivative of a small network", three_times, by_hand, (x,), "worked out by hand", **exact_to)

    theirs = deepxde.nn.FNN([2, 6, 6, 1], "tanh", "Glorot uniform")
    ours = FullyConnected(2, 1, 6, 2)
    ours.load_state_dict(theirs.state_dict())
    yield Case("network", ours, theirs, (torch.randn(4, 2),), f"DeepXDE {deepxde.__version__} FNN", gradients=True)

    problem = PROBLEMS["poisson"]()
    theirs = deepxde.geometry.Interval(0, math.pi).uniform_points(15, boundary=False)
    yield Case(
        "uniform points", lambda: problem.points(15).float(), lambda: torch.tensor(theirs), (), "DeepXDE Interval"
    )

    model = solution("burgers")
    points = torch.rand(500, 2, dtype=torch.float64) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])

    def one_by_one(x: Tensor) -> Tensor:
        size = torch.stack([our_terms(model, p[None])[0].abs().sum() for p in x])
        return x[size.argsort(descending=True)[:10]].detach()

    chosen = lambda x: refine(model, model.residual, x, 10, chunk=64)[0]  # noqa: E731
    yield Case("refinement picks the largest residuals", chosen, one_by_one, (points,), "point by point")
