"""Two-dimensional Navier-Stokes in vorticity form, as in the Fourier neural operator paper: from ten snapshots to the next ones.

w_t + u·∇w = nu Δw + f on the unit torus, with u the velocity of the vorticity w, w(·, 0) ~ N(0, 7^3 (-Δ + 49 I)^-2.5) (as the
released generator draws it; the paper prints 7^(3/2), which is its factor before squaring) and f = 0.1 (sin 2π(x + y) + cos 2π(x + y)) (sec. 5.3). Pseudo-spectral, the advection by explicit Euler steps with 2/3
dealiasing and the viscous term by Crank-Nicolson (appendix A.3.3), float64. The paper solves on 256 x 256 with steps of 1e-4.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from paperzoo.data.arrays import cached_arrays
from paperzoo.errors import PaperZooError

IN_MEMORY = 2**22
SNAPSHOTS = 10  # of the input, at times 1, 2, …, 10


def wave_numbers(n: int) -> tuple[np.ndarray, np.ndarray]:
    """2π times the integer frequencies along both axes of the half spectrum: (n, 1) and (1, n // 2 + 1)."""
    return 2 * np.pi * np.fft.fftfreq(n, 1 / n)[:, None], 2 * np.pi * np.arange(n // 2 + 1)[None, :]


def random_vorticity(count: int, n: int, seed: int = 0, tau: float = 7.0, alpha: float = 2.5) -> np.ndarray:
    """Periodic functions from N(0, tau^(2 alpha - 2) (-Δ + tau² I)^-alpha) without a constant mode: float64 (count, n, n)."""
    kx, ky = wave_numbers(n)
    sigma = tau ** (alpha - 1)
    scale = sigma * (kx**2 + ky**2 + tau**2) ** (-alpha / 2)
    scale[0, 0] = 0.0
    white = np.random.default_rng(seed).standard_normal((count, n, n))
    # white noise on the grid has independent coefficients of variance n² in the discrete transform
    return np.fft.irfft2(np.fft.rfft2(white) * scale * n, s=(n, n))


def solve_vorticity(
    initial: np.ndarray, viscosity: float, times: np.ndarray, dt: float = 1e-3, force: np.ndarray | None = None
) -> np.ndarray:
    """w at the given times, (count, n, n, times), from w at time 0, (count, n, n).

    Args:
        times: increasing multiples of `dt`.
        force: (n, n); None is the paper's.
    """
    n = initial.shape[-1]
    if n % 2:
        raise PaperZooError(f"the grid has {n} points an axis; it must be an even number")
    if force is None:
        x = np.arange(n) / n
        phase = 2 * np.pi * (x[:, None] + x[None, :])
        force = 0.1 * (np.sin(phase) + np.cos(phase))
    kx, ky = wave_numbers(n)
    laplacian = kx**2 + ky**2
    inverse = np.divide(1.0, laplacian, out=np.zeros_like(laplacian), where=laplacian > 0)
    frequencies = np.abs(np.fft.fftfreq(n, 1 / n))
    keep = (frequencies[:, None] <= n / 3) & (
        frequencies[None, : n // 2 + 1] <= n / 3
    )  # 2/3 rule: no aliasing of products
    before, after = 1 - 0.5 * dt * viscosity * laplacian, 1 / (1 + 0.5 * dt * viscosity * laplacian)
    forced = np.fft.rfft2(force)
    w = np.fft.rfft2(np.asarray(initial, dtype=np.float64))
    records, step = [], 0
    for time in times:
        for _ in range(round(float(time) / dt) - step):
            stream = w * inverse
            velocity_x, velocity_y = (
                np.fft.irfft2(1j * ky * stream, s=(n, n)),
                np.fft.irfft2(-1j * kx * stream, s=(n, n)),
            )
            slope_x, slope_y = np.fft.irfft2(1j * kx * w, s=(n, n)), np.fft.irfft2(1j * ky * w, s=(n, n))
            advection = keep * np.fft.rfft2(velocity_x * slope_x + velocity_y * slope_y)
            w = after * (before * w + dt * (forced - advection))
        step = round(float(time) / dt)
        records.append(np.fft.irfft2(w, s=(n, n)))
    result = np.stack(records, axis=-1)
    if not np.isfinite(result).all():
        raise PaperZooError(f"the Navier-Stokes solver blew up at viscosity {viscosity}; use a smaller dt than {dt:g}")
    return result


def navier_stokes_pairs(
    count: int, resolution: int = 64, viscosity: float = 1e-3, seed: int = 0, reference: int = 256, horizon: int = 20
) -> tuple[Tensor, Tensor]:
    """(inputs, outputs) for the network over space and time: float32 (count, 10, n, n, T) and (count, 1, n, n, T).

    The input channels are w at times 1 … 10, repeated along the T = horizon - 10 output times 11 … horizon; n is `resolution`.

    Raises:
        PaperZooError: if `reference` is not a multiple of `resolution`, or there is nothing to predict.
    """
    if reference % resolution:
        raise PaperZooError(
            f"resolution {resolution} does not divide the {reference} points of `reference`; take a power of two"
        )
    if horizon <= SNAPSHOTS:
        raise PaperZooError(f"horizon is {horizon}; it must be above the {SNAPSHOTS} times of the input")
    skip = reference // resolution
    w = torch.from_numpy(solved(count, viscosity, seed, reference, horizon)["w"][:, ::skip, ::skip].copy())
    inputs = w[..., :SNAPSHOTS].permute(0, 3, 1, 2)[..., None].expand(-1, -1, -1, -1, horizon - SNAPSHOTS)
    return inputs.contiguous(), w[:, None, ..., SNAPSHOTS:].contiguous()


@functools.lru_cache(maxsize=2)
def solved(count: int, viscosity: float, seed: int, reference: int, horizon: int) -> dict[str, np.ndarray]:
    """ "w": float32 (count, reference, reference, horizon), the vorticity at times 1, 2, …, horizon."""

    def make() -> dict[str, np.ndarray]:
        dt = 1 / max(100, round(10_000 * reference / 256))  # paper: 1e-4 on 256 x 256; coarser grids allow longer steps
        initial = random_vorticity(count, reference, seed)
        parts = [
            solve_vorticity(initial[i : i + 8], viscosity, np.arange(1, horizon + 1), dt) for i in range(0, count, 8)
        ]
        return {"w": np.concatenate(parts).astype(np.float32)}

    if count * reference**2 * horizon <= IN_MEMORY:
        return make()
    return cached_arrays(f"navier-stokes-v1-{count}-{reference}-nu{viscosity:g}-T{horizon}-seed{seed}", make)


def taylor_green(n: int, viscosity: float, time: float) -> np.ndarray:
    """An exact solution without force, (n, n): w = 4π · 2 cos 2πx cos 2πy exp(-8π² nu t); its advection vanishes."""
    x = 2 * np.pi * np.arange(n) / n
    return 8 * math.pi * np.cos(x)[:, None] * np.cos(x)[None, :] * math.exp(-8 * math.pi**2 * viscosity * time)
