"""What the authors' PyTorch network answers, as spandrel carries it. Run with spandrel importable; writes golden.safetensors.

Weights and pictures follow from sines, so that neither has to be stored.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

VERSION = "0.4.2"
NETWORKS = {
    "17 layers, grey": (17, 64, 1),
    "20 layers, colour": (20, 64, 3),
    "5 layers": (5, 8, 3),
}  # depth, width, channels
SHAPES = ((1, 32, 40), (2, 17, 23))  # pictures, height, width


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A value for every tensor of a state, from its size and its place alone; variances are positive."""
    found = {}
    for k, (name, like) in enumerate(state.items()):
        wave = torch.sin(torch.arange(like.numel(), dtype=torch.float64) * 0.7391 + 1.3 * k).reshape(like.shape)
        if name.endswith("num_batches_tracked"):
            found[name] = like
        elif name.endswith("running_var"):
            found[name] = (1 + 0.5 * wave).float()
        elif like.ndim == 1:
            found[name] = (0.1 * wave + (1 if name.endswith("weight") else 0)).float()
        else:
            found[name] = (wave * (2 / like[0].numel()) ** 0.5 * 1.6).float()
    return found


def picture(channels: int, count: int, height: int, width: int) -> Tensor:
    size = count * channels * height * width
    wave = torch.sin(torch.arange(size, dtype=torch.float64) * 0.331) * torch.sin(torch.arange(size) * 0.0173)
    return (0.5 + 0.5 * wave).float().reshape(count, channels, height, width)


def main() -> None:
    from safetensors.torch import save_file
    from spandrel.architectures.DnCNN import DnCNN

    answers = {}
    with torch.inference_mode():
        for name, (depth, width, channels) in NETWORKS.items():
            network = DnCNN(in_nc=channels, out_nc=channels, nc=width, nb=depth, act_mode="BR").eval()
            network.load_state_dict(weights(network.state_dict()))
            for i, shape in enumerate(SHAPES):
                answers[f"{name}.{i}"] = network(picture(channels, *shape)).contiguous()
    save_file(answers, str(Path(__file__).with_name("golden.safetensors")))


if __name__ == "__main__":
    main()
