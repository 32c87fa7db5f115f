"""SwinIR: Image Restoration Using Swin Transformer (Liang et al., ICCV workshop 2021, arXiv:2108.10257).

A convolution finds shallow features, a trunk of residual Swin transformer blocks deep ones at the same resolution, a long skip joins both,
and one of four reconstructions makes the image. Attention is Swin V1's: within windows that every second layer shifts by half,
with a learned bias for each offset. `classification/swin_v2` has windows and masks, too; here all sizes are written out, so that an
export takes images of any size.

Images are (B, in_channels, H, W) in [0, 1] of any size: they are padded to whole windows by reflection and the result is cut.
Parameter names are those of the released code, whose files also hold index and mask tables; `from_official` leaves these out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from paperzoo.blocks.padding import reflect_to_multiple
from paperzoo.papers.classification.swin_v2.model import Mlp, offset_index
from paperzoo.papers.restoration.edsr.model import DIV2K_MEAN, Upsampler

UPSAMPLERS = ("pixelshuffle", "pixelshuffledirect", "nearest+conv", "")


def to_windows(x: Tensor, side: int) -> Tensor:
    """(B, H, W, C) -> (B, windows, area, C); H and W are multiples of the side."""
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (B, rows, side, columns, side, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def from_windows(x: Tensor, side: int, height: int, width: int) -> Tensor:
    """The inverse of `to_windows`."""
    x = x.unflatten(2, (side, side)).unflatten(1, (height // side, width // side))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def shift_mask(height: int, width: int, side: int, shift: int, like: Tensor) -> Tensor:
    """(windows, area, area): -100 between places that the cyclic shift brought together from opposite sides, else 0."""
    rows, columns = (
        (at >= at.shape[0] - side).long() + (at >= at.shape[0] - shift).long()
        for at in (torch.arange(size, device=like.device) for size in (height, width))
    )
    region = to_windows((3 * rows[:, None] + columns)[None, :, :, None], side)[0, :, :, 0]
    return (region[:, :, None] != region[:, None, :]).to(like.dtype) * -100.0


class WindowAttention(nn.Module):
    """softmax(Q K^T / sqrt(d) + B) V, with a bias B for each offset and head (sec. 3.2). (B, windows, area, dim) -> the same."""

    relative_position_index: Tensor

    def __init__(self, dim: int, window_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        index = offset_index((window_size, window_size))
        self.register_buffer("relative_position_index", index, persistent=False)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` (windows, area, area) is added to the logits."""
        batch, windows, area, dim = x.shape
        heads = self.num_heads
        q, k, v = self.qkv(x).unflatten(3, (3, heads, dim // heads)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if mask is None:
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        else:  # an image's windows stand beside its heads, so that the mask is stored once a batch
            q, k, v = (t.flatten(1, 2) for t in (q, k, v))
            bias = (mask[:, None] + bias).flatten(0, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype))
        y = y.reshape(batch, windows, heads, area, dim // heads).transpose(2, 3)
        return self.proj(y.clone(memory_format=torch.contiguous_format).flatten(3))  # a clone: kernels differ in layout


class SwinLayer(nn.Module):
    """X + attention(LN(X)), then X + MLP(LN(X)) (sec. 3.2). (B, H, W, dim) -> the same; H and W are whole windows.

    Args:
        dim, window_size, num_heads: as `WindowAttention`.
        shift: places by which windows lie further right and down; 0 for none.
        hidden: width of the MLP.
        drop_path: how often a residual branch is left out while training.
    """

    def __init__(
        self, dim: int, window_size: int, num_heads: int, shift: int, hidden: int, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.window_size, self.shift = window_size, shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = WindowAttention(dim, window_size, num_heads), Mlp(dim, hidden)
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`mask` is for the layers that shift."""
        _, height, width, _ = x.shape
        y = self.norm1(x)
        if self.shift:
            y = y.roll((-self.shift, -self.shift), (1, 2))
        y = self.attn(to_windows(y, self.window_size), mask if self.shift else None)
        y = from_windows(y, self.window_size, height, width)
        if self.shift:
            y = y.roll((self.shift, self.shift), (1, 2))
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


def residual_convolution(dim: int, kind: str) -> nn.Module:
    """The convolution that ends a block: one 3 x 3 ("1conv"), or a bottleneck of three with fewer parameters ("3conv").

    Raises:
        ValueError: for another kind.
    """
    if kind == "1conv":
        return nn.Conv2d(dim, dim, 3, padding=1)
    if kind != "3conv":
        raise ValueError(f"residual_connection is 1conv or 3conv, got '{kind}'")
    return nn.Sequential(
        nn.Conv2d(dim, dim // 4, 3, padding=1),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(dim // 4, dim // 4, 1),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(dim // 4, dim, 3, padding=1),
    )


class ResidualSwinBlock(nn.Module):
    """RSTB, Conv(layers(F)) + F (sec. 3.2). (B, H, W, dim) -> the same."""

    def __init__(self, layers: Sequence[SwinLayer], convolution: nn.Module) -> None:
        super().__init__()
        self.residual_group = nn.ModuleDict({"blocks": nn.ModuleList(layers)})
        self.conv = convolution

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = x
        for layer in self.residual_group["blocks"]:
            y = layer(y, mask)
        return self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) + x


class SwinIR(nn.Module):
    """Images (B, in_channels, H, W) in [0, 1] -> restored images (B, in_channels, scale H, scale W), not clipped.

    Args:
        scale: how many times larger the image becomes; 1 for denoising and compression artefacts.
        in_channels: 3 for colour, of which the mean of DIV2K is taken away, or 1.
        embed_dim: channels of the trunk.
        depths: Swin layers in each residual block.
        num_heads: heads of each residual block's layers.
        window_size: side of a window in pixels.
        mlp_ratio: width of the MLP, in `embed_dim`.
        upsampler: "pixelshuffle" (classical super-resolution), "pixelshuffledirect" (lightweight), "nearest+conv"
            (real photographs), or "" (the network gives the residual of an image of the same size).
        residual_connection: what ends a residual block, "1conv" or "3conv".
        image_range: what [0, 1] is multiplied with inside; 255 in the networks against JPEG artefacts.
        num_features: channels of the reconstruction.
        drop_path_rate: of the last layer; earlier ones have less, in proportion to their depth.

    Raises:
        ValueError: for an upsampler or scale that do not go together, or heads that do not divide the channels.
    """

    mean: Tensor

    def __init__(
        self,
        scale: int = 2,
        in_channels: int = 3,
        embed_dim: int = 180,
        depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
        num_heads: Sequence[int] = (6, 6, 6, 6, 6, 6),
        window_size: int = 8,
        mlp_ratio: float = 2.0,
        upsampler: str = "pixelshuffle",
        residual_connection: str = "1conv",
        image_range: float = 1.0,
        num_features: int = 64,
        drop_path_rate: float = 0.1,
    ) -> None:
        super().__init__()
        refuse(upsampler, scale, embed_dim, depths, num_heads)
        self.scale, self.window_size, self.image_range, self.upsampler = scale, window_size, image_range, upsampler
        mean = torch.tensor(DIV2K_MEAN if in_channels == 3 else (0.0,)).view(1, -1, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.conv_first = nn.Conv2d(in_channels, embed_dim, 3, padding=1)
        self.patch_embed = nn.Sequential(OrderedDict(norm=nn.LayerNorm(embed_dim)))
        hidden, total = int(embed_dim * mlp_ratio), sum(depths)
        rates = iter([drop_path_rate * i / max(total - 1, 1) for i in range(total)])
        self.layers = nn.ModuleList()
        for depth, heads in zip(depths, num_heads, strict=True):
            layers = [
                SwinLayer(embed_dim, window_size, heads, i % 2 * (window_size // 2), hidden, next(rates))
                for i in range(depth)
            ]
            self.layers.append(ResidualSwinBlock(layers, residual_convolution(embed_dim, residual_connection)))
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = residual_convolution(embed_dim, residual_connection)
        self.add_reconstruction(embed_dim, num_features, in_channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def add_reconstruction(self, dim: int, width: int, out_channels: int) -> None:
        """The layers of sec. 3.1, "image reconstruction"."""
        if self.upsampler in ("pixelshuffle", "nearest+conv"):
            first = nn.Conv2d(dim, width, 3, padding=1)
            self.conv_before_upsample = nn.Sequential(first, nn.LeakyReLU(inplace=True))
        if self.upsampler == "pixelshuffle":
            self.upsample = Upsampler(self.scale, width)
        elif self.upsampler == "pixelshuffledirect":
            self.upsample = nn.Sequential(
                nn.Conv2d(dim, self.scale**2 * out_channels, 3, padding=1), nn.PixelShuffle(self.scale)
            )
        elif self.upsampler == "nearest+conv":
            self.doublings = self.scale.bit_length() - 1
            for i in range(1, self.doublings + 1):
                self.add_module(f"conv_up{i}", nn.Conv2d(width, width, 3, padding=1))
            self.conv_hr = nn.Conv2d(width, width, 3, padding=1)
        if self.upsampler != "pixelshuffledirect":
            self.conv_last = nn.Conv2d(width if self.upsampler else dim, out_channels, 3, padding=1)

    def trunk(self, x: Tensor) -> Tensor:
        """Deep features before their last convolution, (B, dim, H, W) -> the same; H and W are whole windows."""
        x = self.patch_embed(x.permute(0, 2, 3, 1))
        _, height, width, _ = x.shape
        mask = shift_mask(height, width, self.window_size, self.window_size // 2, x)  # one for all layers that shift
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x).permute(0, 3, 1, 2)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Features (B, dim, H, W) -> an image of `scale` times the size, or the residual where scale is 1."""
        if self.upsampler == "pixelshuffle":
            return self.conv_last(self.upsample(self.conv_before_upsample(x)))
        if self.upsampler == "pixelshuffledirect":
            return self.upsample(x)
        if self.upsampler == "nearest+conv":
            x = self.conv_before_upsample(x)
            for i in range(1, self.doublings + 1):
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = F.leaky_relu(self.get_submodule(f"conv_up{i}")(x), 0.2)
            x = F.leaky_relu(self.conv_hr(x), 0.2)
        return self.conv_last(x)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2] * self.scale, x.shape[3] * self.scale
        x = (reflect_to_multiple(x, self.window_size) - self.mean) * self.image_range
        shallow = self.conv_first(x)
        y = self.reconstruct(self.conv_after_body(self.trunk(shallow)) + shallow)
        y = y if self.upsampler else x + y
        return (y / self.image_range + self.mean)[:, :, :height, :width]


def refuse(upsampler: str, scale: int, dim: int, depths: Sequence[int], heads: Sequence[int]) -> None:
    """Raises ValueError for arguments that make no network."""
    if upsampler not in UPSAMPLERS:
        raise ValueError(f"upsampler is one of {', '.join(map(repr, UPSAMPLERS))}, got '{upsampler}'")
    possible = {"": (1,), "nearest+conv": (2, 4, 8), "pixelshuffle": (2, 3, 4, 8), "pixelshuffledirect": (2, 3, 4, 8)}
    if scale not in possible[upsampler]:
        raise ValueError(f"upsampler '{upsampler}' has scale {', '.join(map(str, possible[upsampler]))}, got {scale}")
    if len(depths) != len(heads) or any(not h or dim % h for h in heads):
        raise ValueError(f"num_heads has a divisor of {dim} for each of {len(depths)} blocks, got {list(heads)}")


# -- variants ----------------------------------------------------------------------------------------------------------


def classical(scale: int, in_channels: int, settings: dict) -> SwinIR:
    """SwinIR-M for bicubic degradation, 180 channels in 6 blocks of 6 layers (sec. 4.1)."""
    return SwinIR(**{"scale": scale, "in_channels": in_channels, **settings})


def lightweight(scale: int, in_channels: int, settings: dict) -> SwinIR:
    """60 channels in 4 blocks of 6 layers; one convolution and pixel shuffle at the end."""
    small = {"embed_dim": 60, "depths": (6,) * 4, "num_heads": (6,) * 4, "upsampler": "pixelshuffledirect"}
    return SwinIR(**{"scale": scale, "in_channels": in_channels, **small, **settings})


def same_size(in_channels: int, settings: dict, **more) -> SwinIR:
    """SwinIR-M that gives the residual of an image of the same size."""
    return SwinIR(**{"scale": 1, "in_channels": in_channels, "upsampler": "", **more, **settings})


def swinir_classical_x2(in_channels: int = 3, **settings) -> SwinIR:
    return classical(2, in_channels, settings)


def swinir_classical_x3(in_channels: int = 3, **settings) -> SwinIR:
    return classical(3, in_channels, settings)


def swinir_classical_x4(in_channels: int = 3, **settings) -> SwinIR:
    return classical(4, in_channels, settings)


def swinir_classical_x8(in_channels: int = 3, **settings) -> SwinIR:
    return classical(8, in_channels, settings)


def swinir_light_x2(in_channels: int = 3, **settings) -> SwinIR:
    return lightweight(2, in_channels, settings)


def swinir_light_x3(in_channels: int = 3, **settings) -> SwinIR:
    return lightweight(3, in_channels, settings)


def swinir_light_x4(in_channels: int = 3, **settings) -> SwinIR:
    return lightweight(4, in_channels, settings)


def swinir_real_x2(in_channels: int = 3, **settings) -> SwinIR:
    """For real photographs: nearest neighbours and convolutions, which leave fewer artefacts than pixel shuffle."""
    return SwinIR(**{"scale": 2, "in_channels": in_channels, "upsampler": "nearest+conv", **settings})


def swinir_real_x4(in_channels: int = 3, **settings) -> SwinIR:
    return SwinIR(**{"scale": 4, "in_channels": in_channels, "upsampler": "nearest+conv", **settings})


def swinir_real_large_x4(in_channels: int = 3, **settings) -> SwinIR:
    """SwinIR-L: 240 channels in 9 blocks that end with three small convolutions."""
    large = {"embed_dim": 240, "depths": (6,) * 9, "num_heads": (8,) * 9, "residual_connection": "3conv"}
    return SwinIR(**{"scale": 4, "in_channels": in_channels, "upsampler": "nearest+conv", **large, **settings})


def swinir_colour_denoising(in_channels: int = 3, **settings) -> SwinIR:
    return same_size(in_channels, settings)


def swinir_grey_denoising(in_channels: int = 1, **settings) -> SwinIR:
    return same_size(in_channels, settings)


def swinir_grey_jpeg(in_channels: int = 1, **settings) -> SwinIR:
    """Windows of 7, since the blocks of JPEG have a side of 8, and pixels of 0 to 255 inside."""
    return same_size(in_channels, settings, window_size=7, image_range=255.0)


def swinir_colour_jpeg(in_channels: int = 3, **settings) -> SwinIR:
    return same_size(in_channels, settings, window_size=7, image_range=255.0)


def swinir_small_x2(in_channels: int = 3, **settings) -> SwinIR:
    """Two blocks of two layers with 24 channels and windows of 4 x 4; not in the paper, for seconds on a CPU."""
    small = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4, "drop_path_rate": 0.0}
    return SwinIR(**{"scale": 2, "in_channels": in_channels, "upsampler": "pixelshuffledirect", **small, **settings})


# -- checkpoints -------------------------------------------------------------------------------------------------------


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' files hold tables that follow from the window and the training size; here they are computed."""
    return {name: value for name, value in state.items() if not name.endswith(("relative_position_index", "attn_mask"))}
