"""Knowledge distillation's reusable parts: the loss of section 2, the specialists of section 5.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------------
# Distillation (sec. 2)


def soften(logits: Tensor, temperature: float) -> Tensor:
    """q_i = exp(z_i / T) / sum_j exp(z_j / T) (eq. 1); logits (B, K)."""
    return (logits / temperature).softmax(dim=1)


class DistillationLoss(nn.Module):
    """soft_weight * T^2 * KL(teacher at T || student at T) + (1 - soft_weight) * cross entropy with the true labels.

    The soft term's gradient shrinks as 1 / T^2; the factor T^2 keeps the balance of the two terms when T is changed.
    The paper minimises the cross entropy with the soft targets, which differs by the teacher's entropy, a constant.

    Args:
        temperature: T for both networks; the hard term is at 1.
        soft_weight: the paper found "a considerably lower weight" on the hard term best.
    """

    def __init__(self, temperature: float = 20.0, soft_weight: float = 0.9) -> None:
        super().__init__()
        self.temperature, self.soft_weight = temperature, soft_weight

    def forward(self, logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss, a scalar.

        Args:
            logits: the student's, (B, K).
            teacher_logits: (B, K); no gradient flows into them.
            labels: (B,) int64, or None for a transfer set without labels.
        """
        student = (logits / self.temperature).log_softmax(dim=1)
        teacher = (teacher_logits.detach() / self.temperature).log_softmax(dim=1)
        soft = F.kl_div(student, teacher, log_target=True, reduction="batchmean") * self.temperature**2
        if labels is None:
            return self.soft_weight * soft
        return self.soft_weight * soft + (1 - self.soft_weight) * F.cross_entropy(logits, labels)


@torch.no_grad()
def limit_weights(network: nn.Module, max_norm: float) -> None:
    """Shorten the incoming weights of every unit of linear layers to the length `max_norm` (sec. 3, from dropout)."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.copy_(layer.weight.renorm(2, 0, max_norm))


# ---------------------------------------------------------------------------------------------------------------------
# Specialists (sec. 5): each knows a cluster of confusable classes and lumps all others into a dustbin, its last class


def confusable_clusters(probabilities: Tensor, clusters: int, seed: int = 0, iterations: int = 100) -> list[list[int]]:
    """Classes that the generalist often predicts together: k-means on the columns of the covariance matrix (sec. 5.3).

    Args:
        probabilities: the generalist's predictions over many images, (N, K).
        clusters: how many; empty ones are left out of the result.

    Returns:
        The classes of each cluster, ascending; every class is in exactly one.
    """
    columns = torch.cov(probabilities.double().T).T
    num_classes = len(columns)
    if not 1 <= clusters <= num_classes:
        raise ValueError(f"clusters is {clusters}; it must lie between 1 and the number of classes, {num_classes}")
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(num_classes, (), generator=generator))]
    while len(chosen) < clusters:  # k-means++: far columns are likelier starts
        distance = torch.cdist(columns, columns[chosen]).amin(1).square()
        distance[chosen] = 0
        weights = distance if distance.sum() > 0 else torch.tensor([float(i not in chosen) for i in range(num_classes)])
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    centres = columns[chosen].clone()
    home = torch.zeros(num_classes, dtype=torch.long)
    for _ in range(iterations):
        previous, home = home, torch.cdist(columns, centres).argmin(1)
        for k in home.unique():
            centres[k] = columns[home == k].mean(0)
        if torch.equal(previous, home):
            break
    return [(home == k).nonzero().flatten().tolist() for k in range(clusters) if bool((home == k).any())]


def specialist_labels(labels: Tensor, classes: list[int]) -> Tensor:
    """A specialist's labels: the place of the class in `classes`, or len(classes), the dustbin; (B,) -> (B,)."""
    table = torch.full((max(int(labels.max()) + 1, max(classes) + 1),), len(classes), dtype=torch.long)
    table[torch.tensor(classes)] = torch.arange(len(classes))
    return table.to(labels.device)[labels]


def specialist_weights(labels: Tensor, classes: list[int]) -> tuple[Tensor, float]:
    """Sampling weights that make half of a specialist's images its own (sec. 5.2), and the dustbin's correction.

    Returns:
        weights (N,) for `torch.multinomial` or a weighted sampler, and the log of the proportion by which the special
        classes are oversampled relative to the rest: what `correct_dustbin` adds after training.
    """
    special = torch.isin(labels.cpu(), torch.tensor(classes))
    own, rest = int(special.sum()), int((~special).sum())
    if not own or not rest:
        raise ValueError(f"classes {classes}: a specialist needs images inside and outside, got {own} and {rest}")
    weights = torch.where(special, 0.5 / own, 0.5 / rest)
    return weights, math.log(rest / own)


def correct_dustbin(logits: Tensor, correction: float) -> Tensor:
    """Undo the biased training set by raising the dustbin's logit (sec. 5.2); logits (B, len(classes) + 1)."""
    return torch.cat([logits[:, :-1], logits[:, -1:] + correction], dim=1)


def combine_specialists(
    generalist: Tensor, specialists: list[tuple[list[int], Tensor]], steps: int = 200, learning_rate: float = 0.5
) -> Tensor:
    """The distribution q that minimises KL(p_g || q) + sum over active specialists of KL(p_m || q) (eq. 5).

    A specialist is active for an image if the generalist's most probable class (n = 1) is among its classes (sec. 5.4).
    For KL(p_m || q), the probabilities that q gives to the classes of m's dustbin are added up. There is no closed
    form: q = softmax(z) is found by gradient descent on z, started at the generalist.

    Args:
        generalist: probabilities (B, K).
        specialists: (classes, probabilities (B, len(classes) + 1)), the dustbin last and already corrected.

    Returns:
        q, (B, K).
    """
    generalist = generalist.detach()
    best = generalist.argmax(1)
    active = [(c, p.detach(), torch.isin(best, torch.tensor(c, device=best.device))) for c, p in specialists]
    with torch.inference_mode(False), torch.enable_grad():
        z = generalist.clone().clamp(min=1e-12).log().requires_grad_(True)
        optimizer = torch.optim.Adam([z], lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            log_q = z.log_softmax(dim=1)
            objective = _cross_entropy(generalist, log_q).sum()
            for classes, probabilities, on in active:
                objective = objective + (_cross_entropy(probabilities, lump(log_q, classes)) * on).sum()
            objective.backward()
            optimizer.step()
            schedule.step()
    return z.detach().softmax(dim=1)


def lump(log_q: Tensor, classes: list[int]) -> Tensor:
    """Log-probabilities of `classes` and, last, of all others together: (B, K) -> (B, len(classes) + 1)."""
    others = [k for k in range(log_q.shape[1]) if k not in classes]
    return torch.cat([log_q[:, classes], log_q[:, others].logsumexp(dim=1, keepdim=True)], dim=1)


def _cross_entropy(p: Tensor, log_q: Tensor) -> Tensor:
    """(B,): KL(p || q) up to the entropy of p, which does not depend on q. A p of 0 counts nothing."""
    return -(p * log_q.clamp(min=-1e4)).sum(dim=1)
