"""DCN V2: explicit feature crosses of bounded degree, learned by cross layers, beside or before an MLP.

Wang et al., "DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale Learning to Rank Systems",
WWW 2021 (arXiv 2008.13535).

What the paper leaves open, and what is done here: the gates of the mixture are a softmax over one linear map a layer
(the paper allows sigmoid or softmax); embeddings start normal with variance 1 / embed_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class CrossLayer(nn.Module):
    """x0 * (W x + b) + x, equation 1. (B, d), (B, d) -> (B, d)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        start(self.linear)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        return x0 * self.linear(x) + x


class LowRankCrossLayer(nn.Module):
    """x0 * (U V^T x + b) + x with U, V of shape (d, rank), equation 2. (B, d), (B, d) -> (B, d)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.v = nn.Linear(width, rank, bias=False)
        self.u = nn.Linear(rank, width)
        start(self.v)
        start(self.u)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        return x0 * self.u(self.v(x)) + x


class MixtureCrossLayer(nn.Module):
    """A gated mixture of low-rank experts with non-linear projections, equations 3 and 4. (B, d), (B, d) -> (B, d).

        sum_i G_i(x) * x0 * (U_i g(C_i g(V_i^T x)) + b) + x,      g = tanh, G = softmax of a linear map

    The experts share x0 and b, and the gates sum to one, so the sum over experts is one matrix product:
    x0 * ([U_1 … U_K] [G_1 z_1; …; G_K z_K] + b) + x.
    """

    def __init__(self, width: int, rank: int, num_experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.v = nn.Parameter(torch.empty(num_experts, width, rank))
        self.c = nn.Parameter(torch.empty(num_experts, rank, rank))
        self.u = nn.Parameter(torch.empty(num_experts, width, rank))
        self.bias = nn.Parameter(torch.zeros(width))
        start(self.gate)
        for weight, fan_in in ((self.v, width), (self.c, rank), (self.u, rank)):
            nn.init.normal_(weight, std=(2 / fan_in) ** 0.5)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        gates = self.gate(x).softmax(-1)  # (B, K)
        z = torch.einsum("bd,kdr->bkr", x, self.v).tanh()
        z = torch.einsum("bkr,ksr->bks", z, self.c).tanh()
        crossed = torch.einsum("bks,kds->bd", gates.unsqueeze(-1) * z, self.u)
        return x0 * (crossed + self.bias) + x


class CrossNetwork(nn.Module):
    """Cross layers in sequence, each fed with the network's input as well. (B, d) -> (B, d).

    With L layers of the full or low-rank kind, the output is a polynomial of degree L + 1 in the input (theorem 4.1).

    Args:
        width: d.
        num_layers: L.
        rank: None for full matrices; else the rank of their factors.
        num_experts: 1, or the number of gated experts, which needs a rank.

    Raises:
        ValueError: for sizes below 1, a rank above `width`, or experts without a rank.
    """

    def __init__(self, width: int, num_layers: int, rank: int | None = None, num_experts: int = 1) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_cross_layers is {num_layers}; it must be 1 or more")
        if rank is not None and not 1 <= rank <= width:
            raise ValueError(f"rank is {rank}; it must be between 1 and the input width {width}")
        if num_experts < 1 or (num_experts > 1 and rank is None):
            raise ValueError(f"num_experts is {num_experts}; it must be 1 or more, and more than 1 needs a rank")
        if rank is None:
            layers = [CrossLayer(width) for _ in range(num_layers)]
        elif num_experts == 1:
            layers = [LowRankCrossLayer(width, rank) for _ in range(num_layers)]
        else:
            layers = [MixtureCrossLayer(width, rank, num_experts) for _ in range(num_layers)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        x0 = x
        for layer in self.layers:
            x = layer(x0, x)
        return x


class FieldEmbedding(nn.Module):
    """One table for all categorical fields; the dense features are appended. (B, D), (B, F) -> (B, F * embed_dim + D).

    Args:
        field_sizes: how many values each field has; ids of field f are 0 … field_sizes[f] - 1.
    """

    def __init__(self, num_dense: int, field_sizes: Sequence[int], embed_dim: int) -> None:
        super().__init__()
        if any(size < 1 for size in field_sizes) or num_dense < 0 or not (len(field_sizes) or num_dense):
            raise ValueError("field_sizes must be 1 or more each, num_dense 0 or more, and there must be a feature")
        self.width = len(field_sizes) * embed_dim + num_dense
        self.table = nn.Embedding(sum(field_sizes), embed_dim)
        nn.init.normal_(self.table.weight, std=embed_dim**-0.5)
        sizes = torch.tensor([0, *field_sizes], dtype=torch.int64, device="cpu")
        self.register_buffer("offsets", sizes.cumsum(0)[:-1], persistent=False)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        return torch.cat([self.table(sparse + self.offsets).flatten(1), dense], 1)


class DeepCross(nn.Module):
    """Embeddings, a cross network and an MLP, stacked or parallel (figure 1). (B, D), (B, F) -> logits (B,).

    Args:
        num_dense: D, the number of dense features.
        field_sizes: how many values each of the F categorical fields has.
        embed_dim: width of every field's embedding.
        num_cross_layers: cross layers.
        hidden: widths of the MLP's layers.
        rank, num_experts: see `CrossNetwork`.
        parallel: the MLP reads the embeddings and its output is put beside the crosses; else it reads the crosses.
        drop_rate: dropout after each layer of the MLP.
    """

    def __init__(
        self,
        num_dense: int,
        field_sizes: Sequence[int],
        embed_dim: int,
        num_cross_layers: int,
        hidden: Sequence[int],
        rank: int | None,
        num_experts: int,
        parallel: bool,
        drop_rate: float,
    ) -> None:
        super().__init__()
        self.parallel = parallel
        self.embedding = FieldEmbedding(num_dense, field_sizes, embed_dim)
        width = self.embedding.width
        self.cross = CrossNetwork(width, num_cross_layers, rank, num_experts)
        self.deep = mlp(width, hidden, drop_rate)
        self.num_features = (hidden[-1] if hidden else width) + (width if parallel else 0)
        self.head = nn.Linear(self.num_features, 1)
        start(self.head)

    def embed(self, dense: Tensor, sparse: Tensor) -> Tensor:
        """What the last layer reads: (B, num_features)."""
        x = self.embedding(dense, sparse)
        if self.parallel:
            return torch.cat([self.cross(x), self.deep(x)], 1)
        return self.deep(self.cross(x))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        return self.head(self.embed(dense, sparse)).squeeze(1)


def mlp(width: int, hidden: Sequence[int], drop_rate: float = 0.0) -> nn.Sequential:
    """Linear, ReLU, dropout for every width in `hidden`."""
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(width, size), nn.ReLU(), nn.Dropout(drop_rate)]
        start(layers[-3])
        width = size
    return nn.Sequential(*layers)


def start(linear: nn.Linear) -> None:
    """He normal weights, biases zero (section 7.1)."""
    nn.init.kaiming_normal_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


CRITEO_FIELDS = (1000,) * 26  # the paper does not say its vocabularies; its counts leave the embeddings out


def dcn_v2_stacked(
    num_dense: int = 13,
    field_sizes: Sequence[int] = CRITEO_FIELDS,
    embed_dim: int = 39,
    num_cross_layers: int = 2,
    hidden: Sequence[int] = (768, 768),
    rank: int | None = None,
    drop_rate: float = 0.0,
) -> DeepCross:
    """Full-matrix (or, with `rank`, low-rank) cross layers, then an MLP: the paper's best on Criteo."""
    return DeepCross(num_dense, field_sizes, embed_dim, num_cross_layers, hidden, rank, 1, False, drop_rate)


def dcn_v2_parallel(
    num_dense: int = 13,
    field_sizes: Sequence[int] = CRITEO_FIELDS,
    embed_dim: int = 39,
    num_cross_layers: int = 2,
    hidden: Sequence[int] = (768, 768),
    rank: int | None = None,
    drop_rate: float = 0.0,
) -> DeepCross:
    """Full-matrix (or, with `rank`, low-rank) cross layers beside an MLP."""
    return DeepCross(num_dense, field_sizes, embed_dim, num_cross_layers, hidden, rank, 1, True, drop_rate)


def dcn_mix_stacked(
    num_dense: int = 13,
    field_sizes: Sequence[int] = CRITEO_FIELDS,
    embed_dim: int = 39,
    num_cross_layers: int = 2,
    hidden: Sequence[int] = (768, 768),
    rank: int = 64,
    num_experts: int = 4,
    drop_rate: float = 0.0,
) -> DeepCross:
    """Gated mixtures of low-rank experts, then an MLP."""
    return DeepCross(num_dense, field_sizes, embed_dim, num_cross_layers, hidden, rank, num_experts, False, drop_rate)


def dcn_mix_parallel(
    num_dense: int = 13,
    field_sizes: Sequence[int] = CRITEO_FIELDS,
    embed_dim: int = 39,
    num_cross_layers: int = 2,
    hidden: Sequence[int] = (768, 768),
    rank: int = 64,
    num_experts: int = 4,
    drop_rate: float = 0.0,
) -> DeepCross:
    """Gated mixtures of low-rank experts beside an MLP."""
    return DeepCross(num_dense, field_sizes, embed_dim, num_cross_layers, hidden, rank, num_experts, True, drop_rate)
