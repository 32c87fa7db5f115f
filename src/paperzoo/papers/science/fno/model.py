"""Fourier neural operators in one, two and three dimensions.

Li et al., "Fourier Neural Operator for Parametric Partial Differential Equations", ICLR 2021, arXiv 2010.08895.
Parameter names are those of the authors' released scripts (`fourier_1d.py`, `fourier_2d.py`, `fourier_3d.py`), and so is the
network: GELU and no batch norm, where the paper's tables were made with ReLU and batch norm after each Fourier layer
(see notes.md). What differs from the scripts: channels come second, (B, C, *grid); the complex weights are stored as
pairs of real numbers, as the scripts for torch 1.6 did, so that every optimizer, precision and file format takes them;
and when the network is exported, the Fourier transforms become products with the few needed rows of the DFT matrix,
which is the same function without complex numbers.
"""

from __future__ import annotations

import math
import re
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROJECTION = 128  # channels between the two layers of the projection Q


class SpectralConv(nn.Module):
    """K of eq. (5): Fourier transform, a complex matrix for each of the lowest modes, inverse transform.

    (B, in_channels, *grid) -> (B, out_channels, *grid). Negative frequencies of all but the last axis have weights of their
    own; those of the last follow from the output being real. `weights1`, `weights2`, … are real tensors (in_channels,
    out_channels, *modes, 2), one for each combination of signs, counting in binary with the first axis as the lowest bit.
    """

    def __init__(self, in_channels: int, out_channels: int, modes: tuple[int, ...]) -> None:
        super().__init__()
        self.modes = modes
        # released code: a uniform real and a uniform imaginary part, not centred, over in_channels * out_channels
        scale = 1 / (in_channels * out_channels)
        for i in range(2 ** (len(modes) - 1)):
            weight = scale * torch.rand(in_channels, out_channels, *modes, 2)
            self.register_parameter(f"weights{i + 1}", nn.Parameter(weight))

    def corners(self) -> list[tuple[nn.Parameter, tuple[slice, ...]]]:
        """Each weight with the part of the half spectrum (in FFT order) that it belongs to."""
        found = []
        signs = product((False, True), repeat=len(self.modes) - 1)
        for i, reversed_signs in enumerate(signs):
            slices = [
                slice(-m, None) if s else slice(0, m)
                for m, s in zip(self.modes, reversed(reversed_signs), strict=False)
            ]
            found.append((getattr(self, f"weights{i + 1}"), (..., *slices, slice(0, self.modes[-1]))))
        return found

    def forward(self, x: Tensor) -> Tensor:
        for axis, (size, modes) in enumerate(zip(x.shape[2:], self.modes, strict=True)):
            needed = 2 * modes if axis < len(self.modes) - 1 else 2 * modes - 2
            if size < needed:
                raise ValueError(f"the grid has {size} points along axis {axis}; {modes} modes need at least {needed}")
        if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
            return self.forward_matrices(x)
        dims = tuple(range(2, x.dim()))
        dtype = x.dtype
        spectrum = torch.fft.rfftn(x.float() if dtype in (torch.bfloat16, torch.float16) else x, dim=dims)
        batch, grid = spectrum.shape[0], spectrum.shape[2:]
        mixed = spectrum.new_zeros(batch, self.weights1.shape[1], *grid)
        for weight, corner in self.corners():
            kernel = torch.view_as_complex(weight.to(spectrum.real.dtype))
            mixed[corner] = torch.einsum("bi...,io...->bo...", spectrum[corner], kernel)  # R · F(v), eq. (5)
        return torch.fft.irfftn(mixed, s=x.shape[2:], dim=dims).to(dtype)

    def forward_matrices(self, x: Tensor) -> Tensor:
        """The same numbers in real arithmetic: only the kept rows of the discrete Fourier transform, as matrices."""
        sizes = x.shape[2:]
        frequencies = [[*range(m), *range(-m, 0)] for m in self.modes[:-1]] + [list(range(self.modes[-1]))]
        real, imaginary = x, torch.zeros_like(x)
        for axis, (size, kept) in enumerate(zip(sizes, frequencies, strict=True)):
            cosine, sine = waves(size, kept, x)
            real, imaginary = (
                along(axis, real, cosine) + along(axis, imaginary, sine),
                along(axis, imaginary, cosine) - along(axis, real, sine),
            )
        weight = self.joined_weights().to(x.dtype)
        mix = "bi...,io...->bo..."
        real, imaginary = (
            torch.einsum(mix, real, weight[..., 0]) - torch.einsum(mix, imaginary, weight[..., 1]),
            torch.einsum(mix, real, weight[..., 1]) + torch.einsum(mix, imaginary, weight[..., 0]),
        )
        last = len(sizes) - 1
        for axis, (size, kept) in enumerate(zip(sizes, frequencies, strict=True)):
            cosine, sine = (w.T / size for w in waves(size, kept, x))
            if axis == last:  # every mode but the mean and the Nyquist frequency stands for two of the full spectrum
                twice = torch.tensor([1.0 if 2 * k % size == 0 else 2.0 for k in kept], dtype=x.dtype, device=x.device)
                return along(axis, real * twice, cosine) - along(axis, imaginary * twice, sine)
            real, imaginary = (
                along(axis, real, cosine) - along(axis, imaginary, sine),
                along(axis, imaginary, cosine) + along(axis, real, sine),
            )
        raise AssertionError("the loop returns on the last axis")

    def joined_weights(self) -> Tensor:
        """All weights as one tensor (in, out, 2 m_1, …, 2 m_{d-1}, m_d, 2), frequencies in the order 0, 1, …, -2, -1."""
        parts = [weight for weight, _ in self.corners()]
        for axis in range(len(self.modes) - 1):
            parts = [torch.cat(parts[i : i + 2], dim=2 + axis) for i in range(0, len(parts), 2)]
        return parts[0]


def waves(size: int, frequencies: list[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2π k n / size, each (size, frequencies)."""
    turns = torch.arange(size, dtype=torch.float64)[:, None] * torch.tensor(frequencies, dtype=torch.float64) / size
    angle = 2 * math.pi * (turns - turns.round())
    return angle.cos().to(like), angle.sin().to(like)


def along(axis: int, x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply the spatial axis `axis` of (B, C, *grid) by a matrix (points in, points out)."""
    return (x.movedim(2 + axis, -1) @ matrix).movedim(-1, 2 + axis)


class FNO(nn.Module):
    """Lifting P, four Fourier layers, projection Q (fig. 2a). (B, in_channels, *grid) -> (B, out_channels, *grid).

    The coordinates of the grid, from 0 to 1 inclusive along each axis, are appended to the input as channels. Works on any
    grid that has the modes; the weights do not depend on it.

    Args:
        modes: kept frequencies along each axis (k_max of the paper).
        width: channels of the Fourier layers (d_v of the paper).
        padding: zeros appended to each axis after the lifting, for functions that are not periodic along it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        modes: tuple[int, ...],
        width: int,
        padding: tuple[int, ...],
        depth: int = 4,
    ) -> None:
        super().__init__()
        if len(modes) not in (1, 2, 3) or min(modes) < 1:
            raise ValueError(f"modes is {modes}; it must be one to three positive numbers, one for each axis")
        if len(padding) != len(modes) or min(padding) < 0:
            raise ValueError(f"padding is {padding}; it must be {len(modes)} numbers of at least 0, one for each axis")
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(modes) - 1]
        self.in_channels, self.out_channels = in_channels, out_channels
        self.modes, self.padding, self.depth = modes, padding, depth
        self.fc0 = nn.Linear(in_channels + len(modes), width)
        for i in range(depth):
            setattr(self, f"conv{i}", SpectralConv(width, width, modes))
            setattr(self, f"w{i}", convolution(width, width, 1))
        self.fc1 = nn.Linear(width, PROJECTION)
        self.fc2 = nn.Linear(PROJECTION, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 + len(self.modes) or x.shape[1] != self.in_channels:
            axes = ", ".join(f"n{i + 1}" for i in range(len(self.modes)))
            raise ValueError(f"the input has shape {tuple(x.shape)}; it must be (B, {self.in_channels}, {axes})")
        x = torch.cat([x, coordinates(x)], dim=1)
        v = self.fc0(x.movedim(1, -1)).movedim(-1, 1)
        v = F.pad(v, [side for p in reversed(self.padding) for side in (0, p)])
        for i in range(self.depth):
            v = getattr(self, f"conv{i}")(v) + getattr(self, f"w{i}")(v)  # eq. (2): v <- σ(W v + K v)
            if i < self.depth - 1:
                v = F.gelu(v)
        v = v[(..., *(slice(0, v.shape[2 + i] - p) for i, p in enumerate(self.padding)))]
        return self.fc2(F.gelu(self.fc1(v.movedim(1, -1)))).movedim(-1, 1)


def coordinates(x: Tensor) -> Tensor:
    """The positions of the grid points, (B, d, *grid), each axis from 0 to 1 inclusive as in the released code."""
    axes = [torch.linspace(0, 1, n, dtype=x.dtype, device=x.device) for n in x.shape[2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(x.shape[0], *[-1] * (x.dim() - 1))


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the authors' `FNO1d`, `FNO2d` or `FNO3d`: complex weights become pairs, unused batch norms go.

    Raises:
        ValueError: for the batch-normalised network of the scripts for torch 1.6, which is another function.
    """
    if any(name.startswith("conv1.conv") for name in state_dict):
        raise ValueError(
            "the weights belong to the batch-normalised network of the scripts for torch 1.6; use those of 1.8 or later"
        )
    kept = {name: value for name, value in state_dict.items() if not re.match(r"bn\d\.", name)}
    return {
        name: torch.view_as_real(value).contiguous() if value.is_complex() else value for name, value in kept.items()
    }


def fno1d(
    in_channels: int = 1, out_channels: int = 1, modes: int = 16, width: int = 64, depth: int = 4, padding: int = 0
) -> FNO:
    """The Burgers network (sec. 5.1): (B, 1, n) -> (B, 1, n), n >= 30."""
    return FNO(in_channels, out_channels, (modes,), width, (padding,), depth)


def fno2d(
    in_channels: int = 1, out_channels: int = 1, modes: int = 12, width: int = 32, depth: int = 4, padding: int = 9
) -> FNO:
    """The Darcy network (sec. 5.2): (B, 1, n, m) -> (B, 1, n, m). Padded by 9 points, as released: the domain is not periodic.

    For Navier-Stokes advanced step by step (sec. 5.3, "FNO-2D"): in_channels=10, width=20, padding=0.
    """
    return FNO(in_channels, out_channels, (modes, modes), width, (padding, padding), depth)


def fno3d(
    in_channels: int = 10, out_channels: int = 1, modes: int = 8, width: int = 20, depth: int = 4, padding: int = 6
) -> FNO:
    """The Navier-Stokes network over space and time (sec. 5.3, "FNO-3D"): (B, 10, n, n, t) -> (B, 1, n, n, t).

    The input channels are the first ten snapshots, repeated along time; only the time axis is padded.
    """
    return FNO(in_channels, out_channels, (modes, modes, modes), width, (0, 0, padding), depth)
