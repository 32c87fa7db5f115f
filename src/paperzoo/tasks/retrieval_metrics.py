"""How good a ranking is. Everything is computed from `relevant`: bool (Q, K), row q the gallery in the order of its distance to query q.

Each function gives one number a query, so that means over a set are exact however it is cut into chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shared_labels(queries: Tensor, gallery: Tensor) -> Tensor:
    """How many labels a query shares with each gallery image, int64 (Q, N): 0 or 1 where images have one.

    Targets are int64 (N,), -1 for an unknown class, which nothing shares; or float32 (N, num_classes) of 0 and 1.
    """
    if queries.ndim == 2:
        return (queries.float() @ gallery.float().T).round().long()
    return ((queries[:, None] == gallery[None]) & (queries[:, None] >= 0)).long()


def average_precision(relevant: Tensor) -> Tensor:
    """sum_i P(i) r(i) / sum_i r(i) over the K that were found: (Q,). NaN where none of them is relevant.

    This is the mAP@K of the hashing papers and of HashNet's released code: the divisor counts the relevant images among the
    K, not in the whole gallery, and a query that finds none is left out of the mean. With K the whole gallery it is
    average precision as everywhere else.
    """
    hits = relevant.double()
    ranks = torch.arange(1, relevant.shape[1] + 1, device=relevant.device)
    precision = hits.cumsum(1) / ranks
    return (precision * hits).sum(1) / hits.sum(1)  # 0 / 0 is NaN


def precision_within(distances: Tensor, relevant: Tensor, radius: float) -> Tensor:
    """The relevant part of what lies within a radius, 0 where nothing does: (Q,). Both (Q, N), in any common order."""
    inside = distances <= radius
    return (inside & relevant).sum(1).double() / inside.sum(1).clamp(min=1)


def precision_at(relevant: Tensor, k: int) -> Tensor:
    """The relevant part of the first k: (Q,)."""
    return relevant[:, :k].double().mean(1)


def hit_at(relevant: Tensor, k: int) -> Tensor:
    """1 where one of the first k is relevant, else 0: (Q,). Its mean is the R@k of the retrieval papers."""
    return relevant[:, :k].any(1).double()


def recall_at(relevant: Tensor, k: int) -> Tensor:
    """The part of all relevant images that is among the first k; `relevant` has the whole gallery. NaN where there are none."""
    return relevant[:, :k].sum(1).double() / relevant.sum(1).double()


def ndcg_at(shared: Tensor, k: int) -> Tensor:
    """Normalised discounted cumulative gain: (Q,). NaN where nothing is relevant.

    Args:
        shared: (Q, N), the number of shared labels, in the order found. The gain is 2^shared - 1, the discount log2(rank + 1).
    """
    gain = torch.pow(2.0, shared.double()) - 1
    best = gain.sort(dim=1, descending=True).values
    discount = 1 / torch.log2(torch.arange(2, min(k, gain.shape[1]) + 2, device=gain.device).double())
    return (gain[:, :k] * discount).sum(1) / (best[:, :k] * discount).sum(1)


def mean(values: list[Tensor]) -> float:
    """The mean over queries, those left out (NaN) not counted; 0 where all are."""
    together = torch.cat(values) if values else torch.zeros(0, dtype=torch.float64)
    together = together[~together.isnan()]
    return float(together.mean()) if len(together) else 0.0


def precision_recall(relevant: Tensor, points: int = 40) -> list[tuple[float, float]]:
    """(recall, precision) at growing depths, averaged over the queries that have something relevant; for a curve."""
    relevant = relevant[relevant.any(1)]
    if not len(relevant):
        return [(0.0, 0.0)]
    hits = relevant.double().cumsum(1)
    depth = torch.logspace(0, torch.tensor(float(relevant.shape[1])).log10().item(), points, device=hits.device)
    depth = depth.round().long().clamp(1, relevant.shape[1]).unique()
    recall = (hits[:, depth - 1] / hits[:, -1:]).mean(0)
    precision = (hits[:, depth - 1] / depth).mean(0)
    return list(zip(recall.tolist(), precision.tolist(), strict=True))
