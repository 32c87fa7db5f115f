"""Attention U-Net (Oktay et al., MIDL 2018, arXiv:1804.03999).

A U-Net in three dimensions whose skipped maps pass an attention gate (fig. 2): from the coarser map, the gating signal, and the skipped map itself
it computes one number in [0, 1] for every voxel, by which the map is multiplied before it is concatenated. What is irrelevant is silenced, in the
forward pass and in the gradients.

Two networks bear the name. `attention_unet` is the authors' (`unet_CT_single_att_dsv_3D` of github.com/ozan-oktay/Attention-Gated-Networks, whose
parameter names it has): gates computed on a grid half as fine and resampled, the finest skipped map ungated, trilinear upsampling, deep supervision:
the class maps of four scales are joined for the answer. `attention_unet_monai` is what MONAI distributes under this name, with its parameter names.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBlock(nn.Module):
    """Twice (3x3x3 convolution, batch norm, ReLU)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = unit(in_channels, out_channels)
        self.conv2 = unit(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


def unit(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(in_channels, out_channels, kernel_size, stride, kernel_size // 2),
        nn.BatchNorm3d(out_channels),
        nn.ReLU(inplace=True),
    )


class GatingSignal(nn.Sequential):
    """The coarsest map made ready as the signal g: 1x1x1 convolution, batch norm, ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = unit(channels, channels, 1)


class GridAttention(nn.Module):
    """The additive attention gate (eq. 1, fig. 2), computed on a grid half as fine as x.

    q = psi^T relu(W_x^T x + W_g^T g + b_g) + b_psi, alpha = sigmoid(q); alpha is resampled trilinearly to x and multiplied with it; then
    1x1x1 convolution and batch norm.

    Args:
        channels: of x; gate_channels: of g; inter_channels: F_int.
    """

    def __init__(self, channels: int, gate_channels: int, inter_channels: int) -> None:
        super().__init__()
        # a convolution over 2x2x2 with stride 2, as the authors' code has it; eq. 1 leaves b_g alone
        self.theta = nn.Conv3d(channels, inter_channels, 2, stride=2, bias=False)
        self.phi = nn.Conv3d(gate_channels, inter_channels, 1)
        self.psi = nn.Conv3d(inter_channels, 1, 1)
        self.W = nn.Sequential(nn.Conv3d(channels, channels, 1), nn.BatchNorm3d(channels))

    def coefficients(self, x: Tensor, g: Tensor) -> Tensor:
        """alpha at the resolution of x: (B, 1, X, Y, Z) in [0, 1]."""
        down = self.theta(x)
        signal = resize(self.phi(g), down.shape[2:])
        alpha = torch.sigmoid(self.psi(F.relu(down + signal)))
        return resize(alpha, x.shape[2:])

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        return self.W(self.coefficients(x, g) * x)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return (
        x if x.shape[2:] == tuple(size) else F.interpolate(x, size=tuple(size), mode="trilinear", align_corners=False)
    )


class GatedSkip(nn.Module):
    """One gate, then 1x1x1 convolution, batch norm, ReLU."""

    def __init__(self, channels: int, gate_channels: int, inter_channels: int) -> None:
        super().__init__()
        self.gate_block_1 = GridAttention(channels, gate_channels, inter_channels)
        self.combine_gates = unit(channels, channels, 1)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        return self.combine_gates(self.gate_block_1(x, g))


class Up(nn.Module):
    """The coarser map upsampled trilinearly and concatenated behind the skipped one, two convolutions."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = ConvBlock(in_channels + out_channels, out_channels)

    def forward(self, skipped: Tensor, coarser: Tensor) -> Tensor:
        return self.conv(torch.cat([skipped, resize(coarser, skipped.shape[2:])], 1))


class ClassMap(nn.Module):
    """1x1x1 to the classes, upsampled trilinearly: one scale of the deep supervision."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.dsv = nn.Sequential(nn.Conv3d(in_channels, num_classes, 1))

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return resize(self.dsv(x), size)


class AttentionUNet(nn.Module):
    """(B, in_channels, X, Y, Z) -> logits (B, num_classes, X, Y, Z). Extents are multiples of 16; others are continued by their last voxels and cut.

    Args:
        widths: channels from the finest to the coarsest level, five of them.
    """

    def __init__(
        self, num_classes: int = 2, in_channels: int = 1, widths: Sequence[int] = (16, 32, 64, 128, 256), depth: int = 4
    ) -> None:
        super().__init__()
        widths = list(widths)[: depth + 1]
        self.depth = depth
        channels = in_channels
        for level, width in enumerate(widths[:-1], 1):
            self.add_module(f"conv{level}", ConvBlock(channels, width))
            channels = width
        self.center = ConvBlock(channels, widths[-1])
        self.gating = GatingSignal(widths[-1])
        for level in range(2, depth + 1):
            # the signal of a level is the coarsest map for the deepest gate, the decoder's map above it for the others
            self.add_module(f"attentionblock{level}", GatedSkip(widths[level - 1], widths[level], widths[level - 1]))
        for level in range(depth, 0, -1):
            self.add_module(f"up_concat{level}", Up(widths[level], widths[level - 1]))
            fine = nn.Conv3d(widths[level - 1], num_classes, 1)
            self.add_module(f"dsv{level}", fine if level == 1 else ClassMap(widths[level - 1], num_classes))
        self.final = nn.Conv3d(depth * num_classes, num_classes, 1)
        self.reset()

    def reset(self) -> None:
        """He's initialisation, and gates that let features pass at first, as the paper asks for; how far open it does not say: here 0.88."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, GridAttention):
                nn.init.constant_(module.psi.bias, 2.0)
                nn.init.normal_(module.psi.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        size, step = x.shape[2:], 2**self.depth
        lacking = [-n % step for n in size]
        if any(lacking):
            x = F.pad(x, [pad for n in reversed(lacking) for pad in (0, n)], mode="replicate")
        wanted, maps = x.shape[2:], []
        for level in range(1, self.depth + 1):
            maps.append(getattr(self, f"conv{level}")(F.max_pool3d(maps[-1], 2) if maps else x))
        h = self.center(F.max_pool3d(maps[-1], 2))
        signal = self.gating(h)
        answers = []
        for level in range(self.depth, 0, -1):
            skipped = maps[level - 1]
            if level > 1:
                skipped = getattr(self, f"attentionblock{level}")(skipped, signal)
            h = signal = getattr(self, f"up_concat{level}")(skipped, h)
            answers.append(self.dsv1(h) if level == 1 else getattr(self, f"dsv{level}")(h, wanted))
        logits = self.final(torch.cat(answers[::-1], 1))
        return logits[:, :, : size[0], : size[1], : size[2]] if any(lacking) else logits


# -- MONAI's network -----------------------------------------------------------------------------------------------------


def layer(in_channels: int, out_channels: int, stride: int = 1, kernel_size: int = 3) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv3d(in_channels, out_channels, kernel_size, stride, kernel_size // 2),
            adn=nn.Sequential(OrderedDict(N=nn.BatchNorm3d(out_channels), A=nn.ReLU())),
        )
    )


def projection(in_channels: int, out_channels: int) -> nn.Sequential:
    """1x1x1 convolution alone."""
    return nn.Sequential(OrderedDict(conv=nn.Conv3d(in_channels, out_channels, 1)))


class FullGate(nn.Module):
    """The additive gate at the resolution of x, to which g was upsampled before; batch norm after each projection. (g, x) -> alpha * x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // 2
        self.W_g = nn.Sequential(projection(channels, inner), nn.BatchNorm3d(inner))
        self.W_x = nn.Sequential(projection(channels, inner), nn.BatchNorm3d(inner))
        self.psi = nn.Sequential(projection(inner, 1), nn.BatchNorm3d(1), nn.Sigmoid())

    def forward(self, g: Tensor, x: Tensor) -> Tensor:
        return x * self.psi(F.relu(self.W_g(g) + self.W_x(x)))


class Level(nn.Module):
    """A level of the U: what is below is upsampled, gates the map of this level, and is merged with it (instance norm, PReLU)."""

    def __init__(self, channels: int, below: int, submodule: nn.Module) -> None:
        super().__init__()
        self.attention = FullGate(channels)
        up = nn.ConvTranspose3d(below, channels, 3, stride=2, padding=1, output_padding=1)
        norm = nn.Sequential(OrderedDict(N=nn.BatchNorm3d(channels), A=nn.ReLU()))
        self.upconv = nn.Sequential(OrderedDict(up=nn.Sequential(OrderedDict(conv=up, adn=norm))))
        self.merge = nn.Sequential(
            OrderedDict(
                conv=nn.Conv3d(2 * channels, channels, 3, padding=1),
                adn=nn.Sequential(OrderedDict(N=nn.InstanceNorm3d(channels), A=nn.PReLU())),
            )
        )
        self.submodule = submodule

    def forward(self, x: Tensor) -> Tensor:
        lower = self.upconv(self.submodule(x))
        return self.merge(torch.cat([self.attention(lower, x), lower], 1))


class Convolutions(nn.Module):
    """Two layers, the first with a stride."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Sequential(layer(in_channels, out_channels, stride), layer(out_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class MonaiAttentionUNet(nn.Module):
    """(B, in_channels, X, Y, Z) -> logits of that size; extents are multiples of 2^(levels - 1).

    Against the paper: strided convolutions for pooling, transposed ones for upsampling, gates at full resolution on every level with the upsampled
    decoder map as the signal, batch norm inside the gate, no deep supervision.
    """

    def __init__(self, num_classes: int, in_channels: int, channels: Sequence[int]) -> None:
        super().__init__()
        below: nn.Module | None = None
        for upper, lower in list(zip(channels[:-1], channels[1:], strict=True))[::-1]:
            step = Convolutions(upper, lower, 2)
            below = Level(upper, lower, step if below is None else nn.Sequential(step, below))
        head, answer = Convolutions(in_channels, channels[0]), projection(channels[0], num_classes)
        self.model = nn.Sequential(head, below, answer)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def attention_unet(num_classes: int = 2, in_channels: int = 1) -> AttentionUNet:
    """The authors' network: 16 to 256 channels."""
    return AttentionUNet(num_classes, in_channels)


def attention_unet_monai(num_classes: int = 2, in_channels: int = 1) -> MonaiAttentionUNet:
    """MONAI's `AttentionUnet` with 16 to 256 channels."""
    return MonaiAttentionUNet(num_classes, in_channels, (16, 32, 64, 128, 256))


def attention_unet_slim(num_classes: int = 2, in_channels: int = 1) -> AttentionUNet:
    """Not of the paper: two halvings, 16 to 64 channels, for small volumes and learning in seconds."""
    return AttentionUNet(num_classes, in_channels, depth=2)
