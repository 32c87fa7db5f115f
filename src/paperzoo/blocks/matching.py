"""Matching two sets by a table of scores. For the best total there is `scipy.optimize.linear_sum_assignment`."""

from __future__ import annotations

from torch import Tensor, inf


def greedy_pairs(scores: Tensor, least: float) -> list[tuple[int, int]]:
    """Pairs of a row and a column, the highest score first, each row and column once at most.

    Args:
        scores: (M, N).
        least: only pairs above it count.
    """
    left, pairs = scores.clone(), []
    for _ in range(min(left.shape)):
        row, column = divmod(int(left.argmax()), left.shape[1])
        if not float(left[row, column]) > least:
            break
        pairs.append((row, column))
        left[row], left[:, column] = -inf, -inf
    return pairs
