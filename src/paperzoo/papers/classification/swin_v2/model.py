"""Swin V2: Swin Transformer V2: Scaling Up Capacity and Resolution (Liu et al., CVPR 2022, arXiv:2111.09883).

Attention within windows that every second block shifts by half, in four stages as Swin V1, with the paper's three changes:
normalisation at the end of each residual branch, cosine attention, and a position bias that a small network computes.

Parameter names are timm's (`layers.1.blocks.0.attn.q_bias`), so its checkpoints of all public sizes load unchanged;
`from_official` converts the authors' files and torchvision's. What differs from the paper, as in the released code: the bias is
16 * sigmoid(MLP), offsets are scaled to -8 … 8 before the logarithm, and keys have no additive bias.

The window of a stage is `window_size`, or its whole map where `image_size` makes that smaller. Other image sizes work: maps
are padded to whole windows, and padding is attended to as torchvision does; the released code takes one size alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

HEAD_DIM = 32


def to_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B * windows, window area, C); H and W are multiples of the window."""
    _, height, width, channels = x.shape
    x = x.reshape(-1, height // window[0], window[0], width // window[1], window[1], channels)
    return x.transpose(2, 3).reshape(-1, window[0] * window[1], channels)


def from_windows(x: Tensor, window: tuple[int, int], height: int, width: int) -> Tensor:
    """The inverse of `to_windows`."""
    x = x.reshape(-1, height // window[0], width // window[1], window[0], window[1], x.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, x.shape[-1])


def shift_mask(height: int, width: int, window: tuple[int, int], shift: tuple[int, int], like: Tensor) -> Tensor:
    """(windows, area, area): -100 between places that the cyclic shift brought together from opposite sides, else 0."""
    rows, columns = (
        (at >= size - w).long() + (at >= size - s).long() if s else at * 0
        for at, size, w, s in (
            (torch.arange(height, device=like.device), height, window[0], shift[0]),
            (torch.arange(width, device=like.device), width, window[1], shift[1]),
        )
    )
    region = to_windows((3 * rows[:, None] + columns)[None, :, :, None], window).squeeze(-1)
    return (region[:, :, None] != region[:, None, :]).to(like.dtype) * -100.0


class WindowAttention(nn.Module):
    """Scaled cosine attention with a log-spaced continuous position bias (sec. 3.3). (windows, area, dim) -> the same.

    Args:
        dim: channels.
        window_size: height and width of a window.
        num_heads: heads.
        pretrained_window_size: the window that the weights were learned with, where it was another: offsets are measured in it.
    """

    def __init__(
        self,
        dim: int,
        window_size: tuple[int, int],
        num_heads: int,
        pretrained_window_size: int | None = None,
    ) -> None:
        super().__init__()
        self.window_size, self.num_heads = window_size, num_heads
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(inplace=True), nn.Linear(512, num_heads, bias=False))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)
        known = window_size if pretrained_window_size is None else (pretrained_window_size, pretrained_window_size)
        self.register_buffer("relative_coords_table", log_offsets(window_size, known), persistent=False)
        self.register_buffer("relative_position_index", offset_index(window_size), persistent=False)

    def position_bias(self) -> Tensor:
        """B of eq. (2) and (3), (heads, area, area)."""
        table = 16 * torch.sigmoid(self.cpb_mlp(self.relative_coords_table))  # one row an offset
        return table[self.relative_position_index].permute(2, 0, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` (windows of one image, area, area) is added to the logits."""
        count, area, dim = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).reshape(count, area, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()  # 1 / tau; tau stays above 0.01
        q, k = F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)  # eq. (2)
        bias = self.position_bias()
        if mask is None:
            bias = bias[None]
        else:  # an image's windows stand beside its heads, so that the mask is stored once a batch
            bias = (mask[:, None] + bias).flatten(0, 1)[None]
            q, k, v = (t.reshape(-1, bias.shape[1], area, dim // self.num_heads) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=bias.to(q.dtype), scale=1.0)
        y = y.reshape(count, self.num_heads, area, -1).transpose(1, 2)
        return self.proj(y.clone(memory_format=torch.contiguous_format).flatten(2))  # a clone: kernels differ in layout


def log_offsets(window: tuple[int, int], known: tuple[int, int]) -> Tensor:
    """Every offset between two places of a window on a log scale (eq. 4): ((2 h - 1) * (2 w - 1), 2)."""
    axes = [
        torch.arange(1 - size, size, dtype=torch.float32) * 8 / max(k - 1, 1)
        for size, k in zip(window, known, strict=True)
    ]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    return offsets.sign() * torch.log2(offsets.abs() + 1) / math.log2(8)


def offset_index(window: tuple[int, int]) -> Tensor:
    """(area, area): which row of the table holds the offset between two places."""
    rows = torch.arange(window[0]).repeat_interleave(window[1])
    columns = torch.arange(window[1]).repeat(window[0])
    down = rows[:, None] - rows + window[0] - 1
    right = columns[:, None] - columns + window[1] - 1
    return down * (2 * window[1] - 1) + right


class Mlp(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwinV2Block(nn.Module):
    """x + norm(attention(x)), then x + norm(mlp(x)): residual post-norm (sec. 3.2). (B, H, W, dim) -> the same.

    Args:
        dim, num_heads, window_size, pretrained_window_size: as `WindowAttention`.
        shifted: whether the windows lie half a window further right and down.
        drop_path: how often a residual branch is left out while training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: tuple[int, int],
        shifted: bool,
        drop_path: float = 0.0,
        pretrained_window_size: int | None = None,
    ) -> None:
        super().__init__()
        self.shifted = shifted
        self.attn = WindowAttention(dim, window_size, num_heads, pretrained_window_size)
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.norm2 = nn.LayerNorm(dim)
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else nn.Identity()

    def attend(self, x: Tensor, shift: tuple[int, int], mask: Tensor | None) -> Tensor:
        _, height, width, _ = x.shape
        window = self.attn.window_size
        down, right = -height % window[0], -width % window[1]
        if down or right:
            x = F.pad(x, (0, 0, 0, right, 0, down))
        moved = self.shifted and any(shift)
        if moved:
            x = x.roll((-shift[0], -shift[1]), (1, 2))
        y = self.attn(to_windows(x, window), mask if moved else None)
        y = from_windows(y, window, height + down, width + right)
        if moved:
            y = y.roll(shift, (1, 2))
        return y[:, :height, :width] if down or right else y

    def forward(self, x: Tensor, shift: tuple[int, int], mask: Tensor | None) -> Tensor:
        """`shift` and `mask` are the stage's, for blocks that shift."""
        x = x + self.drop_path(self.norm1(self.attend(x, shift, mask)))
        return x + self.drop_path(self.norm2(self.mlp(x)))


class PatchMerging(nn.Module):
    """Each 2 x 2 square becomes one place with twice the channels. (B, H, W, dim) -> (B, ceil(H/2), ceil(W/2), 2 dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % 2 or x.shape[2] % 2:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        _, height, width, dim = x.shape
        x = x.reshape(-1, height // 2, 2, width // 2, 2, dim).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.norm(self.reduction(x))


class Stage(nn.Module):
    """Patch merging (but in the first stage), then blocks of which every second shifts. (B, H, W, C) -> (B, H', W', C').

    `extra_norm` puts a layer norm on the main branch after so many blocks: sec. 3.2, for the two largest models.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        window_size: tuple[int, int],
        downsample: bool,
        drop_path: Sequence[float],
        pretrained_window_size: int | None = None,
        extra_norm: int | None = None,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.downsample = PatchMerging(dim // 2) if downsample else nn.Identity()
        self.blocks = nn.ModuleList(
            SwinV2Block(dim, num_heads, window_size, i % 2 == 1, drop_path[i], pretrained_window_size)
            for i in range(depth)
        )
        self.extra_norm = extra_norm
        self.extra_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth // extra_norm if extra_norm else 0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        window = self.window_size
        sizes = [n + -n % w for n, w in zip(x.shape[1:3], window, strict=True)]  # padded to whole windows
        shift = tuple(
            w // 2 if n > w else 0 for n, w in zip(sizes, window, strict=True)
        )  # one window: nothing to shift
        mask = shift_mask(*sizes, window, shift, x) if any(shift) else None
        for i, block in enumerate(self.blocks, 1):
            x = block(x, shift, mask)
            if self.extra_norm and i % self.extra_norm == 0:
                x = self.extra_norms[i // self.extra_norm - 1](x)
        return x


class PatchEmbed(nn.Module):
    """(B, in_channels, H, W) -> (B, H / patch, W / patch, dim); what does not fill a patch is left out."""

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class SwinTransformerV2(nn.Module):
    """Images (B, in_channels, H, W), normalised, -> logits (B, num_classes).

    Args:
        image_size: the size that decides where a window is larger than a stage's map; other sizes work.
        window_size: side of a window, in places of each stage's map.
        embed_dim: channels of the first stage; each further one doubles them.
        depth: blocks in each stage.
        num_heads: heads in each stage; None is one for 32 channels.
        num_classes: columns of the logits; 0 for features.
        in_channels: channels of the image.
        patch_size: side of a patch.
        drop_rate: dropout before the last layer.
        drop_path_rate: of the last block; earlier ones have less, in proportion to their depth.
        pretrained_window_sizes: of each stage, where the weights were learned with other windows.
        extra_norm: blocks of a stage between additional layer norms on the main branch; None for none.

    Raises:
        ValueError: for an image smaller than a patch, or widths that the heads do not divide.
    """

    def __init__(
        self,
        image_size: int = 256,
        window_size: int = 8,
        embed_dim: int = 96,
        depth: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] | None = None,
        num_classes: int = 1000,
        in_channels: int = 3,
        patch_size: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        pretrained_window_sizes: Sequence[int] | None = None,
        extra_norm: int | None = None,
    ) -> None:
        super().__init__()
        if image_size < patch_size:
            raise ValueError(f"image_size must be at least patch_size ({patch_size}), got {image_size}")
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {window_size}")
        dims = [embed_dim * 2**i for i in range(len(depth))]
        num_heads = [dim // HEAD_DIM for dim in dims] if num_heads is None else list(num_heads)
        if len(num_heads) != len(depth) or any(not h or dim % h for dim, h in zip(dims, num_heads, strict=False)):
            raise ValueError(f"num_heads has one divisor of {dims} for each of {len(depth)} stages, got {num_heads}")
        known = [None] * len(depth) if pretrained_window_sizes is None else list(pretrained_window_sizes)
        self.num_classes, self.patch_size = num_classes, patch_size
        self.patch_embed = PatchEmbed(patch_size, in_channels, embed_dim)
        last = max(sum(depth) - 1, 1)
        rates = iter([drop_path_rate * i / last for i in range(sum(depth))])
        grid, stages = image_size // patch_size, []
        for i, (dim, blocks, heads) in enumerate(zip(dims, depth, num_heads, strict=True)):
            grid = (grid + 1) // 2 if i else grid
            window = (min(window_size, grid),) * 2
            dropped = [next(rates) for _ in range(blocks)]
            stages.append(Stage(dim, blocks, heads, window, i > 0, dropped, known[i], extra_norm))
        self.layers = nn.Sequential(*stages)
        self.stage_channels, self.num_features = dims, dims[-1]
        self.stage_strides = [patch_size * 2**i for i in range(len(depth))]
        self.norm = nn.LayerNorm(self.num_features)
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.ModuleDict({"fc": nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()})
        self.apply(initialise)

    def patches(self, x: Tensor) -> Tensor:
        """What the first stage sees, (B, H / patch, W / patch, embed_dim)."""
        if min(x.shape[2:]) < self.patch_size:
            raise ValueError(f"images must be at least {self.patch_size} pixels in each direction, got {list(x.shape)}")
        return self.patch_embed(x)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The outputs of the stages (B, C_i, H_i, W_i), strides 4, 8, 16, 32, the last one before the final norm."""
        x, outputs = self.patches(x), []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x.permute(0, 3, 1, 2))
        return outputs

    def embed(self, x: Tensor) -> Tensor:
        """Pooled features (B, num_features)."""
        return self.norm(self.layers(self.patches(x))).mean((1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head["fc"](self.drop(self.embed(x)))

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer for another number of classes; 0 leaves none."""
        self.num_classes = num_classes
        fresh = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head["fc"] = fresh.to(self.norm.weight)
        fresh.apply(initialise)


def initialise(module: nn.Module) -> None:
    """Truncated normal weights; the norms that end a branch start at zero, so that every block starts as the identity."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, SwinV2Block):
        for norm in (module.norm1, module.norm2):
            nn.init.zeros_(norm.weight)
            nn.init.zeros_(norm.bias)


# -- variants: widths, depths and stochastic depth as in the authors' configurations ------------------------------------

SIZES = {
    "tiny": {"embed_dim": 96, "depth": (2, 2, 6, 2), "drop_path_rate": 0.2},
    "small": {"embed_dim": 96, "depth": (2, 2, 18, 2), "drop_path_rate": 0.3},
    "base": {"embed_dim": 128, "depth": (2, 2, 18, 2), "drop_path_rate": 0.5},
    "large": {"embed_dim": 192, "depth": (2, 2, 18, 2), "drop_path_rate": 0.2},
    "huge": {"embed_dim": 352, "depth": (2, 2, 18, 2), "extra_norm": 6},
    "giant": {"embed_dim": 512, "depth": (2, 2, 42, 4), "extra_norm": 6},
}


def sized(size: str, window_size: int, image_size: int, settings: dict) -> SwinTransformerV2:
    """A network of one of the `SIZES`; `settings` go before everything else."""
    return SwinTransformerV2(**{"window_size": window_size, "image_size": image_size, **SIZES[size], **settings})


def moved_up(size: str, window_size: int, image_size: int, settings: dict) -> SwinTransformerV2:
    """Learned at 192 pixels with windows of 12 (6 in the last stage), used at a larger size with larger windows."""
    known = {"drop_path_rate": 0.2, "pretrained_window_sizes": (12, 12, 12, 6)}
    return sized(size, window_size, image_size, {**known, **settings})


def swinv2_tiny_window8_256(**settings) -> SwinTransformerV2:
    """SwinV2-T, 28M parameters; `settings` as `SwinTransformerV2`."""
    return sized("tiny", 8, 256, settings)


def swinv2_tiny_window16_256(**settings) -> SwinTransformerV2:
    return sized("tiny", 16, 256, settings)


def swinv2_small_window8_256(**settings) -> SwinTransformerV2:
    """SwinV2-S, 50M parameters."""
    return sized("small", 8, 256, settings)


def swinv2_small_window16_256(**settings) -> SwinTransformerV2:
    return sized("small", 16, 256, settings)


def swinv2_base_window8_256(**settings) -> SwinTransformerV2:
    """SwinV2-B, 88M parameters."""
    return sized("base", 8, 256, settings)


def swinv2_base_window16_256(**settings) -> SwinTransformerV2:
    return sized("base", 16, 256, settings)


def swinv2_base_window12_192(**settings) -> SwinTransformerV2:
    """SwinV2-B as learned on ImageNet-22k, with its 21,841 classes."""
    return sized("base", 12, 192, {"drop_path_rate": 0.2, "num_classes": 21841, **settings})


def swinv2_base_window12to16_192to256(**settings) -> SwinTransformerV2:
    return moved_up("base", 16, 256, settings)


def swinv2_base_window12to24_192to384(**settings) -> SwinTransformerV2:
    return moved_up("base", 24, 384, settings)


def swinv2_large_window12_192(**settings) -> SwinTransformerV2:
    """SwinV2-L as learned on ImageNet-22k, with its 21,841 classes."""
    return sized("large", 12, 192, {"num_classes": 21841, **settings})


def swinv2_large_window12to16_192to256(**settings) -> SwinTransformerV2:
    return moved_up("large", 16, 256, settings)


def swinv2_large_window12to24_192to384(**settings) -> SwinTransformerV2:
    return moved_up("large", 24, 384, settings)


def swinv2_huge_window12_192(**settings) -> SwinTransformerV2:
    """SwinV2-H, 658M parameters; no weights are public."""
    return sized("huge", 12, 192, settings)


def swinv2_giant_window12_192(**settings) -> SwinTransformerV2:
    """SwinV2-G, 3.0B parameters; no weights are public."""
    return sized("giant", 12, 192, settings)


def swinv2_digits(**settings) -> SwinTransformerV2:
    """Two stages for 32x32 images, 0.3M parameters; not in the paper, for seconds on a CPU."""
    small = {"image_size": 32, "window_size": 4, "embed_dim": 48, "depth": (2, 2), "num_heads": (3, 6)}
    return SwinTransformerV2(**{"num_classes": 10, **small, **settings})


# -- checkpoints -----------------------------------------------------------------------------------------------------------


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts the authors' checkpoints and torchvision's; timm's are returned as they are."""
    if any(name.startswith("features.") for name in state):
        return from_torchvision(state)
    derived = ("relative_position_index", "relative_coords_table", "attn_mask")
    state = {name: value for name, value in state.items() if not name.endswith(derived)}
    if "layers.0.downsample.reduction.weight" in state:  # the authors merge at the end of a stage, here it is the start
        state = {
            re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name): value
            for name, value in state.items()
        }
    return {re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name): value for name, value in state.items()}


def from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's `swin_v2_t`, `swin_v2_s` and `swin_v2_b`."""
    rules = [
        (r"^features\.0\.0\.", "patch_embed.proj."),
        (r"^features\.0\.2\.", "patch_embed.norm."),
        (r"^features\.(\d*[02468])\.", lambda m: f"layers.{int(m[1]) // 2}.downsample."),
        (r"^features\.(\d*[13579])\.", lambda m: f"layers.{int(m[1]) // 2}.blocks."),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.3\.", ".mlp.fc2."),
        (r"^head\.", "head.fc."),
    ]
    converted = {}
    for name, value in state.items():
        if name.endswith(("relative_position_index", "relative_coords_table")):
            continue
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if name.endswith("attn.qkv.bias"):  # the keys' third is held at zero there
            q, _, v = value.chunk(3)
            converted |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        else:
            converted[name] = value
    return converted
