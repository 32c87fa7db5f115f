"""Point sets: farthest point sampling, ball query, nearest neighbours, interpolation. No loop runs over points.

Points are (B, N, 3) and features (B, N, C), one row a point. A mask (B, N), bool, is true where a row is a point; rows where it is
false stand for nothing and are never chosen. Which points are chosen has no gradient; what is gathered from them has.

Distances are taken in the points' own precision, also where autocast is on: in half precision a ball's border would be a guess.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

OUTSIDE = 2**31 - 1  # more than any point's number; not their count, which would be a constant of an exported graph


def full_precision(x: Tensor):
    """The context in which matrix products keep the precision of `x`."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()  # no context at all otherwise: an exported graph has nothing to carry then


def square_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 of every pair: (B, S, D), (B, N, D) -> (B, S, N), in one matrix product.

    |a|^2 - 2 a.b + |b|^2 is written as (a, |a|^2, 1) . (-2 b, 1, |b|^2). It rounds at the scale of the points' distance from their
    middle, which is subtracted first, so it is for choosing; a distance of zero may come out a little below.
    """
    middle = b.mean(1, keepdim=True)
    a, b = a - middle, b - middle
    left = torch.cat([a, a.square().sum(2, keepdim=True), torch.ones_like(a[..., :1])], 2)
    right = torch.cat([-2 * b, torch.ones_like(b[..., :1]), b.square().sum(2, keepdim=True)], 2)
    with full_precision(a):
        return left @ right.transpose(1, 2)


def gather_points(values: Tensor, index: Tensor) -> Tensor:
    """Rows of each set: values (B, N, C), index int64 (B, …) in 0 … N - 1 -> (B, …, C)."""
    batch, count, width = values.shape
    first = torch.arange(batch, device=values.device) * count
    flat = index + first.view(-1, *[1] * (index.ndim - 1))
    return values.reshape(-1, width).index_select(0, flat.flatten()).view(*index.shape, width)


@torch.no_grad()
def farthest_point_sampling(points: Tensor, count: int, mask: Tensor | None = None) -> Tensor:
    """`count` points of each set, each the one farthest from all before it: (B, N, D) -> indices int64 (B, count).

    The first is the set's first point, so the answer is always the same. Each choice needs the one before it, so there are `count`
    steps, each over all points of all sets at once. Where a set has fewer points, they come again.
    """
    points = points.permute(2, 0, 1).contiguous()  # a coordinate a plane: sums and minima run along memory
    near = torch.full_like(points[0], float("inf"))
    chosen = torch.zeros_like(near[:, :1], dtype=torch.int64)
    if mask is not None:
        near = near.masked_fill(~mask, float("-inf"))  # stays below every distance
        chosen = mask.to(torch.uint8).argmax(1, keepdim=True)
    if torch.compiler.is_compiling():
        return _sampling_loop(points, count, near, chosen)
    order, difference, distance = [chosen], torch.empty_like(points), torch.empty_like(near)
    for _ in range(count - 1):  # `_farthest`, in place
        latest = points.gather(2, chosen.expand(len(points), -1, -1))
        torch.sum(torch.sub(points, latest, out=difference).square_(), 0, out=distance)
        torch.minimum(near, distance, out=near)
        chosen = near.max(1, keepdim=True)[1]
        order.append(chosen)
    return torch.cat(order, 1)


def _farthest(points: Tensor, near: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """One step: squared distances (B, N) to the chosen points, now with the latest (B, 1) among them; and the farthest point."""
    latest = points.gather(2, chosen.expand(len(points), -1, -1))
    near = torch.minimum(near, (points - latest).square().sum(0))
    return near, near.max(1, keepdim=True)[1]


def _sampling_loop(points: Tensor, count: int, near: Tensor, chosen: Tensor) -> Tensor:
    """The same as one loop of the graph (a Loop in ONNX), where tracing would write every step out."""
    from torch._higher_order_ops.while_loop import while_loop

    place = torch.arange(count, device=points.device)

    def unfinished(step: Tensor, near: Tensor, chosen: Tensor, order: Tensor) -> Tensor:
        return step < count

    def advance(step: Tensor, near: Tensor, chosen: Tensor, order: Tensor) -> tuple[Tensor, ...]:
        order = torch.where(place == step, chosen, order)
        near, chosen = _farthest(points, near, chosen)
        return step + 1, near, chosen, order

    start = torch.zeros((), dtype=torch.int64, device=points.device)
    return while_loop(unfinished, advance, (start, near, chosen, chosen.repeat(1, count)))[3]


@torch.no_grad()
def ball_query(points: Tensor, centres: Tensor, radius: float, count: int, mask: Tensor | None = None) -> Tensor:
    """The first `count` points, in the set's order, within `radius` of each centre: (B, N, D), (B, S, D) -> int64 (B, S, count).

    Where there are fewer, the first of them comes again, so that a maximum over the group is not changed; where there is none, the
    nearest point stands in.
    """
    distances = square_distances(centres, points)
    if mask is not None:
        distances = distances.masked_fill(~mask[:, None], float("inf"))
    within = distances <= radius * radius
    if torch.compiler.is_compiling() or within.is_meta:
        return _first_by_order(within, distances, count)
    sets, centre_count, size = within.shape
    hits = within.view(-1).nonzero().squeeze(1)  # sorted by centre, then by point
    row = hits.div(size, rounding_mode="floor")
    found = torch.bincount(row, minlength=sets * centre_count)
    if bool((found == 0).any()):
        nearest = distances.view(-1, size).argmin(1) + torch.arange(len(found), device=row.device) * size
        hits = torch.cat([hits, nearest[found == 0]]).sort()[0]
        found = found.clamp(min=1)
    place = torch.arange(count, device=row.device)
    place = torch.where(place < found[:, None], place, 0) + (found.cumsum(0) - found)[:, None]
    return (hits[place] % size).view(sets, centre_count, count)


def _first_by_order(within: Tensor, distances: Tensor, count: int) -> Tensor:
    """The same without shapes that depend on the data: the `count` smallest numbers of points that are inside."""
    size = within.shape[2]
    number = torch.where(within, torch.arange(size, device=within.device), OUTSIDE)
    first = number.topk(min(count, size), dim=2, largest=False, sorted=True)[0]
    first = F.pad(first, (0, count - min(count, size)), value=OUTSIDE)
    start = torch.where(first[..., :1] == OUTSIDE, distances.argmin(2, keepdim=True), first[..., :1])
    return torch.where(first == OUTSIDE, start, first)


def k_nearest(points: Tensor, queries: Tensor, count: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `count` points nearest to each query, the nearest first: (B, N, D), (B, S, D) -> squared distances, indices (B, S, count).

    The distances of those that were chosen are exact: differences first, then squares. They carry gradients.

    Raises:
        ValueError: if the sets have fewer points.
    """
    if points.shape[1] < count:
        raise ValueError(f"{count} nearest points were asked for, the sets have {points.shape[1]}")
    with torch.no_grad():
        distances = square_distances(queries, points)
        if mask is not None:
            distances = distances.masked_fill(~mask[:, None], float("inf"))
        index = distances.topk(count, dim=2, largest=False, sorted=True)[1]
    return (gather_points(points, index) - queries[:, :, None]).square().sum(3), index


def interpolate(
    points: Tensor, features: Tensor, queries: Tensor, count: int = 3, mask: Tensor | None = None
) -> Tensor:
    """Features carried to other places: the mean over the `count` nearest points, weighted by 1 / (d^2 + 1e-8).

    points (B, N, D) with features (B, N, C), queries (B, S, D) -> (B, S, C). Sets of fewer points use them all.
    """
    count = min(count, points.shape[1])
    if count == 1 and points.shape[1] == 1:
        return features.expand(-1, queries.shape[1], -1)
    distances, index = k_nearest(points, queries, count, mask)
    weights = 1 / (1 + 1e8 * distances)  # 1e-8 times those: ONNX's optimiser takes adding 1e-8 for adding nothing
    weights = (weights / weights.sum(2, keepdim=True)).to(features.dtype)
    total = gather_points(features, index[..., 0]) * weights[..., :1]
    for k in range(1, count):  # a neighbour at a time: (B, S, count, C) is never made
        total = total + gather_points(features, index[..., k]) * weights[..., k : k + 1]
    return total


def largest(x: Tensor) -> Tensor:
    """The maximum over the points of a group, channel by channel: (B, N, C) -> (B, C).

    In training each channel's gradient goes to one point, found by the pooling kernel for channels-last maps, many times faster than
    `max` along an axis that is not the last.
    """
    if not (torch.is_grad_enabled() and x.requires_grad) or torch.compiler.is_compiling():
        return x.amax(1)
    with torch.no_grad():
        grid = x[:, :, None].permute(0, 3, 1, 2)
        winner = F.max_pool2d(grid, (x.shape[1], 1), return_indices=True)[1].view(len(x), 1, -1)
    return x.gather(1, winner).squeeze(1)
