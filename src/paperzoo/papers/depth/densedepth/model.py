"""DenseDepth: High Quality Monocular Depth Estimation via Transfer Learning (Alhashim & Wonka, 2018, arXiv:1812.11941).

A DenseNet without its head, and a decoder of four blocks: enlarge twofold by bilinear interpolation, join with the encoder's map of
that size, two 3x3 convolutions with leaky ReLUs (sec. 3.1 and the appendix's table). No batch norm in the decoder, no other tricks.

Images are (B, 3, H, W) in [0, 1], as they are: neither the released training nor testing normalises them. The answer is (B, 1, H/2, W/2),
the reciprocal m / depth (see `technique`).

The encoder is torchvision's DenseNet under torchvision's names (`encoder.features.…`), the decoder has the names of the authors' PyTorch
files. Those put the whole classifier into `encoder.original_model`; `from_official` takes it out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.densenet import DenseNet

# torchvision's published files write denselayer1.norm.1, its network denselayer1.norm1
OLD_NAME = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_mean|running_var|num_batches_tracked))$"
)


class Encoder(nn.Module):
    """A DenseNet's maps: after the first ReLU, the first pooling, two transitions, and the end; strides 2, 4, 8, 16, 32."""

    def __init__(self, growth_rate: int, blocks: Sequence[int], stem: int) -> None:
        super().__init__()
        self.features = DenseNet(growth_rate, tuple(blocks), stem, num_classes=1).features
        self.channels = [stem, stem]
        channels = stem
        for i, layers in enumerate(blocks):
            channels += layers * growth_rate
            if i < len(blocks) - 1:
                channels //= 2
            if i < 2 or i == len(blocks) - 1:
                self.channels.append(channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps, x = [], images
        for name, layer in self.features.named_children():
            x = layer(x)
            if name in ("relu0", "pool0", "transition1", "transition2"):
                maps.append(x)
        return [*maps, F.relu(x)]


class UpBlock(nn.Module):
    """Enlarge to the skip's size, join, two convolutions. (B, C, h, w), (B, S, H, W) -> (B, out_channels, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convA = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.convB = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, skip.shape[-2:], mode="bilinear", align_corners=True)
        x = F.leaky_relu(self.convA(torch.cat([x, skip], 1)), 0.2)
        return F.leaky_relu(self.convB(x), 0.2)


class Decoder(nn.Module):
    """The encoder's five maps, finest first -> (B, 1, H/2, W/2).

    Args:
        channels: of the maps.
        features: of the first 1x1 convolution; each block has half of the one before. The paper takes as many as the encoder ends with.
    """

    def __init__(self, channels: Sequence[int], features: int) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(channels[-1], features, 1)
        inside = features
        for i, skip in enumerate(reversed(channels[:-1]), 1):
            self.add_module(f"up{i}", UpBlock(inside + skip, features // 2**i))
            inside = features // 2**i
        self.conv3 = nn.Conv2d(inside, 1, 3, padding=1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = self.conv2(maps[-1])
        for block, skip in zip((self.up1, self.up2, self.up3, self.up4), reversed(maps[:-1]), strict=True):
            x = block(x, skip)
        return self.conv3(x)


class DenseDepth(nn.Module):
    """Images (B, 3, H, W) in [0, 1], 32 pixels or more each way -> m / depth (B, 1, H/2, W/2), odd sizes rounded up."""

    def __init__(self, growth_rate: int, blocks: Sequence[int], stem: int, features: int | None = None) -> None:
        super().__init__()
        self.encoder = Encoder(growth_rate, blocks, stem)
        self.decoder = Decoder(self.encoder.channels, features or self.encoder.channels[-1])

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images))

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        """Take over a DenseNet classifier's weights, torchvision's published files included; its dense layer is left out."""
        renamed = {OLD_NAME.sub(r"\1\2", name): tensor for name, tensor in state.items()}
        self.encoder.load_state_dict({k: v for k, v in renamed.items() if not k.startswith("classifier.")})


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' PyTorch names: the classifier lies in `encoder.original_model`, its dense layer is left out."""
    inside = "encoder.original_model."
    return {
        OLD_NAME.sub(r"\1\2", name).replace(inside, "encoder."): tensor
        for name, tensor in state.items()
        if not name.startswith(inside + "classifier.")
    }


def densedepth169() -> DenseDepth:
    """The paper's network on DenseNet-169: 42.6M parameters."""
    return DenseDepth(32, (6, 12, 32, 32), 64)


def densedepth169_half() -> DenseDepth:
    """DenseNet-169 and a decoder of half the features, the released code's default."""
    return DenseDepth(32, (6, 12, 32, 32), 64, 832)


def densedepth201_half() -> DenseDepth:
    """DenseNet-201 and a decoder of half the features (ablation, sec. 4.4)."""
    return DenseDepth(32, (6, 12, 48, 32), 64, 960)


def densedepth_slim() -> DenseDepth:
    """Not of the paper: narrow and shallow, for small images and learning from scratch."""
    return DenseDepth(12, (3, 3, 3, 3), 24, 128)
