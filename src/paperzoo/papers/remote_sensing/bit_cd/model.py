"""BIT: Remote Sensing Image Change Detection with Transformers (Chen, Qi, Shi, IEEE TGRS 2022, arXiv:2103.00208).

Each date's feature map becomes a few semantic tokens; a transformer encoder relates the tokens of both dates; a transformer decoder
writes them back into every pixel; what differs then is classified. `from_official` takes the files of the authors' code
(justchenhao/BIT_CD). What differs from the paper, as in that code:

- scores are scaled by 1 / sqrt(channels), 32, not by the width of a head (eq. 5 divides by the square root of a head's);
- the ResNet's third stage keeps the resolution of the second (stride 8) without dilation, as its basic blocks have none;
- a pixel's query and the output projection are never formed: with few tokens it is quicker to carry the tokens to the pixels'
  space, which is the same product in another order (`CrossAttention`).

Maps are brought back to the size of the input, so that any size is legal; at multiples of 8 that is the authors' upsampling by four.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.backbones import at_strides, headless, load_body
from paperzoo.papers.classification.resnet.model import BasicBlock, ResNet, conv3x3, initialise

# -- tokens (sec. III-B) -------------------------------------------------------------------------------------------------


class SemanticTokenizer(nn.Module):
    """Eq. 1: (B, C, H, W) -> (B, token_len, C), each token a mean of the pixels weighed by a spatial attention map of its own."""

    def __init__(self, channels: int, token_len: int) -> None:
        super().__init__()
        self.conv_a = nn.Conv2d(channels, token_len, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        attention = self.conv_a(x).flatten(2).softmax(-1)  # (B, L, HW)
        return attention @ x.flatten(2).transpose(1, 2)


class SelfAttention(nn.Module):
    """Sec. III-C: `heads` attentions of `dim_head` among tokens (B, T, dim)."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim**-0.5
        self.to_qkv = nn.Linear(dim, heads * dim_head * 3, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.to_qkv(x).chunk(3, -1))
        return self.to_out(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Eq. 7 to 9: pixels (B, N, dim) ask, tokens (B, L, dim) answer.

    Of head h the scores are (x Wq)(m Wk)^T = x (Wq Wk^T m^T), its part of the output is A (m Wv) Wo = A (m Wv Wo). Both brackets hold
    L columns a head, against `dim_head` for each of the N pixels: at 4 tokens and heads of 64 that is sixteen times less to compute.
    """

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim**-0.5
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_v = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_k(m), self.to_v(m)))  # (B, h, L, d)
        asks = k @ self.to_q.weight.unflatten(0, (self.heads, -1))  # (B, h, L, dim)
        says = v @ self.to_out.weight.t().unflatten(0, (self.heads, -1))  # (B, h, L, dim)
        scores = (asks * self.scale).flatten(1, 2) @ x.transpose(1, 2)  # (B, h L, N): a softmax is quicker across rows
        attention = scores.unflatten(1, (self.heads, -1)).softmax(2).flatten(1, 2)
        return attention.transpose(1, 2) @ says.flatten(1, 2) + self.to_out.bias


class Layer(nn.Module):
    """A pre-norm layer: x + attention(norm(x)), then x + MLP(norm(x)). In a decoder the tokens go through the same norm as the pixels."""

    def __init__(self, dim: int, attention: nn.Module, mlp_dim: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim))

    def forward(self, x: Tensor, *memory: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), *(self.norm1(m) for m in memory))
        return x + self.mlp(self.norm2(x))


# -- networks ------------------------------------------------------------------------------------------------------------


class Block(BasicBlock):
    """ResNet's basic block, also where a bottleneck would be dilated: stride 1, no dilation."""

    def __init__(self, *arguments, dilation: int = 1, **options) -> None:
        super().__init__(*arguments, dilation=1, **options)


class SiameseBase(nn.Module):
    """The paper's baseline: (before, after) (B, in_channels, H, W) each -> logits of change (B, num_classes, H, W).

    One ResNet for both dates, its map upsampled to stride 4 and brought to 32 channels; the absolute difference goes, at the input's
    size, through two convolutions (sec. III-E).

    Args:
        body: has `stages(x)`, `stage_channels` and `stage_strides`.
        stage: which of its maps is used, counted from 0.
    """

    channels = 32

    def __init__(self, body: nn.Module, stage: int, num_classes: int = 2) -> None:
        super().__init__()
        self.resnet = headless(body)
        self.stage, self.enlarge = stage, max(1, body.stage_strides[stage] // 4)
        c = self.channels
        self.conv_pred = nn.Conv2d(body.stage_channels[stage], c, 3, padding=1)
        self.classifier = nn.Sequential(
            nn.Conv2d(c, c, 3, padding=1, bias=False),
            nn.BatchNorm2d(c),
            nn.ReLU(),
            nn.Conv2d(c, num_classes, 3, padding=1),
        )

    def load_backbone(self, state_dict: dict[str, Tensor]) -> None:
        """Start from a classifier's weights; its later stages and last layer are left out."""
        load_body(self.resnet, state_dict)

    def embed(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, 32, H / 4, W / 4)."""
        x = self.resnet.stages(images)[self.stage]
        if self.enlarge > 1:
            x = F.interpolate(x, scale_factor=float(self.enlarge), mode="nearest")
        return self.conv_pred(x)

    def relate(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The baseline compares the maps as they are."""
        return first, second

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        first, second = self.relate(self.embed(before), self.embed(after))
        difference = (first - second).abs()  # eq. 10
        difference = F.interpolate(difference, before.shape[-2:], mode="bilinear", align_corners=False)
        return self.classifier(difference)


class BIT(SiameseBase):
    """The baseline with the bitemporal image transformer between backbone and difference; fig. 2.

    Args:
        token_len: L, semantic tokens a date.
        enc_depth, dec_depth: layers of the encoder and of the decoder.
        heads, dim_head, decoder_dim_head: of both transformers.
    """

    def __init__(
        self,
        body: nn.Module,
        stage: int,
        num_classes: int = 2,
        token_len: int = 4,
        enc_depth: int = 1,
        dec_depth: int = 8,
        heads: int = 8,
        dim_head: int = 64,
        decoder_dim_head: int = 64,
    ) -> None:
        super().__init__(body, stage, num_classes)
        if token_len < 1:
            raise ValueError(f"token_len is {token_len}; at least one token is needed")
        c = self.channels
        self.tokenizer = SemanticTokenizer(c, token_len)
        self.pos_embedding = nn.Parameter(torch.randn(1, token_len * 2, c))
        self.encoder = nn.ModuleList(Layer(c, SelfAttention(c, heads, dim_head), 2 * c) for _ in range(enc_depth))
        self.decoder = nn.ModuleList(
            Layer(c, CrossAttention(c, heads, decoder_dim_head), 2 * c) for _ in range(dec_depth)
        )

    def relate(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([self.tokenizer(first), self.tokenizer(second)], 1) + self.pos_embedding  # eq. 3
        for layer in self.encoder:
            tokens = layer(tokens)
        # Both dates share the decoder: one pass over a doubled batch.
        pixels, size = torch.cat([first, second]), first.shape[-2:]
        memory = torch.cat(tokens.chunk(2, 1))
        x = pixels.flatten(2).transpose(1, 2)
        for layer in self.decoder:
            x = layer(x, memory)
        x, count = x.transpose(1, 2).unflatten(2, size), first.shape[0]
        return x[:count], x[count:]


def residual_body(
    blocks: Sequence[int], stages: int, in_channels: int = 3, backbone: str | None = None
) -> tuple[nn.Module, int]:
    """The authors' backbone: a ResNet whose third and fourth stages keep stride 8, cut after so many stages; and the map's number.

    `backbone`: another classifier by name in its place, its map of stride 8.
    """
    if backbone is not None:
        return at_strides(backbone, (8,), in_channels=in_channels), 0
    body = ResNet(Block, blocks, 0, in_channels, replace_stride_with_dilation=(False, True, True))
    for i in range(stages, 4):
        setattr(body, f"layer{i + 1}", nn.Identity())
    return body, stages - 1


class ThinBody(nn.Module):
    """Three basic blocks at strides 2, 4 and 4, for pictures of about 64 pixels."""

    def __init__(self, in_channels: int = 3, channels: Sequence[int] = (16, 32, 48)) -> None:
        super().__init__()
        self.stage_channels, self.stage_strides = list(channels), [2, 4, 4]
        self.conv1, self.bn1 = conv3x3(in_channels, channels[0], stride=2), nn.BatchNorm2d(channels[0])
        inplanes = channels[0]
        for i, (planes, stride) in enumerate(zip(channels, (1, 2, 1), strict=True)):
            shortcut = None
            if stride != 1 or inplanes != planes:
                shortcut = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
            self.add_module(f"layer{i + 1}", BasicBlock(inplanes, planes, stride, shortcut))
            inplanes = planes
        initialise(self)

    def stages(self, x: Tensor) -> list[Tensor]:
        c1 = self.layer1(F.relu(self.bn1(self.conv1(x))))
        c2 = self.layer2(c1)
        return [c1, c2, self.layer3(c2)]


# -- variants ------------------------------------------------------------------------------------------------------------


def bit_resnet18(num_classes: int = 2, in_channels: int = 3, backbone: str | None = None, **options: int) -> BIT:
    """BIT_S4 (the stem counts as a stage), the paper's main model and the authors' `base_transformer_pos_s4_dd8`; `options` as `BIT`."""
    return BIT(*residual_body((2, 2, 2, 2), 3, in_channels, backbone), num_classes, **options)


def bit_resnet18_released(num_classes: int = 2, in_channels: int = 3) -> BIT:
    """The authors' `base_transformer_pos_s4_dd8_dedim8`, whose weights they gave out: the decoder's heads have 8 channels."""
    return bit_resnet18(num_classes, in_channels, decoder_dim_head=8)


def bit_resnet18_s3(num_classes: int = 2, in_channels: int = 3, backbone: str | None = None) -> BIT:
    """BIT_S3: the backbone ends one stage earlier."""
    return BIT(*residual_body((2, 2, 2, 2), 2, in_channels, backbone), num_classes)


def bit_base_resnet18(num_classes: int = 2, in_channels: int = 3) -> SiameseBase:
    """Base_S5, without the transformer, on all four stages of the ResNet."""
    return SiameseBase(*residual_body((2, 2, 2, 2), 4, in_channels), num_classes)


def bit_slim(num_classes: int = 2, in_channels: int = 3) -> BIT:
    """Not of the paper: a thin backbone and half of the decoder, for pictures of about 64 pixels."""
    return BIT(ThinBody(in_channels), 2, num_classes, dec_depth=4, dim_head=8, decoder_dim_head=8)


def bit_base_slim(num_classes: int = 2, in_channels: int = 3) -> SiameseBase:
    """Not of the paper: `bit_slim` without the transformer."""
    return SiameseBase(ThinBody(in_channels), 2, num_classes)


# -- the authors' files --------------------------------------------------------------------------------------------------

PARTS = (
    (".0.fn.norm.", ".norm1."),
    (".0.fn.fn.to_out.0.", ".attention.to_out."),
    (".0.fn.fn.", ".attention."),
    (".1.fn.norm.", ".norm2."),
    (".1.fn.fn.net.0.", ".mlp.0."),
    (".1.fn.fn.net.3.", ".mlp.2."),
)


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names to these. What their network holds but never runs is left out: the ResNet's classifier, and its fourth stage."""
    base = "pos_embedding" not in state_dict  # runs the fourth stage
    renamed = {}
    for name, value in state_dict.items():
        if name.startswith("resnet.fc.") or (not base and name.startswith("resnet.layer4.")):
            continue
        if name.startswith(("transformer.layers.", "transformer_decoder.layers.")):
            name = name.replace("transformer_decoder.layers.", "decoder.").replace("transformer.layers.", "encoder.")
            for theirs, ours in PARTS:
                name = name.replace(theirs, ours)
        renamed[name.replace("conv_a.", "tokenizer.conv_a.")] = value
    return renamed


def read_official(path: Path, model: nn.Module) -> dict[str, Tensor] | None:
    """The network's state in a checkpoint of the authors' training code, which also holds an optimizer and scores; None for other files."""
    import numpy as np

    scalar = getattr(np, "_core", np).multiarray.scalar if hasattr(np, "_core") else np.core.multiarray.scalar
    allowed = [scalar, np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType]
    if path.suffix == ".safetensors" or not path.is_file():
        return None
    try:
        with torch.serialization.safe_globals(allowed):
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # not a pickle, or one that asks for more: the general reader says what is wrong
        return None
    return stored.get("model_G_state_dict") if isinstance(stored, dict) else None
