"""nnU-Net's networks (Isensee et al., 2018, arXiv:1809.10486): plain U-Nets whose depth, strides and kernels are planned for each data set.

Two convolutions a level, each with instance norm and leaky ReLU; strided convolutions down, transposed ones up, channels doubled from 30 to at most
320 (480 in 2-D). Nothing else: the paper's claim is that what surrounds a plain network decides.

Parameters have the names of `PlainConvUNet` of the package dynamic-network-architectures, with which nnU-Net v2 trains; `from_official` leaves out the
second names that its checkpoints hold for every tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = {
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.InstanceNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.InstanceNorm3d),
}
SLOPE = 0.01


class Step(nn.Module):
    """Convolution, instance norm with scale and offset, leaky ReLU."""

    def __init__(
        self, dimensions: int, in_channels: int, channels: int, kernel: Sequence[int], stride: Sequence[int]
    ) -> None:
        super().__init__()
        convolution, _, norm = CONVOLUTIONS[dimensions]
        self.conv = convolution(
            in_channels, channels, tuple(kernel), tuple(stride), tuple((k - 1) // 2 for k in kernel)
        )
        self.norm = norm(channels, eps=1e-5, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x)), SLOPE)


class Stack(nn.Module):
    """Two steps, the first with a stride."""

    def __init__(
        self, dimensions: int, in_channels: int, channels: int, kernel: Sequence[int], stride: Sequence[int]
    ) -> None:
        super().__init__()
        plain = [1] * dimensions
        self.convs = nn.Sequential(
            Step(dimensions, in_channels, channels, kernel, stride), Step(dimensions, channels, channels, kernel, plain)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x)


class Encoder(nn.Module):
    def __init__(
        self, dimensions: int, in_channels: int, widths: Sequence[int], kernels: Sequence, strides: Sequence
    ) -> None:
        super().__init__()
        every = [[1] * dimensions, *strides]
        before = [in_channels, *widths]
        rows = zip(before, widths, kernels, every, strict=False)
        self.stages = nn.Sequential(*(nn.Sequential(Stack(dimensions, a, b, k, s)) for a, b, k, s in rows))


class Decoder(nn.Module):
    """Deepest level first. Every level has logits of its own, used where the network is supervised deeply."""

    def __init__(
        self, dimensions: int, num_classes: int, widths: Sequence[int], kernels: Sequence, strides: Sequence
    ) -> None:
        super().__init__()
        convolution, transposed, _ = CONVOLUTIONS[dimensions]
        self.stages, self.transpconvs, self.seg_layers = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level in range(len(strides) - 1, -1, -1):
            below, here, stride = widths[level + 1], widths[level], tuple(strides[level])
            self.transpconvs.append(transposed(below, here, stride, stride))
            self.stages.append(Stack(dimensions, 2 * here, here, kernels[level], [1] * dimensions))
            self.seg_layers.append(convolution(here, num_classes, 1))


class PlannedUNet(nn.Module):
    """(B, in_channels, *size) -> logits (B, num_classes, *size). Any size: zeros are added to a multiple of all strides and cut again.

    Two voxels or more must be left at the deepest level, where instance norm divides by their deviation.

    Args:
        strides: of each level below the first, a number an axis. kernels: of each level.
        base_features, max_features: channels of the first level, doubled at each stride up to the maximum.
        deep_supervision: in training the output is {"out": logits, "aux": [coarser logits …]}, of all levels but the two deepest, the finest first.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        strides: Sequence[Sequence[int]],
        kernels: Sequence[Sequence[int]],
        base_features: int = 30,
        max_features: int = 320,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        dimensions = len(kernels[0])
        if len(kernels) != len(strides) + 1 or any(len(row) != dimensions for row in (*strides, *kernels)):
            raise ValueError(
                f"kernels are of {len(kernels)} levels and strides of {len(strides)}; one less is needed, all of {dimensions} axes"
            )
        widths = [min(base_features * 2**level, max_features) for level in range(len(kernels))]
        self.encoder = Encoder(dimensions, in_channels, widths, kernels, strides)
        self.decoder = Decoder(dimensions, num_classes, widths, kernels, strides)
        self.multiples = [1] * dimensions
        for row in strides:
            self.multiples = [m * s for m, s in zip(self.multiples, row, strict=True)]
        self.deep_supervision = deep_supervision
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
                nn.init.kaiming_normal_(module.weight, a=SLOPE)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor | dict:
        size = x.shape[2:]
        lacking = [-n % m for n, m in zip(size, self.multiples, strict=True)]
        if any(lacking):
            x = F.pad(x, [pad for n in reversed(lacking) for pad in (0, n)])
        maps = []
        for stage in self.encoder.stages:
            x = stage(x)
            maps.append(x)
        maps.pop()
        logits = []
        d = self.decoder
        levels = len(d.stages)
        for level, (up, stage, head) in enumerate(zip(d.transpconvs, d.stages, d.seg_layers, strict=True)):
            x = stage(torch.cat([up(x), maps.pop()], 1))
            if level == levels - 1 or (self.deep_supervision and self.training and level > 0):
                logits.append(head(x))
        out = logits.pop()
        if any(lacking):
            out = out[(slice(None), slice(None), *(slice(0, n) for n in size))]
        return {"out": out, "aux": logits[::-1]} if self.deep_supervision and self.training else out


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of nnU-Net v2 (its `network_weights`): each tensor is there under several names, of which one is kept."""
    return {k: v for k, v in state.items() if ".all_modules." not in k and not k.startswith("decoder.encoder.")}


def rows(text: str) -> list[list[int]]:
    """ "2.2.2 1.2.2" -> [[2, 2, 2], [1, 2, 2]]."""
    return [[int(n) for n in row.split(".")] for row in text.split()]


def nnunet(
    num_classes: int = 2,
    in_channels: int = 1,
    dimensions: int = 3,
    strides: str = "",
    kernels: str = "",
    base_features: int = 30,
    max_features: int = 320,
    deep_supervision: bool = False,
) -> PlannedUNet:
    """A planned network. Strides and kernels are written "2.2.2 1.2.2", a level a word; without them it is the one of 128^3 or 512^2 voxels."""
    levels = 5 if dimensions == 3 else 6
    made = rows(strides) or [[2] * dimensions] * levels
    spans = rows(kernels) or [[3] * dimensions] * (len(made) + 1)
    return PlannedUNet(num_classes, in_channels, made, spans, base_features, max_features, deep_supervision)


def nnunet_2d(num_classes: int = 2, in_channels: int = 1, deep_supervision: bool = False) -> PlannedUNet:
    """Of slices of 512 x 512 pixels: six halvings, 30 to 480 channels."""
    return nnunet(num_classes, in_channels, 2, max_features=480, deep_supervision=deep_supervision)


def nnunet_3d(num_classes: int = 2, in_channels: int = 1, deep_supervision: bool = False) -> PlannedUNet:
    """Of patches of 128^3 voxels: five halvings, 30 to 320 channels."""
    return nnunet(num_classes, in_channels, 3, deep_supervision=deep_supervision)
