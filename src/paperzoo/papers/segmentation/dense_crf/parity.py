"""DenseCRF against pydensecrf (its marginals are stored, see `golden.py`), and against kernels of all pairs written out.

The lattice itself is compared with what makes it one: partition of unity, and the Gaussian that it approximates.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from safetensors.torch import load_file
from torch import Tensor

from paperzoo.engine.parity import Case
from paperzoo.papers.segmentation.dense_crf import golden
from paperzoo.papers.segmentation.dense_crf.technique import Kernels, PermutohedralLattice, mean_field

KERNELS = Kernels(golden.COLOUR[1], *golden.NEAR, golden.COLOUR[0], golden.SMOOTH)


def cases() -> Iterator[Case]:
    stored, unary, image = load_file(str(golden.FILE)), golden.energies()[None], golden.picture()[None].float()
    for n in golden.ITERATIONS:
        yield Case(
            f"marginals after {n} iterations",
            lambda u, i, n=n: mean_field(u, i, KERNELS, n, own_voice=True)[0],
            lambda u, i, n=n: stored[f"q{n}"],
            (unary, image),
            "pydensecrf2 1.1",
            note="the authors' code lets a pixel hear itself; the paper's algorithm 1, our default, does not",
        )
    yield Case(
        "a batch is its pictures one by one",
        lambda u, i: mean_field(u, i, KERNELS, 3),
        lambda u, i: torch.cat([mean_field(a[None], b[None], KERNELS, 3) for a, b in zip(u, i, strict=True)]),
        (torch.cat([unary, unary.flip(-1)]), torch.cat([image, image.flip(1)])),
        "the definition",
    )
    yield from of_the_filter()
    yield from of_inference()


def of_the_filter() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for d in (1, 2, 3, 5):
        points = 3 * torch.rand(1, 300, d, generator=generator)
        lattice = PermutohedralLattice(points)
        yield Case(
            f"weights in {d} dimensions",
            lambda x: x.sum(-1),
            lambda x: torch.ones(len(x)),
            (lattice.weights,),
            "they sum to one",
        )
        values = torch.rand(1, 300, 4, generator=generator)
        yield Case(
            f"Gaussian in {d} dimensions, normalised",
            lambda x, v, lattice=lattice: lattice.filter(v) / lattice.filter(torch.ones_like(v)),
            lambda x, v: gaussian(x) @ v / gaussian(x).sum(-1, keepdim=True),
            (points, values),
            "exp(-|f_i - f_j|^2 / 2) of all pairs",
            atol=0.035,
            rtol=0.0,
            note="the lattice approximates the Gaussian; values are uniform in [0, 1]",
        )


def matrix_of(points: Tensor) -> Tensor:
    """(N, d) -> (N, N): what the filter multiplies with."""
    return PermutohedralLattice(points[None]).filter(torch.eye(len(points))[None])[0]


def gaussian(points: Tensor) -> Tensor:
    return torch.exp(-0.5 * (points[:, :, None] - points[:, None]).square().sum(-1))


def of_inference() -> Iterator[Case]:
    """Algorithm 1 with the lattice's kernels as matrices of all pairs of pixels."""
    generator = torch.Generator().manual_seed(1)
    image = 255 * torch.rand(1, 3, 7, 9, generator=generator)
    unary = torch.randn(1, 3, 7, 9, generator=generator)
    for normalisation in ("symmetric", "none"):

        def slow(unary: Tensor, image: Tensor, normalisation: str = normalisation) -> Tensor:
            kernels = kernel_matrices(image, normalisation)
            energy = unary[0].flatten(1).T
            q = (-energy).softmax(-1)
            for _ in range(4):
                heard = torch.zeros_like(q)
                for weight, kernel, own in kernels:
                    heard += weight * (kernel @ q - own[:, None] * q)
                potts = heard.sum(1, keepdim=True) - heard  # what all other labels say, times mu = 1
                q = torch.exp(-energy - potts)
                q = q / q.sum(1, keepdim=True)
            return q.T.view_as(unary)

        yield Case(
            f"inference, kernels normalised: {normalisation}",
            lambda u, i, n=normalisation: mean_field(u, i, KERNELS, 4, n),
            slow,
            (unary, image),
            "algorithm 1 with matrices of all pairs",
        )


def kernel_matrices(image: Tensor, normalisation: str) -> list[tuple[float, Tensor, Tensor]]:
    """(weight, matrix of all pairs, what a pixel's own voice counts) of both kernels, the lattice given single points."""
    height, width = image.shape[-2:]
    place = torch.tensor([[x, y] for y in range(height) for x in range(width)], dtype=torch.float32)
    colour = image[0].flatten(1).T
    found = []
    for weight, points in (
        (KERNELS.smoothness, place / KERNELS.smooth_position),
        (KERNELS.appearance, torch.cat([place / KERNELS.position, colour / KERNELS.colour], 1)),
    ):
        matrix = matrix_of(points)
        own = torch.ones(len(points))
        if normalisation == "symmetric":
            scale = matrix.sum(1).rsqrt()
            matrix, own = scale[:, None] * matrix * scale, scale.square()
        found.append((weight, matrix, own))
    return found
