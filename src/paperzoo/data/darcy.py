"""Darcy flow in two dimensions, as in the Fourier neural operator paper: from the permeability to the pressure.

-∇·(a ∇u) = 1 on the unit square, u = 0 on its edges; a is 12 where a Gaussian random function is positive, and 3 (sec. 5.2, appendix
A.3.2) elsewhere; the function is drawn from N(0, (-Δ + 9 I)^-2) with Neumann conditions. (The released generator's demo has 4 for 3
and scales the function, which does not change its sign.) Second-order finite differences on the grid's nodes, solved directly.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from paperzoo.data.arrays import cached_arrays
from paperzoo.errors import PaperZooError

DRAWN_MODES = 128  # random numbers are drawn for this many modes an axis, so a function is the same at every resolution
IN_MEMORY = 2**20


def random_fields(count: int, resolution: int, seed: int = 0, tau: float = 3.0, alpha: float = 2.0) -> np.ndarray:
    """Functions on the unit square from N(0, (-Δ + tau² I)^-alpha), zero Neumann conditions, without a constant mode.

    Returns float64 (count, resolution, resolution) on nodes that include the edges, i / (resolution - 1).
    """
    k = np.arange(min(DRAWN_MODES, resolution))
    scale = (np.pi**2 * (k[:, None] ** 2 + k[None, :] ** 2) + tau**2) ** (-alpha / 2)
    scale *= np.where(k == 0, 1.0, np.sqrt(2.0))[:, None] * np.where(k == 0, 1.0, np.sqrt(2.0))[None, :]
    scale[0, 0] = 0.0
    cosines = np.cos(np.pi * np.linspace(0, 1, resolution)[:, None] * k)  # (points, modes)
    generator = np.random.default_rng(seed)
    fields = np.empty((count, resolution, resolution))
    for i in range(count):
        drawn = generator.standard_normal((DRAWN_MODES, DRAWN_MODES))[: len(k), : len(k)]
        fields[i] = cosines @ (scale * drawn) @ cosines.T
    return fields


def solve_darcy(permeability: np.ndarray, force: np.ndarray | float = 1.0) -> np.ndarray:
    """The pressure u for one permeability a, both (n, n) on nodes that include the edges: -∇·(a ∇u) = force, u = 0 on the edges.

    The permeability between two nodes is their mean, as in the released solver.
    """
    from scipy.sparse import diags
    from scipy.sparse.linalg import spsolve

    a = np.asarray(permeability, dtype=np.float64)
    n, inner = len(a), len(a) - 2
    if a.shape != (n, n) or inner < 1:
        raise PaperZooError(f"the permeability has shape {a.shape}; it must be a square grid of at least 3 x 3 nodes")
    down = (a[1:, 1:-1] + a[:-1, 1:-1]) / 2  # between rows i and i + 1, on inner columns: (n - 1, inner)
    across = (a[1:-1, 1:] + a[1:-1, :-1]) / 2  # between columns j and j + 1, on inner rows: (inner, n - 1)
    middle = down[:-1] + down[1:] + across[:, :-1] + across[:, 1:]
    beside = across[:, 1:].copy()
    beside[:, -1] = 0.0  # the last inner column has no inner neighbour
    below = down[1:-1].ravel()
    system = (
        diags(
            [middle.ravel(), -beside.ravel()[:-1], -beside.ravel()[:-1], -below, -below],
            [0, 1, -1, inner, -inner],
            format="csc",
        )
        * float(n - 1) ** 2
    )
    right = np.broadcast_to(force, a.shape)[1:-1, 1:-1].ravel()
    solution = np.zeros_like(a)
    solution[1:-1, 1:-1] = spsolve(system, right, permc_spec="MMD_AT_PLUS_A").reshape(inner, inner)
    return solution


def darcy_pairs(count: int, resolution: int = 85, seed: int = 0, reference: int = 421) -> tuple[Tensor, Tensor]:
    """(permeability, pressure), float32 (count, 1, resolution, resolution): solved on `reference` nodes an axis, thinned.

    The paper's grid has 421 nodes, its networks see 85 (every fifth); solving on it takes about a second a function.

    Raises:
        PaperZooError: if (reference - 1) is not a multiple of (resolution - 1).
    """
    if resolution < 3 or (reference - 1) % (resolution - 1):
        raise PaperZooError(
            f"resolution {resolution} does not thin the {reference} nodes of `reference` evenly; reference - 1 must be a multiple of resolution - 1"
        )
    arrays = solved(count, seed, reference)
    skip = (reference - 1) // (resolution - 1)
    return tuple(torch.from_numpy(np.ascontiguousarray(arrays[key][:, None, ::skip, ::skip])) for key in ("a", "u"))


@functools.lru_cache(maxsize=2)
def solved(count: int, seed: int, reference: int) -> dict[str, np.ndarray]:
    """Permeabilities "a" and pressures "u", float32 (count, reference, reference)."""

    def make() -> dict[str, np.ndarray]:
        permeability = np.where(random_fields(count, reference, seed) >= 0, 12.0, 3.0)
        pressure = np.stack([solve_darcy(a) for a in permeability])
        return {"a": permeability.astype(np.float32), "u": pressure.astype(np.float32)}

    if count * reference**2 <= IN_MEMORY:
        return make()
    return cached_arrays(f"darcy-v1-{count}-{reference}-seed{seed}", make)
