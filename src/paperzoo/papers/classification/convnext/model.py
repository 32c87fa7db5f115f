"""ConvNeXt: A ConvNet for the 2020s (Liu et al., CVPR 2022, arXiv:2201.03545).

A residual network rebuilt with the habits of transformers: a stem that cuts the image into patches, blocks of one wide
depthwise convolution and one two-layer perceptron, a single layer norm and a single GELU in each (fig. 4), and normalised
2 x 2 convolutions between four stages (sec. 2.6). The isotropic networks of sec. 3.3 keep one resolution, as ViT does.

Parameter names are torchvision's (`features.1.0.block.0.weight`), whose `state_dict`s load unchanged; `from_official`
converts the authors' files and those of timm and transformers. Nothing differs from the paper; as in the released code,
features are normalised after the pooling. Stochastic depth is off unless `drop_path_rate` asks for it; the paper trains on
ImageNet-1K with 0.1, 0.4, 0.5 and 0.5 for T, S, B and L.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Permute, StochasticDepth

from paperzoo.blocks.classifier import last_layer

EPS = 1e-6


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each place of a map. (B, C, H, W) -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """x + gamma * W2 GELU(W1 LN(DW(x))) (fig. 4 right). (B, dim, H, W) -> the same.

    Args:
        dim: channels; the perceptron is four times as wide.
        kernel_size: of the depthwise convolution, odd.
        layer_scale: what gamma starts at; None for no gamma.
        drop_path: the probability that the branch is left out of a training sample.
    """

    def __init__(
        self, dim: int, kernel_size: int = 7, layer_scale: float | None = 1e-6, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim),  # mixes places
            Permute([0, 2, 3, 1]),
            nn.LayerNorm(dim, eps=EPS),
            nn.Linear(dim, 4 * dim),  # from here on: mixes channels
            nn.GELU(),
            nn.Linear(4 * dim, dim),
            Permute([0, 3, 1, 2]),
        )
        self.layer_scale = None if layer_scale is None else nn.Parameter(torch.full((dim, 1, 1), layer_scale))
        self.stochastic_depth = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor) -> Tensor:
        branch = self.block(x)
        if self.layer_scale is not None:
            branch = branch * self.layer_scale
        return self.stochastic_depth(branch) + x


def make_blocks(
    dims: Sequence[int], depths: Sequence[int], kernel_size: int, layer_scale: float | None, drop_path_rate: float
) -> list[nn.Sequential]:
    """The stages; the share of left-out branches grows from 0 in the first block to `drop_path_rate` in the last."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd (the paper has 7), got {kernel_size}")
    if len(dims) != len(depths) or min(depths) < 1:
        raise ValueError(f"depths has one entry of at least 1 for each of dims {tuple(dims)}, got {tuple(depths)}")
    last, number, stages = max(1, sum(depths) - 1), 0, []
    for dim, depth in zip(dims, depths, strict=True):
        rates = [drop_path_rate * (number + i) / last for i in range(depth)]
        stages.append(nn.Sequential(*[ConvNeXtBlock(dim, kernel_size, layer_scale, rate) for rate in rates]))
        number += depth
    return stages


def initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class ConvNeXt(nn.Module):
    """Table 9: images (B, in_channels, H, W), normalised, -> logits (B, num_classes).

    H and W are at least 8 * `patch_size`, 32 in the paper's networks; what does not fill a patch is cut off.

    Args:
        depths: blocks in each stage.
        dims: channels of each stage.
        num_classes: columns of the logits; 0 for no head.
        in_channels: channels of the image.
        kernel_size: of the depthwise convolutions (sec. 2.5).
        patch_size: of the stem; smaller ones keep small images large.
        layer_scale: what the branches' factors start at; None for none.
        drop_path_rate: stochastic depth in the last block.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        num_classes: int = 1000,
        in_channels: int = 3,
        kernel_size: int = 7,
        patch_size: int = 4,
        layer_scale: float | None = 1e-6,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.stage_channels = list(dims)
        self.stage_strides = [patch_size << i for i in range(len(dims))]
        self.num_features = dims[-1]
        stem = nn.Conv2d(in_channels, dims[0], patch_size, stride=patch_size)
        layers = [nn.Sequential(stem, LayerNorm2d(dims[0], eps=EPS))]
        for i, stage in enumerate(make_blocks(dims, depths, kernel_size, layer_scale, drop_path_rate)):
            if i > 0:  # sec. 2.6: layer norm, then a 2 x 2 convolution that halves the map
                down = nn.Conv2d(dims[i - 1], dims[i], 2, stride=2)
                layers.append(nn.Sequential(LayerNorm2d(dims[i - 1], eps=EPS), down))
            layers.append(stage)
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            LayerNorm2d(dims[-1], eps=EPS), nn.Flatten(1), last_layer(dims[-1], num_classes)
        )
        initialise(self)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The outputs of the stages, strides 4, 8, 16, 32."""
        maps = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i % 2:
                maps.append(x)
        return maps

    def embed(self, x: Tensor) -> Tensor:
        """Pooled features (B, num_features), normalised. Not by `stages`, so that each map is freed when it was read."""
        x = self.features(x).mean((2, 3), keepdim=True)
        return self.classifier[1](self.classifier[0](x))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier[2](self.embed(x))

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer for another number of classes; 0 for none."""
        self.classifier[2] = last_layer(self.num_features, num_classes).to(self.features[0][0].weight)
        initialise(self.classifier[2])


class IsotropicConvNeXt(nn.Module):
    """Sec. 3.3: patches as ViT's and one stage of blocks. (B, in_channels, H, W) -> logits (B, num_classes).

    H and W are at least `patch_size`. Arguments as `ConvNeXt`; `dim` and `depth` are of the one stage.
    """

    def __init__(
        self,
        dim: int = 384,
        depth: int = 18,
        num_classes: int = 1000,
        in_channels: int = 3,
        kernel_size: int = 7,
        patch_size: int = 16,
        layer_scale: float | None = None,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_channels, self.num_features = in_channels, dim
        self.stage_channels, self.stage_strides = [dim], [patch_size]
        self.stem = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        (self.blocks,) = make_blocks([dim], [depth], kernel_size, layer_scale, drop_path_rate)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.head = last_layer(dim, num_classes)
        initialise(self)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The one map, stride 16."""
        return [self.blocks(self.stem(x))]

    def embed(self, x: Tensor) -> Tensor:
        """Pooled features (B, num_features), normalised."""
        return self.norm(self.blocks(self.stem(x)).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer for another number of classes; 0 for none."""
        self.head = last_layer(self.num_features, num_classes).to(self.stem.weight)
        initialise(self.head)


# -- variants ------------------------------------------------------------------------------------------------------------


def convnext_tiny(num_classes: int = 1000, in_channels: int = 3, **options) -> ConvNeXt:
    """ConvNeXt-T, 28.6M parameters; `options` as `ConvNeXt`."""
    return ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768), num_classes, in_channels, **options)


def convnext_small(num_classes: int = 1000, in_channels: int = 3, **options) -> ConvNeXt:
    """ConvNeXt-S, 50.2M parameters."""
    return ConvNeXt((3, 3, 27, 3), (96, 192, 384, 768), num_classes, in_channels, **options)


def convnext_base(num_classes: int = 1000, in_channels: int = 3, **options) -> ConvNeXt:
    """ConvNeXt-B, 88.6M parameters."""
    return ConvNeXt((3, 3, 27, 3), (128, 256, 512, 1024), num_classes, in_channels, **options)


def convnext_large(num_classes: int = 1000, in_channels: int = 3, **options) -> ConvNeXt:
    """ConvNeXt-L, 197.8M parameters."""
    return ConvNeXt((3, 3, 27, 3), (192, 384, 768, 1536), num_classes, in_channels, **options)


def convnext_xlarge(num_classes: int = 1000, in_channels: int = 3, **options) -> ConvNeXt:
    """ConvNeXt-XL, 350.2M parameters."""
    return ConvNeXt((3, 3, 27, 3), (256, 512, 1024, 2048), num_classes, in_channels, **options)


def convnext_isotropic_small(num_classes: int = 1000, in_channels: int = 3, **options) -> IsotropicConvNeXt:
    """ConvNeXt-S (isotropic), 22.3M parameters, without layer scale; `options` as `IsotropicConvNeXt`."""
    return IsotropicConvNeXt(384, 18, num_classes, in_channels, **options)


def convnext_isotropic_base(num_classes: int = 1000, in_channels: int = 3, **options) -> IsotropicConvNeXt:
    """ConvNeXt-B (isotropic), 87.1M parameters, without layer scale."""
    return IsotropicConvNeXt(768, 18, num_classes, in_channels, **options)


def convnext_isotropic_large(
    num_classes: int = 1000, in_channels: int = 3, layer_scale: float | None = 1e-6, **options
) -> IsotropicConvNeXt:
    """ConvNeXt-L (isotropic), 306M parameters."""
    return IsotropicConvNeXt(1024, 36, num_classes, in_channels, layer_scale=layer_scale, **options)


def convnext_digits(
    num_classes: int = 10, in_channels: int = 3, layer_scale: float | None = 0.1, **options
) -> ConvNeXt:
    """Not in the paper: four narrow stages for 32 x 32 images, patches of 2, for seconds on a CPU.

    Layer scale starts at 0.1: a few hundred steps are too few for branches to grow from a millionth.
    """
    options = {"patch_size": 2, **options}
    return ConvNeXt((1, 1, 3, 1), (24, 48, 96, 192), num_classes, in_channels, layer_scale=layer_scale, **options)


# -- checkpoints ---------------------------------------------------------------------------------------------------------

PARTS = {"conv_dw": 0, "dwconv": 0, "norm": 2, "layernorm": 2, "mlp.fc1": 3, "pwconv1": 3, "mlp.fc2": 5, "pwconv2": 5}
SCALES = ("gamma", "layer_scale_parameter")


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' weights, timm's and transformers' to these names; torchvision's come through unchanged."""
    isotropic = "stem.weight" in state_dict
    return {
        new_name(name, isotropic): value.reshape(-1, 1, 1) if name.endswith(SCALES) else value
        for name, value in state_dict.items()
    }


def new_name(name: str, isotropic: bool = False) -> str:
    """For example "stages.0.blocks.1.mlp.fc1.weight" (timm) -> "features.1.1.block.3.weight"."""
    name = name.removeprefix("convnext.").removeprefix("encoder.")
    if found := re.match(r"(?:stages\.(\d+)\.(?:blocks\.|layers\.)?|blocks\.)(\d+)\.(.+)$", name):
        stage, block, rest = found.groups()
        here = f"blocks.{block}" if stage is None else f"features.{2 * int(stage) + 1}.{block}"
        if rest in SCALES:
            return f"{here}.layer_scale"
        part, _, kind = rest.rpartition(".")
        return f"{here}.block.{PARTS[part]}.{kind}" if part in PARTS else name
    if found := re.match(
        r"(?:stages|downsample_layers)\.(\d+)\.(?:downsample\.|downsampling_layer\.)?(\d+)\.(\w+)$", name
    ):
        return f"features.{2 * int(found[1])}.{found[2]}.{found[3]}"
    if isotropic:
        return name
    for pattern, new in (
        (r"^(?:stem\.0|embeddings\.patch_embeddings)\.", "features.0.0."),
        (r"^(?:stem\.1|embeddings\.layernorm)\.", "features.0.1."),
        (r"^(?:head\.norm|norm|layernorm)\.", "classifier.0."),
        (r"^(?:head\.fc|head|classifier)\.(?=\D)", "classifier.2."),
    ):
        name, changed = re.subn(pattern, new, name)
        if changed:
            return name
    return name
