"""Restormer: Efficient Transformer for High-Resolution Image Restoration (Zamir et al., CVPR 2022, arXiv:2111.09881).

A U of four levels of transformer blocks whose attention is between channels instead of places: its cost grows with the number of
pixels, not with their square. Depthwise convolutions bring what is near into queries, keys, values and the gated feed-forward part.

Images are (B, in_channels, H, W) in [0, 1] of any size: they are padded to multiples of 8 by reflection and the result is cut.
Parameter names are those of the released code, so that its files load unchanged.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.padding import reflect_to_multiple
from paperzoo.papers.classification.convnext.model import LayerNorm2d

MULTIPLE = 8  # three halvings
EPS = 1e-5


class BiasFreeNorm(nn.Module):
    """x / deviation(x) over the channels of each place, times a weight; the mean stays. (B, C, H, W) -> the same.

    Denoisers have it: without additive constants they do better at noise levels that they did not learn from.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        deviation = (x.var(1, keepdim=True, unbiased=False) + EPS).sqrt()
        return x / deviation * self.weight[:, None, None]


def norm(channels: int, bias_free: bool) -> nn.Module:
    return nn.Sequential(OrderedDict(body=BiasFreeNorm(channels) if bias_free else LayerNorm2d(channels, eps=EPS)))


class TransposedAttention(nn.Module):
    """MDTA: V softmax(K^T Q / alpha) between the channels of each head (sec. 3.1). (B, C, H, W) -> the same.

    Queries and keys have length one along the pixels, so that the logits are cosines; `temperature` is 1 / alpha, learned for each head.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.qkv_dwconv = nn.Conv2d(3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=False)
        self.project_out = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        shape = (batch, 3, self.heads, channels // self.heads, height * width)
        q, k, v = self.qkv_dwconv(self.qkv(x)).reshape(shape).unbind(1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        weights = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)  # (B, heads, C / heads, C / heads)
        return self.project_out((weights.to(v.dtype) @ v).reshape(batch, channels, height, width))


class GatedFeedForward(nn.Module):
    """GDFN: W (GELU(D1 W1 x) * D2 W2 x) (sec. 3.2). (B, C, H, W) -> the same; `expansion` is the width of a branch, in C."""

    def __init__(self, channels: int, expansion: float) -> None:
        super().__init__()
        hidden = int(channels * expansion)
        self.project_in = nn.Conv2d(channels, 2 * hidden, 1, bias=False)
        self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.project_out = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(gate) * value)


class TransformerBlock(nn.Module):
    """x + MDTA(LN(x)), then x + GDFN(LN(x)). (B, C, H, W) -> the same."""

    def __init__(self, channels: int, heads: int, expansion: float, bias_free: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(channels, bias_free), norm(channels, bias_free)
        self.attn, self.ffn = TransposedAttention(channels, heads), GatedFeedForward(channels, expansion)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


def halved(channels: int) -> nn.Module:
    """(B, C, H, W) -> (B, 2 C, H / 2, W / 2)."""
    body = nn.Sequential(nn.Conv2d(channels, channels // 2, 3, padding=1, bias=False), nn.PixelUnshuffle(2))
    return nn.Sequential(OrderedDict(body=body))


def doubled(channels: int) -> nn.Module:
    """(B, C, H, W) -> (B, C / 2, 2 H, 2 W)."""
    body = nn.Sequential(nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False), nn.PixelShuffle(2))
    return nn.Sequential(OrderedDict(body=body))


class Restormer(nn.Module):
    """Degraded images (B, in_channels, H, W) in [0, 1] -> restored images (B, out_channels, H, W), not clipped.

    Args:
        in_channels: of the images; 6 for the two views of a dual-pixel camera.
        out_channels: None for as many.
        dim: channels of the first level; each further one has twice as many.
        blocks: of the four levels, on the way down and up.
        refinement: blocks after the way up, at full resolution.
        heads: of the four levels.
        expansion: width of the feed-forward branches.
        bias_free: norms without additive constants, for denoising.
        dual_pixel: the network makes the whole image, with a skip from its first features, instead of a residual.

    Raises:
        ValueError: if blocks or heads are not four, heads do not divide the channels, or a residual has another number of channels than the image.
    """

    scale = 1

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        dim: int = 48,
        blocks: Sequence[int] = (4, 6, 6, 8),
        refinement: int = 4,
        heads: Sequence[int] = (1, 2, 4, 8),
        expansion: float = 2.66,
        bias_free: bool = False,
        dual_pixel: bool = False,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        if len(blocks) != 4 or len(heads) != 4 or any(dim * 2**i % h for i, h in enumerate(heads)):
            raise ValueError(f"blocks and heads have four numbers, and heads divide {dim} * 2^level; got {heads}")
        if not dual_pixel and out_channels != in_channels:
            raise ValueError(f"a residual of {in_channels} channels has as many, got out_channels {out_channels}")

        def level(width: int, i: int, count: int) -> nn.Sequential:
            return nn.Sequential(*(TransformerBlock(width, heads[i], expansion, bias_free) for _ in range(count)))

        d1, d2, d3, d4 = (dim * 2**i for i in range(4))
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(in_channels, d1, 3, padding=1, bias=False)))
        self.encoder_level1, self.down1_2 = level(d1, 0, blocks[0]), halved(d1)
        self.encoder_level2, self.down2_3 = level(d2, 1, blocks[1]), halved(d2)
        self.encoder_level3, self.down3_4 = level(d3, 2, blocks[2]), halved(d3)
        self.latent = level(d4, 3, blocks[3])
        self.up4_3, self.reduce_chan_level3 = doubled(d4), nn.Conv2d(d4, d3, 1, bias=False)
        self.decoder_level3 = level(d3, 2, blocks[2])
        self.up3_2, self.reduce_chan_level2 = doubled(d3), nn.Conv2d(d3, d2, 1, bias=False)
        self.decoder_level2 = level(d2, 1, blocks[1])
        self.up2_1 = doubled(d2)  # the first level keeps both halves: its blocks have d2 channels on the way up
        self.decoder_level1, self.refinement = level(d2, 0, blocks[0]), level(d2, 0, refinement)
        self.skip_conv = nn.Conv2d(d1, d2, 1, bias=False) if dual_pixel else None
        self.output = nn.Conv2d(d2, out_channels, 3, padding=1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        images = reflect_to_multiple(images, MULTIPLE)
        shallow = self.patch_embed(images)
        e1 = self.encoder_level1(shallow)
        e2 = self.encoder_level2(self.down1_2(e1))
        e3 = self.encoder_level3(self.down2_3(e2))
        x = self.latent(self.down3_4(e3))
        x = self.decoder_level3(self.reduce_chan_level3(torch.cat([self.up4_3(x), e3], dim=1)))
        x = self.decoder_level2(self.reduce_chan_level2(torch.cat([self.up3_2(x), e2], dim=1)))
        x = self.refinement(self.decoder_level1(torch.cat([self.up2_1(x), e1], dim=1)))
        y = self.output(x) + images if self.skip_conv is None else self.output(x + self.skip_conv(shallow))
        return y[:, :, :height, :width]


# -- variants ----------------------------------------------------------------------------------------------------------


def restormer(in_channels: int = 3, **settings) -> Restormer:
    """For rain, motion blur and defocus: norms with bias."""
    return Restormer(**{"in_channels": in_channels, **settings})


def restormer_denoising(in_channels: int = 3, **settings) -> Restormer:
    """For Gaussian and real noise: norms without bias. Grey images have one channel."""
    return Restormer(**{"in_channels": in_channels, "bias_free": True, **settings})


def restormer_dual_pixel(in_channels: int = 6, **settings) -> Restormer:
    """For defocus in the two views of a dual-pixel camera, stacked."""
    return Restormer(**{"in_channels": in_channels, "out_channels": 3, "dual_pixel": True, **settings})


def restormer_small(in_channels: int = 3, **settings) -> Restormer:
    """One block a level with 8 to 64 channels; not in the paper, for seconds on a CPU."""
    small = {"dim": 8, "blocks": (1, 1, 1, 1), "refinement": 1, "bias_free": True}
    return Restormer(**{"in_channels": in_channels, **small, **settings})
