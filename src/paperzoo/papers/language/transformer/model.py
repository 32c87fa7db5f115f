"""Transformer: Vaswani et al., "Attention Is All You Need", NeurIPS 2017 (arXiv 1706.03762).

An encoder and a decoder of stacked attention and position-wise feed-forward layers, post-norm as published:
LayerNorm(x + Dropout(Sublayer(x))), sinusoidal positions, one embedding matrix for source, target and output.

What differs from the paper, or is left open by it:
- the paper's equations and released code give the attention projections no bias; `attention_bias=True` adds them, as
  most later code does. `MultiHeadAttention` alone has them by default, because most who import it want them.
- the paper's dropout is on each sub-layer's output and on embeddings plus positions (section 5.4). The released code
  also drops attention weights and hidden feed-forward units; `MultiHeadAttention(drop_rate=…)` can do the former.
- source and target are padded on the right with `pad_id`; the masks follow from the ids, so `forward` takes two tensors.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiHeadAttention(nn.Module):
    """Section 3.2.2: h attentions side by side, each in a subspace of its own, then one projection.

    Args:
        embed_dim: width of the queries and of the output.
        num_heads: h; embed_dim must be a multiple of it.
        drop_rate: dropout on the attention weights, in training.
        bias: whether the four projections have a bias.
        key_dim: width of keys and values, where it differs from `embed_dim`.

    Raises:
        ValueError: if `embed_dim` is not a multiple of `num_heads`.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, drop_rate: float = 0.0, bias: bool = True, key_dim: int | None = None
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} must be a multiple of num_heads {num_heads}")
        self.num_heads, self.drop_rate = num_heads, drop_rate
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias)
        self.k_proj = nn.Linear(key_dim or embed_dim, embed_dim, bias)
        self.v_proj = nn.Linear(key_dim or embed_dim, embed_dim, bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            if bias:
                nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attend from `query` to `key` and `value` (self-attention when they are left out).

        Args:
            query: (B, T, embed_dim).
            key, value: (B, S, key_dim); `value` defaults to `key`.
            mask: boolean, True where attention is allowed, broadcastable to (B, heads, T, S); `padding_mask(...)` makes
                one from lengths of padding. A row that allows nothing gives NaN, as softmax over nothing does.
            causal: position t sees only positions up to t.

        Returns:
            (B, T, embed_dim)
        """
        key = query if key is None else key
        return self.attend(query, *self.project(key, key if value is None else value), mask, causal)

    def project(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of every head, (B, heads, S, head_dim): what a decoder keeps between steps."""
        return self.split(self.k_proj(key)), self.split(self.v_proj(value))

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Equation 1 in every head: softmax(Q K^T / sqrt(d_k)) V, then concatenation and W^O."""
        if mask is not None and causal:
            mask, causal = mask & causal_mask(query.shape[1], keys.shape[2], query.device), False
        heads = F.scaled_dot_product_attention(
            self.split(self.q_proj(query)),
            keys,
            values,
            attn_mask=mask,
            dropout_p=self.drop_rate if self.training else 0.0,
            is_causal=causal,
        )
        return self.out_proj(heads.transpose(1, 2).flatten(2))

    def weights(
        self, query: Tensor, key: Tensor | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """The attention weights themselves, (B, heads, T, S), for looking at."""
        q, k = self.split(self.q_proj(query)), self.split(self.k_proj(query if key is None else key))
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        if causal:
            scores = scores.masked_fill(~causal_mask(q.shape[2], k.shape[2], q.device), -math.inf)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return scores.softmax(-1)

    def split(self, x: Tensor) -> Tensor:
        """(B, T, embed_dim) -> (B, heads, T, head_dim)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def causal_mask(target_length: int, source_length: int, device: torch.device | None = None) -> Tensor:
    """(T, S) boolean, True at and below the diagonal: position t may see positions 0 … t."""
    return torch.ones(target_length, source_length, dtype=torch.bool, device=device).tril()


def padding_mask(ids: Tensor, pad_id: int) -> Tensor:
    """(B, S) token ids -> (B, 1, 1, S) boolean, True at real tokens: what every query may attend to."""
    return (ids != pad_id)[:, None, None, :]


class PositionwiseFeedForward(nn.Module):
    """Equation 2: max(0, x W1 + b1) W2 + b2, the same at every position. (…, embed_dim) -> (…, embed_dim)."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


def sinusoids(length: int, embed_dim: int) -> Tensor:
    """Section 3.5, (length, embed_dim): sin(pos / 10000^(2i/d)) in the even columns, cos of the same in the odd ones.

    Computed in float64 and returned as float32, so that far positions stay exact.

    Raises:
        ValueError: if `embed_dim` is odd.
    """
    if embed_dim % 2:
        raise ValueError(f"embed_dim {embed_dim} must be even: every sine has its cosine")
    rates = 10000.0 ** (-torch.arange(0, embed_dim, 2, dtype=torch.float64) / embed_dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1).float()


class PositionalEncoding(nn.Module):
    """Adds the sinusoids of section 3.5. x: (B, T, embed_dim) at positions start … start + T - 1, T up to `max_length`."""

    def __init__(self, embed_dim: int, max_length: int = 1024) -> None:
        super().__init__()
        self.register_buffer("table", sinusoids(max_length, embed_dim), persistent=False)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        if start + x.shape[1] > len(self.table):
            raise ValueError(
                f"{start + x.shape[1]} tokens are more than max_length {len(self.table)}; create a longer one"
            )
        return x + self.table[start : start + x.shape[1]]


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward; each with residual and post-norm (section 3.1). x: (B, S, embed_dim)."""

    def __init__(self, embed_dim: int, num_heads: int, hidden_dim: int, drop_rate: float, attention_bias: bool) -> None:
        super().__init__()
        self.self_attn = MultiHeadAttention(embed_dim, num_heads, bias=attention_bias)
        self.self_attn_layer_norm = nn.LayerNorm(embed_dim)
        self.feed_forward = PositionwiseFeedForward(embed_dim, hidden_dim)
        self.final_layer_norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.self_attn_layer_norm(x + self.dropout(self.self_attn(x, mask=mask)))
        return self.final_layer_norm(x + self.dropout(self.feed_forward(x)))


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder's output, feed-forward (section 3.1)."""

    def __init__(self, embed_dim: int, num_heads: int, hidden_dim: int, drop_rate: float, attention_bias: bool) -> None:
        super().__init__()
        self.self_attn = MultiHeadAttention(embed_dim, num_heads, bias=attention_bias)
        self.self_attn_layer_norm = nn.LayerNorm(embed_dim)
        self.encoder_attn = MultiHeadAttention(embed_dim, num_heads, bias=attention_bias)
        self.encoder_attn_layer_norm = nn.LayerNorm(embed_dim)
        self.feed_forward = PositionwiseFeedForward(embed_dim, hidden_dim)
        self.final_layer_norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """x: (B, T, embed_dim), memory: (B, S, embed_dim), mask: over memory -> (B, T, embed_dim)."""
        keys, values = self.self_attn.project(x, x)
        return self.layers(x, keys, values, *self.encoder_attn.project(memory, memory), mask, causal=True)

    def layers(
        self, x: Tensor, keys: Tensor, values: Tensor, seen_keys: Tensor, seen_values: Tensor, mask, causal: bool
    ) -> Tensor:
        x = self.self_attn_layer_norm(x + self.dropout(self.self_attn.attend(x, keys, values, causal=causal)))
        attended = self.encoder_attn.attend(x, seen_keys, seen_values, mask)
        x = self.encoder_attn_layer_norm(x + self.dropout(attended))
        return self.final_layer_norm(x + self.dropout(self.feed_forward(x)))


class Transformer(nn.Module):
    """The whole network. `forward(source, target)` gives the logits of every next token; `start` and `advance` decode.

    Args:
        vocab_size: size of the vocabulary that source and target share (section 3.4).
        embed_dim: d_model. depth: N. num_heads: h. hidden_dim: d_ff. drop_rate: P_drop.
        max_length: longest sequence that positions are tabulated for.
        attention_bias: see the top of this file.
        pad_id: the id that pads sequences on the right.
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int = 512,
        depth: int = 6,
        num_heads: int = 8,
        hidden_dim: int = 2048,
        drop_rate: float = 0.1,
        max_length: int = 1024,
        attention_bias: bool = False,
        pad_id: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= pad_id < vocab_size:
            raise ValueError(f"pad_id {pad_id} must be one of the {vocab_size} ids of the vocabulary")
        self.pad_id, self.embed_dim, self.max_length = pad_id, embed_dim, max_length
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        nn.init.normal_(self.embedding.weight, std=embed_dim**-0.5)  # so that the scaled embedding has unit variance
        self.positions = PositionalEncoding(embed_dim, max_length)
        self.dropout = nn.Dropout(drop_rate)
        shape = (embed_dim, num_heads, hidden_dim, drop_rate, attention_bias)
        self.encoder = nn.ModuleList(EncoderLayer(*shape) for _ in range(depth))
        self.decoder = nn.ModuleList(DecoderLayer(*shape) for _ in range(depth))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """source: int64 (B, S), target: int64 (B, T) beginning with the start token -> logits (B, T, vocab_size)."""
        mask = padding_mask(source, self.pad_id)
        memory = self.encode(source, mask)
        x = self.embed(target)
        for layer in self.decoder:  # targets are padded on the right, so the causal mask also hides the padding
            x = layer(x, memory, mask)
        return self.logits(x)

    def embed(self, ids: Tensor, start: int = 0) -> Tensor:
        """Section 3.4: embeddings times sqrt(d_model), plus positions. (B, T) -> (B, T, embed_dim)."""
        return self.dropout(self.positions(self.embedding(ids) * math.sqrt(self.embed_dim), start))

    def encode(self, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, S) -> (B, S, embed_dim). Rows at padding are computed, and masked wherever they would be read."""
        mask = padding_mask(source, self.pad_id) if mask is None else mask
        x = self.embed(source)
        for layer in self.encoder:
            x = layer(x, mask)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """The output projection is the embedding matrix (section 3.4)."""
        return F.linear(x, self.embedding.weight)

    # -- one token after the other, for search -----------------------------------------------------------------------

    def start(self, source: Tensor) -> dict[str, Tensor]:
        """Encode the source and prepare to decode: a flat dict of tensors whose first axis is the batch.

        Beam search repeats and reorders rows of it; that is all it needs to know about a model.
        """
        mask = padding_mask(source, self.pad_id)
        memory = self.encode(source, mask)
        state = {"mask": mask}
        for i, layer in enumerate(self.decoder):
            state[f"encoder_keys.{i}"], state[f"encoder_values.{i}"] = layer.encoder_attn.project(memory, memory)
        return state

    def advance(self, tokens: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Feed one more token: int64 (B,) -> logits of the next (B, vocab_size), and the state after it.

        Keys and values of earlier positions are kept in the state, so a step costs one position, not all of them.
        """
        state = dict(state)
        position = state["keys.0"].shape[2] if "keys.0" in state else 0
        x = self.embed(tokens[:, None], start=position)
        for i, layer in enumerate(self.decoder):
            keys, values = layer.self_attn.project(x, x)
            if position:
                keys, values = torch.cat([state[f"keys.{i}"], keys], 2), torch.cat([state[f"values.{i}"], values], 2)
            state[f"keys.{i}"], state[f"values.{i}"] = keys, values
            seen = state[f"encoder_keys.{i}"], state[f"encoder_values.{i}"]
            x = layer.layers(x, keys, values, *seen, state["mask"], causal=False)
        return self.logits(x[:, 0]), state


def transformer_base(
    vocab_size: int = 37_000,
    embed_dim: int = 512,
    depth: int = 6,
    num_heads: int = 8,
    hidden_dim: int = 2048,
    drop_rate: float = 0.1,
    max_length: int = 1024,
    attention_bias: bool = False,
    pad_id: int = 0,
) -> Transformer:
    """The base model of table 3: N=6, d_model=512, d_ff=2048, h=8, dropout 0.1."""
    shape = (embed_dim, depth, num_heads, hidden_dim)
    return Transformer(vocab_size, *shape, drop_rate, max_length, attention_bias, pad_id)


def transformer_big(
    vocab_size: int = 37_000,
    embed_dim: int = 1024,
    depth: int = 6,
    num_heads: int = 16,
    hidden_dim: int = 4096,
    drop_rate: float = 0.3,
    max_length: int = 1024,
    attention_bias: bool = False,
    pad_id: int = 0,
) -> Transformer:
    """The big model of table 3: N=6, d_model=1024, d_ff=4096, h=16, dropout 0.3 (0.1 for English-French)."""
    shape = (embed_dim, depth, num_heads, hidden_dim)
    return Transformer(vocab_size, *shape, drop_rate, max_length, attention_bias, pad_id)
