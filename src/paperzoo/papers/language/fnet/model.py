"""FNet: Lee-Thorp et al., "FNet: Mixing Tokens with Fourier Transforms", NAACL 2022 (arXiv 2105.03824).

A BERT encoder whose self-attention sub-layer is replaced by the real part of a two-dimensional Fourier transform, over
the sequence and the hidden axis; it has no parameters. Post-norm, GELU, learned positions, as BERT.

Parameter names are those of `transformers` (FNetModel, FNetForMaskedLM, FNetForPreTraining, …), so google/fnet-base and
google/fnet-large load unchanged; `from_official` only drops what their files hold twice. What differs from the paper or its code:
- the released code initialises biases from N(0, 0.02); here they start at zero, as BERT and `transformers`;
- there is no attention mask: padding is mixed like any token (so does the released code). Pad to one fixed length, or the
  same text gives different outputs;
- the transform is an FFT, and two real matrix products with DFT matrices while a graph is exported, because ONNX
  Runtime and others have no complex numbers. Section 3.2: on TPUs matrix products win up to length 4096.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dft_matrices(length: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """C and S, float32 (length, length), with exp(-2 pi i n k / length) = C - i S.

    n k is reduced modulo the length in integers first, so the angle stays exact for long sequences.
    """
    n = torch.arange(length, device=device)
    angles = (n[:, None] * n % length) * (2 * math.pi / length)
    return angles.cos(), angles.sin()


def fourier_mixing(x: Tensor) -> Tensor:
    """Equation 3: Re(F_seq(F_hidden(x))), by FFT in float32 (there is no half-precision FFT). x: (B, T, C)."""
    return torch.fft.fftn(x.float(), dim=(1, 2)).real


def fourier_mixing_matmul(x: Tensor, sequence: tuple[Tensor, Tensor], hidden: tuple[Tensor, Tensor]) -> Tensor:
    """The same as two real products (section 3.2): Re((C - iS) X (C' - iS')) = C X C' - S X S'."""
    (cos_t, sin_t), (cos_c, sin_c) = sequence, hidden
    return cos_t @ (x @ cos_c) - sin_t @ (x @ sin_c)


class FNetEmbeddings(nn.Module):
    """Word, position and type embeddings, summed, normalised and projected. (B, T) -> (B, T, embed_dim)."""

    def __init__(self, vocab_size: int, embed_dim: int, max_length: int, num_types: int, drop_rate: float, pad_id: int):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, embed_dim, padding_idx=pad_id)
        self.position_embeddings = nn.Embedding(max_length, embed_dim)
        self.token_type_embeddings = nn.Embedding(num_types, embed_dim)
        self.LayerNorm = nn.LayerNorm(embed_dim, eps=1e-12)
        self.projection = nn.Linear(embed_dim, embed_dim)
        self.dropout = nn.Dropout(drop_rate)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        length = input_ids.shape[1]
        if length > self.position_embeddings.num_embeddings:
            raise ValueError(f"{length} tokens are more than max_length {self.position_embeddings.num_embeddings}")
        types = (
            self.token_type_embeddings.weight[0]
            if token_type_ids is None
            else self.token_type_embeddings(token_type_ids)
        )
        x = self.word_embeddings(input_ids) + types + self.position_embeddings.weight[:length]
        return self.dropout(self.projection(self.LayerNorm(x)))


class Residual(nn.Module):
    """LayerNorm(mixed + x): the output of a mixing sub-layer."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.LayerNorm = nn.LayerNorm(embed_dim, eps=1e-12)

    def forward(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(x + mixed)


class Fourier(nn.Module):
    """The mixing sub-layer. `matrices` are the DFT matrices of sequence and hidden axis; None means FFT."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.output = Residual(embed_dim)

    def forward(self, x: Tensor, matrices: tuple | None) -> Tensor:
        return self.output(fourier_mixing(x) if matrices is None else fourier_mixing_matmul(x, *matrices), x)


class Dense(nn.Module):
    """One linear layer under the name `dense`, with the tanh form of GELU that the released code uses."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x), approximate="tanh")


class FeedForwardOutput(nn.Module):
    """The second half of the feed-forward sub-layer: linear, dropout, residual, norm."""

    def __init__(self, hidden_dim: int, embed_dim: int, drop_rate: float) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_dim, embed_dim)
        self.LayerNorm = nn.LayerNorm(embed_dim, eps=1e-12)
        self.dropout = nn.Dropout(drop_rate)

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden)) + x)


class FNetLayer(nn.Module):
    """Fourier mixing, then feed-forward; post-norm (figure 1)."""

    def __init__(self, embed_dim: int, hidden_dim: int, drop_rate: float) -> None:
        super().__init__()
        self.fourier = Fourier(embed_dim)
        self.intermediate = Dense(embed_dim, hidden_dim)
        self.output = FeedForwardOutput(hidden_dim, embed_dim, drop_rate)

    def forward(self, x: Tensor, matrices: tuple | None) -> Tensor:
        x = self.fourier(x, matrices)
        return self.output(self.intermediate(x), x)


class FNetEncoder(nn.Module):
    """The stack. `mixing`: "auto" (FFT, and matrix products while exporting), "fft" or "matmul"."""

    def __init__(self, embed_dim: int, depth: int, hidden_dim: int, drop_rate: float, mixing: str) -> None:
        super().__init__()
        if mixing not in ("auto", "fft", "matmul"):
            raise ValueError(f"mixing '{mixing}' must be 'auto', 'fft' or 'matmul'")
        self.mixing = mixing
        self.layer = nn.ModuleList(FNetLayer(embed_dim, hidden_dim, drop_rate) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        by_matrices = self.mixing == "matmul" or (self.mixing == "auto" and torch.compiler.is_exporting())
        matrices = (dft_matrices(x.shape[1], x.device), dft_matrices(x.shape[2], x.device)) if by_matrices else None
        for layer in self.layer:
            x = layer(x, matrices)
        return x


class FNetPooler(nn.Module):
    """tanh of a linear layer on the first token, (B, T, C) -> (B, C)."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x[:, 0]).tanh()


class FNetModel(nn.Module):
    """The encoder: token ids int64 (B, T), optional token types (B, T) -> states (B, T, C) and pooled (B, C)."""

    def __init__(
        self,
        vocab_size: int = 32_000,
        embed_dim: int = 768,
        depth: int = 12,
        hidden_dim: int = 3072,
        max_length: int = 512,
        num_types: int = 4,
        drop_rate: float = 0.1,
        pad_id: int = 3,
        mixing: str = "auto",
    ) -> None:
        super().__init__()
        if not 0 <= pad_id < vocab_size:
            raise ValueError(f"pad_id {pad_id} must be one of the {vocab_size} ids of the vocabulary")
        self.num_features, self.max_length, self.pad_id = embed_dim, max_length, pad_id
        self.embeddings = FNetEmbeddings(vocab_size, embed_dim, max_length, num_types, drop_rate, pad_id)
        self.encoder = FNetEncoder(embed_dim, depth, hidden_dim, drop_rate, mixing)
        self.pooler = FNetPooler(embed_dim)
        self.apply(initialise)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        states = self.encoder(self.embeddings(input_ids, token_type_ids))
        return states, self.pooler(states)


def initialise(module: nn.Module) -> None:
    """N(0, 0.02) for every matrix, zero for biases and for the padding's embedding, as BERT."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        nn.init.zeros_(module.weight.data[module.padding_idx])


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Files of the Hub without what they hold twice (the tied output layer) or needlessly (constant buffers)."""
    needless = ("position_ids", "embeddings.token_type_ids", "predictions.decoder.weight")
    state = {name: t for name, t in state.items() if not name.endswith(needless)}
    bias = state.pop("cls.predictions.decoder.bias", None)
    return state if bias is None else {"cls.predictions.bias": bias} | state


class PredictionTransform(nn.Module):
    """Dense, GELU, LayerNorm before the vocabulary."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(embed_dim, embed_dim)
        self.LayerNorm = nn.LayerNorm(embed_dim, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x), approximate="tanh"))


class Predictions(nn.Module):
    """The masked-language-model head: (…, C) -> logits (…, vocab_size), with the word embeddings as output matrix."""

    def __init__(self, embed_dim: int, vocab_size: int) -> None:
        super().__init__()
        self.transform = PredictionTransform(embed_dim)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        return F.linear(self.transform(x), word_embeddings, self.bias)


class Heads(nn.Module):
    """The heads under the name `cls`: words (`predictions`) and next sentence (`seq_relationship`), where wanted."""

    def __init__(self, embed_dim: int, vocab_size: int | None, next_sentence: bool) -> None:
        super().__init__()
        if vocab_size is not None:
            self.predictions = Predictions(embed_dim, vocab_size)
        if next_sentence:
            self.seq_relationship = nn.Linear(embed_dim, 2)
        self.apply(initialise)


def at(states: Tensor, positions: Tensor | None) -> Tensor:
    """The states (B, T, C) at `positions` (B, P) -> (B, P, C); all of them if `positions` is None."""
    return states if positions is None else states.gather(1, positions[..., None].expand(-1, -1, states.shape[2]))


class FNetForMaskedLM(nn.Module):
    """(B, T) ids -> word logits (B, T, vocab_size), or (B, P, vocab_size) at `positions` (B, P) alone."""

    def __init__(self, vocab_size: int = 32_000, **kwargs) -> None:
        super().__init__()
        self.fnet = FNetModel(vocab_size, **kwargs)
        self.cls = Heads(self.fnet.num_features, vocab_size, next_sentence=False)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        states, _ = self.fnet(input_ids, token_type_ids)
        return self.cls.predictions(at(states, positions), self.fnet.embeddings.word_embeddings.weight)


class FNetForPreTraining(nn.Module):
    """The paper's pre-training network: word logits (B, T, vocab_size) and next-sentence logits (B, 2).

    With `positions` (B, P) the words are predicted there alone, (B, P, vocab_size): training needs no others. Class 0 of the latter: the second segment follows the first; class 1: it is from somewhere else.
    """

    def __init__(self, vocab_size: int = 32_000, **kwargs) -> None:
        super().__init__()
        self.fnet = FNetModel(vocab_size, **kwargs)
        self.cls = Heads(self.fnet.num_features, vocab_size, next_sentence=True)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        states, pooled = self.fnet(input_ids, token_type_ids)
        words = self.cls.predictions(at(states, positions), self.fnet.embeddings.word_embeddings.weight)
        return words, self.cls.seq_relationship(pooled)


class FNetForNextSentencePrediction(nn.Module):
    """(B, T) ids and token types -> logits (B, 2)."""

    def __init__(self, vocab_size: int = 32_000, **kwargs) -> None:
        super().__init__()
        self.fnet = FNetModel(vocab_size, **kwargs)
        self.cls = Heads(self.fnet.num_features, None, next_sentence=True)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        return self.cls.seq_relationship(self.fnet(input_ids, token_type_ids)[1])


class FNetForSequenceClassification(nn.Module):
    """(B, T) ids -> logits (B, num_classes), from the pooled first token through dropout and one linear layer."""

    def __init__(self, num_classes: int = 2, drop_rate: float = 0.1, **kwargs) -> None:
        super().__init__()
        self.fnet = FNetModel(drop_rate=drop_rate, **kwargs)
        self.num_features = self.fnet.num_features
        self.dropout = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be 1 or more")
        self.classifier = nn.Linear(self.num_features, num_classes)
        initialise(self.classifier)

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """The pooled features, (B, num_features)."""
        return self.fnet(input_ids, token_type_ids)[1]

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        return self.classifier(self.dropout(self.embed(input_ids, token_type_ids)))


BASE = dict(embed_dim=768, depth=12, hidden_dim=3072)  # 83M parameters in the paper's table 1
LARGE = dict(embed_dim=1024, depth=24, hidden_dim=4096)  # 238M


def fnet_base(**kwargs) -> FNetModel:
    """The base encoder, 12 layers of width 768."""
    return FNetModel(**(BASE | kwargs))


def fnet_large(**kwargs) -> FNetModel:
    """The large encoder, 24 layers of width 1024."""
    return FNetModel(**(LARGE | kwargs))


def fnet_base_pretraining(**kwargs) -> FNetForPreTraining:
    """The base encoder with both pre-training heads: what google/fnet-base holds."""
    return FNetForPreTraining(**(BASE | kwargs))


def fnet_large_pretraining(**kwargs) -> FNetForPreTraining:
    """The large encoder with both pre-training heads: what google/fnet-large holds."""
    return FNetForPreTraining(**(LARGE | kwargs))


def fnet_base_masked_lm(**kwargs) -> FNetForMaskedLM:
    """The base encoder with the masked-language-model head."""
    return FNetForMaskedLM(**(BASE | kwargs))


def fnet_base_classifier(num_classes: int = 2, **kwargs) -> FNetForSequenceClassification:
    """The base encoder for classifying a text or a pair of texts, as fine-tuned on GLUE."""
    return FNetForSequenceClassification(num_classes, **(BASE | kwargs))


def fnet_large_classifier(num_classes: int = 2, **kwargs) -> FNetForSequenceClassification:
    """The large encoder for classifying a text or a pair of texts."""
    return FNetForSequenceClassification(num_classes, **(LARGE | kwargs))
