"""Checks of the Fourier neural operator: against `neuralop`, explicit Fourier sums, and the properties the paper claims."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.science.fno.model import FNO, SpectralConv, coordinates, fno1d, fno2d, fno3d, from_official


class ExplicitSums(nn.Module):
    """Eq. (5) written out: one frequency at a time, complex exponentials summed over every grid point."""

    def __init__(self, layer: SpectralConv) -> None:
        super().__init__()
        self.modes = layer.modes
        for name, weight in layer.named_parameters():
            self.register_parameter(name, nn.Parameter(weight.detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[2:]
        points = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=x.dtype) / n for n in grid), indexing="ij"))
        total = x.new_zeros(x.shape[0], self.weights1.shape[1], *grid)
        ranges = [range(-m, m) for m in self.modes[:-1]] + [range(self.modes[-1])]
        for k in itertools.product(*ranges):
            angle = 2 * math.pi * sum(f * p for f, p in zip(k, points, strict=True))
            wave = torch.polar(torch.ones_like(angle), angle)
            coefficient = (x * wave.conj()).flatten(2).sum(2) / math.prod(grid)  # (B, in)
            which = sum(2**axis for axis, f in enumerate(k[:-1]) if f < 0)
            places = [f + m if f < 0 else f for f, m in zip(k[:-1], self.modes[:-1], strict=True)] + [k[-1]]
            matrix = torch.view_as_complex(getattr(self, f"weights{which + 1}"))[(slice(None), slice(None), *places)]
            mode = (coefficient @ matrix)[(...,) + (None,) * len(grid)] * wave
            total = total + (mode.real if 2 * k[-1] % grid[-1] == 0 else 2 * mode.real)
        return total


def neuralop_weight(layer: SpectralConv) -> Tensor:
    """Our weights in the layout of `neuralop`: one complex tensor, frequencies of the leading axes in rising order."""
    joined = torch.view_as_complex(layer.joined_weights().detach().contiguous())
    for axis, modes in enumerate(layer.modes[:-1]):
        joined = joined.roll(modes, dims=2 + axis)
    return joined


class NeuralopParts(nn.Module):
    """Lifting, spectral convolutions, skips and projection of `neuralop`, with our weights.

    They are joined here and not by its `FNO`: version 2.0 applies the activation twice in a block without channel MLP.
    """

    def __init__(self, ours: FNO) -> None:
        super().__init__()
        from neuralop.models import FNO as Theirs

        width = ours.fc0.out_features
        theirs = Theirs(
            n_modes=(*(2 * m for m in ours.modes[:-1]), 2 * (ours.modes[-1] - 1)),
            in_channels=ours.fc0.in_features,
            out_channels=ours.out_channels,
            hidden_channels=width,
            lifting_channel_ratio=0,
            projection_channel_ratio=ours.fc1.out_features / width,
            positional_embedding=None,
            use_channel_mlp=False,
        )
        with torch.no_grad():
            for mine, other in zip(
                (ours.fc0, ours.fc1, ours.fc2), (*theirs.lifting.fcs, *theirs.projection.fcs), strict=True
            ):
                other.weight.copy_(mine.weight[..., None])
                other.bias.copy_(mine.bias)
            for i, (layer, skip) in enumerate(zip(theirs.fno_blocks.convs, theirs.fno_blocks.fno_skips, strict=True)):
                layer.weight.tensor.copy_(neuralop_weight(getattr(ours, f"conv{i}")))
                layer.bias.copy_(getattr(ours, f"w{i}").bias.reshape(layer.bias.shape))
                skip.conv.weight.copy_(getattr(ours, f"w{i}").weight.flatten(2))
        self.theirs = theirs

    def forward(self, x: Tensor) -> Tensor:
        v = self.theirs.lifting(torch.cat([x, coordinates(x)], dim=1))
        blocks = self.theirs.fno_blocks
        for i, (layer, skip) in enumerate(zip(blocks.convs, blocks.fno_skips, strict=True)):
            v = layer(v) + skip(v)
            v = nn.functional.gelu(v) if i + 1 < len(blocks.convs) else v
        return self.theirs.projection(v)


def cases() -> Iterator[Case]:
    import neuralop
    from neuralop.layers.spectral_convolution import SpectralConv as Theirs

    against = f"neuralop {neuralop.__version__}"
    torch.manual_seed(0)
    for modes, grid in (((5,), (33,)), ((5,), (16,)), ((4, 3), (10, 12)), ((2, 3, 3), (6, 8, 7))):
        layer = SpectralConv(3, 4, modes)
        for weight in layer.parameters():
            nn.init.normal_(weight)
        theirs = Theirs(3, 4, n_modes=(*(2 * m for m in modes[:-1]), 2 * (modes[-1] - 1)), bias=False)
        theirs.weight.tensor.data.copy_(neuralop_weight(layer))
        x = torch.randn(2, 3, *grid)
        note = (
            "neuralop shifts back with fftshift, which is off by one on leading axes of odd length; those are even here"
        )
        yield Case(
            f"spectral convolution, grid {grid}",
            layer,
            theirs,
            (x,),
            against,
            gradients=True,
            note=note if len(grid) > 1 else "",
        )
        exact = copy.deepcopy(layer).double()
        slow = ExplicitSums(exact)
        yield Case(
            f"spectral convolution, grid {grid}, slowly",
            exact,
            slow,
            (x.double(),),
            "eq. (5), one mode at a time",
            gradients=True,
            rtol=1e-9,
            atol=1e-10,
        )

    for modes, grid in (((5,), (8,)), ((3, 4), (7, 9)), ((2, 2, 3), (5, 4, 4))):
        layer = SpectralConv(2, 2, modes).double()
        x = torch.randn(2, 2, *grid, dtype=torch.float64)
        title = f"spectral convolution at its limits, grid {grid}"
        yield Case(title, layer, ExplicitSums(layer), (x,), "eq. (5)", gradients=True, rtol=1e-9, atol=1e-10)

    for name, network, shape in (
        ("fno1d at the published size", fno1d(), (2, 1, 256)),
        ("fno1d on a grid of odd length", fno1d(modes=6, width=16), (3, 1, 45)),
        ("fno2d unpadded", fno2d(modes=5, width=16, padding=0), (2, 1, 20, 23)),
        ("fno3d unpadded", fno3d(in_channels=2, modes=3, width=8, padding=0), (1, 2, 8, 10, 9)),
    ):
        x = torch.randn(shape)
        yield Case(name, network, NeuralopParts(network), (x,), against, gradients=True)

    for name, network, shape in (
        ("fno1d", fno1d(modes=6, width=8), (2, 1, 32)),
        ("fno2d with padding", fno2d(modes=4, width=6), (2, 1, 14, 15)),
        ("fno3d with padding", fno3d(in_channels=2, modes=3, width=4), (1, 2, 8, 8, 7)),
    ):
        x = torch.randn(shape)
        yield Case(f"{name}, as exported", network, Matrices(network), (x,), "truncated DFT matrices", atol=1e-6)

    network = fno1d(modes=4, width=6).double()
    official = {
        n: torch.view_as_complex(p.detach()) if ".weights" in n else p.detach() for n, p in network.state_dict().items()
    }
    official["bn0.weight"] = torch.ones(6)
    yield Case(
        "from_official", lambda: from_official(official), lambda: dict(network.state_dict()), (), "the released names"
    )

    # sec. 4: a layer is defined between functions. For band-limited functions the grid does not matter at all.
    layer = SpectralConv(1, 2, (6,)).double()
    waves = random_waves(5)
    yield Case(
        "the same function on 16 and on 64 points",
        lambda: layer(waves(64))[..., ::4],
        lambda: layer(waves(16)),
        (),
        "resolution invariance, sec. 4",
        rtol=1e-9,
        atol=1e-10,
    )


class Matrices(nn.Module):
    """A network whose spectral convolutions run as they are exported."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = [network]

    def forward(self, x: Tensor) -> Tensor:
        layers = [m for m in self.network[0].modules() if isinstance(m, SpectralConv)]
        for layer in layers:
            layer.forward = layer.forward_matrices
        try:
            return self.network[0](x)
        finally:
            for layer in layers:
                del layer.forward


def random_waves(highest: int):
    """A random periodic function with frequencies up to `highest`, to be sampled on n points: (1, 1, n) float64."""
    generator = torch.Generator().manual_seed(0)
    cosines, sines = torch.randn(2, highest + 1, generator=generator, dtype=torch.float64)

    def sample(n: int) -> Tensor:
        angle = torch.arange(highest + 1)[:, None] * torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
        return (cosines[:, None] * angle.cos() + sines[:, None] * angle.sin()).sum(0)[None, None]

    return sample


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: the same weights on a grid of 64 x 64, without padding."""

    def fields(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 1, 64, 64),)

    def ours() -> nn.Module:
        return fno2d(padding=0)

    return {"fno2d": Pair(ours, lambda: NeuralopParts(ours()), fields, "neuraloperator:FNO")}
