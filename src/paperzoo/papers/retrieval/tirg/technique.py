"""TIRG's two losses (sec. 3.3). Queries and targets come scaled by the network's normalisation layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paperzoo.tasks.composed_retrieval import batch_softmax

TRIPLETS = 3  # M of eq. 5 in the released code: triplets for each feature


def draw_negatives(count: int, generator: torch.Generator | None = None, triplets: int = TRIPLETS) -> Tensor:
    """For each of 2 `count` features (queries, then targets in the same order) other pairs' features: int64 (2 count, up to `triplets`)."""
    own = torch.arange(2 * count) % count
    chance = torch.rand(2 * count, 2 * count, generator=generator)
    chance[own[:, None] == own[None]] = -1.0
    return chance.topk(min(triplets, 2 * count - 2), dim=1).indices


def soft_triplet(queries: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """The mean of log(1 + exp(|x - x+|^2 - |x - x-|^2)) (eq. 5 with K = 2): a scalar.

    Args:
        queries, targets: (B, D); each is anchor once, the other of its pair its positive.
        negatives: int64 (2 B, M), rows of the two together, see `draw_negatives`.

    The released code has the distance squared in the loss and its gradient without the 2 that comes of it.
    """
    features = torch.cat([queries, targets])
    partners = torch.cat([targets, queries])
    near = (features - partners).square().sum(1, keepdim=True)
    far = (features[:, None] - features[negatives]).square().sum(2)
    return F.softplus(near - far, threshold=40.0).mean()


def composition_loss(kind: str, queries: Tensor, targets: Tensor, runtime: Any) -> Tensor:
    """ "softmax": eq. 4 over the whole batch, K = B, M = 1; "soft_triplet". With several processes the batch is that of all."""
    if kind == "softmax":
        return batch_softmax(queries, targets, runtime)
    if runtime.world > 1:  # every process has the whole loss; the gradients' mean is that of one process
        queries, targets = runtime.gather(queries), runtime.gather(targets)
    chosen = draw_negatives(len(queries), runtime.rng("triplets", per_rank=False))
    return soft_triplet(queries, targets, chosen.to(queries.device))
