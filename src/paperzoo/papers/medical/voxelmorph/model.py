"""VoxelMorph (Balakrishnan, Zhao, Sabuncu, Guttag and Dalca, IEEE TMI 2019, arXiv:1809.05231).

A U-Net sees the moving and the fixed image as channels and puts out the displacement of every voxel (sec. III-A, fig. 3). Registering a pair is one
pass; what classical methods optimise for each pair anew is optimised once, over all training pairs.

`VoxelMorph` is the network of the papers: convolutions of stride 2 on the way down, names as in the authors' first PyTorch port. `VxmDense` is what
the `voxelmorph` package (0.2, PyTorch) trains and distributes: convolutions at full resolution followed by max pooling; its checkpoints load
as they are. With `integration_steps` the package's networks put out a velocity, whose integral is the displacement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.tasks.registration_measures import integrate

SLOPE = 0.2  # of the LeakyReLU


class ConvBlock(nn.Module):
    """Convolution of 3 voxels an axis and LeakyReLU."""

    def __init__(self, dimensions: int, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        kind = nn.Conv2d if dimensions == 2 else nn.Conv3d
        self.main = kind(in_channels, channels, 3, stride, 1)
        self.activation = nn.LeakyReLU(SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.main(x))


class StridedUnet(nn.Module):
    """The papers' U-Net (fig. 3): (B, C, *size) -> (B, decoder[-1], *size), every extent a multiple of 2^len(encoder).

    Going up, each convolution but the two at half resolution is followed by repetition of voxels and the map of the way down. The images
    themselves join at full resolution.

    Args:
        encoder: channels, each at half the resolution of the one before.
        decoder: channels: one a level going up, one more at half resolution, then those at full resolution.
    """

    def __init__(self, dimensions: int, in_channels: int, encoder: Sequence[int], decoder: Sequence[int]) -> None:
        super().__init__()
        levels = len(encoder)
        widths = [in_channels, *encoder]
        self.enc = nn.ModuleList(ConvBlock(dimensions, a, b, 2) for a, b in zip(widths, encoder, strict=False))
        self.dec = nn.ModuleList([ConvBlock(dimensions, encoder[-1], decoder[0])])
        for level in range(1, levels):
            self.dec.append(ConvBlock(dimensions, decoder[level - 1] + encoder[-1 - level], decoder[level]))
        self.dec.append(ConvBlock(dimensions, decoder[levels - 1], decoder[levels]))
        self.dec.append(ConvBlock(dimensions, decoder[levels] + in_channels, decoder[levels + 1]))
        if len(decoder) > levels + 2:
            self.vm2_conv = ConvBlock(dimensions, decoder[levels + 1], decoder[levels + 2])
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.levels, self.channels = levels, decoder[-1]

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for block in self.enc:
            maps.append(block(maps[-1]))
        y = maps.pop()
        for block in self.dec[: self.levels - 1]:
            y = torch.cat([self.upsample(block(y)), maps.pop()], 1)
        y = self.dec[self.levels](self.dec[self.levels - 1](y))
        y = self.dec[self.levels + 1](torch.cat([self.upsample(y), maps.pop()], 1))
        return self.vm2_conv(y) if hasattr(self, "vm2_conv") else y


class PooledUnet(nn.Module):
    """The package's U-Net: convolution, then max pooling; going up convolution, repetition, concatenation; then convolutions at full resolution."""

    def __init__(self, dimensions: int, in_channels: int, encoder: Sequence[int], decoder: Sequence[int]) -> None:
        super().__init__()
        levels = len(encoder)
        widths = [in_channels, *encoder]
        self.encoder = nn.ModuleList(
            nn.ModuleList([ConvBlock(dimensions, a, b)]) for a, b in zip(widths, encoder, strict=False)
        )
        self.decoder, width = nn.ModuleList(), encoder[-1]
        for level in range(levels):
            self.decoder.append(nn.ModuleList([ConvBlock(dimensions, width, decoder[level])]))
            width = decoder[level] + encoder[-1 - level]
        self.remaining = nn.ModuleList()
        for channels in decoder[levels:]:
            self.remaining.append(ConvBlock(dimensions, width, channels))
            width = channels
        self.pool = (nn.MaxPool2d if dimensions == 2 else nn.MaxPool3d)(2)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.levels, self.channels = levels, width

    def forward(self, x: Tensor) -> Tensor:
        maps = []
        for (block,) in self.encoder:
            maps.append(block(x))
            x = self.pool(maps[-1])
        for (block,) in self.decoder:
            x = torch.cat([self.upsample(block(x)), maps.pop()], 1)
        for block in self.remaining:
            x = block(x)
        return x


class Registration(nn.Module):
    """moving, fixed (B, in_channels, *size) -> displacement (B, D, *size), voxels, in the order of the axes. Any size: zeros are added and cut again.

    Args:
        unet: the network before the last convolution.
        integration_steps: 0: the last convolution gives the displacement. Else it gives a velocity, at half resolution where `halved`, which is
            integrated by so many doublings; in training the output is then {"displacement", "regularised": the velocity}.
    """

    def __init__(self, unet: nn.Module, dimensions: int, integration_steps: int = 0, halved: bool = True) -> None:
        super().__init__()
        self.unet_model = unet
        self.flow = (nn.Conv2d if dimensions == 2 else nn.Conv3d)(unet.channels, dimensions, 3, padding=1)
        self.dimensions, self.integration_steps, self.halved = dimensions, integration_steps, halved
        nn.init.normal_(self.flow.weight, std=1e-5)  # a fresh network moves nothing
        nn.init.zeros_(self.flow.bias)

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor | dict[str, Tensor]:
        size, step = moving.shape[2:], 2**self.unet_model.levels
        x = torch.cat([moving, fixed], 1)
        lacking = [-n % step for n in size]
        if any(lacking):
            x = F.pad(x, [pad for n in reversed(lacking) for pad in (0, n)])
        flow = self.flow(self.unet_model(x))
        if self.integration_steps == 0:
            return cut(flow, size)
        mode = "bilinear" if self.dimensions == 2 else "trilinear"
        if self.halved:  # half the voxels, half the numbers
            flow = 0.5 * F.interpolate(flow, scale_factor=0.5, mode=mode, align_corners=True)
        found = integrate(flow, self.integration_steps)
        if self.halved:
            found = F.interpolate(2 * found, scale_factor=2.0, mode=mode, align_corners=True)
        found = cut(found, size)
        return {"displacement": found, "regularised": flow} if self.training else found


def cut(field: Tensor, size: Sequence[int]) -> Tensor:
    return field if field.shape[2:] == tuple(size) else field[(slice(None), slice(None), *(slice(0, n) for n in size))]


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of the package (its `model_state`), whose sampling grids are left out: they follow from the size."""
    return {name: value for name, value in state.items() if not name.endswith(".grid")}


def voxelmorph_1(in_channels: int = 1, dimensions: int = 3) -> Registration:
    """The smaller network: 16, 32, 32, 32 channels down, 32, 32, 32, 32, 8, 8 up."""
    return Registration(StridedUnet(dimensions, 2 * in_channels, (16, 32, 32, 32), (32, 32, 32, 32, 8, 8)), dimensions)


def voxelmorph_2(in_channels: int = 1, dimensions: int = 3) -> Registration:
    """The larger one, fig. 3: 16, 32, 32, 32 channels down, 32, 32, 32, 32, 32, 16, 16 up."""
    unet = StridedUnet(dimensions, 2 * in_channels, (16, 32, 32, 32), (32, 32, 32, 32, 32, 16, 16))
    return Registration(unet, dimensions)


def voxelmorph_slim(in_channels: int = 1, dimensions: int = 3) -> Registration:
    """Not of the paper: three halvings, few channels at full resolution, for small volumes and learning in seconds."""
    return Registration(StridedUnet(dimensions, 2 * in_channels, (16, 32, 32), (32, 32, 32, 16, 8)), dimensions)


def vxm_dense(
    in_channels: int = 1, dimensions: int = 3, integration_steps: int = 7, halved: bool = True
) -> Registration:
    """The package's `VxmDense` with its defaults: a velocity at half resolution, seven doublings; `integration_steps` 0 is this paper's displacement."""
    unet = PooledUnet(dimensions, 2 * in_channels, (16, 32, 32, 32), (32, 32, 32, 32, 32, 16, 16))
    return Registration(unet, dimensions, integration_steps, halved)
