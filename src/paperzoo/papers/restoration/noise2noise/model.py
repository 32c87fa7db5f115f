"""The U-Net of Noise2Noise's appendix (table 2), with the names of the released TensorFlow code.

Five halvings by pooling, 48 channels on the way down; on the way up the nearest pixel is repeated, the map of the same size from before is put beside it, and two
convolutions follow. LeakyReLU of 0.1, no normalisation; the picture itself is the last thing put beside.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEPTH = 5


class NoiseUNet(nn.Module):
    """(B, C, H, W) around [0, 1] to the same, any size: what is no multiple of 32 is continued by its border and cropped again.

    Args:
        width: channels on the way down; twice as many on the way up. The last two layers have 4/3 and 2/3 of it.
    """

    scale = 1

    def __init__(self, in_channels: int = 3, width: int = 48) -> None:
        super().__init__()
        self.enc_conv0 = nn.Conv2d(in_channels, width, 3, padding=1)
        for k in range(1, DEPTH + 2):
            setattr(self, f"enc_conv{k}", nn.Conv2d(width, width, 3, padding=1))
        for k in range(DEPTH, 1, -1):
            entering = (width if k == DEPTH else 2 * width) + width
            setattr(self, f"dec_conv{k}", nn.Conv2d(entering, 2 * width, 3, padding=1))
            setattr(self, f"dec_conv{k}b", nn.Conv2d(2 * width, 2 * width, 3, padding=1))
        last = (4 * width // 3, 2 * width // 3)
        self.dec_conv1a = nn.Conv2d(2 * width + in_channels, last[0], 3, padding=1)
        self.dec_conv1b = nn.Conv2d(last[0], last[1], 3, padding=1)
        self.dec_conv1 = nn.Conv2d(last[1], in_channels, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if module is self.dec_conv1 else "relu")
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        multiple = 2**DEPTH
        # the released network works with [-1/2, 1/2]
        x = F.pad(images - 0.5, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        passed = [x]
        x = self.act(self.enc_conv0(x))
        for k in range(1, DEPTH + 1):
            x = F.max_pool2d(self.act(getattr(self, f"enc_conv{k}")(x)), 2)
            if k < DEPTH:
                passed.append(x)
        x = self.act(self.enc_conv6(x))
        for k in range(DEPTH, 1, -1):
            x = torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), passed.pop()], 1)
            x = self.act(getattr(self, f"dec_conv{k}")(x))
            x = self.act(getattr(self, f"dec_conv{k}b")(x))
        x = torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), passed.pop()], 1)
        x = self.dec_conv1(self.act(self.dec_conv1b(self.act(self.dec_conv1a(x)))))
        return x[..., :height, :width] + 0.5

    @staticmethod
    def act(x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.1)


def n2n_unet(in_channels: int = 3) -> NoiseUNet:
    """As published: 48 channels."""
    return NoiseUNet(in_channels, 48)
