"""Adam and AdaMax as `torch.optim.Optimizer`s.

Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015 (arXiv 1412.6980): Algorithm 1 and Algorithm 2.

State and group keys are those of `torch.optim.Adam` and `torch.optim.Adamax`, so checkpoints interchange in both
directions. Beyond the paper there is only `weight_decay`, which adds `weight_decay * parameter` to the gradient (an L2
penalty, as in torch; the decoupled decay of AdamW is another paper).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

OTHER_PAPERS = ("amsgrad", "decoupled_weight_decay", "maximize")  # torch's switches that these classes do not have


class _Moments(Optimizer):
    """What both algorithms share: checked options, the step counter, the first moment, one fused pass over a group."""

    second: str  # the name of the second state tensor

    def __init__(
        self, params: Iterable, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, foreach: bool
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr is {lr}; it must be 0 or more")
        for i, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{i}] is {beta}; it must be in [0, 1)")
        if not eps >= 0:
            raise ValueError(f"eps is {eps}; it must be 0 or more")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay is {weight_decay}; it must be 0 or more")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=foreach))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for option in OTHER_PAPERS:
                if group.get(option):
                    raise ValueError(
                        f"this state was saved with {option}=True, which {type(self).__name__} does not do"
                    )
            if group.get("foreach") is None:
                group["foreach"] = True  # torch writes None for "whatever is faster"

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
            for p in parameters:
                if p.grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} needs dense gradients; use torch.optim.SparseAdam")
                if not self.state[p]:
                    self.state[p]["step"] = torch.tensor(0.0)  # on the CPU: reading it must not wait for the device
                    for name in ("exp_avg", self.second):
                        self.state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            lists = [
                parameters,
                [p.grad for p in parameters],
                [self.state[p]["exp_avg"] for p in parameters],
                [self.state[p][self.second] for p in parameters],
            ]
            lists = [[torch.view_as_real(t) if t.is_complex() else t for t in tensors] for tensors in lists]
            steps = [self.state[p]["step"].add_(1).item() for p in parameters]
            (self._many if group["foreach"] else self._one_by_one)(*lists, steps, group)
        return loss


class Adam(_Moments):
    """Adam, Algorithm 1: steps of about `lr`, scaled per parameter by bias-corrected moments of the gradient.

        m_t = beta1 m_{t-1} + (1 - beta1) g_t            v_t = beta2 v_{t-1} + (1 - beta2) g_t^2
        theta_t = theta_{t-1} - lr * m_t / (1 - beta1^t) / (sqrt(v_t / (1 - beta2^t)) + eps)

    Args:
        params: parameters or parameter groups.
        lr: step size alpha; the paper's 0.001 is the default.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the square root, after the bias correction.
        weight_decay: L2 penalty, added to the gradient.
        foreach: update all tensors of a group with a few multi-tensor calls; False is the plain loop, the same numbers.

    Raises:
        ValueError: for an option out of range, or a loaded state that needs another algorithm (amsgrad, …).
        RuntimeError: for sparse gradients.
    """

    second = "exp_avg_sq"

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        foreach: bool = True,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, foreach)

    @staticmethod
    def _one_by_one(parameters, gradients, m, v, steps: list[float], group: dict) -> None:
        beta1, beta2 = group["betas"]
        for p, g, m_i, v_i, t in zip(parameters, gradients, m, v, steps, strict=True):
            if group["weight_decay"]:
                g = g.add(p, alpha=group["weight_decay"])
            m_i.lerp_(g, 1 - beta1)
            v_i.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            root = v_i.sqrt().div_((1 - beta2**t) ** 0.5).add_(group["eps"])  # sqrt(v_hat) + eps
            p.addcdiv_(m_i, root, value=-group["lr"] / (1 - beta1**t))

    @staticmethod
    def _many(parameters, gradients, m, v, steps: list[float], group: dict) -> None:
        beta1, beta2 = group["betas"]
        if group["weight_decay"]:
            gradients = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
        torch._foreach_lerp_(m, gradients, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
        roots = torch._foreach_sqrt(v)
        torch._foreach_div_(roots, [(1 - beta2**t) ** 0.5 for t in steps])
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(parameters, m, roots, [-group["lr"] / (1 - beta1**t) for t in steps])


class AdaMax(_Moments):
    """AdaMax, Algorithm 2 (section 7.1): Adam with an exponentially weighted infinity norm as the second moment.

        m_t = beta1 m_{t-1} + (1 - beta1) g_t            u_t = max(beta2 u_{t-1}, |g_t|)
        theta_t = theta_{t-1} - lr / (1 - beta1^t) * m_t / u_t

    Args and errors as `Adam`; the paper's default for `lr` is 0.002. The paper has no eps: a parameter whose gradient was
    always zero would divide 0 by 0. As torch does, eps is added to |g_t|.
    """

    second = "exp_inf"

    def __init__(
        self,
        params: Iterable,
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        foreach: bool = True,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, foreach)

    @staticmethod
    def _one_by_one(parameters, gradients, m, u, steps: list[float], group: dict) -> None:
        beta1, beta2 = group["betas"]
        for p, g, m_i, u_i, t in zip(parameters, gradients, m, u, steps, strict=True):
            if group["weight_decay"]:
                g = g.add(p, alpha=group["weight_decay"])
            m_i.lerp_(g, 1 - beta1)
            torch.maximum(u_i.mul_(beta2), g.abs().add_(group["eps"]), out=u_i)
            p.addcdiv_(m_i, u_i, value=-group["lr"] / (1 - beta1**t))

    @staticmethod
    def _many(parameters, gradients, m, u, steps: list[float], group: dict) -> None:
        beta1, beta2 = group["betas"]
        if group["weight_decay"]:
            gradients = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
        torch._foreach_lerp_(m, gradients, 1 - beta1)
        torch._foreach_mul_(u, beta2)
        sizes = torch._foreach_abs(gradients)
        torch._foreach_add_(sizes, group["eps"])
        torch._foreach_maximum_(u, sizes)
        torch._foreach_addcdiv_(parameters, m, u, [-group["lr"] / (1 - beta1**t) for t in steps])
