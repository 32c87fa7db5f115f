"""SuperPoint: interest points and descriptors from one network (DeTone et al., CVPR workshops 2018, arXiv:1712.07629), sec. 3.

    model(pictures)     grey (B, 1, H, W) in [0, 1], sides multiples of 8
        in eval         heat (B, H, W), each pixel's probability; descriptors (B, 256, H / 8, W / 8) of unit length
        in training     logits (B, 65, H / 8, W / 8), a cell's 64 pixels row by row and "no point"; the same descriptors

A shorter encoder has smaller cells: with three pairs of convolutions they are 4 pixels wide, and there are 17 classes.

Parameter names are those of the authors' file, which loads as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class SuperPoint(nn.Module):
    """See the module's docstring.

    Args:
        widths: channels of the encoder's pairs of convolutions, four in the paper; between two pairs the resolution is halved.
        head: channels of the first convolution of both heads.
        descriptor_size: D.
        batch_norm: after every 3x3 convolution; not of the paper, but of most who trained it again.
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 64, 128, 128),
        head: int = 256,
        descriptor_size: int = 256,
        batch_norm: bool = False,
        in_channels: int = 1,
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"widths has {len(widths)} entries; the encoder has 2 pairs of convolutions or more")
        self.stride, self.pairs = 2 ** (len(widths) - 1), len(widths)
        before = in_channels
        for i, width in enumerate(widths, 1):
            for k in "ab":
                self.add_module(f"conv{i}{k}", nn.Conv2d(before, width, 3, padding=1))
                self.add_module(f"bn{i}{k}", nn.BatchNorm2d(width) if batch_norm else nn.Identity())
                before = width
        for k, size in (("P", self.stride**2 + 1), ("D", descriptor_size)):
            self.add_module(f"conv{k}a", nn.Conv2d(before, head, 3, padding=1))
            self.add_module(f"bn{k}a", nn.BatchNorm2d(head) if batch_norm else nn.Identity())
            self.add_module(f"conv{k}b", nn.Conv2d(head, size, 1))

        for module in self.modules():  # not said in the paper; torch's own would let the signal fade over ten layers
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def encode(self, x: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, C, H / 8, W / 8), sec. 3.1."""
        for i in range(1, self.pairs + 1):
            x = self.layer(f"{i}b", self.layer(f"{i}a", x))
            if i < self.pairs:
                x = F.max_pool2d(x, 2)
        return x

    def layer(self, name: str, x: Tensor) -> Tensor:
        return F.relu(self.get_submodule(f"bn{name}")(self.get_submodule(f"conv{name}")(x)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.encode(x)
        logits = self.convPb(self.layer("Pa", maps))
        descriptors = F.normalize(self.convDb(self.layer("Da", maps)), dim=1)
        return (logits, descriptors) if self.training else (heat(logits), descriptors)


def heat(logits: Tensor) -> Tensor:
    """Softmax over a cell's 64 pixels and "no point", which is dropped then; cells laid out as pixels: (B, 65, h, w) -> (B, 8 h, 8 w)."""
    return F.pixel_shuffle(logits.softmax(1)[:, :-1], math.isqrt(logits.shape[1] - 1))[:, 0]


def superpoint(**arguments) -> SuperPoint:
    return SuperPoint(**arguments)


def superpoint_slim(**arguments) -> SuperPoint:
    """Not of the paper: few channels, cells of 4 pixels, with batch norm. For small pictures and small machines."""
    return SuperPoint(**{"widths": (8, 16, 32), "head": 48, "descriptor_size": 48, "batch_norm": True} | arguments)


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file that is shared with the transformers library; the authors' own, superpoint_v1.pth, has our names already."""
    heads = {
        "keypoint_decoder.conv_score_a": "convPa",
        "keypoint_decoder.conv_score_b": "convPb",
        "descriptor_decoder.conv_descriptor_a": "convDa",
        "descriptor_decoder.conv_descriptor_b": "convDb",
    }
    names = {f"encoder.conv_blocks.{i}.conv_{k}": f"conv{i + 1}{k}" for i in range(4) for k in "ab"} | heads
    parts = ((key.removeprefix("superpoint.").rpartition("."), value) for key, value in state.items())
    return {f"{names[module]}.{kind}": value for (module, _, kind), value in parts}
