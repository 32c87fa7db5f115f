"""DnCNN: a plain stack of convolutions that finds the noise, which is then taken away.

    v = R(y),   x = y - R(y)            (section III)

Conv + ReLU, then depth - 2 times Conv + BatchNorm + ReLU, then Conv; 64 kernels of 3 x 3, padded with zeros, nothing is pooled. So a pixel of
the answer sees 2 * depth + 1 pixels: 35 for 17 layers, as the patches of the methods of its time.

Parameter names are those of the authors' PyTorch code. The files they released have the batch norms merged into the convolutions; `from_official`
puts batch norms that change nothing back in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS = 1e-4  # of batch norm, as the authors'; torch's default is 1e-5


class DnCNN(nn.Module):
    """Noisy (B, C, H, W) to denoised (B, C, H, W), values around [0, 1], any size.

    Args:
        depth: convolutions, at least 2. width: kernels of each. in_channels: 1 (grey) or 3 (colour), as the authors' CDnCNN.
    """

    scale = 1

    def __init__(self, depth: int = 17, width: int = 64, in_channels: int = 1) -> None:
        super().__init__()
        if depth < 2:
            raise ValueError(f"depth is {depth}; it is at least 2")
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU(inplace=True)]
        for _ in range(depth - 2):
            layers += [
                nn.Conv2d(width, width, 3, padding=1),
                nn.BatchNorm2d(width, eps=EPS),
                nn.ReLU(inplace=True),
            ]
        self.model = nn.Sequential(*layers, nn.Conv2d(width, in_channels, 3, padding=1))
        self.receptive_radius = depth
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al. (section IV-A)
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.model[-1].weight, std=1e-3)  # the answer starts as the picture itself

    def forward(self, noisy: Tensor) -> Tensor:
        return noisy - self.model(noisy)


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' released names, without batch norm ("model.0", "model.2", "model.4", …), to those here.

    The batch norm after each inner convolution gets statistics and weights under which it returns its input.

    Raises:
        ValueError: if the state is not of such a network.
    """
    numbers = sorted({int(name.split(".")[1]) for name in state if name.startswith("model.")})
    if (
        len(numbers) < 2
        or any("running_mean" in name for name in state)
        or numbers != list(range(0, 2 * len(numbers), 2))
    ):
        raise ValueError("not a released DnCNN: the layers model.0, model.2, model.4, … are expected")
    found = {}
    for k, number in enumerate(numbers):
        place = 0 if k == 0 else 3 * k - 1
        for part in ("weight", "bias"):
            found[f"model.{place}.{part}"] = state[f"model.{number}.{part}"]
        if 0 < k < len(numbers) - 1:
            like = state[f"model.{number}.bias"]
            norm = f"model.{place + 1}"
            found |= {f"{norm}.weight": torch.ones_like(like), f"{norm}.bias": torch.zeros_like(like)}
            found |= {
                f"{norm}.running_mean": torch.zeros_like(like),
                f"{norm}.running_var": torch.full_like(like, 1 - EPS),
            }
            found[f"{norm}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    return found


def dncnn_s(in_channels: int = 1) -> DnCNN:
    """DnCNN-S, for one known level of noise: 17 layers."""
    return DnCNN(17, 64, in_channels)


def dncnn_b(in_channels: int = 1) -> DnCNN:
    """DnCNN-B, for unknown levels up to 55 (CDnCNN-B with three channels): 20 layers."""
    return DnCNN(20, 64, in_channels)


def dncnn_3(in_channels: int = 1) -> DnCNN:
    """DnCNN-3, one network for noise, enlarged small pictures and JPEG artefacts: 20 layers."""
    return DnCNN(20, 64, in_channels)


def dncnn_slim(in_channels: int = 1) -> DnCNN:
    """Not in the paper: 6 layers of 32 kernels, to learn in seconds."""
    return DnCNN(6, 32, in_channels)
