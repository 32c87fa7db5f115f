"""A picture or volume larger than memory through a network, by windows that overlap and are blended.

    logits = tiled(network, volume, window=(96, 96, 64))            # (B, C, D, H, W) -> (B, K, D, H, W)
    logits = tiled(network, picture, window=(512, 512), device="cuda", memory_map="logits.bin")

Two dimensions, three, or any other number. The network only ever sees batches of windows. The result needs memory for K numbers a
pixel, on `accumulate_on` or in a file; the input may itself be memory-mapped, as it is only ever read a window at a time.

Near the edge of a window a network lacks context. Two things hide that: Gaussian weights (sigma an eighth of the window, as nnU-Net
and MONAI have them) trust the middle of a window more than its edge, and `margin` does not use the edge at all: with a margin of at
least the receptive field's radius the result is the whole input's, to rounding, if the network has no stride (with one, where the windows'
starts are multiples of it). Where the edge of a window is the edge of the input, it counts.

The weights of the windows over a pixel sum to 1 along each axis, so nothing is divided afterwards. nnU-Net and MONAI take the product over the
axes first and allow none below a floor; then a window's middle row and its corner weigh nearly the same along the border of
the input, where seams show.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

SIGMA = 1 / 8  # of the Gaussian, as a share of the window's extent


@dataclass(frozen=True)
class Axis:
    """Where windows lie along one axis. Positions count from the input's first pixel, so padding before it is negative.

    ratio: pixels out for a pixel in; 1/4 for a network of stride 4, 2 for one that doubles the resolution.
    """

    size: int
    window: int
    starts: tuple[int, ...]
    ratio: Fraction

    @property
    def out_size(self) -> int:
        return math.ceil(self.size * self.ratio)

    @property
    def out_window(self) -> int:
        return int(self.window * self.ratio)

    def out(self, start: int) -> tuple[slice, slice]:
        """Of a window that starts here: the part of its output that lies inside the result, and where in the result that is."""
        first = int(start * self.ratio)
        low, high = max(0, first), min(self.out_size, first + self.out_window)
        return slice(low - first, high - first), slice(low, high)

    def shares(self, blend: Literal["gaussian", "constant"], margin: int) -> dict[int, Tensor]:
        """For each window's start, how much each of its output pixels counts: float64 (out_window,); over the windows they sum to 1.

        `margin` input pixels at each edge that is not the input's own count nothing.
        """
        edge = math.ceil(margin * self.ratio)
        weights = {}
        for start in self.starts:
            weight = profile(self.out_window, blend)
            if edge and start > 0:
                weight[:edge] = 0
            if edge and start + self.window < self.size:
                weight[-edge:] = 0
            weights[start] = weight
        total = torch.zeros(self.out_size, dtype=torch.float64)
        for start, weight in weights.items():
            inside, target = self.out(start)
            total[target] += weight[inside]
        if not total.all():
            gap = max(b - a for a, b in itertools.pairwise(self.starts))
            raise ValueError(
                f"a margin of {margin} leaves {max(0, self.window - 2 * margin)} of {self.window} pixels of a window, but windows "
                f"are {gap} apart; a larger overlap or a smaller margin is needed"
            )
        for start, weight in weights.items():
            inside, target = self.out(start)
            weight[inside] /= total[target]
        return weights


def profile(extent: int, blend: Literal["gaussian", "constant"]) -> Tensor:
    """How much the pixels along one axis of a window count, float64 (extent,), at most 1."""
    if blend == "constant":
        return torch.ones(extent, dtype=torch.float64)
    distance = torch.arange(extent, dtype=torch.float64) - (extent - 1) / 2
    return torch.exp(-0.5 * (distance / (SIGMA * extent)).square())


def place(size: int, window: int, overlap: float, ratio: Fraction) -> Axis:
    """Windows along an axis: steps of (1 - overlap) windows, the last one ends with the input; starts fit the network's stride.

    An axis shorter than the window gets one window with the input in its middle.
    """
    stride = ratio.denominator
    if size <= window:
        return Axis(size, window, (-((window - size) // 2 // stride * stride),), ratio)
    step = max(stride, int(window * (1 - overlap)) // stride * stride)
    last = math.ceil((size - window) / stride) * stride
    return Axis(size, window, (*range(0, last, step), last), ratio)


def cut(inputs: Tensor, item: int, starts: Sequence[int], window: Sequence[int], padding: str) -> Tensor:
    """One window (1, C, *window) of inputs (B, C, *size); what lies outside is padded."""
    slices, pads = [], []
    for start, extent, size in zip(starts, window, inputs.shape[2:], strict=True):
        slices.append(slice(max(0, start), min(size, start + extent)))
        pads = [max(0, -start), max(0, start + extent - size), *pads]  # F.pad counts from the last axis
    part = inputs[(slice(item, item + 1), slice(None), *slices)]
    if not any(pads):
        return part
    if padding == "reflect" and any(
        max(pads[2 * i : 2 * i + 2]) >= n for i, n in enumerate(reversed(part.shape[2:])) if n
    ):
        raise ValueError(
            f"an input of {' x '.join(map(str, inputs.shape[2:]))} cannot be mirrored up to a window of "
            f"{' x '.join(map(str, window))}; use padding 'replicate' or 'constant', or a smaller window"
        )
    return F.pad(part, pads, mode=padding)


@torch.no_grad()
def tiled(
    network: Callable[[Tensor], Tensor],
    inputs: Tensor,
    window: Sequence[int],
    overlap: float = 0.5,
    batch_size: int = 4,
    blend: Literal["gaussian", "constant"] = "gaussian",
    progress: bool = False,
    *,
    margin: int | Sequence[int] = 0,
    padding: Literal["constant", "reflect", "replicate"] = "constant",
    device: torch.device | str | None = None,
    accumulate_on: torch.device | str | None = None,
    memory_map: str | Path | None = None,
) -> Tensor:
    """The network's output for inputs of any size, from overlapping windows. Without gradients.

    Args:
        network: (N, C, *window) -> (N, K, *output), N at most `batch_size`; each extent of the output is the window's times one number,
            or a whole fraction of it.
        inputs: (B, C, *size), a floating-point dtype; anywhere, memory-mapped if need be. An axis shorter than the window is padded on both sides.
        window: extents of a window, one an axis.
        overlap: share of a window that it has in common with the next, at least 0 and below 1. 0.5 is nnU-Net's, 0.25 MONAI's.
        batch_size: windows that the network sees at once.
        blend: weights where windows overlap: "gaussian", or "constant" (the mean).
        progress: whether a bar counts the windows.
        margin: pixels of the input at each inner edge of a window that do not count, one number or one an axis.
        padding: what lies outside of the input: zeros, its mirror image, or its last pixel.
        device: where the network runs; its first parameter's, or the inputs', unless given.
        accumulate_on: where the result is gathered and returned; the inputs' device unless given.
        memory_map: a file to gather the result in (created, overwritten; 4 bytes x B * K a pixel); the result is
            read from it for as long as it is used.

    Returns:
        (B, K, *ceil(size * ratio)), float32 (float64 of a network that returns it).

    Raises:
        ValueError: if an argument is out of its range, or the network's output does not fit its window.
    """
    window, margin, device = _checked(network, inputs, window, overlap, batch_size, blend, margin, device)
    spatial = len(window)
    axes = [place(n, w, overlap, Fraction(1)) for n, w in zip(inputs.shape[2:], window, strict=True)]

    def run(chosen: Sequence[tuple[int, tuple[int, ...]]]) -> Tensor:
        parts = torch.cat([cut(inputs, item, starts, window, padding) for item, starts in chosen]).to(device)
        return network(parts)

    # The first window tells how large outputs are; with a stride the padding and the starts must be multiples of it.
    first = (0, tuple(axis.starts[0] for axis in axes))
    output = run([first])
    ratios = _ratios(output, window)
    axes = [place(axis.size, axis.window, overlap, r) for axis, r in zip(axes, ratios, strict=True)]
    shares = [axis.shares(blend, edge) for axis, edge in zip(axes, margin, strict=True)]
    moved = (0, tuple(axis.starts[0] for axis in axes))
    if moved != first:
        output = run([moved])

    places = [(item, starts) for item in range(len(inputs)) for starts in itertools.product(*(a.starts for a in axes))]
    dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
    shape = (len(inputs), output.shape[1], *(a.out_size for a in axes))
    gathered = _zeros(shape, dtype, accumulate_on or inputs.device, memory_map)

    def add(chosen: Sequence[tuple[int, tuple[int, ...]]], results: Tensor) -> None:
        for (item, starts), result in zip(chosen, results, strict=True):
            inside, target = zip(*(axis.out(s) for axis, s in zip(axes, starts, strict=True)), strict=True)
            part = result[(slice(None), *inside)].to(dtype)
            for i, start in enumerate(starts):
                share = shares[i][start][inside[i]].to(part)
                part = part * share.view(-1, *[1] * (spatial - 1 - i))
            gathered[(item, slice(None), *target)] += part.to(gathered.device)

    with tqdm(total=len(places), desc="windows", delay=1.0, leave=False, disable=None if progress else True) as bar:
        add(places[:1], output)
        bar.update(1)
        for chosen in _chunks(places[1:], batch_size):
            add(chosen, run(chosen))
            bar.update(len(chosen))
    return gathered


def _chunks(places: list, count: int) -> Iterator[list]:
    for i in range(0, len(places), count):
        yield places[i : i + count]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, path: str | Path | None) -> Tensor:
    """Zeros, in a file where one is named."""
    if path is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    Path(path).unlink(missing_ok=True)  # a new file reads as zeros
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def _ratios(output: Tensor, window: tuple[int, ...]) -> list[Fraction]:
    if not isinstance(output, Tensor):
        raise ValueError(f"the network returned {type(output).__name__}; a tensor is needed (is it in training mode?)")
    if output.ndim != len(window) + 2 or 0 in output.shape:
        raise ValueError(
            f"the network made {tuple(output.shape)} of a window of {' x '.join(map(str, window))}; (N, K, *output) is needed"
        )
    ratios = [Fraction(n, w) for n, w in zip(output.shape[2:], window, strict=True)]
    if any(1 not in (r.numerator, r.denominator) for r in ratios):
        raise ValueError(
            f"the network made {' x '.join(map(str, output.shape[2:]))} of a window of {' x '.join(map(str, window))}; "
            "every extent must be a multiple or a whole fraction of the window's"
        )
    return ratios


def _checked(network, inputs, window, overlap, batch_size, blend, margin, device):
    """The arguments, completed; raises what `tiled` says."""
    window = tuple(int(n) for n in window)
    if inputs.ndim != len(window) + 2:
        raise ValueError(
            f"inputs {tuple(inputs.shape)} have {inputs.ndim - 2} spatial axes, the window {window} has {len(window)}"
        )
    if not window or min(window) < 1:
        raise ValueError(f"window is {window}; extents are at least 1")
    if 0 in inputs.shape:
        raise ValueError(f"inputs {tuple(inputs.shape)} are empty")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}; it is at least 0 and below 1")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it is at least 1")
    if blend not in ("gaussian", "constant"):
        raise ValueError(f"blend is '{blend}'; it is 'gaussian' or 'constant'")
    margin = (margin,) * len(window) if isinstance(margin, int) else tuple(margin)
    if len(margin) != len(window) or min(margin) < 0:
        raise ValueError(f"margin is {margin}; one number of at least 0 is needed for each of {len(window)} axes")
    if device is None:
        parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
        device = inputs.device if parameter is None else parameter.device
    return window, margin, torch.device(device)
