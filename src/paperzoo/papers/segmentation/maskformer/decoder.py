"""The transformer of MaskFormer, which is DETR's (Carion et al., ECCV 2020, arXiv:2005.12872).

Layers are post-norm; encodings of position are added to queries and keys in every layer, and never to values. Names of parameters
are those of `transformers`' published files.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.papers.language.transformer.model import MultiHeadAttention


def sine_positions(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """DETR's fixed encodings of rows and columns, which go from 0 to 2 pi: (height * width, channels).

    The first half of the channels tells the row, the second the column; sines and cosines take turns.
    """
    half = channels // 2
    rate = 10000 ** (2 * torch.arange(half, device=like.device).div(2, rounding_mode="floor") / half)

    def waves(count: int) -> Tensor:
        angle = torch.arange(1, count + 1, device=like.device)[:, None] * (2 * torch.pi / (count + 1e-6)) / rate
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1)

    rows, columns = waves(height)[:, None].expand(-1, width, -1), waves(width)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1).to(like.dtype)


class FeedForward(nn.Module):
    """What both kinds of layers end with: norm(x + fc2(relu(fc1(x))))."""

    def __init__(self, width: int, hidden: int, drop_rate: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.drop_rate = drop_rate
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.drop_rate, self.training)

    def feed(self, x: Tensor) -> Tensor:
        return self.final_layer_norm(x + self.drop(self.fc2(self.drop(F.relu(self.fc1(x))))))


class EncoderLayer(FeedForward):
    """Self-attention of an image's cells; positions are added to queries and keys, not to values. (B, N, width)."""

    def __init__(self, width: int, heads: int, hidden: int, drop_rate: float) -> None:
        super().__init__(width, hidden, drop_rate)
        self.self_attn = MultiHeadAttention(width, heads, drop_rate)
        self.self_attn_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        placed = x + positions
        return self.feed(self.self_attn_layer_norm(x + self.drop(self.self_attn(placed, placed, x))))


class DecoderLayer(EncoderLayer):
    """Self-attention of the queries, then their attention to the image's cells (B, N, width). (B, Q, width)."""

    def __init__(self, width: int, heads: int, hidden: int, drop_rate: float) -> None:
        super().__init__(width, heads, hidden, drop_rate)
        self.encoder_attn = MultiHeadAttention(width, heads, drop_rate)
        self.encoder_attn_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, queries: Tensor, memory: Tensor, placed: Tensor) -> Tensor:
        mine = x + queries
        x = self.self_attn_layer_norm(x + self.drop(self.self_attn(mine, mine, x)))
        x = self.encoder_attn_layer_norm(x + self.drop(self.encoder_attn(x + queries, placed, memory)))
        return self.feed(x)


class Decoder(nn.Module):
    """The queries' states after each layer, normalised: a list of (B, Q, width), the last one alone unless `every`."""

    def __init__(self, width: int, heads: int, hidden: int, depth: int, drop_rate: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(width, heads, hidden, drop_rate) for _ in range(depth))
        self.layernorm = nn.LayerNorm(width)

    def forward(self, queries: Tensor, memory: Tensor, positions: Tensor, every: bool) -> list[Tensor]:
        x, placed, states = torch.zeros_like(queries), memory + positions, []
        for i, layer in enumerate(self.layers):
            x = layer(x, queries, memory, placed)
            if every or i == len(self.layers) - 1:
                states.append(self.layernorm(x))
        return states
