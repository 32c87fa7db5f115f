"""RCAN: Image Super-Resolution Using Very Deep Residual Channel Attention Networks (Zhang et al., ECCV 2018, arXiv:1807.02758).

Residual in residual: ten groups of twenty blocks, each block, each group and the whole trunk with a skip of its own, so that what the small image shows
already goes around the layers; in each block the channels are weighed by a squeeze-and-excitation.

Images are (B, in_channels, H, W) in [0, 1]; inside they have 0 to 255, less the mean of DIV2K, as in the released code.
Parameter names are those of the released code, but for the two layers of channel attention, which are `classification/senet`'s;
`from_official` converts the authors' files.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from paperzoo.papers.classification.senet.model import SqueezeExcitation
from paperzoo.papers.restoration.edsr.model import MeanShift, Upsampler

RANGE = 255.0


class ChannelAttentionBlock(nn.Module):
    """RCAB: F + attention(W2 relu(W1 F)) (sec. 3.4). (B, C, H, W) -> the same.

    Args:
        channels: C.
        reduction: by how much attention narrows the channels.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            SqueezeExcitation(channels, channels // reduction),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ResidualGroup(nn.Module):
    """F + W(blocks(F)): the short skip of residual in residual (sec. 3.2). (B, C, H, W) -> the same."""

    def __init__(self, channels: int, blocks: int, reduction: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(ChannelAttentionBlock(channels, reduction) for _ in range(blocks)),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class RCAN(nn.Module):
    """Images (B, in_channels, H, W) in [0, 1] -> images (B, in_channels, scale H, scale W), not clipped.

    Args:
        scale: 2, 3, 4 or 8.
        groups: residual groups.
        blocks: blocks in each group.
        channels: of the trunk.
        reduction: by how much channel attention narrows them.
        in_channels: 3 for colour, as published, or 1.
    """

    def __init__(
        self,
        scale: int = 4,
        groups: int = 10,
        blocks: int = 20,
        channels: int = 64,
        reduction: int = 16,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.sub_mean, self.add_mean = MeanShift(RANGE, -1, in_channels), MeanShift(RANGE, 1, in_channels)
        self.head = nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1))
        self.body = nn.Sequential(
            *(ResidualGroup(channels, blocks, reduction) for _ in range(groups)),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.tail = nn.Sequential(Upsampler(scale, channels), nn.Conv2d(channels, in_channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        shallow = self.head(self.sub_mean(x * RANGE))
        deep = shallow + self.body(shallow)  # the long skip
        return self.add_mean(self.tail(deep)) / RANGE


# -- variants ----------------------------------------------------------------------------------------------------------


def rcan_x2(in_channels: int = 3, **settings) -> RCAN:
    return RCAN(**{"scale": 2, "in_channels": in_channels, **settings})


def rcan_x3(in_channels: int = 3, **settings) -> RCAN:
    return RCAN(**{"scale": 3, "in_channels": in_channels, **settings})


def rcan_x4(in_channels: int = 3, **settings) -> RCAN:
    """10 groups of 20 blocks, 64 channels, more than 400 convolutions; 15.6M parameters."""
    return RCAN(**{"scale": 4, "in_channels": in_channels, **settings})


def rcan_x8(in_channels: int = 3, **settings) -> RCAN:
    return RCAN(**{"scale": 8, "in_channels": in_channels, **settings})


def rcan_small_x2(in_channels: int = 3, **settings) -> RCAN:
    """Two groups of two blocks with 16 channels; not in the paper, for seconds on a CPU."""
    return RCAN(
        **{"scale": 2, "in_channels": in_channels, "groups": 2, "blocks": 2, "channels": 16, "reduction": 4, **settings}
    )


# -- checkpoints -------------------------------------------------------------------------------------------------------


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names of the two layers of channel attention to those of `SqueezeExcitation`; all others are the same."""
    layers = {"0": "fc1", "2": "fc2"}
    return {re.sub(r"conv_du\.([02])\.", lambda m: f"{layers[m[1]]}.", name): value for name, value in state.items()}
