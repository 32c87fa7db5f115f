"""Writes golden.safetensors: what the `voxelmorph` package 0.2 (PyTorch) answers for weights and images that follow from a rule.

    pip download --no-deps voxelmorph==0.2 && unzip voxelmorph-0.2-py3-none-any.whl -d DIR
    python -m paperzoo.papers.medical.voxelmorph.golden DIR

Its subpackage `voxelmorph.torch` is loaded alone, as the rest needs TensorFlow or neurite. Two things in it are of their time: it uses
`inspect.getargspec`, which Python no longer has, and its NCC moves a filter to a GPU.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

SIZES = {2: (16, 32), 3: (16, 16, 32)}
FEATURES = [[4, 6, 8, 8], [8, 8, 6, 6, 6, 4, 4]]  # of the small networks that are compared


def rule(shape: tuple[int, ...], number: int) -> Tensor:
    """Values in -1 … 1 that look random and follow from their place."""
    count = torch.Size(shape).numel()
    return (
        torch.sin(torch.arange(count, dtype=torch.float64) * (1.37 + 0.11 * number) + number).mul(7.0).sin().view(shape)
    )


def filled(network: nn.Module, spread: float = 1.0) -> nn.Module:
    """Every parameter by the rule, in the order of their names, at the scale of its fan-in."""
    with torch.no_grad():
        for number, (_, p) in enumerate(sorted(network.named_parameters())):
            p.copy_(rule(tuple(p.shape), number) * (spread * 1.7 / max(1, p[0].numel()) ** 0.5 if p.ndim > 1 else 0.1))
    return network


def images(dimensions: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    shape = (batch, 1, *SIZES[dimensions])
    return tuple((0.5 + 0.5 * rule(shape, number)).float() for number in (50, 51))


def fields(dimensions: int) -> Tensor:
    """A displacement of some voxels, (2, D, *size)."""
    return (2.5 * rule((2, dimensions, *SIZES[dimensions]), 60)).float()


def some(values: Tensor) -> Tensor:
    """Every seventh number, which keeps the file small."""
    return values.detach().flatten()[::7] if values.numel() > 100 else values.detach()


def networks(make) -> Mapping[str, nn.Module]:
    """Name -> network; `make(dimensions, steps, downsize)`."""
    kinds = {
        "plane, displacement": (2, 0, 1),
        "volume, displacement": (3, 0, 1),
        "plane, velocity": (2, 5, 2),
        "volume, velocity": (3, 7, 2),
        "velocity at full size": (2, 4, 1),
    }
    return {name: filled(make(*arguments), 1.4) for name, arguments in kinds.items()}


def theirs(folder: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """The package's `networks` and `losses`."""
    from collections import namedtuple

    spec = namedtuple("Spec", "args varargs keywords defaults")
    inspect.getargspec = lambda f: spec(*inspect.getfullargspec(f)[:4])
    package = types.ModuleType("voxelmorph")
    package.__path__ = [str(folder / "voxelmorph")]
    package.default_unet_features = lambda: [[16, 32, 32, 32], [32, 32, 32, 32, 32, 16, 16]]
    sys.modules["voxelmorph"] = package
    moved = Tensor.to
    Tensor.to = lambda self, *args, **kwargs: self if args[:1] == ("cuda",) else moved(self, *args, **kwargs)
    return tuple(importlib.import_module(f"voxelmorph.torch.{name}") for name in ("networks", "losses"))


def main(folder: Path) -> None:
    from safetensors.torch import save_file

    nets, losses = theirs(folder)
    found: dict[str, Tensor] = {}

    def make(dimensions: int, steps: int, downsize: int) -> nn.Module:
        return nets.VxmDense(SIZES[dimensions], FEATURES, int_steps=steps, int_downsize=downsize)

    for name, network in networks(make).items():
        dimensions = 2 if network.flow.weight.ndim == 4 else 3
        moving, fixed = images(dimensions)
        warped, field = network(moving, fixed, registration=True)
        found[f"{name}: displacement"], found[f"{name}: warped"] = field, warped
        _, raw = network(moving, fixed)
        total = warped.square().mean() + field.square().mean() + raw.square().mean()
        total.backward()
        found[f"{name}: gradients"] = torch.stack([p.grad.norm() for _, p in sorted(network.named_parameters())])
    for dimensions in (2, 3):
        moving, fixed = images(dimensions)
        moving = (0.7 * fixed + 0.3 * moving).requires_grad_(True)
        value = losses.NCC().loss(fixed, moving)
        found[f"ncc {dimensions}"] = torch.stack([value.detach()])
        (found[f"ncc gradient {dimensions}"],) = torch.autograd.grad(value, moving)
    field = fields(3).requires_grad_(True)
    found["gradient loss"] = losses.Grad("l2").loss(None, field)[None]
    (found["gradient loss, gradient"],) = torch.autograd.grad(found["gradient loss"].sum(), field)
    a, b = (images(3)[k].clamp(0, 1) for k in (0, 1))
    found["dice loss"] = losses.Dice().loss(a, b)[None]
    stored = {name: some(value).float().contiguous() for name, value in found.items()}
    save_file(stored, Path(__file__).with_name("golden.safetensors"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
