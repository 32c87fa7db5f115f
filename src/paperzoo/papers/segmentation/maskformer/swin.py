"""Swin Transformer as dense prediction takes it (Liu et al., ICCV 2021, arXiv:2103.14030), MaskFormer's larger backbones.

Attention within windows, which every second block shifts by half; norms before attention and MLP; a learned bias for every offset. What
`classification/swin_v2` shares with it is imported from there. Any image size is taken: maps are padded to whole windows, and
windows shift also where there is one alone, as the released code does. Each stage's map has a layer norm of its own.

Parameter names are those of timm's classifiers but for `norms`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from paperzoo.papers.classification.swin_v2.model import (
    Mlp,
    PatchEmbed,
    from_windows,
    offset_index,
    shift_mask,
    to_windows,
)


class WindowAttention(nn.Module):
    """softmax(Q K^T / sqrt(d) + B) V with a bias for each offset (eq. 4). (windows, area, dim) -> the same."""

    relative_position_index: Tensor

    def __init__(self, dim: int, window: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.register_buffer("relative_position_index", offset_index((window, window)), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` (windows of one image, area, area) is added to the logits."""
        count, area, dim = x.shape
        q, k, v = self.qkv(x).reshape(count, area, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:  # an image's windows stand beside its heads, so that the mask is stored once a batch
            bias = (mask[:, None] + bias).flatten(0, 1)
            q, k, v = (t.reshape(-1, bias.shape[0], area, dim // self.heads) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype))
        y = y.reshape(count, self.heads, area, -1).transpose(1, 2)
        return self.proj(y.clone(memory_format=torch.contiguous_format).flatten(2))  # a clone: kernels differ in layout


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). (B, H, W, dim) -> the same."""

    def __init__(self, dim: int, window: int, heads: int, shift: int, drop_path: float) -> None:
        super().__init__()
        self.window, self.shift = (window, window), shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = WindowAttention(dim, window, heads), Mlp(dim, 4 * dim)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        y = F.pad(self.norm1(x), (0, 0, 0, -width % self.window[1], 0, -height % self.window[0]))
        rows, columns = y.shape[1:3]
        if self.shift:
            y = y.roll((-self.shift, -self.shift), (1, 2))
        y = from_windows(
            self.attn(to_windows(y, self.window), mask if self.shift else None), self.window, rows, columns
        )
        if self.shift:
            y = y.roll((self.shift, self.shift), (1, 2))
        x = x + self.drop_path(y[:, :height, :width])
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Each 2 x 2 square becomes one place with twice the channels. (B, H, W, dim) -> (B, ceil(H/2), ceil(W/2), 2 dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H/2, 2, W/2, 2, dim)
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class Stage(nn.Module):
    """Patch merging (but in the first stage), then blocks of which every second shifts. (B, H, W, C) -> (B, H', W', C')."""

    def __init__(self, dim: int, window: int, heads: int, drop_path: Sequence[float], first: bool) -> None:
        super().__init__()
        self.window = window
        self.downsample = nn.Identity() if first else PatchMerging(dim // 2)
        self.blocks = nn.ModuleList(
            Block(dim, window, heads, i % 2 * (window // 2), rate) for i, rate in enumerate(drop_path)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        sizes, half = [n + -n % self.window for n in x.shape[1:3]], self.window // 2
        mask = shift_mask(*sizes, (self.window, self.window), (half, half), x)
        for block in self.blocks:
            x = block(x, mask)
        return x


class Swin(nn.Module):
    """Images (B, 3, H, W) -> by `stages` maps (B, C_i, H_i, W_i) of strides 4, 8, 16, 32, each normalised.

    Args:
        dim: channels of the first stage; each later one has twice as many.
        depths, heads: blocks and heads of each stage.
        window: side of a window.
        drop_path: how often the last residual branch is left out while learning; the ones before it less often.
    """

    stage_strides = (4, 8, 16, 32)

    def __init__(
        self, dim: int, depths: Sequence[int], heads: Sequence[int], window: int, drop_path: float = 0.3
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(4, 3, dim)
        self.stage_channels = [dim * 2**i for i in range(len(depths))]
        rates = [drop_path * i / (sum(depths) - 1) for i in range(sum(depths))]
        self.layers = nn.ModuleList()
        for i, (channels, depth) in enumerate(zip(self.stage_channels, depths, strict=True)):
            own = rates[sum(depths[:i]) :][:depth]
            self.layers.append(Stage(channels, window, heads[i], own, first=i == 0))
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.stage_channels)
        for name, parameter in self.named_parameters():
            if name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight", "reduction.weight", "table")):
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def stages(self, images: Tensor) -> list[Tensor]:
        x = self.patch_embed(F.pad(images, (0, -images.shape[3] % 4, 0, -images.shape[2] % 4)))
        maps = []
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = layer(x)
            maps.append(norm(x).permute(0, 3, 1, 2))
        return maps
