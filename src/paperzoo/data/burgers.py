"""The one-dimensional Burgers data set of the Fourier neural operator paper, made by a solver.

u_t + u u_x = nu u_xx on (0, 1), periodic; the input is u(·, 0), a Gaussian random function, the output u(·, 1).
Source: Li et al., "Fourier Neural Operator for Parametric Partial Differential Equations", sec. 5.1 and appendix A.3.1:
u(·, 0) ~ N(0, 625 (-Δ + 25 I)^-2), nu = 0.1, solved on 8192 points and sub-sampled. As in the released generator the
constant mode is zero (its `GRF1` is called with mean 0).

The paper solves with Chebfun's ETDRK4 (fourth-order exponential time differencing); so does this file, in float64 and
vectorised over functions, with the upper third of the modes removed from the product u². The released file
`burgers_data_R10.mat` can be read instead, by the task's reader (`paperzoo.tasks.operator_learning`); what is known of how it
was made is in the FNO paper's notes.md.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from paperzoo.data.arrays import cached_arrays
from paperzoo.errors import PaperZooError

DRAWN_MODES = 4096  # random numbers are drawn for this many modes, so a function is the same at every resolution
IN_MEMORY = 2**22  # values up to which a generated set is only kept in memory


def random_functions(
    count: int, resolution: int, seed: int = 0, sigma: float = 25.0, tau: float = 5.0, gamma: float = 2.0
) -> np.ndarray:
    """Periodic functions on (0, 1) from N(0, sigma² (-Δ + tau² I)^-gamma) without a constant mode.

    The eigenfunctions are sqrt(2) cos 2πkx and sqrt(2) sin 2πkx, k = 1, 2, …; at another resolution the same seed gives
    the same functions, band-limited to it. Returns float64 (count, resolution), sampled at i / resolution.
    """
    if resolution < 4 or resolution % 2:
        raise PaperZooError(f"resolution is {resolution}; it must be an even number of at least 4 grid points")
    kept = min(resolution // 2 - 1, DRAWN_MODES)
    k = np.arange(1, kept + 1)
    scale = np.sqrt(2.0) * sigma * ((2 * np.pi * k) ** 2 + tau**2) ** (-gamma / 2)
    spectrum = np.zeros((count, resolution // 2 + 1), dtype=np.complex128)
    generator = np.random.default_rng(seed)
    for i in range(count):  # function by function: a larger set begins with the smaller one
        cosines, sines = generator.standard_normal((2, DRAWN_MODES))[:, :kept]
        spectrum[i, 1 : kept + 1] = scale * (cosines - 1j * sines) * (resolution / 2)
    return np.fft.irfft(spectrum, n=resolution)


def etdrk4_weights(linear: np.ndarray, dt: float, nodes: int = 32) -> tuple[np.ndarray, ...]:
    """The coefficients of ETDRK4 for the eigenvalues `linear`, by contour integrals (Kassam and Trefethen, 2005, sec. 3).

    Returns (E, E2, Q, f1, f2, f3): exp(h L), exp(h L / 2) and the weights of the stages and of the update.
    """
    z = dt * linear[:, None] + np.exp(1j * np.pi * (np.arange(1, nodes + 1) - 0.5) / nodes)[None, :]
    e = np.exp(z)
    q = dt * np.mean((np.exp(z / 2) - 1) / z, axis=1).real
    f1 = dt * np.mean((-4 - z + e * (4 - 3 * z + z**2)) / z**3, axis=1).real
    f2 = dt * np.mean((2 + z + e * (-2 + z)) / z**3, axis=1).real
    f3 = dt * np.mean((-4 - 3 * z - z**2 + e * (4 - z)) / z**3, axis=1).real
    return np.exp(dt * linear), np.exp(dt * linear / 2), q, f1, f2, f3


def solve_burgers(
    initial: np.ndarray, viscosity: float = 0.1, time: float = 1.0, steps: int | None = None, block: int = 32
) -> np.ndarray:
    """u(·, time) for many initial functions: pseudo-spectral ETDRK4, float64.

    Args:
        initial: (count, n) samples at i / n of periodic functions on (0, 1), n even.
        steps: time steps; None chooses them so that |u| dt stays below the smallest scale that moves: the grid's, or the
            viscous length nu / |u| below which diffusion wins, whichever is larger (and at least 200).
        block: functions solved together; small enough for the processor's cache.
    """
    if viscosity <= 0:
        raise PaperZooError(f"viscosity is {viscosity}; it must be positive")
    initial = np.asarray(initial, dtype=np.float64)
    n = initial.shape[-1]
    speed = float(np.abs(initial).max()) + 1e-12
    if steps is None:
        steps = max(200, int(np.ceil(speed * time / max(1 / n, viscosity / speed))))
    k = 2 * np.pi * np.arange(n // 2 + 1)
    e, e2, q, f1, f2, f3 = etdrk4_weights(-viscosity * k**2, time / steps)
    half_derivative = -0.5j * k * (np.arange(n // 2 + 1) <= n // 3)  # 2/3 rule: no aliasing of u²

    def nonlinear(v: np.ndarray) -> np.ndarray:
        return half_derivative * np.fft.rfft(np.fft.irfft(v, n=n) ** 2)

    result = np.empty_like(initial)
    for start in range(0, len(initial), block):
        v = np.fft.rfft(initial[start : start + block])
        for _ in range(steps):
            n0 = nonlinear(v)
            a = e2 * v + q * n0
            na = nonlinear(a)
            b = e2 * v + q * na
            nb = nonlinear(b)
            c = e2 * a + q * (2 * nb - n0)
            v = e * v + f1 * n0 + 2 * f2 * (na + nb) + f3 * nonlinear(c)
        result[start : start + block] = np.fft.irfft(v, n=n)
    if not np.isfinite(result).all():
        raise PaperZooError(f"the Burgers solver blew up at viscosity {viscosity}; use more than {steps} steps")
    return result


def cole_hopf(initial: np.ndarray, viscosity: float, time: float) -> np.ndarray:
    """The exact solution for one periodic function of mean zero, (n,): u = -2 nu φ_x / φ with φ_t = nu φ_xx.

    Accurate only while exp of the initial potential / (2 nu) fits float64 comfortably: an oracle for large viscosity.
    """
    n = len(initial)
    k = 2j * np.pi * np.arange(n // 2 + 1)
    spectrum = np.fft.rfft(np.asarray(initial, dtype=np.float64))
    spectrum[1:] /= k[1:]
    spectrum[0] = 0
    potential = np.fft.rfft(np.exp(-np.fft.irfft(spectrum, n=n) / (2 * viscosity)))
    potential *= np.exp(viscosity * (k**2).real * time)
    return -2 * viscosity * np.fft.irfft(k * potential, n=n) / np.fft.irfft(potential, n=n)


def burgers_pairs(
    count: int, resolution: int = 1024, viscosity: float = 0.1, seed: int = 0, reference: int = 8192
) -> tuple[Tensor, Tensor]:
    """(inputs, outputs), float32 (count, 1, resolution): solved on `reference` points, every few of them taken.

    Sets beyond 4 million values are kept in the user's cache directory; making the paper's 1200 functions on 8192 points
    takes a minute or two, once.

    Raises:
        PaperZooError: if `reference` is not a multiple of `resolution`.
    """
    if reference % resolution:
        raise PaperZooError(
            f"resolution {resolution} does not divide the {reference} points of `reference`; take a power of two"
        )
    arrays = solved(count, viscosity, seed, reference)
    skip = reference // resolution
    return tuple(torch.from_numpy(np.ascontiguousarray(arrays[key][:, None, ::skip])) for key in ("a", "u"))


@functools.lru_cache(maxsize=2)
def solved(count: int, viscosity: float, seed: int, reference: int) -> dict[str, np.ndarray]:
    """Initial functions "a" and solutions "u" at time 1, float32 (count, reference)."""

    def make() -> dict[str, np.ndarray]:
        initial = random_functions(count, reference, seed)
        return {"a": initial.astype(np.float32), "u": solve_burgers(initial, viscosity).astype(np.float32)}

    if count * reference <= IN_MEMORY:
        return make()
    return cached_arrays(f"burgers-v1-{count}-{reference}-nu{viscosity:g}-seed{seed}", make)
