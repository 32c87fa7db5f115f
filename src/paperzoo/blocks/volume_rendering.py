"""Volume rendering by quadrature: samples along rays, their weights, and what a ray sees.

Depths t are along a ray: a point is origin + t * direction. Rays need not have unit length; lengths handed to `ray_weights` are
distances in space, so t-intervals times the direction's norm. Shapes are (N, S): N rays with S samples each. Everything is
differentiable, and runs without loops over rays or samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

FAR_AWAY = 1e10  # the last sample stands for all that lies behind it


def stratified(near: Tensor, far: Tensor, count: int, jitter: bool = False, in_disparity: bool = False) -> Tensor:
    """Depths (N, count) from `near` to `far` (N, 1), evenly spaced, ascending.

    Args:
        jitter: each depth is drawn uniformly between the middles to its neighbours, from torch's global generator.
        in_disparity: evenly spaced in 1 / depth; `near` must not be 0 then.
    """
    share = torch.linspace(0.0, 1.0, count, device=near.device, dtype=near.dtype)
    if in_disparity:
        depths = 1.0 / (1.0 / near * (1.0 - share) + 1.0 / far * share)
    else:
        depths = near * (1.0 - share) + far * share
    if not jitter:
        return depths
    middles = (depths[:, 1:] + depths[:, :-1]) / 2
    lower, upper = torch.cat([depths[:, :1], middles], 1), torch.cat([middles, depths[:, -1:]], 1)
    return torch.lerp(lower, upper, torch.rand_like(depths))


def intervals(depths: Tensor, norms: Tensor, last: float = FAR_AWAY) -> Tensor:
    """Lengths (N, S) in space from each sample to the next one; the last one's is `last` in depth.

    Args:
        norms: (N, 1), the directions' lengths.
    """
    steps = depths[:, 1:] - depths[:, :-1]
    return torch.cat([steps, torch.full_like(depths[:, :1], last)], 1) * norms


def ray_weights(density: Tensor, lengths: Tensor) -> Tensor:
    """w_i = T_i (1 - exp(-density_i * length_i)), T_i = exp(-sum of density_j * length_j over j < i). (N, S), (N, S) -> (N, S).

    Densities are not negative. The weights of a ray sum up to at most 1: to its opacity.
    """
    optical = density * lengths
    before = torch.cat([torch.zeros_like(optical[:, :1]), optical[:, :-1]], 1).cumsum(1)
    return torch.exp(-before) * -torch.expm1(-optical)


def composite(
    weights: Tensor, colours: Tensor, depths: Tensor, white_background: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """What rays see: colours (N, C), expected depths (N,), opacities (N,).

    Args:
        weights, depths: (N, S).
        colours: (N, S, C).
        white_background: what is not opaque shows white; else black.
    """
    opacity = weights.sum(1)
    seen = (weights[..., None] * colours).sum(1)  # no matrix product: autocast would round it
    if white_background:
        seen = seen + (1.0 - opacity)[:, None]
    return seen, (weights * depths).sum(1), opacity


def invert_cdf(edges: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    """Depths at which the distribution of weights reaches `places`: inverse transform sampling of a piecewise constant density.

    Args:
        edges: (N, B + 1), the borders of the bins, ascending.
        weights: (N, B), not negative; 1e-5 is added to each, so that empty rays are sampled evenly.
        places: (N, K) in [0, 1].
    """
    weights = weights + 1e-5
    cdf = torch.cumsum(weights / weights.sum(1, keepdim=True), 1)
    cdf = torch.cat([torch.zeros_like(cdf[:, :1]), cdf], 1)
    if torch.compiler.is_exporting():  # ONNX has no binary search; counting gives the same
        above = (cdf[:, None] <= places[..., None]).sum(2)
    else:
        above = torch.searchsorted(cdf, places.contiguous(), right=True)
    below = (above - 1).clamp(min=0)
    above = above.clamp(max=cdf.shape[1] - 1)
    start, low = cdf.gather(1, below), edges.gather(1, below)
    width = cdf.gather(1, above) - start
    width = torch.where(width < 1e-5, 1.0, width)
    return low + (places - start) / width * (edges.gather(1, above) - low)


def importance_samples(depths: Tensor, weights: Tensor, count: int, jitter: bool = False) -> Tensor:
    """Depths (N, count) drawn where a first pass found weight (N, S), between the middles of its samples; without gradient.

    Args:
        jitter: at random places of the distribution, from torch's global generator; else at evenly spaced ones, ascending.
    """
    middles = (depths[:, 1:] + depths[:, :-1]) / 2
    if jitter:
        places = torch.rand(depths.shape[0], count, device=depths.device, dtype=depths.dtype)
    else:
        places = torch.linspace(0.0, 1.0, count, device=depths.device, dtype=depths.dtype)
        places = places.expand(depths.shape[0], count)  # len() would fix the batch of an exported graph
    return invert_cdf(middles, weights[:, 1:-1], places).detach()
