"""MLP-Mixer: An all-MLP Architecture for Vision (Tolstikhin et al., NeurIPS 2021, arXiv:2105.01601).

The image is cut into patches; every block holds one perceptron that mixes patches, the same for each channel, and one that
mixes channels, the same for each patch (fig. 1, eq. 1).

Parameter names are timm's (`blocks.0.mlp_tokens.fc1.weight`), whose `state_dict`s load unchanged; `from_official` converts
the authors' arrays. What differs from the released code: GELU is exact, as in timm; the authors' framework computes the
approximation with tanh, which is `gelu="tanh"`. The head starts at zero, as there.
"""

from __future__ import annotations

import re
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

EPS = 1e-6
Gelu = Literal["none", "tanh"]


class Mlp(nn.Module):
    """Two layers with a GELU between them, on the last dimension."""

    def __init__(self, features: int, hidden: int, gelu: Gelu = "none") -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, hidden)
        self.act = nn.GELU(gelu)
        self.fc2 = nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class MixerBlock(nn.Module):
    """Eq. (1). (B, patches, channels) -> the same.

    Args:
        patches, channels: S and C.
        token_dim, channel_dim: widths of the two perceptrons, D_S and D_C.
        drop_paths: the probabilities that the two branches are left out of a training sample.
        gelu: "tanh" approximates.
    """

    def __init__(
        self,
        patches: int,
        channels: int,
        token_dim: int,
        channel_dim: int,
        drop_paths: tuple[float, float] = (0.0, 0.0),
        gelu: Gelu = "none",
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=EPS)
        self.mlp_tokens = Mlp(patches, token_dim, gelu)
        self.norm2 = nn.LayerNorm(channels, eps=EPS)
        self.mlp_channels = Mlp(channels, channel_dim, gelu)
        self.drop_path1, self.drop_path2 = (StochasticDepth(p, "row") for p in drop_paths)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2))
        return x + self.drop_path2(self.mlp_channels(self.norm2(x)))


class PatchEmbed(nn.Module):
    """The same linear map of every patch. (B, C, H, W) -> (B, patches, dim), row by row."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class MlpMixer(nn.Module):
    """Fig. 1: images (B, in_channels, image_size, image_size), normalised, -> logits (B, num_classes).

    Args:
        embed_dim: channels, C.
        depth: blocks.
        patch_size: pixels of a patch's side.
        num_classes: columns of the logits; 0 for no head.
        in_channels: channels of the image.
        image_size: the side of the image, or height and width. The weights of the token mixing depend on it.
        mlp_ratio: widths of the two perceptrons, of `embed_dim`: D_S and D_C.
        drop_path_rate: stochastic depth, growing from 0 in the first perceptron to this share in the last.
        gelu: "tanh" for the authors' weights.
    """

    def __init__(
        self,
        embed_dim: int = 768,
        depth: int = 12,
        patch_size: int = 16,
        num_classes: int = 1000,
        in_channels: int = 3,
        image_size: int | tuple[int, int] = 224,
        mlp_ratio: tuple[float, float] = (0.5, 4.0),
        drop_path_rate: float = 0.0,
        gelu: Gelu = "none",
    ) -> None:
        super().__init__()
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if any(side % patch_size or side < patch_size for side in self.image_size):
            raise ValueError(f"image_size must be a multiple of the patch size {patch_size}, got {image_size}")
        self.grid = tuple(side // patch_size for side in self.image_size)
        self.in_channels, self.num_features = in_channels, embed_dim
        self.stage_channels, self.stage_strides = [embed_dim], [patch_size]
        self.stem = PatchEmbed(in_channels, embed_dim, patch_size)
        widths = [int(ratio * embed_dim) for ratio in mlp_ratio]
        rates = [drop_path_rate * i / max(1, 2 * depth - 1) for i in range(2 * depth)]
        self.blocks = nn.Sequential(
            *[
                MixerBlock(self.grid[0] * self.grid[1], embed_dim, *widths, (rates[2 * i], rates[2 * i + 1]), gelu)
                for i in range(depth)
            ]
        )
        self.norm = nn.LayerNorm(embed_dim, eps=EPS)
        self.reset_classifier(num_classes)
        for part in (self.stem, self.blocks):
            for module in part.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):  # LeCun's normal, cut at two deviations, as the authors'
                    spread = module.weight[0].numel() ** -0.5 / 0.87962566103423978
                    nn.init.trunc_normal_(module.weight, std=spread, a=-2 * spread, b=2 * spread)
                    nn.init.zeros_(module.bias)

    def features(self, x: Tensor) -> Tensor:
        """(B, patches, embed_dim), normalised."""
        if tuple(x.shape[-2:]) != self.image_size:
            height, width = self.image_size
            raise ValueError(
                f"this network takes images of {height} x {width} (image_size), got {x.shape[-2]} x {x.shape[-1]}"
            )
        return self.norm(self.blocks(self.stem(x)))

    def stages(self, x: Tensor) -> list[Tensor]:
        """The one map, (B, embed_dim, H / patch, W / patch)."""
        return [self.features(x).transpose(1, 2).unflatten(2, self.grid)]

    def embed(self, x: Tensor) -> Tensor:
        """The mean over patches (B, num_features)."""
        return self.features(x).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer of zeros for another number of classes; 0 for none."""
        if not num_classes:
            self.head = nn.Identity()
            return
        self.head = nn.Linear(self.num_features, num_classes).to(self.norm.weight)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)


# -- variants (table 1) ----------------------------------------------------------------------------------------------------


def mixer_s32_224(num_classes: int = 1000, in_channels: int = 3, **options) -> MlpMixer:
    """Mixer-S/32, 19.1M parameters; `options` as `MlpMixer`."""
    return MlpMixer(512, 8, 32, num_classes, in_channels, **options)


def mixer_s16_224(num_classes: int = 1000, in_channels: int = 3, **options) -> MlpMixer:
    """Mixer-S/16, 18.5M parameters."""
    return MlpMixer(512, 8, 16, num_classes, in_channels, **options)


def mixer_b32_224(num_classes: int = 1000, in_channels: int = 3, **options) -> MlpMixer:
    """Mixer-B/32, 60.3M parameters."""
    return MlpMixer(768, 12, 32, num_classes, in_channels, **options)


def mixer_b16_224(num_classes: int = 1000, in_channels: int = 3, **options) -> MlpMixer:
    """Mixer-B/16, 59.9M parameters."""
    return MlpMixer(768, 12, 16, num_classes, in_channels, **options)


def mixer_l32_224(num_classes: int = 1000, in_channels: int = 3, **options) -> MlpMixer:
    """Mixer-L/32, 206.9M parameters."""
    return MlpMixer(1024, 24, 32, num_classes, in_channels, **options)


def mixer_l16_224(num_classes: int = 1000, in_channels: int = 3, **options) -> MlpMixer:
    """Mixer-L/16, 208.2M parameters."""
    return MlpMixer(1024, 24, 16, num_classes, in_channels, **options)


def mixer_h14_224(num_classes: int = 1000, in_channels: int = 3, **options) -> MlpMixer:
    """Mixer-H/14, 432M parameters."""
    return MlpMixer(1280, 32, 14, num_classes, in_channels, **options)


def mixer_digits(num_classes: int = 10, in_channels: int = 3, **options) -> MlpMixer:
    """Not in the paper: patches of 8 in 32 x 32 images, four narrow blocks, for seconds on a CPU."""
    return MlpMixer(96, 4, 8, num_classes, in_channels, **{"image_size": 32, **options})


# -- checkpoints ---------------------------------------------------------------------------------------------------------

PARTS = {
    "LayerNorm_0": "norm1",
    "LayerNorm_1": "norm2",
    "token_mixing.Dense_0": "mlp_tokens.fc1",
    "token_mixing.Dense_1": "mlp_tokens.fc2",
    "channel_mixing.Dense_0": "mlp_channels.fc1",
    "channel_mixing.Dense_1": "mlp_channels.fc2",
}
OUTER = {"stem": "stem.proj", "pre_head_layer_norm": "norm", "head": "head"}


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' arrays ("MixerBlock_0/token_mixing/Dense_0/kernel") to these names; timm's come through unchanged."""
    renamed = {}
    for name, value in state_dict.items():
        part, _, kind = name.replace("/", ".").rpartition(".")
        found = re.match(r"MixerBlock_(\d+)\.(.+)$", part)
        if found and found[2] in PARTS:
            part = f"blocks.{found[1]}.{PARTS[found[2]]}"
        elif kind == "kernel" or part == "pre_head_layer_norm" or f"{part}/kernel" in state_dict:
            part = OUTER.get(part, part)
        else:
            renamed[name] = value
            continue
        if kind == "kernel":  # inputs stand before outputs
            value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
        renamed[f"{part}.{'bias' if kind == 'bias' else 'weight'}"] = torch.as_tensor(value)
    return renamed
