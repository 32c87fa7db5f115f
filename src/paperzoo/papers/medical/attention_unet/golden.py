"""Writes `golden.safetensors`: what the authors' network answers for weights and volumes that can be written down.

    python -m paperzoo.papers.medical.attention_unet.golden Attention-Gated-Networks

takes the folder of a checkout of github.com/ozan-oktay/Attention-Gated-Networks (its `models` is imported with empty `__init__` files, as those pull in
more than the network). `parity.py` makes the same weights and volumes by the same rule and compares.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import torch
from torch import Tensor, nn

FILE = Path(__file__).with_name("golden.safetensors")
CLASSES = 3
SIZE = (16, 32, 16)


def noise(shape: tuple[int, ...], phase: float = 0.0) -> Tensor:
    """Numbers between 0 and 1 that look random and need no generator."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((n * 12.9898 + phase).sin() * 437.585).remainder(1).float().reshape(shape)


@torch.no_grad()
def write_weights(model: nn.Module) -> nn.Module:
    """Every parameter and buffer filled with `noise`, by the order of the names; variances and scales around 1."""
    state = model.state_dict()
    for phase, name in enumerate(sorted(state)):
        value = state[name]
        if name.endswith("num_batches_tracked"):
            continue
        values = noise(tuple(value.shape), phase) - 0.5
        if value.ndim == 5:
            value.copy_(values * 4 / value[0].numel() ** 0.5)
        elif name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
            value.copy_(1 + values)
        else:
            value.copy_(values)
    return model


def volumes() -> Tensor:
    return noise((2, 1, *SIZE), 0.5) * 2 - 1


def answers(model: nn.Module) -> dict[str, Tensor]:
    """Every eighth logit in eval; and, in double precision, the training loss and the length of each parameter's gradient, by the order of the names."""
    with torch.no_grad():
        logits = model.eval()(volumes())
    model = model.double().train()
    loss = model(volumes().double()).square().mean()
    names, parameters = zip(*sorted(model.named_parameters()), strict=True)
    lengths = torch.stack([g.norm() for g in torch.autograd.grad(loss, parameters)])
    model.float()
    return {"logits": logits.flatten()[::8].contiguous(), "loss": loss.detach(), "gradients": lengths}


def main() -> None:
    from safetensors.torch import save_file

    root = Path(sys.argv[1])
    for name in ("models", "models.networks", "models.layers"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[name] = package
    from models.networks.unet_CT_single_att_dsv_3D import unet_CT_single_att_dsv_3D

    save_file(answers(write_weights(unet_CT_single_att_dsv_3D(4, CLASSES, True, 1))), FILE)


if __name__ == "__main__":
    main()
