"""Writes `golden.safetensors`: what anomalib and FrEIA answer for weights and features that can be written down.

    python -m paperzoo.papers.anomaly.fastflow.golden path/to/anomalib path/to/FrEIA

needs the folders of both packages (2.7.0 and 0.2 were used) and timm. Of anomalib only the flow, the loss and the map are run; its
training framework is not imported. `parity.py` makes the same weights and features by the same rule and compares.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from paperzoo.papers.anomaly.padim.golden import bare, noise

FILE = Path(__file__).with_name("golden.safetensors")
SHAPES = ((2, 7, 8, 6), (2, 10, 4, 3))  # odd and even numbers of channels
STEPS, RATIO = 4, 0.7
SIZE = (16, 12)


def features() -> list[Tensor]:
    return [2 * noise(shape, i) - 1 for i, shape in enumerate(SHAPES)]


@torch.no_grad()
def write_weights(parameters: dict[str, Tensor]) -> None:
    """Subnets, scales and offsets filled with `noise`, by the order of their names (`0.subnet.0.bias`, `0.global_scale`, …)."""
    for phase, name in enumerate(sorted(parameters)):
        value = parameters[name]
        values = noise(tuple(value.shape), phase)
        if name.endswith("global_scale"):
            value.copy_(7 + 6 * values)
        else:
            value.copy_((values - 0.5) * (6 / value[0].numel() ** 0.5 if value.ndim > 1 and value.shape[0] > 1 else 1))


def order(channels: int, step: int) -> Tensor:
    """The permutation of a step: int64 (channels,)."""
    return noise((channels,), 20 + step).argsort()


def main(anomalib: Path, freia: Path) -> None:
    from safetensors.torch import save_file

    sys.path.insert(0, str(freia))
    parts = "anomalib.models.components"
    bare(anomalib, "anomalib", "anomalib.models", "anomalib.models.image", "anomalib.models.image.fastflow")
    bare(anomalib, parts, f"{parts}.flow", "anomalib.data", "omegaconf")
    sys.modules["anomalib.data"].InferenceBatch = dict
    sys.modules["omegaconf"].ListConfig = list
    sys.modules[f"{parts}.flow"].AllInOneBlock = import_module(f"{parts}.flow.all_in_one_block").AllInOneBlock
    folder = "anomalib.models.image.fastflow"
    make = import_module(f"{folder}.torch_model").create_fast_flow_block
    loss = import_module(f"{folder}.loss").FastflowLoss()
    generator = import_module(f"{folder}.anomaly_map").AnomalyMapGenerator(SIZE)

    found, hidden, determinants = {}, [], []
    for level, x in enumerate(features()):
        flow = make(list(x.shape[1:]), conv3x3_only=False, hidden_ratio=RATIO, flow_steps=STEPS)
        prepare(flow)
        z, determinant = flow(x)
        found |= {f"{level}.z": z, f"{level}.log_determinant": determinant, f"{level}.inverse": flow(z, rev=True)[0]}
        hidden.append(z)
        determinants.append(determinant)
        for step, block in enumerate(flow.module_list):
            found[f"{level}.w_perm.{step}"] = block.w_perm.data
        value = loss([z], [determinant])
        value.backward(retain_graph=True)
        first = flow.module_list[0]
        found |= {
            f"{level}.gradient.scale": first.global_scale.grad,
            f"{level}.gradient.kernel": first.subnet[0].weight.grad,
        }
    found |= {"loss": loss(hidden, determinants), "map": generator(hidden)[:, 0]}
    save_file({name: value.detach().contiguous().clone() for name, value in found.items()}, str(FILE))


def prepare(flow: nn.Module) -> None:
    """Weights and permutations of FrEIA's sequence."""
    blocks = list(flow.module_list)
    write_weights({f"{i}.{n}": p for i, b in enumerate(blocks) for n, p in b.named_parameters() if "w_perm" not in n})
    for step, block in enumerate(blocks):
        matrix = torch.zeros(block.in_channels, block.in_channels)
        matrix[torch.arange(block.in_channels), order(block.in_channels, step)] = 1
        block.w_perm.data = matrix[..., None, None]
        block.w_perm_inv.data = matrix.T.contiguous()[..., None, None]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
