"""MASTER: Multi-Aspect Non-local Network for Scene Text Recognition (Lu et al., Pattern Recognition 2021, arXiv:1910.02562).

A residual network whose stages look at the whole map through several global contexts (sec. 3.1); its map, flattened, with sinusoidal
positions, is the memory of a transformer decoder (sec. 3.2), which keeps keys and values of earlier steps at inference (sec. 3.3).

Attention, its projections and the sinusoids are those of `language/transformer`; what differs there is that a decoder layer
normalises before each part, not after it. Tokens are numbered as in `paperzoo.blocks.sequence_decoding`. The backbone's parameter
names are those of the authors' PyTorch code (wenwenyu/MASTER-pytorch); `from_official` takes its checkpoints, as of its first release.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.sequence_decoding import (
    END,
    PAD,
    START,
    State,
    beam_search_steps,
    greedy_steps,
    read_greedy,
    sequence_cross_entropy,
)
from paperzoo.papers.language.transformer.model import MultiHeadAttention, PositionalEncoding

# -- the encoder (sec. 3.1) ----------------------------------------------------------------------------------------------


class MultiAspectGCAttention(nn.Module):
    """Several global contexts of a map, one for each group of its channels, given back to every place. (B, C, H, W) -> the same.

    For each of h groups of C / h channels, a softmax over places weighs their sum; the h contexts side by side pass a
    bottleneck of C * ratio channels and are added to every place, or concatenated with it.

    Args:
        heads: h. ratio: of the bottleneck.
        scale: divide what goes into the softmax by sqrt(C / h) where there is more than one group. (Released code has the
            switch, but never does it.)
        fusion: "add": x + transform(context); "concat": ReLU(LayerNorm(W [x, transform(context)])), LayerNorm over the map.
    """

    def __init__(
        self, channels: int, heads: int = 8, ratio: float = 0.0625, scale: bool = True, fusion: str = "add"
    ) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels are not a multiple of {heads} heads")
        if fusion not in ("add", "concat"):
            raise ValueError(f"fusion is 'add' or 'concat', got '{fusion}'")
        self.heads, self.fusion = heads, fusion
        self.temperature = math.sqrt(channels // heads) if scale and heads > 1 else 1.0
        hidden = max(1, int(channels * ratio))
        self.conv_mask = nn.Conv2d(channels // heads, 1, 1)  # W_k, shared by the groups
        transform = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.LayerNorm([hidden, 1, 1]), nn.ReLU(inplace=True), nn.Conv2d(hidden, channels, 1)
        )  # fmt: skip
        setattr(self, f"channel_{fusion}_conv", transform)
        if fusion == "concat":
            self.cat_conv = nn.Conv2d(2 * channels, channels, 1)

    def contexts(self, x: Tensor) -> Tensor:
        """The weighted sums, (B, C, 1, 1)."""
        groups = x.unflatten(1, (self.heads, -1)).flatten(3)  # (B, h, C / h, places)
        keys = self.conv_mask.weight.flatten()
        weights = (torch.einsum("bhcn,c->bhn", groups, keys) + self.conv_mask.bias) / self.temperature
        return (groups @ weights.softmax(2)[..., None]).flatten(1)[..., None, None]

    def forward(self, x: Tensor) -> Tensor:
        if self.fusion == "add":
            return x + self.channel_add_conv(self.contexts(x))
        term = self.channel_concat_conv(self.contexts(x)).expand_as(x)
        joined = self.cat_conv(torch.cat([x, term], 1))
        return F.relu(F.layer_norm(joined, joined.shape[1:]))


class BasicBlock(nn.Module):
    """A residual block of two 3 x 3 convolutions, with or without global contexts at the end of its branch."""

    def __init__(self, inputs: int, outputs: int, context: dict | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.context_block = None if context is None else MultiAspectGCAttention(outputs, **context)
        self.downsample = None
        if inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.context_block is not None:
            branch = self.context_block(branch)
        return F.relu(branch + (x if self.downsample is None else self.downsample(x)))


class Backbone(nn.Module):
    """Table 1: pictures (B, in_channels, H, W) -> a map (B, widths[-1], H / 8, W / 4).

    Args:
        stem: channels of the two convolutions before the first stage.
        widths, depths: channels and blocks of the four stages; a convolution follows each.
        context: arguments of `MultiAspectGCAttention`, which the first block of the stages 2 to 4 has.
    """

    POOLS = ((2, 2), (2, 2), (2, 1), None)  # before each stage

    def __init__(
        self, in_channels: int, stem: Sequence[int], widths: Sequence[int], depths: Sequence[int], context: dict
    ) -> None:
        super().__init__()
        channels = [in_channels, *stem]
        for i in (1, 2):
            self.add_convolution(i, channels[i - 1], channels[i])
        before = stem[1]
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True), 1):
            blocks = [BasicBlock(before if k == 0 else width, width, context if i > 1 and k == 0 else None)
                      for k in range(depth)]  # fmt: skip
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
            self.add_convolution(i + 2, width, width)
            before = width

    def add_convolution(self, number: int, inputs: int, outputs: int) -> None:
        setattr(self, f"conv{number}", nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
        setattr(self, f"bn{number}", nn.BatchNorm2d(outputs))

    def convolve(self, number: int, x: Tensor) -> Tensor:
        return F.relu(getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolve(2, self.convolve(1, x))
        for i, pool in enumerate(self.POOLS, 1):
            x = x if pool is None else F.max_pool2d(x, pool)
            x = self.convolve(i + 2, getattr(self, f"layer{i}")(x))
        return x


class ConvEmbedding(nn.Module):
    """The backbone's map as a sequence, row by row: (B, H / 8 * W / 4, widths[-1])."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x).flatten(2).transpose(1, 2)


# -- the decoder (sec. 3.2) ----------------------------------------------------------------------------------------------


class FeedForward(nn.Module):
    """W2 dropout(max(0, x W1 + b1)) + b2. (…, embed_dim) -> the same."""

    def __init__(self, embed_dim: int, hidden_dim: int, drop_rate: float) -> None:
        super().__init__()
        self.w_1 = nn.Linear(embed_dim, hidden_dim)
        self.w_2 = nn.Linear(hidden_dim, embed_dim)
        self.dropout = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(self.dropout(F.relu(self.w_1(x))))


class DecoderLayer(nn.Module):
    """Masked self-attention, attention to the map, feed-forward: each x + dropout(part(norm(x)))."""

    def __init__(self, embed_dim: int, num_heads: int, hidden_dim: int, drop_rate: float) -> None:
        super().__init__()
        self.self_attn = MultiHeadAttention(embed_dim, num_heads, drop_rate)
        self.src_attn = MultiHeadAttention(embed_dim, num_heads, drop_rate)
        self.feed_forward = FeedForward(embed_dim, hidden_dim, drop_rate)
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim, eps=1e-6) for _ in range(3))
        self.dropout = nn.Dropout(drop_rate)

    def forward(
        self, x: Tensor, seen: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (B, T, embed_dim); `seen`: keys and values of the map; `before`: those of earlier steps, for one step more (T = 1).

        Returns the layer's output, and keys and values of all steps so far, (B, heads, steps, head_dim) each.
        """
        normed = self.norms[0](x)
        keys, values = self.self_attn.project(normed, normed)
        if before is not None:
            keys, values = torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)
        x = x + self.dropout(self.self_attn.attend(normed, keys, values, causal=before is None))
        x = x + self.dropout(self.src_attn.attend(self.norms[1](x), *seen))
        return x + self.dropout(self.feed_forward(self.norms[2](x))), (keys, values)


class Decoder(nn.Module):
    """N layers and a normalisation of what comes out."""

    def __init__(self, embed_dim: int, num_heads: int, hidden_dim: int, depth: int, drop_rate: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(embed_dim, num_heads, hidden_dim, drop_rate) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)


class Generator(nn.Module):
    """Logits of every token."""

    def __init__(self, embed_dim: int, tokens: int) -> None:
        super().__init__()
        self.fc = nn.Linear(embed_dim, tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class MASTER(nn.Module):
    """Pictures (B, in_channels, H, W), H a multiple of 8, W of 4 -> logits (B, max_length + 1, K + 4).

    See `paperzoo.tasks.text_recognition` for the members.

    Args:
        num_classes: K, the characters. max_length: the most of a text; one step more is decoded, for its end.
        embed_dim, num_heads, hidden_dim, depth: of the decoder; embed_dim is the map's channels as well.
        heads, ratio, scale, fusion: of the global contexts.
        drop_rate: dropout of positions, parts, attention weights and hidden units.
        stem, widths, depths: of the backbone.
    """

    def __init__(
        self,
        num_classes: int = 94,
        in_channels: int = 3,
        max_length: int = 25,
        embed_dim: int = 512,
        num_heads: int = 8,
        hidden_dim: int = 2048,
        depth: int = 3,
        heads: int = 8,
        ratio: float = 0.0625,
        scale: bool = True,
        fusion: str = "add",
        drop_rate: float = 0.2,
        stem: Sequence[int] = (64, 128),
        widths: Sequence[int] = (256, 256, 512, 512),
        depths: Sequence[int] = (1, 2, 5, 3),
        max_places: int = 2048,
    ) -> None:
        super().__init__()
        if widths[-1] != embed_dim:
            raise ValueError(f"the map has {widths[-1]} channels; the decoder's embed_dim {embed_dim} must be the same")
        self.num_classes, self.in_channels, self.max_length, self.embed_dim = (
            num_classes,
            in_channels,
            max_length,
            embed_dim,
        )
        context = {"heads": heads, "ratio": ratio, "scale": scale, "fusion": fusion}
        self.conv_embedding_gc = ConvEmbedding(Backbone(in_channels, stem, widths, depths, context))
        self.positions = PositionalEncoding(embed_dim, max(max_places, max_length + 1))
        self.dropout = nn.Dropout(drop_rate)
        self.embedding = nn.Embedding(num_classes + 4, embed_dim)
        self.decoder = Decoder(embed_dim, num_heads, hidden_dim, depth, drop_rate)
        self.generator = Generator(embed_dim, num_classes + 4)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def features(self, images: Tensor) -> Tensor:
        """The memory (B, H / 8 * W / 4, embed_dim): the map with its positions."""
        if images.shape[2] % 8 or images.shape[3] % 4:
            raise ValueError(f"height must be a multiple of 8 and width of 4, got {tuple(images.shape[2:])}")
        return self.dropout(self.positions(self.conv_embedding_gc(images)))

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        return self.dropout(self.positions(self.embedding(tokens) * math.sqrt(self.embed_dim), start))

    def forced(self, memory: Tensor, tokens: Tensor) -> Tensor:
        """Logits (B, T, K + 4), each step given the true characters before it: tokens int64 (B, T)."""
        x = self.embed(F.pad(tokens[:, :-1], (1, 0), value=self.num_classes + START))
        for layer in self.decoder.layers:
            x, _ = layer(x, layer.src_attn.project(memory, memory))
        return self.generator(self.decoder.norm(x))

    def start(self, memory: Tensor) -> State:
        """What the steps need of the memory: its keys and values in each layer."""
        state = {}
        for i, layer in enumerate(self.decoder.layers):
            state[f"seen_keys.{i}"], state[f"seen_values.{i}"] = layer.src_attn.project(memory, memory)
        return state

    def advance(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """One token more, int64 (B,) -> logits (B, K + 4) of the next: keys and values of earlier steps are not computed again."""
        state = dict(state)
        position = state["keys.0"].shape[2] if "keys.0" in state else 0
        x = self.embed(tokens[:, None], position)
        for i, layer in enumerate(self.decoder.layers):
            before = (state[f"keys.{i}"], state[f"values.{i}"]) if position else None
            x, kept = layer(x, (state[f"seen_keys.{i}"], state[f"seen_values.{i}"]), before)
            state[f"keys.{i}"], state[f"values.{i}"] = kept
        return self.generator(self.decoder.norm(x))[:, 0], state

    def forward(self, images: Tensor, targets: dict[str, Tensor] | None = None) -> Tensor | dict[str, Tensor]:
        """Raw outputs, greedily decoded; or with targets the loss: cross-entropy, averaged over tokens."""
        memory = self.features(images)
        if targets is None:
            return greedy_steps(self.advance, self.start(memory), self.starts(memory), self.max_length + 1)
        logits = self.forced(memory, targets["tokens"])
        return {"cross_entropy": sequence_cross_entropy(logits, targets["tokens"], targets["lengths"], mean="tokens")}

    def starts(self, memory: Tensor) -> Tensor:
        return torch.full((memory.shape[0],), self.num_classes + START, device=memory.device)

    def decode(self, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return read_greedy(outputs, self.num_classes + END, self.num_classes + PAD)

    def search(self, images: Tensor, beam_size: int = 5) -> tuple[Tensor, Tensor, Tensor]:
        """The best text of a beam search."""
        memory = self.features(images)
        end, pad = self.num_classes + END, self.num_classes + PAD
        found = beam_search_steps(
            self.advance, self.start(memory), self.starts(memory), self.max_length + 1, end, pad, min(beam_size, self.num_classes)
        )  # fmt: skip
        return tuple(x[:, 0] for x in found)

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh embedding and output for other characters."""
        like, self.num_classes = self.embedding.weight, num_classes
        self.embedding = nn.Embedding(num_classes + 4, self.embed_dim).to(like)
        self.generator = Generator(self.embed_dim, num_classes + 4).to(like)
        nn.init.xavier_uniform_(self.embedding.weight)
        nn.init.xavier_uniform_(self.generator.fc.weight)


RENAMED = (
    (r"^src_embed\.0\.", "conv_embedding_gc."),
    (r"^tgt_embed\.0\.lut\.", "embedding."),
    (r"\.linears\.0\.", ".q_proj."),
    (r"\.linears\.1\.", ".k_proj."),
    (r"\.linears\.2\.", ".v_proj."),
    (r"\.linears\.3\.", ".out_proj."),
    (r"\.sublayer\.(\d)\.norm\._norm\.", r".norms.\1."),
    (r"^decoder\.norm\._norm\.", "decoder.norm."),
)


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of wenwenyu/MASTER-pytorch (first release): names, and the order of tokens (padding, end, start, unknown, characters)."""
    converted = {}
    for name, value in state.items():
        if name.endswith(".pe"):  # the table of sinusoids
            continue
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, name)
        if name == "embedding.weight" or name.startswith("generator."):
            value = torch.cat([value[4:], value[[1, 0, 3, 2]]])
        converted[name] = value
    return converted


# -- variants ------------------------------------------------------------------------------------------------------------


def master(num_classes: int = 94, in_channels: int = 3, max_length: int = 25, drop_rate: float = 0.2) -> MASTER:
    """The paper's network, for pictures of 48 x 160."""
    return MASTER(num_classes, in_channels, max_length, drop_rate=drop_rate)


def master_released(
    num_classes: int = 94, in_channels: int = 3, max_length: int = 100, drop_rate: float = 0.2
) -> MASTER:
    """As the authors' PyTorch code is configured: one context, concatenated with the map."""
    return MASTER(num_classes, in_channels, max_length, heads=1, fusion="concat", drop_rate=drop_rate)


def master_tiny(num_classes: int = 10, in_channels: int = 3, max_length: int = 6, drop_rate: float = 0.0) -> MASTER:
    """A small one for short texts."""
    return MASTER(
        num_classes, in_channels, max_length, embed_dim=96, num_heads=4, hidden_dim=192, depth=2, heads=4, ratio=0.25,
        drop_rate=drop_rate, stem=(8, 16), widths=(24, 32, 64, 96), depths=(1, 1, 1, 1), max_places=512,
    )  # fmt: skip
