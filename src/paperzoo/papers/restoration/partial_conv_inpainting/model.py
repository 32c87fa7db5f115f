"""Partial convolutions and the network that fills holes with them (arXiv 1804.07723).

A convolution that is shown a hole takes the hole's placeholder for data. A partial convolution (eq. 1) multiplies the mask in, scales what is left up by
how little of the window was known, and afterwards (eq. 2) counts a place as known if anything in its window was: layer by layer the hole closes.

Masks of the decoder's inputs differ between the channels that come from below and those of the skip connection; sec. 3.2 concatenates masks as
it does features. All channels of either part share one mask, so all that eq. 1 needs of them is, at each pixel, the *share* of channels that are known:
one channel of averages stands for the released code's convolution of 512 to 1024 channels of ones, with the same result.

Parameter names are those of OpenMMLab's MMagic, whose files `from_official` takes after dropping the constant kernels; it also takes those of the
widely used naoto0804/pytorch-inpainting-with-partial-conv, which leaves the factor sum(1) of eq. 1 away, so that its weights are larger by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Table 1 of the supplement: the encoder's output channels and kernels; every layer halves the picture.
ENCODER = ((64, 7), (128, 5), (256, 5), (512, 3), (512, 3), (512, 3), (512, 3), (512, 3))


class PartialConv2d(nn.Conv2d):
    """x' = W^T (X * M) sum(1) / sum(M) + b where sum(M) > 0, and 0 elsewhere (eq. 1); sums over a window and its channels.

    Takes x (B, C, H, W), zero where it is unknown, and `share` (B, 1, H, W) in [0, 1], which share of the channels is known. Gives
    the features (B, C', H', W') and what is known of them, 0 or 1, (B, 1, H', W') in the dtype of `share` (eq. 2). Padding counts as unknown.
    """

    def forward(self, x: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        part = F.avg_pool2d(share, self.kernel_size, self.stride, self.padding)  # sum(M) / sum(1)
        known = (part > 0).to(part.dtype)
        factor = known / torch.where(part > 0, part, 1)
        out = F.conv2d(x, self.weight, None, self.stride, self.padding) * factor.to(x.dtype)
        if self.bias is not None:
            out = out + self.bias[:, None, None].to(out.dtype) * known.to(out.dtype)
        return out, known


class MaskConvModule(nn.Module):
    """A partial convolution, batch norm and activation; what is unknown is zero again afterwards.

    Batch norm moves zeros to its shift, so the mask is multiplied in once more: the released code does that at the start of the next layer.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, norm: bool, activation: nn.Module | None):
        super().__init__()
        self.conv = PartialConv2d(inputs, outputs, kernel, stride, kernel // 2, bias=not norm)
        self.bn = nn.BatchNorm2d(outputs) if norm else None
        self.activation = activation

    def forward(self, x: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        x, known = self.conv(x, share)
        if self.bn is not None:
            x = self.bn(x)
        if self.activation is not None:
            x = self.activation(x)
        return (x if self.bn is None else x * known.to(x.dtype)), known


class PartialConvUNet(nn.Module):
    """Images (B, 3, H, W) in [0, 1] and masks (B, 1, H, W), 1 or True where known -> the whole picture (B, 3, H, W), not clamped.

    Any size of at least one pixel: the decoder enlarges by nearest neighbours to the size of each skip connection, which is twofold where the size is a
    multiple of 2 ** layers. What the images hold inside the holes is never read.

    Args:
        encoder: (output channels, kernel) of each layer, each of stride 2.
        freeze_encoder_norm: the second phase of training (sec. 3.3): the encoder's batch norms use their running statistics
            and are not changed, so that holes cannot disturb them.
    """

    scale = 1

    def __init__(
        self, encoder: Sequence[tuple[int, int]] = ENCODER, in_channels: int = 3, freeze_encoder_norm: bool = False
    ) -> None:
        super().__init__()
        self.layers, self.in_channels, self.freeze_encoder_norm = len(encoder), in_channels, freeze_encoder_norm
        widths = [in_channels, *(width for width, _ in encoder)]
        self.encoder, self.decoder = nn.Module(), nn.Module()
        for i, (width, kernel) in enumerate(encoder, 1):
            layer = MaskConvModule(widths[i - 1], width, kernel, 2, i > 1, nn.ReLU())
            self.encoder.add_module(f"enc{i}", layer)
        for i in range(self.layers, 0, -1):
            last = i == 1
            outputs = in_channels if last else widths[i - 1]
            activation = None if last else nn.LeakyReLU(0.2)
            layer = MaskConvModule(widths[i] + widths[i - 1], outputs, 3, 1, not last, activation)
            self.decoder.add_module(f"dec{i}", layer)
        for module in self.modules():
            if isinstance(module, PartialConv2d):  # sec. 4.2: He's initialisation
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def train(self, mode: bool = True) -> PartialConvUNet:
        super().train(mode)
        if self.freeze_encoder_norm:
            for module in self.encoder.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.requires_grad_(False).eval()
        return self

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        masks = masks.to(images.dtype)
        x = images * masks
        maps, shares = [x], [masks]
        for i in range(1, self.layers + 1):
            x, known = getattr(self.encoder, f"enc{i}")(maps[-1], shares[-1])
            maps.append(x)
            shares.append(known)
        x, known = maps.pop(), shares.pop()
        for i in range(self.layers, 0, -1):
            skip, skip_known = maps.pop(), shares.pop()
            size = skip.shape[-2:]
            below, beside = x.shape[1], skip.shape[1]
            x = torch.cat([F.interpolate(x, size), skip], 1)
            share = (F.interpolate(known, size) * below + skip_known * beside) / (below + beside)
            x, known = getattr(self.decoder, f"dec{i}")(x, share)
        return x


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of MMagic's generator, or of naoto0804's network, with this network's names.

    naoto0804's first layer has no bias; it becomes zero.

    Raises:
        ValueError: if a name belongs to neither.
    """
    state = {name.removeprefix("module.").removeprefix("generator."): value for name, value in state.items()}
    converted = {}
    for name, value in state.items():
        if name.endswith(("weight_mask_updater", "mask_conv.weight")):
            continue  # constants
        if name.startswith(("encoder.", "decoder.")):
            converted[name] = value
        elif name.startswith(("enc_", "dec_")):
            own = ("encoder." if name.startswith("enc") else "decoder.") + name.replace("_", "", 1)
            own = own.replace("conv.input_conv", "conv")
            converted[own] = value / value[0].numel() if own.endswith("conv.weight") else value
            if own == "encoder.enc1.conv.weight":
                converted["encoder.enc1.conv.bias"] = value.new_zeros(len(value))
        else:
            raise ValueError(f"{name}: this is no parameter of MMagic's or naoto0804's partial convolution network")
    return converted


def pconv_unet(**options) -> PartialConvUNet:
    """Eight layers each way, as in table 1 of the supplement; for pictures of 512 pixels."""
    return PartialConvUNet(ENCODER, **options)


def pconv_unet_256(**options) -> PartialConvUNet:
    """Seven layers each way: MMagic's network for pictures of 256 pixels."""
    return PartialConvUNet(ENCODER[:7], **options)


def pconv_unet_slim(**options) -> PartialConvUNet:
    """Not of the paper: four narrow layers each way, for pictures of 48 to 64 pixels."""
    return PartialConvUNet(((24, 5), (32, 3), (48, 3), (64, 3)), **options)
