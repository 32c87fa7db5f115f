"""SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image Segmentation (arXiv 1511.00561).

The encoder is VGG-16 without its dense layers. Each 2x2 max pooling hands on, besides its values, where in the window they were
found; the decoder puts its values back to just those places, everything else zero, and convolutions make the sparse map
dense again (sec. 3, fig. 3). Nothing is learned in the upsampling, and no feature map of the encoder is kept.

`features` has torchvision's names and indices (`vgg16_bn`), so a classifier's weights load by `load_backbone`; pytorchcv's `segnet_cityscapes`
converts with `from_official`. As the released Caffe networks do, convolutions have biases, pooling rounds up, and the
shift of batch norms starts at 0.001. (The paper's text has no biases in SegNet-Basic.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.backbones import load_body
from paperzoo.papers.classification.vgg.model import PLANS, POOL, conv_stack


def pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """2x2 max pooling, rounding up: (B, C, H, W) -> values and indices (int64, place in H * W), each (B, C, ceil(H / 2), ceil(W / 2))."""
    return F.max_pool2d(x, 2, stride=2, ceil_mode=True, return_indices=True)


def unpool(values: Tensor, indices: Tensor, size: Sequence[int]) -> Tensor:
    """Each value at the place its index names in a map of zeros of `size` (H, W), which odd sizes need to be told (fig. 3, left)."""
    return F.max_unpool2d(values, indices, 2, stride=2, output_size=list(size))


def stages(plan: tuple[int, ...]) -> list[list[int]]:
    """The widths between poolings: [[64, 64], [128, 128], …]."""
    blocks: list[list[int]] = [[]]
    for width in plan:
        if width == POOL:
            blocks.append([])
        else:
            blocks[-1].append(width)
    return blocks[:-1]


class SegNet(nn.Module):
    """Images (B, in_channels, H, W) of any size -> logits (B, num_classes, H, W).

    Args:
        plan: widths of the encoder's convolutions, `paperzoo.papers.classification.vgg.model.PLANS`; ends with a pooling.
        drop_rate: dropout after the three deepest poolings and the decoder stages that mirror them (sec. 4.1: 0.5).
    """

    def __init__(
        self,
        plan: tuple[int, ...] = PLANS["D"],
        *,
        num_classes: int = 11,
        in_channels: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.features = conv_stack(plan, batch_norm=True, in_channels=in_channels)
        self.drop_rate = drop_rate
        blocks = stages(plan)
        self.depth = len(blocks)
        self.decoder = (
            nn.ModuleList()
        )  # deepest first: the mirror of each encoder stage, ending in the width of the one above
        for i in reversed(range(self.depth)):
            widths = [*blocks[i][1:], blocks[i - 1][-1]] if i else blocks[i][1:]
            self.decoder.append(conv_stack(tuple(widths), batch_norm=True, in_channels=blocks[i][-1]))
        self.classifier = nn.Conv2d(blocks[0][-1], num_classes, 3, padding=1)
        initialise(self)

    def drop(self, x: Tensor, stage: int) -> Tensor:
        return F.dropout(x, self.drop_rate, self.training and stage >= self.depth - 3)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                size = x.shape[-2:]
                x, indices = pool(x)
                x = self.drop(x, len(kept))
                kept.append((indices, size))
            else:
                x = layer(x)
        for stage in self.decoder:
            indices, size = kept.pop()
            x = self.drop(stage(unpool(x, indices, size)), len(kept))
        return self.classifier(x)

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        """Start from a VGG classifier of the same plan (its state dict), with batch norm or without; its dense layers are left out.

        Raises:
            ValueError: if a weight is missing or has another shape.
        """
        if not any(name.endswith("running_mean") for name in state):  # the paper's: VGG-16 had no batch norm
            plain = sorted({int(name.split(".")[1]) for name in state if name.startswith("features.")})
            here = [i for i, layer in enumerate(self.features) if isinstance(layer, nn.Conv2d)]
            if len(plain) != len(here):
                raise ValueError(f"the weights have {len(plain)} convolutions, this encoder {len(here)}")
            taken = {
                f"{i}.{part}": value
                for i, layer in enumerate(self.features)
                for part, value in layer.state_dict().items()
            }
            for old, new in zip(plain, here, strict=True):
                taken |= {f"{new}.{part}": state[f"features.{old}.{part}"] for part in ("weight", "bias")}
        else:
            taken = {name.removeprefix("features."): v for name, v in state.items() if name.startswith("features.")}
        load_body(self.features, taken)


class SegNetBasic(nn.Module):
    """SegNet-Basic (sec. 3.1): four encoders, four decoders, all of 7x7 convolutions of one width; no activation in the decoder.

    Images (B, in_channels, H, W) -> logits (B, num_classes, H, W). The input is normalised across its channels (the released network's
    LRN, in the place of the paper's local contrast normalisation).
    """

    def __init__(self, width: int = 64, depth: int = 4, *, num_classes: int = 11, in_channels: int = 3) -> None:
        super().__init__()

        def layer(inputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, width, 7, padding=3), nn.BatchNorm2d(width))

        self.encoder = nn.ModuleList(layer(width if i else in_channels) for i in range(depth))
        self.decoder = nn.ModuleList(layer(width) for _ in range(depth))  # deepest first
        self.classifier = nn.Conv2d(width, num_classes, 1)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.local_response_norm(x, 5, alpha=1e-4, beta=0.75, k=1.0)
        kept = []
        for layer in self.encoder:
            x = F.relu(layer(x))
            size = x.shape[-2:]
            x, indices = pool(x)
            kept.append((indices, size))
        for layer in self.decoder:
            x = layer(unpool(x, *kept.pop()))
        return self.classifier(x)


def initialise(network: nn.Module) -> None:
    """He's normal initialisation by fan-in (sec. 3.2), and 0.001 for the shift of batch norms, as released."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 0.001)


def median_frequency_weights(pixels: Tensor, totals: Tensor) -> Tensor:
    """Weights of the classes: the median of their frequencies over each one's own (sec. 3.2, "median frequency balancing").

    Args:
        pixels: (K,), the pixels of each class in the training set.
        totals: (K,), all pixels of the images in which it appears.

    Returns:
        float32 (K,); 0 for a class that never appears, which the median does not count either.
    """
    frequency = pixels.double() / totals.double().clamp(min=1)
    there = frequency > 0
    if not there.any():
        return torch.zeros_like(frequency, dtype=torch.float32)
    median = frequency[there].quantile(0.5)
    return torch.where(there, median / frequency.clamp(min=1e-300), 0.0).float()


def segnet(num_classes: int = 11, in_channels: int = 3, drop_rate: float = 0.0) -> SegNet:
    """The paper's network: VGG-16 and its mirror, 29.4M parameters."""
    return SegNet(num_classes=num_classes, in_channels=in_channels, drop_rate=drop_rate)


def segnet_basic(num_classes: int = 11, in_channels: int = 3) -> SegNetBasic:
    """The small network of the paper's comparison of decoders, 1.4M parameters."""
    return SegNetBasic(num_classes=num_classes, in_channels=in_channels)


def segnet_slim(num_classes: int = 11, in_channels: int = 3, drop_rate: float = 0.0) -> SegNet:
    """Not of the paper: four stages of narrow convolutions, for small images and learning from scratch."""
    plan = (16, 16, POOL, 32, 32, POOL, 48, 48, POOL, 64, 64, POOL)
    return SegNet(plan, num_classes=num_classes, in_channels=in_channels, drop_rate=drop_rate)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """pytorchcv's names (`down_stage1.unit1.conv.weight`, `up_stage5.unit2.bn.bias`, `head.weight`) to those of `segnet`."""
    blocks = stages(PLANS["D"])
    starts, place = [], 0
    for block in blocks:
        starts.append(place)
        place += 3 * len(block) + 1  # a convolution is three layers; the pooling one more
    renamed = {}
    for name, value in state.items():
        part, *rest = name.split(".")
        if part.startswith(("down_stage", "up_stage")):
            unit, kind, leaf = rest
            stage, unit, layer = int(part[-1]) - 1, int(unit.removeprefix("unit")) - 1, ("conv", "bn").index(kind)
            if part.startswith("down"):
                name = f"features.{starts[stage] + 3 * unit + layer}.{leaf}"
            else:  # its first unit is the unpooling
                name = f"decoder.{stage}.{3 * (unit - 1) + layer}.{leaf}"
        elif part == "head":
            name = f"classifier.{rest[0]}"
        renamed[name] = value
    return renamed
