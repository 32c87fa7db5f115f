"""Adam and AdaMax against torch's, step by step, and against what sections 3, 4 and 7 of the paper say."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.optimization.adam.technique import Adam, AdaMax

SHAPES = ((), (7,), (3, 5), (4, 2, 3, 3))


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    torch_version = torch.__version__.split("+")[0]
    for ours, theirs in ((Adam, torch.optim.Adam), (AdaMax, torch.optim.Adamax)):
        for foreach in (True, False):
            for options in ({}, {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}):
                yield Case(
                    name=f"{ours.__name__}: 50 steps, foreach={foreach}, {options or 'defaults'}",
                    ours=path(ours, foreach=foreach, **options),
                    reference=path(theirs, foreach=foreach, **options),
                    against=f"torch {torch_version} {theirs.__name__}: parameters after every step, and the state",
                    rtol=0.0,
                    atol=1e-7,
                    note="shapes (), (7,), (3, 5), (4, 2, 3, 3) and a complex (3,); bit for bit but for weight decay on the "
                    "complex one, which torch's plain loop adds before it splits real and imaginary part",
                )
        yield Case(
            name=f"{ours.__name__}: a checkpoint of torch's continued by ours and the reverse",
            ours=handover(theirs, ours),
            reference=handover(ours, theirs),
            against=f"torch {torch_version} {theirs.__name__}",
            rtol=0.0,
            atol=0.0,
        )
    yield Case(
        name="Adam: float64, 50 steps",
        ours=path(Adam, dtype=torch.float64),
        reference=by_hand,
        against="Algorithm 1 written with one number at a time",
        rtol=1e-12,
        atol=1e-14,
    )
    yield Case(
        name="bias correction (section 3): for a constant gradient both corrected moments are exact from step one",
        ours=constant_gradient,
        reference=lambda: {"m_hat": [0.3] * 20, "v_hat": [0.09] * 20, "moved": -20 * 0.01},
        against="equation 4: E[v_t] = E[g^2] (1 - beta2^t)",
        rtol=1e-5,
        atol=1e-7,
    )
    yield Case(
        name="invariance (section 2.1): gradients times 1000, the same path",
        ours=path(Adam, dtype=torch.float64, scale=1000.0, eps=0.0),
        reference=path(Adam, dtype=torch.float64, eps=0.0),
        against="section 2.1: the scale of the gradient cancels in m / sqrt(v)",
        rtol=1e-9,
        atol=1e-12,
    )
    yield Case(
        name="online convex regret (section 4): R(T) stays below the bound of theorem 4.1, R(T)/T falls",
        ours=convex_regret,
        reference=lambda: {"below the bound": 1.0, "average regret falls": 1.0},
        against="theorem 4.1 and corollary 4.2, on linear losses over [-1, 1]^5",
    )
    yield Case(
        name="where theorem 4.1 fails: a periodic linear loss drives Adam to the worst point",
        ours=reddi_example,
        reference=lambda: {"end point": 1.0, "average regret per period": 2.0},
        against="Reddi, Kale and Kumar, On the Convergence of Adam and Beyond (2018), theorem 1",
        rtol=0.02,
        atol=0.02,
        note="best point -1; the proof of theorem 4.1 has a gap that this example shows",
    )


def path(
    optimizer: Callable, dtype: torch.dtype = torch.float32, scale: float = 1.0, foreach: bool = True, **options
) -> Callable[[], dict]:
    """Parameters after each of 50 steps on a seeded sequence of gradients, and the state at the end."""

    def run() -> dict:
        generator = torch.Generator().manual_seed(1)
        draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
        parameters = [nn.Parameter(draw(shape)) for shape in SHAPES]
        if dtype is torch.float32:
            parameters.append(nn.Parameter(torch.complex(draw((3,)), draw((3,)))))
        opt = optimizer(parameters, foreach=foreach, **options)
        history: list[Tensor] = []
        for step in range(50):
            for i, p in enumerate(parameters):
                real = torch.view_as_real(p) if p.is_complex() else p
                gradient = draw(real.shape) * scale
                p.grad = torch.view_as_complex(gradient) if p.is_complex() else gradient
                if i == 1 and step % 3 == 2:
                    p.grad = None  # a parameter that takes no part in some steps keeps a step count of its own
            opt.step()
            history.append(
                torch.cat([torch.view_as_real(p).flatten() if p.is_complex() else p.flatten() for p in parameters])
            )
        state = {} if scale != 1.0 or "eps" in options and options["eps"] == 0.0 else opt.state_dict()["state"]
        return {"path": torch.stack(history).detach(), **({"state": state} if dtype is torch.float32 else {})}

    return run


def handover(first: type, second: type) -> Callable[[], Tensor]:
    """Twenty steps of a small network with `first`, its state given to `second`, twenty more."""

    def run() -> Tensor:
        generator = torch.Generator().manual_seed(2)
        x, y = torch.randn(64, 6, generator=generator), torch.randn(64, 2, generator=generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        optimizer = first(network.parameters(), lr=0.01)
        for step in range(40):
            if step == 20:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = second(network.parameters())
                optimizer.load_state_dict(saved)
            optimizer.zero_grad()
            (network(x) - y).square().mean().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    return run


def by_hand() -> dict:
    """Algorithm 1 in Python floats, on the gradients of `path(dtype=float64)`."""
    generator = torch.Generator().manual_seed(1)
    theta = [torch.randn(s, generator=generator, dtype=torch.float64).flatten().tolist() for s in SHAPES]
    m, v = [[0.0] * len(t) for t in theta], [[0.0] * len(t) for t in theta]
    count, history = [0] * len(theta), []
    for step in range(50):
        for i, shape in enumerate(SHAPES):
            gradient = torch.randn(shape, generator=generator, dtype=torch.float64).flatten().tolist()
            if i == 1 and step % 3 == 2:
                continue
            count[i] += 1
            for j, g in enumerate(gradient):
                m[i][j] = 0.9 * m[i][j] + 0.1 * g
                v[i][j] = 0.999 * v[i][j] + 0.001 * g * g
                m_hat, v_hat = m[i][j] / (1 - 0.9 ** count[i]), v[i][j] / (1 - 0.999 ** count[i])
                theta[i][j] -= 0.001 * m_hat / (v_hat**0.5 + 1e-8)
        history.append([number for tensor in theta for number in tensor])
    return {"path": torch.tensor(history, dtype=torch.float64)}


def constant_gradient() -> dict:
    p = nn.Parameter(torch.zeros(1))
    optimizer = Adam([p], lr=0.01)
    seen: dict = {"m_hat": [], "v_hat": []}
    for t in range(1, 21):
        p.grad = torch.full((1,), 0.3)
        optimizer.step()
        seen["m_hat"].append(float(optimizer.state[p]["exp_avg"]) / (1 - 0.9**t))
        seen["v_hat"].append(float(optimizer.state[p]["exp_avg_sq"]) / (1 - 0.999**t))
    return seen | {"moved": float(p.detach())}


def convex_regret() -> dict:
    """f_t(theta) = g_t . theta on the box [-1, 1]^5, alpha_t = alpha / sqrt(t), beta1_t = beta1 lambda^(t-1), projected."""
    alpha, beta1, beta2, decay, size, largest = 0.1, 0.9, 0.999, 0.999, 2.0, 1.0
    generator = torch.Generator().manual_seed(4)
    gradients = (torch.rand(4000, 5, generator=generator, dtype=torch.float64) * 2 - 1).clamp(-largest, largest)
    p = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = Adam([p], eps=1e-12)
    losses, below, averages = [], [], []
    for t, g in enumerate(gradients, 1):
        losses.append(float(g @ p.detach()))
        p.grad = g.clone()
        optimizer.param_groups[0].update(lr=alpha / t**0.5, betas=(beta1 * decay ** (t - 1), beta2))
        optimizer.step()
        with torch.no_grad():
            p.clamp_(-1, 1)
        if t in (250, 1000, 4000):
            total = gradients[:t].sum(0)
            regret = sum(losses) + float(total.abs().sum())  # the best fixed point is -sign(sum of gradients)
            v_hat = optimizer.state[p]["exp_avg_sq"] / (1 - beta2**t)
            gamma = beta1**2 / beta2**0.5
            # D is the diameter: of the box in the Euclidean norm (first term) and in one coordinate (third term)
            bound = 5 * size**2 / (2 * alpha * (1 - beta1)) * float((t * v_hat).sqrt().sum())
            bound += (
                alpha * (1 + beta1) * largest / ((1 - beta1) * (1 - beta2) ** 0.5 * (1 - gamma) ** 2)
                * float(gradients[:t].norm(dim=0).sum())
            )  # fmt: skip
            bound += 5 * size**2 * largest * (1 - beta2) ** 0.5 / (2 * alpha * beta1 * (1 - decay) ** 2)
            below.append(regret <= bound)
            averages.append(regret / t)
    return {
        "below the bound": float(all(below)),
        "average regret falls": float(averages == sorted(averages, reverse=True)),
    }


def reddi_example() -> dict:
    """f_t(x) = 3 x when t mod 3 = 1, else -x, on [-1, 1]; beta1 = 0, beta2 = 1 / (1 + 3^2), alpha_t = alpha / sqrt(t)."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Adam([p], lr=0.1, betas=(0.0, 0.1), eps=1e-12)
    regret, periods = 0.0, 2000
    for t in range(1, 3 * periods + 1):
        gradient = 3.0 if t % 3 == 1 else -1.0
        if t > 3 * periods // 2:
            regret += gradient * (float(p.detach()) + 1)  # against the best fixed point, -1
        optimizer.param_groups[0]["lr"] = 0.1 / t**0.5
        p.grad = torch.full_like(p, gradient)
        optimizer.step()
        with torch.no_grad():
            p.clamp_(-1, 1)
    return {"end point": float(p.detach()), "average regret per period": regret / (periods / 2)}
