"""HashNet's loss and its continuation (arXiv:1702.00758, sec. 3).

The released code is thuml/HashNet, in Caffe (the paper's numbers) and in PyTorch; where the two and the paper differ is said
at each function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# -- which pairs are similar -------------------------------------------------------------------------------------------


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """s_ij: whether two images share a label, bool (n, m). Labels are int64 (n,), or of 0 and 1, (n, num_classes)."""
    if first.ndim == 1:
        return first[:, None] == second[None]
    return first.float() @ second.float().T > 0


def continuous_similarity(
    first: Tensor, second: Tensor, kind: str = "jaccard", dtype: torch.dtype = torch.float32
) -> Tensor:
    """c_ij of eq. 2, the weight of a similar pair: (n, m), 1 for images with one label, and for pairs that share none.

    "jaccard": labels in common over labels in all, the paper's. "cosine": four times the squared cosine of the two label
    vectors, which is what the released Caffe layer multiplies its gradients with. "none": 1, as the released PyTorch code.
    """
    if first.ndim == 1 or kind == "none":
        return torch.ones(len(first), len(second), dtype=dtype, device=first.device)
    first, second = first.to(dtype), second.to(dtype)
    common, one, other = first @ second.T, first.sum(1)[:, None], second.sum(1)[None]
    if kind == "jaccard":
        weight = common / (one + other - common).clamp(min=1)
    elif kind == "cosine":
        weight = 4 * common.square() / (one * other).clamp(min=1)
    else:
        raise ValueError(f"continuous similarity '{kind}' is not known; it is jaccard, cosine or none")
    return torch.where(common > 0, weight, 1.0)


# -- the loss (eq. 2 to 4) ---------------------------------------------------------------------------------------------


class PairwiseLikelihood(nn.Module):
    """Weighted maximum likelihood: the mean over pairs of w_ij (log(1 + exp(alpha <h_i, h_j>)) - alpha s_ij <h_i, h_j>).

    log(1 + e^x) is softplus, which neither overflows nor needs the released code's switch to x above a threshold of 15.

    Args:
        alpha: of the adaptive sigmoid, below 1 for long codes; the released code's is 10 / bits.
        balance: "pairs" is eq. 2: similar pairs weigh |S| / |S_1|, others |S| / |S_0|, counted in the batch. A number is the
            released code's class_num: similar pairs weigh so much, others 1, and the sum is divided by the sum of weights.
        continuous: kind of c_ij, see `continuous_similarity`.
        runtime: with several processes, the object whose `gather` brings the other processes' second codes.
    """

    def __init__(
        self, alpha: float, balance: float | str = "pairs", continuous: str = "jaccard", runtime: Any = None
    ) -> None:
        super().__init__()
        self.alpha, self.balance, self.continuous, self.runtime = alpha, balance, continuous, runtime

    def forward(self, first: Tensor, second: Tensor, first_labels: Tensor, second_labels: Tensor) -> Tensor:
        """Codes (n, K) and (m, K) in (-1, 1) with their labels -> the loss over all n m pairs, a scalar.

        With several processes each returns its own rows' part, times their number: the mean over processes is the loss of the
        whole batch, and so are the gradients.
        """
        several = self.runtime is not None and self.runtime.world > 1
        if several:
            second, second_labels = self.runtime.gather(second), self.runtime.gather(second_labels)
        similar = similarity(first_labels, second_labels)
        wide = torch.promote_types(first.dtype, torch.float32)  # products in half precision would lose bits
        with torch.autocast(first.device.type, enabled=False):
            product = self.alpha * (first.to(wide) @ second.to(wide).T)
        loss = F.softplus(product, threshold=40.0) - torch.where(similar, product, 0.0)
        loss = loss * continuous_similarity(first_labels, second_labels, self.continuous, loss.dtype)
        counts = torch.stack([similar.sum(), (~similar).sum()]).to(loss.dtype)
        if several:
            counts = self.runtime.mean(counts) * self.runtime.world
        parts = torch.stack([torch.where(similar, loss, 0.0).sum(), torch.where(similar, 0.0, loss).sum()])
        parts = parts * (self.runtime.world if several else 1)
        if self.balance == "pairs":  # sum of w_ij l_ij over |S|, where |S| cancels
            return (parts / counts.clamp(min=1)).sum()
        weight = parts.new_tensor([float(self.balance), 1.0])
        return (weight * parts).sum() / (weight * counts).sum()


# -- continuation (sec. 3.3) -------------------------------------------------------------------------------------------


def growing_beta(step: int, gamma: float = 0.005, power: float = 0.5, every: int = 200, first: float = 1.0) -> float:
    """The released code's beta at a step (counted from 0): first (1 + gamma t)^power, t the iteration, renewed `every` iterations.

    With its constants beta ends at 7.1 after 10,000 iterations.
    """
    iteration = (step + 1) // every * every  # the released code counts from 1, in training passes
    return first * (1 + gamma * iteration) ** power if iteration else first


def staged_beta(step: int, steps: int, betas: Sequence[float]) -> float:
    """Algorithm 1: stages of equal length with 1 = beta_0 < beta_1 < …, each starting from where the one before ended."""
    return betas[min(len(betas) - 1, step * len(betas) // max(1, steps))]
