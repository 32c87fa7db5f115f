"""Writes `golden.safetensors`: what the authors' PyTorch code answers for weights and pictures that can be written down.

    python -m paperzoo.papers.pose.stacked_hourglass.golden path/to/pytorch_stacked_hourglass

(commit ceedc14 was used). `parity.py` makes the same weights and pictures by the same rule and compares. All in float64.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

FILE = Path(__file__).with_name("golden.safetensors")
STACKS, CHANNELS, KEYPOINTS = 2, 16, 3
SIZES = {"square": (2, 64, 64), "tall": (1, 128, 64)}


def noise(shape: tuple[int, ...], phase: float = 0.0) -> Tensor:
    """Numbers between -0.5 and 0.5 that look random and need no generator."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((n * 12.9898 + phase).sin() * 437.585).remainder(1).reshape(shape) - 0.5


@torch.no_grad()
def write_weights(network: nn.Module) -> nn.Module:
    """Every parameter and statistic filled with `noise`, by its name; float64."""
    for name, value in network.double().state_dict().items():
        if not value.is_floating_point():
            continue
        values = noise(tuple(value.shape), sum(map(ord, name)) % 1009)
        if value.ndim > 1:
            value.copy_(values * 3.0 / value[0].numel() ** 0.5)
        elif name.endswith("running_var") or ("bn" in name and name.endswith("weight")):
            value.copy_(1 + 0.4 * values)
        else:
            value.copy_(0.2 * values)
    return network


def pictures(size: tuple[int, int, int]) -> Tensor:
    """float64 (B, 3, H, W) in [0, 1]."""
    return noise((size[0], 3, *size[1:]), 7.0) + 0.5


def answers(network: nn.Module, call) -> dict[str, Tensor]:
    """The outputs in eval, and of a training step the outputs, the loss and the norms of some gradients."""
    found = {}
    network.eval()
    for name, size in SIZES.items():
        with torch.no_grad():
            found[f"{name} eval"] = call(network, pictures(size))
    network.train()
    output = call(network, pictures(SIZES["square"]))
    loss = output.square().mean((3, 4)).mean(2).sum()
    loss.backward()
    found |= {"square train": output.detach(), "loss": loss.detach()}
    for name, parameter in network.named_parameters():
        if parameter.grad is not None and name.endswith("weight") and parameter.ndim == 4:
            found[f"gradient {name}"] = parameter.grad.norm()
    return found


def main(repository: str) -> None:
    from safetensors.torch import save_file

    sys.path.insert(0, repository)
    from models.posenet import PoseNet

    network = PoseNet(STACKS, CHANNELS, KEYPOINTS)
    # the authors' stem has 64 and 128 channels whatever the features have
    found = answers(write_weights(network), lambda net, x: net(x.permute(0, 2, 3, 1)))
    save_file({name: value.contiguous() for name, value in found.items()}, FILE)
    print(FILE, FILE.stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1])
