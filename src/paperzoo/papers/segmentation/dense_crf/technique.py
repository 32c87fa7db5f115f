"""Mean-field inference in a fully connected CRF with Gaussian edge potentials (Krähenbühl and Koltun, NIPS 2011).

Every pixel is linked with every other one. The links are Gaussian kernels of position and colour, so that a step of mean-field
inference is a Gaussian filter in that space, done in linear time on the permutohedral lattice (Adams, Baek and Davis 2010).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Normalisation = Literal["symmetric", "none"]


# -- Gaussian filtering in d dimensions ---------------------------------------------------------------------------------


class PermutohedralLattice:
    """Where N points lie among the vertices of a lattice that tiles d dimensions with simplices.

    Points are spread over the d + 1 vertices around them, the vertices are blurred along the lattice's d + 1 axes, and the
    points read their answer back: together an approximation of a Gaussian filter with deviation 1, in O(N d (d + C)). Each of
    the three is a product with a sparse matrix.

    Args:
        features: float (B, N, d), already divided by the kernel's deviations. Pictures of a batch do not see each other.

    Raises:
        ValueError: for features of another shape, that are not finite, or too far apart for the lattice's addresses.
    """

    def __init__(self, features: Tensor) -> None:
        if features.ndim != 3 or not features.is_floating_point() or 0 in features.shape:
            raise ValueError(
                f"features are {features.dtype} {tuple(features.shape)}; floating point (B, N, d) is needed"
            )
        if not bool(features.isfinite().all()):
            raise ValueError("features hold values that are not finite")
        batch, count, d = features.shape
        codes, self.weights, steps = surrounding_vertices(features)
        # equal addresses side by side: the rows of the matrix that spreads, and the vertices' numbers
        addresses, order = codes.flatten().sort()
        first = torch.ones_like(addresses, dtype=torch.bool)
        torch.ne(addresses[1:], addresses[:-1], out=first[1:])
        known, starts = addresses[first], first.nonzero()[:, 0]
        self.index = torch.empty_like(order).scatter_(0, order, first.cumsum(0) - 1).view_as(self.weights)
        self.points, self.vertices, self.order = batch * count, len(known), order
        self.rows = torch.cat([starts, starts.new_tensor([len(order)])])
        self.blurs = [self.blur(known, step) for step in steps]
        self.scale = 1 / (1 + 2.0**-d)

    def blur(self, known: Tensor, step: int) -> Tensor:
        """A row a vertex: itself, and half of its two neighbours along an axis; those that no point touches hold nothing."""
        (after, is_after), (before, is_before) = find(known, known + step), find(known, known - step)
        own = torch.arange(len(known), device=known.device)
        columns, values = torch.stack([own, after, before], -1), torch.stack([own >= 0, is_after, is_before], -1)
        halves = values.to(self.weights) * self.weights.new_tensor([1.0, 0.5, 0.5])
        return sparse(own.new_tensor(range(0, 3 * len(known) + 1, 3)), columns, halves, len(known))

    def spreading(self, factor: Tensor | None = None) -> Tensor:
        """The sparse matrix (vertices, points) that gives each vertex its points' values, each times its factor (points,)."""
        weights = self.weights if factor is None else self.weights * factor[:, None]
        columns = self.order // self.weights.shape[1]
        return sparse(self.rows, columns, weights.flatten()[self.order], self.points)

    def reading(self, factor: Tensor | float = 1.0) -> Tensor:
        """The sparse matrix (points, vertices) that reads the vertices back, the lattice's own scale included."""
        weights = self.weights * (factor[:, None] if isinstance(factor, Tensor) else factor) * self.scale
        size = weights.shape[1]
        rows = torch.arange(0, size * self.points + 1, size, device=weights.device)
        return sparse(rows, self.index, weights, self.vertices)

    def blurred(self, held: Tensor) -> Tensor:
        for blur in self.blurs:
            held = blur @ held
        return held

    def filter(self, values: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C): for every point the sum over all points of kernel times value."""
        held = self.blurred(self.spreading() @ values.flatten(0, 1))
        return (self.reading() @ held).view_as(values)


def sparse(rows: Tensor, columns: Tensor, values: Tensor, width: int) -> Tensor:
    """A matrix in compressed rows."""
    shape = (len(rows) - 1, width)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's own note that the layout is in beta
        index = (
            torch.int32 if max(len(values.flatten()), *shape) < 2**31 else torch.int64
        )  # what MKL reads without a copy
        parts = rows.to(index), columns.flatten().to(index), values.flatten()
        return torch.sparse_csr_tensor(*parts, shape, check_invariants=False)


def surrounding_vertices(features: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """The simplex around each point.

    Args:
        features: float (B, N, d).

    Returns:
        an address int64 (B * N, d + 1) for each vertex, linear in its integer coordinates; barycentric weights (B * N, d + 1),
        which sum to one; and what a step along each of the lattice's d + 1 axes adds to an address.
    """
    batch, count, d = features.shape
    size = d + 1
    # onto the plane in d + 1 dimensions whose coordinates sum to zero, so that a blur step of the lattice has deviation 1
    i = torch.arange(d, dtype=features.dtype, device=features.device)
    scaled = features.flatten(0, 1) * ((2 / 3) ** 0.5 * size / ((i + 1) * (i + 2)).sqrt())
    ahead = scaled.flip(-1).cumsum(-1).flip(-1)  # the sum of coordinate k and those after it
    elevated = torch.cat([ahead[:, :1], ahead[:, 1:] - (i[:-1] + 1) * scaled[:, :-1], -d * scaled[:, -1:]], dim=-1)

    # the nearest point whose coordinates are all multiples of d + 1, then moved until its coordinates sum to zero, too
    nearest = (elevated / size).round()
    excess = nearest.sum(-1, keepdim=True).long()
    rest, order = (elevated - nearest * size).sort(dim=-1, descending=True)
    # coordinate order[j] has the j-th largest rest, hence rank j; the excess turns the ranks round
    rank = torch.arange(size, device=features.device) + excess
    moved = (rank < 0).long() - (rank > d).long()
    turned = torch.remainder(rank, size)
    sorted_rest = torch.empty_like(rest).scatter_(1, turned, rest / size - moved)  # by rank, descending
    inner = sorted_rest[:, :-1] - sorted_rest[:, 1:]  # the weight of vertex d, d - 1 … 1
    weights = torch.cat([1 - (sorted_rest[:, :1] - sorted_rest[:, -1:]), inner.flip(-1)], dim=-1)

    # the last coordinate follows from the others and is left out; spans leave room for a step to either side
    origin = nearest.long().scatter_add_(1, order, moved) * size
    low, high = origin[:, :-1].amin(0) - 2 * size, origin[:, :-1].amax(0) + 2 * size
    radix, place = [], 1
    for span in (high - low + 1).tolist():
        radix.append(place)
        place *= span
    if place * batch >= 2**62:
        raise ValueError(
            "the features are too far apart for the lattice's 62-bit addresses; divide by larger deviations"
        )
    factors = torch.tensor([*radix, 0], device=features.device)
    group = torch.arange(batch, device=features.device).repeat_interleave(count) * place
    base = ((origin[:, :-1] - low) * factors[:-1]).sum(-1) + group
    # the k-th vertex has its k coordinates of the highest rank d + 1 - k below the origin's, and all others k above
    by_rank = torch.empty_like(order).scatter_(1, turned, factors[order])
    below = by_rank.flip(-1)[:, :d].cumsum(-1)
    everywhere = sum(radix)
    k = torch.arange(1, size, device=features.device)
    codes = torch.cat([base[:, None], base[:, None] + everywhere * k - size * below], dim=-1)
    return codes, weights, [everywhere - size * r for r in radix] + [everywhere]


def find(known: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The places of `wanted` in the sorted `known`, and whether they are there at all."""
    place = torch.searchsorted(known, wanted).clamp_(max=len(known) - 1)
    return place, known[place] == wanted


# -- kernels and inference ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernels:
    """The two kernels of eq. 3: nearby pixels of a similar colour, and nearby pixels.

    appearance, smoothness: their weights w1 and w2. position, colour: theta_alpha in pixels and theta_beta in steps of 255.
    smooth_position: theta_gamma in pixels.
    """

    appearance: float = 10.0
    position: float = 60.0
    colour: float = 20.0
    smoothness: float = 3.0
    smooth_position: float = 3.0


def grid(height: int, width: int, like: Tensor) -> Tensor:
    """Pixel positions (x, y), (H * W, 2)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=-1).to(like)


class Messages:
    """What every pixel hears from all others: sum over kernels of w * (kernel * Q), without its own voice (algorithm 1).

    The norms and weights are in the sparse matrices, so that a message is three products.
    """

    def __init__(self, images: Tensor, kernels: Kernels, normalisation: Normalisation, own_voice: bool) -> None:
        batch, _, height, width = images.shape
        place = grid(height, width, images).expand(batch, -1, -1)
        colours = images.flatten(2).mT
        features = [
            (kernels.smoothness, place / kernels.smooth_position),
            (kernels.appearance, torch.cat([place / kernels.position, colours / kernels.colour], dim=-1)),
        ]
        self.own = images.new_zeros(batch * height * width, 1)
        self.lattices, self.spreads, self.reads = [], [], []
        for weight, points in features:
            if weight == 0:
                continue
            lattice, norm = PermutohedralLattice(points), None
            if normalisation == "symmetric":  # D^-1/2 K D^-1/2, as in the authors' code
                norm = (lattice.filter(torch.ones_like(points[..., :1])).flatten() + 1e-20).rsqrt()
            if not own_voice:
                self.own += weight * (1.0 if norm is None else norm.square()[:, None])
            self.lattices.append(lattice)
            self.spreads.append(lattice.spreading(norm))
            self.reads.append(lattice.reading(weight if norm is None else weight * norm))

    def added_to(self, energies: Tensor, q: Tensor) -> Tensor:
        """`energies` and what is heard where the probabilities are `q`; all (B * N, K)."""
        heard = torch.addcmul(energies, self.own, q, value=-1)
        for lattice, spread, read in zip(self.lattices, self.spreads, self.reads, strict=True):
            heard = heard.addmm_(read, lattice.blurred(spread @ q))
        return heard


def mean_field(
    unary: Tensor,
    images: Tensor,
    kernels: Kernels | None = None,
    iterations: int = 10,
    normalisation: Normalisation = "symmetric",
    own_voice: bool = False,
) -> Tensor:
    """Approximate marginals of the CRF with the Potts model, each pixel and label (algorithm 1).

    Args:
        unary: float (B, K, H, W), negative log-probabilities of the labels at every pixel (eq. 2's psi_u).
        images: (B, 3, H, W), colours in 0 … 255.
        kernels: see `Kernels`; the defaults where None.
        iterations: of mean-field updates; 0 gives softmax(-unary).
        normalisation: "none" for the kernels as printed, "symmetric" as the authors' code scales them.
        own_voice: whether a pixel hears itself, too, as in the authors' code; the paper leaves it out.

    Returns:
        float (B, K, H, W), probabilities over K.

    Raises:
        ValueError: if the shapes do not match or a number is out of range.
    """
    if unary.ndim != 4 or images.ndim != 4 or images.shape[1] != 3 or unary.shape[::3] != images.shape[::3]:
        raise ValueError(f"unary is {tuple(unary.shape)}, images {tuple(images.shape)}; (B, K, H, W) and (B, 3, H, W)")
    if unary.shape[2:] != images.shape[2:]:
        raise ValueError(
            f"unary has {tuple(unary.shape[2:])} pixels, the images {tuple(images.shape[2:])}; equal sizes"
        )
    if iterations < 0:
        raise ValueError(f"iterations is {iterations}; 0 or more")
    batch, labels, height, width = unary.shape
    energies = -unary.float().flatten(2).mT.contiguous().view(-1, labels)
    q = energies.softmax(-1)
    messages = Messages(images.float(), kernels or Kernels(), normalisation, own_voice) if iterations else None
    for _ in range(iterations):
        # Potts: disagreement costs, which is the same as that agreement pays
        q = messages.added_to(energies, q).softmax(-1)
    return q.view(batch, height, width, labels).permute(0, 3, 1, 2)
