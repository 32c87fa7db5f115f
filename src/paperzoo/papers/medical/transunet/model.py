"""TransUNet (Chen et al., 2021, arXiv:2102.04306): a residual network, a transformer over its coarse map, and a decoder with skipped maps.

The hybrid encoder is the R50 + ViT-B/16 of the vision transformer's authors: three stages of a ResNet with standardised kernels and group norm end at 1/16
of the input, each cell of which is embedded as a token. Twelve layers relate them; the cascaded upsampler (CUP) makes a map of the tokens again
and doubles it four times, joined three times by maps of the way down (fig. 1).

Checkpoints of github.com/Beckschen/TransUNet load through `from_official`, the ImageNet-21k weights R50+ViT-B_16.npz of its encoder through
`read_official`. The transformer's layers are `detection/yolos`', with dropout.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.papers.detection.yolos.model import Layer, interpolated

NORM_EPS = 1e-6


# -- the residual network ------------------------------------------------------------------------------------------------


class StdConv2d(nn.Conv2d):
    """A convolution whose kernels have mean 0 and variance 1, each output channel for itself."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) / torch.sqrt(variance + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 2), channels, eps=NORM_EPS)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1, each followed by group norm; the sum passes ReLU."""

    def __init__(self, in_channels: int, channels: int, middle: int, stride: int = 1) -> None:
        super().__init__()
        self.gn1, self.conv1 = group_norm(middle), StdConv2d(in_channels, middle, 1, bias=False)
        self.gn2, self.conv2 = group_norm(middle), StdConv2d(middle, middle, 3, stride, 1, bias=False)
        self.gn3, self.conv3 = group_norm(channels), StdConv2d(middle, channels, 1, bias=False)
        self.projected = stride != 1 or in_channels != channels
        if self.projected:
            self.downsample = StdConv2d(in_channels, channels, 1, stride, bias=False)
            self.gn_proj = nn.GroupNorm(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.gn_proj(self.downsample(x)) if self.projected else x
        y = F.relu(self.gn1(self.conv1(x)))
        y = F.relu(self.gn2(self.conv2(y)))
        return F.relu(kept + self.gn3(self.conv3(y)))


class ResNetV2(nn.Module):
    """(B, in_channels, H, W) -> map at 1/16, and those at 1/8, 1/4 and 1/2 for the decoder. H and W are multiples of 16.

    The pooling has no padding, so that the map at 1/4 is one row and column short; zeros complete it for the decoder.
    """

    def __init__(self, in_channels: int, width: int, units: Sequence[int]) -> None:
        super().__init__()
        root = [
            ("conv", StdConv2d(in_channels, width, 7, 2, 3, bias=False)),
            ("gn", group_norm(width)),
            ("relu", nn.ReLU()),
        ]
        self.root = nn.Sequential(OrderedDict(root))
        blocks, before = [], width
        for level, count in enumerate(units):
            middle, channels = width * 2**level, 4 * width * 2**level
            first = Bottleneck(before, channels, middle, 1 if level == 0 else 2)
            rest = [Bottleneck(channels, channels, middle) for _ in range(count - 1)]
            blocks.append(
                (
                    f"block{level + 1}",
                    nn.Sequential(OrderedDict((f"unit{i}", b) for i, b in enumerate([first, *rest], 1))),
                )
            )
            before = channels
        self.body = nn.Sequential(OrderedDict(blocks))
        self.channels = before

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        half = self.root(x)
        quarter = self.body[0](F.max_pool2d(half, 3, 2))
        eighth = self.body[1](quarter)
        return self.body[2](eighth), [eighth, F.pad(quarter, (0, 1, 0, 1)), half]


# -- the transformer -----------------------------------------------------------------------------------------------------


class Block(Layer):
    """The layer of a vision transformer with dropout in its perceptron."""

    def __init__(self, width: int, heads: int, hidden: int, drop_rate: float) -> None:
        super().__init__(width, heads, hidden, NORM_EPS)
        self.dropout = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        h = self.dropout(F.gelu(self.intermediate(self.layernorm_after(x))))
        return x + self.dropout(self.output(h))


class Embeddings(nn.Module):
    """The residual network and a token for each cell of its map, with a learned position."""

    def __init__(
        self, in_channels: int, width: int, units: Sequence[int], tokens: int, grid: int, drop_rate: float
    ) -> None:
        super().__init__()
        self.grid = (grid, grid)
        self.hybrid_model = ResNetV2(in_channels, width, units)
        self.patch_embeddings = nn.Conv2d(self.hybrid_model.channels, tokens, 1)
        self.position_embeddings = nn.Parameter(torch.zeros(1, grid * grid, tokens))
        self.dropout = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        coarse, skipped = self.hybrid_model(x)
        x = self.patch_embeddings(coarse)
        grid = (x.shape[2], x.shape[3])
        positions = self.position_embeddings
        if grid != self.grid:  # `interpolated` expects a class token, which this sequence does not have
            positions = interpolated(F.pad(positions, (0, 0, 1, 0)), self.grid, grid, 0)[:, 1:]
        return self.dropout(x.flatten(2).transpose(1, 2) + positions), skipped


class Encoder(nn.Module):
    def __init__(self, tokens: int, depth: int, heads: int, hidden: int, drop_rate: float) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Block(tokens, heads, hidden, drop_rate) for _ in range(depth))
        self.encoder_norm = nn.LayerNorm(tokens, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x)
        return self.encoder_norm(x)


class Transformer(nn.Module):
    def __init__(self, embeddings: Embeddings, encoder: Encoder) -> None:
        super().__init__()
        self.embeddings, self.encoder = embeddings, encoder


# -- the decoder ---------------------------------------------------------------------------------------------------------


def convolution(in_channels: int, channels: int) -> nn.Sequential:
    """3x3, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
    )


class DecoderBlock(nn.Module):
    """Twice the size bilinearly (corners on corners), the skipped map beside it, two convolutions."""

    def __init__(self, in_channels: int, channels: int, skipped: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = convolution(in_channels + skipped, channels), convolution(channels, channels)

    def forward(self, x: Tensor, skipped: Tensor | None) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)
        return self.conv2(self.conv1(x if skipped is None else torch.cat([x, skipped], 1)))


class Decoder(nn.Module):
    """The cascaded upsampler: tokens (B, rows * columns, width) to a map at full resolution (sec. 3.3)."""

    def __init__(self, tokens: int, head: int, widths: Sequence[int], skipped: Sequence[int]) -> None:
        super().__init__()
        self.conv_more = convolution(tokens, head)
        rows = zip([head, *widths], widths, [*skipped, *[0] * (len(widths) - len(skipped))], strict=False)
        self.blocks = nn.ModuleList(DecoderBlock(a, b, s) for a, b, s in rows)

    def forward(self, x: Tensor, grid: tuple[int, int], skipped: list[Tensor]) -> Tensor:
        x = self.conv_more(x.transpose(1, 2).unflatten(2, grid))
        for i, block in enumerate(self.blocks):
            x = block(x, skipped[i] if i < len(skipped) else None)
        return x


class TransUNet(nn.Module):
    """Images (B, in_channels, H, W) -> logits (B, num_classes, H, W). Any size: zeros are added to a multiple of 16 and cut again.

    A single channel is repeated three times, as the encoder's weights are of colour images. Positions are stored for `image_size` and interpolated
    bicubically for others.

    Args:
        width: channels of the residual network's root; units: bottlenecks of its three stages.
        tokens, depth, heads, hidden: of the transformer.
        head, widths: channels of the decoder, at 1/16 and of the four maps after.
        skips: how many maps of the way down join, the coarsest first.
    """

    def __init__(
        self,
        num_classes: int = 2,
        in_channels: int = 1,
        image_size: int = 224,
        width: int = 64,
        units: Sequence[int] = (3, 4, 9),
        tokens: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int = 3072,
        head: int = 512,
        widths: Sequence[int] = (256, 128, 64, 16),
        skips: int = 3,
        drop_rate: float = 0.1,
    ) -> None:
        super().__init__()
        if image_size % 16:
            raise ValueError(f"image_size is {image_size}; it must be a multiple of 16")
        if not 0 <= skips <= 3:
            raise ValueError(f"skips is {skips}; it is 0 to 3")
        self.repeated = in_channels == 1
        embeddings = Embeddings(3 if self.repeated else in_channels, width, units, tokens, image_size // 16, drop_rate)
        self.transformer = Transformer(embeddings, Encoder(tokens, depth, heads, hidden, drop_rate))
        self.skips = skips
        self.decoder = Decoder(tokens, head, widths, (8 * width, 4 * width, width)[:skips])
        self.segmentation_head = nn.Sequential(nn.Conv2d(widths[-1], num_classes, 3, padding=1))
        for name, module in self.transformer.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if "intermediate" in name or name.endswith("output.dense"):
                    nn.init.normal_(module.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        lacking = [-n % 16 for n in size]
        if any(lacking):
            x = F.pad(x, (0, lacking[1], 0, lacking[0]))
        if self.repeated:
            x = x.expand(-1, 3, -1, -1)
        grid = (x.shape[2] // 16, x.shape[3] // 16)
        x, skipped = self.transformer.embeddings(x)
        x = self.segmentation_head(self.decoder(self.transformer.encoder(x), grid, skipped[: self.skips]))
        return x[:, :, : size[0], : size[1]] if any(lacking) else x


# -- weights -------------------------------------------------------------------------------------------------------------

LAYER = (  # the authors' names in a layer to ours
    ("attention_norm", "layernorm_before"),
    ("ffn_norm", "layernorm_after"),
    ("attn.query", "attention.attention.query"),
    ("attn.key", "attention.attention.key"),
    ("attn.value", "attention.attention.value"),
    ("attn.out", "attention.output.dense"),
    ("ffn.fc1", "intermediate.dense"),
    ("ffn.fc2", "output.dense"),
)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of the authors' repository to our names."""
    renamed = {}
    for name, value in state.items():
        match = re.match(r"(transformer\.encoder\.layer\.\d+\.)([a-z_]+(?:\.[a-z0-9]+)?)\.(weight|bias)$", name)
        if match:
            name = match[1] + dict(LAYER)[match[2]] + "." + match[3]
        renamed[name] = value
    return renamed


def read_official(path: Path, model: nn.Module) -> dict[str, Tensor] | None:
    """R50+ViT-B_16.npz, the encoder's weights on ImageNet-21k, with the model's own decoder; None for other files."""
    if path.suffix != ".npz":
        return None
    import numpy as np

    from paperzoo.errors import PaperZooError

    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: torch.from_numpy(np.array(stored[name])) for name in stored.files}
        return {**model.state_dict(), **from_jax(arrays)}
    except (OSError, ValueError) as error:
        raise PaperZooError(f"{path}: not a readable .npz file ({str(error)[:120]})") from None
    except KeyError as error:
        raise PaperZooError(f"{path}: lacks {error}; the weights of a hybrid R50+ViT are needed") from None


def from_jax(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder of the vision transformer's authors (JAX) to our names; its class token and classifier are left out."""
    made: dict[str, Tensor] = {}

    def kernel(name: str) -> Tensor:
        return arrays[name].permute(3, 2, 0, 1).contiguous()

    root, body = "transformer.embeddings.hybrid_model.root", "transformer.embeddings.hybrid_model.body"
    made[f"{root}.conv.weight"] = kernel("conv_root/kernel")
    for ours, theirs in (("weight", "scale"), ("bias", "bias")):
        made[f"{root}.gn.{ours}"] = arrays[f"gn_root/{theirs}"].flatten()
    for name, value in arrays.items():
        match = re.match(r"(block\d+)/(unit\d+)/(conv\d|conv_proj|gn\d|gn_proj)/(kernel|scale|bias)$", name)
        if match:
            part = "downsample" if match[3] == "conv_proj" else match[3]
            kind = "bias" if match[4] == "bias" else "weight"
            made[f"{body}.{match[1]}.{match[2]}.{part}.{kind}"] = (
                kernel(name) if match[4] == "kernel" else value.flatten()
            )
    made["transformer.embeddings.patch_embeddings.weight"] = kernel("embedding/kernel")
    made["transformer.embeddings.patch_embeddings.bias"] = arrays["embedding/bias"]
    made["transformer.embeddings.position_embeddings"] = arrays["Transformer/posembed_input/pos_embedding"][:, 1:]
    for ours, theirs in (("weight", "scale"), ("bias", "bias")):
        made[f"transformer.encoder.encoder_norm.{ours}"] = arrays[f"Transformer/encoder_norm/{theirs}"]
    depth = len({name.split("/")[1] for name in arrays if name.startswith("Transformer/encoderblock_")})
    for k in range(depth):
        there, here = f"Transformer/encoderblock_{k}", f"transformer.encoder.layer.{k}"
        for theirs, ours in (("LayerNorm_0", "layernorm_before"), ("LayerNorm_2", "layernorm_after")):
            made[f"{here}.{ours}.weight"] = arrays[f"{there}/{theirs}/scale"]
            made[f"{here}.{ours}.bias"] = arrays[f"{there}/{theirs}/bias"]
        parts = [(f"MultiHeadDotProductAttention_1/{n}", f"attention.attention.{n}") for n in ("query", "key", "value")]
        parts += [("MultiHeadDotProductAttention_1/out", "attention.output.dense")]
        parts += [("MlpBlock_3/Dense_0", "intermediate.dense"), ("MlpBlock_3/Dense_1", "output.dense")]
        for theirs, ours in parts:
            value = arrays[f"{there}/{theirs}/kernel"]
            rows = value.shape[0] * value.shape[1] if theirs.endswith("/out") else value.shape[0]
            made[f"{here}.{ours}.weight"] = value.reshape(rows, -1).t().contiguous()
            made[f"{here}.{ours}.bias"] = arrays[f"{there}/{theirs}/bias"].flatten()
    return made


# -- variants ------------------------------------------------------------------------------------------------------------


def transunet(
    num_classes: int = 2, in_channels: int = 1, image_size: int = 224, skips: int = 3, drop_rate: float = 0.1
) -> TransUNet:
    """R50-ViT-B/16 with the cascaded upsampler, the network of tables 1 to 5."""
    return TransUNet(num_classes, in_channels, image_size, skips=skips, drop_rate=drop_rate)


def transunet_slim(
    num_classes: int = 2, in_channels: int = 1, image_size: int = 48, drop_rate: float = 0.0
) -> TransUNet:
    """Not of the paper: one bottleneck a stage and two layers of 64 channels, for small slices and learning in seconds."""
    return TransUNet(
        num_classes, in_channels, image_size, 16, (1, 1, 1), 64, 2, 4, 128, 64, (48, 32, 16, 16), drop_rate=drop_rate
    )
