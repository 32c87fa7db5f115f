"""ArcFace's reusable parts: the margins, the softmax with a margin, and the same with its classes spread over processes.

Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019, eq. 3 and 4 and the
appendix on parallel acceleration; An et al., "Partial FC" (arXiv:2010.05222, 2203.15565), for the sampled classes.

The heads take embeddings of any length and number and give the mean loss; they compute in float32, autocast or not.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.precision import full_precision
from paperzoo.engine.distributed import GatherRows
from paperzoo.tasks.face_verification import NormalisedSoftmax

# ---------------------------------------------------------------------------------------------------------------------
# Margins


class CombinedMargin(nn.Module):
    """cos(theta) -> cos(m1 theta + m2) - m3 (eq. 4): ArcFace (1, 0.5, 0), CosFace (1, 0, 0.35), SphereFace (m1 > 1).

    Beyond m1 theta + m2 = pi the cosine would rise again, and a worse face would be punished less. There the value goes on
    falling: for m1 = 1 as cos(theta) - m2 sin(m2), which is the authors' code; else as SphereFace has it (Liu et al. 2017,
    eq. 7), (-1)^k cos(m1 theta + m2) - 2k with k = floor((m1 theta + m2) / pi).

    For m1 = 1 no angle is computed: cos(theta + m2) = cos(theta) cos(m2) - sin(theta) sin(m2).
    """

    def __init__(self, m1: float = 1.0, m2: float = 0.5, m3: float = 0.0) -> None:
        super().__init__()
        if not (m1 > 0 and 0 <= m2 < math.pi and m3 >= 0):
            raise ValueError(f"margins are m1 > 0, 0 <= m2 < pi and m3 >= 0, not {m1}, {m2}, {m3}")
        self.m1, self.m2, self.m3 = m1, m2, m3

    def forward(self, cosines: Tensor) -> Tensor:
        """The true classes' cosines, of any shape -> the same with the margin; float32 or float64."""
        if self.m1 == 1.0 and self.m2 == 0.0:
            return cosines - self.m3
        cosines = cosines.clamp(-1.0, 1.0)
        # the root's slope is infinite where theta = 0; a sine of at least 3e-4 keeps it finite
        sines = (1.0 - cosines.square()).clamp(min=1e-7).sqrt()
        if self.m1 == 1.0:
            shifted = cosines * math.cos(self.m2) - sines * math.sin(self.m2)
            beyond = cosines - self.m2 * math.sin(self.m2)
            return torch.where(cosines > math.cos(math.pi - self.m2), shifted, beyond) - self.m3
        angles = self.m1 * torch.atan2(sines, cosines) + self.m2
        turns = (angles.detach() / math.pi).floor()
        return (1.0 - 2.0 * turns.remainder(2.0)) * angles.cos() - 2.0 * turns - self.m3

    def extra_repr(self) -> str:
        return f"m1={self.m1}, m2={self.m2}, m3={self.m3}"


class MarginSoftmax(NormalisedSoftmax):
    """Softmax over s cos(theta_j), the true class with a margin (eq. 3 with eq. 4). (B, D), int64 (B,) -> the mean loss."""

    def __init__(self, num_classes: int, num_features: int, margin: nn.Module, scale: float = 64.0) -> None:
        super().__init__(num_classes, num_features, scale)
        self.margin = margin

    def logits(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(B, num_classes), scaled; the margin is on the labels' entries."""
        cosines = self.cosines(embeddings)
        places = labels[:, None]
        return self.scale * cosines.scatter(1, places, self.margin(cosines.gather(1, places)))


class ArcFace(MarginSoftmax):
    """Eq. 3: -log of e^{s cos(theta_y + m)} over itself plus the sum of e^{s cos(theta_j)}, averaged over the batch.

    Args:
        num_classes: identities; their centres W are the rows of `weight` (num_classes, num_features).
        num_features: D.
        margin: m, in radians. scale: s.
    """

    def __init__(self, num_classes: int, num_features: int, margin: float = 0.5, scale: float = 64.0) -> None:
        super().__init__(num_classes, num_features, CombinedMargin(1.0, margin, 0.0), scale)


class CosFace(MarginSoftmax):
    """The additive cosine margin (Wang et al. 2018) in the same form: s (cos(theta_y) - m)."""

    def __init__(self, num_classes: int, num_features: int, margin: float = 0.35, scale: float = 64.0) -> None:
        super().__init__(num_classes, num_features, CombinedMargin(1.0, 0.0, margin), scale)


# ---------------------------------------------------------------------------------------------------------------------
# Classes spread over processes


class SpreadCrossEntropy(torch.autograd.Function):
    """Cross-entropy of rows whose classes are spread over processes; of each row only a maximum, a sum and a logit travel.

    logits (N, C_here), where (N,): the label's column here, or -1 if another process has it -> the mean over N, the same
    everywhere. The gradient is (softmax - one-hot) / N and needs no communication.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, where: Tensor, spread: bool) -> Tensor:
        count = len(logits)
        top = logits.amax(1) if logits.shape[1] else logits.new_full((count,), -math.inf)
        if spread:
            dist.all_reduce(top, dist.ReduceOp.MAX)
        shifted = logits - top[:, None]
        rows = (where >= 0).nonzero().flatten()
        true = logits.new_zeros(count)
        true[rows] = shifted[rows, where[rows]]
        weights = shifted.exp_()
        sums = torch.stack([weights.sum(1), true])  # one message for both
        if spread:
            dist.all_reduce(sums)
        total, true = sums.unbind()
        ctx.save_for_backward(weights.div_(total[:, None]), rows, where)
        return (total.log() - true).mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        probabilities, rows, where = ctx.saved_tensors
        result = probabilities.clone()
        result[rows, where[rows]] -= 1.0
        return result * (gradient / len(result)), None, None


class ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class PartialFC(nn.Module):
    """`MarginSoftmax` for identities by the million: each process keeps the centres of its part of the classes.

    All processes' embeddings are gathered, each computes their cosines with its own centres, and the softmax is put together
    from partial maxima and sums: W and the logits never travel. With `sample_rate` r below 1 a step sees the batch's own
    classes and as many others, drawn anew, as make r of all; the gradient of `weight` is then sparse.

    The loss is the mean over the batch of all processes. The gradient of the embeddings is multiplied by the number of
    processes, because data-parallel training averages over processes what is a sum here; that of `weight` is exact and must
    not be averaged: every process has other rows. `state_dict()` is the whole head on every process (a collective), so that
    it can be loaded by any number of them.

    Args:
        num_classes: of the whole head.
        num_features: D.
        margin: on the true class's cosine, for example `CombinedMargin()`.
        scale: s.
        sample_rate: r, in (0, 1].
        rank, world: which part, of how many; None: of the process group, where there is one.
    """

    weight: nn.Parameter

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        margin: nn.Module | None = None,
        scale: float = 64.0,
        sample_rate: float = 1.0,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate is {sample_rate}; it must be above 0 and at most 1")
        on = dist.is_available() and dist.is_initialized()
        self.rank = rank if rank is not None else dist.get_rank() if on else 0
        self.world = world if world is not None else dist.get_world_size() if on else 1
        self.num_classes, self.num_features, self.scale, self.sample_rate = (
            num_classes,
            num_features,
            scale,
            sample_rate,
        )
        self.margin = CombinedMargin() if margin is None else margin
        self.first, self.count = self.part(self.rank)
        self.weight = nn.Parameter(torch.empty(self.count, num_features))
        seed = int(
            torch.empty((), dtype=torch.int64, device="cpu").random_()
        )  # all processes draw the same, and go on from it
        if not self.weight.is_meta:
            rng = torch.Generator(self.weight.device).manual_seed((seed + self.rank) % 2**63)
            nn.init.normal_(self.weight, 0.0, 0.01, generator=rng)

    def part(self, rank: int) -> tuple[int, int]:
        """First class of a process, and how many it has."""
        each, more = divmod(self.num_classes, self.world)
        return each * rank + min(rank, more), each + int(rank < more)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """This process's embeddings (B, num_features) and labels int64 (B,), B the same on all -> the loss."""
        with full_precision(embeddings):
            embeddings = embeddings.to(self.weight.dtype)
            if self.world > 1:
                embeddings = GatherRows.apply(ScaleGradient.apply(embeddings, float(self.world)), self.rank, self.world)
                parts = [torch.empty_like(labels) for _ in range(self.world)]
                dist.all_gather(parts, labels.contiguous())
                labels = torch.cat(parts)
            mine = (labels >= self.first) & (labels < self.first + self.count)
            where = torch.where(mine, labels - self.first, -1)
            centres, where = self.sampled(where) if self.sample_rate < 1 else (self.weight, where)
            cosines = F.normalize(embeddings) @ F.normalize(centres).T
            rows = (where >= 0).nonzero().flatten()
            true = self.margin(cosines[rows, where[rows]])
            logits = self.scale * cosines.index_put((rows, where[rows]), true)
            return SpreadCrossEntropy.apply(logits, where, self.world > 1)

    def sampled(self, where: Tensor) -> tuple[Tensor, Tensor]:
        """The batch's own centres and random others (S, D), with the labels' places among them. Draws from torch's generator."""
        own = where[where >= 0].unique()
        wanted = max(int(self.sample_rate * self.count), len(own))
        order = torch.rand(self.count, device=where.device)
        order[own] = 2.0
        chosen = order.topk(wanted).indices.sort().values
        centres = F.embedding(chosen, self.weight, sparse=True)
        return centres, torch.where(where >= 0, torch.searchsorted(chosen, where.clamp(min=0)), -1)

    # -- the whole head in checkpoints ---------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        state = super().state_dict(*args, **kwargs)
        if self.world > 1:
            state |= {name: gather_parts(value, self) for name, value in state.items() if name.endswith("weight")}
        return state

    def load_state_dict(self, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        own = {name: self.own(value) for name, value in state_dict.items()}
        return super().load_state_dict(own, *args, **kwargs)

    def own(self, whole: Tensor) -> Tensor:
        """This process's rows of something with a row a class."""
        return whole[self.first : self.first + self.count] if len(whole) == self.num_classes else whole


def gather_parts(rows: Tensor, head: PartialFC) -> Tensor:
    """Every process's rows, in the order of the classes: (num_classes, …). A collective."""
    most = head.part(0)[1]
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in range(head.world)]
    dist.all_gather(parts, padded)
    return torch.cat([part[: head.part(rank)[1]] for rank, part in enumerate(parts)])


class CentresSGD(torch.optim.Optimizer):
    """Stochastic gradient descent with momentum on a head's centres; those that a step did not see stay as they are.

    v = momentum v + g + weight_decay w; w = w - lr v, on the rows of a sparse gradient alone: a centre that was not sampled
    neither decays nor coasts, and a step costs what its sample costs. With dense gradients it is `torch.optim.SGD`.
    `state_dict()` is whole, as the head's.
    """

    def __init__(self, head: PartialFC, lr: float, momentum: float = 0.9, weight_decay: float = 5e-4) -> None:
        super().__init__([head.weight], {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.centres = head

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                buffer = state["momentum_buffer"]
                if weight.grad.is_sparse:
                    gradient = weight.grad.coalesce()
                    rows = gradient.indices()[0]
                    change = group["momentum"] * buffer[rows] + gradient.values() + group["weight_decay"] * weight[rows]
                    buffer[rows] = change
                    weight.index_add_(0, rows, change, alpha=-group["lr"])
                else:
                    buffer.mul_(group["momentum"]).add_(weight.grad).add_(weight, alpha=group["weight_decay"])
                    weight.add_(buffer, alpha=-group["lr"])

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.centres.world > 1:
            state["state"] = {
                i: {name: gather_parts(value, self.centres) for name, value in moments.items()}
                for i, moments in state["state"].items()
            }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        moments = {i: {name: self.centres.own(v) for name, v in m.items()} for i, m in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": moments})
