"""Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder Transformers (Chefer et al., arXiv:2103.15679).

Which token made the score? Relevancy matrices follow the attention from the input on, each layer weighted with its gradient:

    TransformerRelevance(model)(images, target=3)            a vision transformer: (B, H, W) in [0, 1]
    TransformerRelevance(model, streams).matrices((text, image), target=…)       any other: R by pair of modalities

Works on any network whose attention `capture.recording` sees; nothing in the network is changed, and nothing of it is known but
which modality attends to which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paperzoo.blocks.explaining import Target, explaining, rescale, select, upsample
from paperzoo.papers.interpretability.generic_attention_explainability.capture import Attention, recording

Streams = Callable[[Attention], tuple[str, str]]
"""From an attention (by its module's name and which of the module's calls it is) to the modalities of its queries and its keys."""


# -- the rules -----------------------------------------------------------------------------------------------------------


def head_average(probabilities: Tensor, gradients: Tensor) -> Tensor:
    """Eq. (5): the mean over heads of what is positive in gradient times attention; two (B, heads, T, S) -> (B, T, S)."""
    return (gradients * probabilities).clamp_min(0).mean(1)


def normalised(relevancy: Tensor) -> Tensor:
    """Eq. (8) and (9): what a self-relevancy (B, T, T) gathered beyond the identity, each row made to sum to one, plus the identity.

    A row that has gathered nothing stays the identity's; the authors' code divides by zero there.
    """
    identity = torch.eye(relevancy.shape[-1], dtype=relevancy.dtype, device=relevancy.device)
    gathered = relevancy - identity
    total = gathered.sum(-1, keepdim=True)
    return gathered / total.where(total != 0, 1.0) + identity


class Relevancies(dict[tuple[str, str], Tensor]):
    """R[a, b] (B, tokens of a, tokens of b): how much each token of a holds of each token of b.

    At first a token holds itself: identity within a modality, zero across (sec. 3.1).

    Args:
        tokens: by the modality's name, how many tokens it has.
        batch: images, or whatever is explained at once.
    """

    def __init__(self, tokens: dict[str, int], batch: int, like: Tensor) -> None:
        super().__init__()
        for a, rows in tokens.items():
            for b, columns in tokens.items():
                begin = like.new_zeros(batch, rows, columns)
                self[a, b] = begin + torch.eye(rows, dtype=like.dtype, device=like.device) if a == b else begin
        self.names = list(tokens)

    def self_attention(self, a: str, average: Tensor) -> None:
        """Eq. (6) and (7): tokens of a mix, and with them all that they hold; average (B, Ta, Ta)."""
        for b in self.names:
            self[a, b] = self[a, b] + average @ self[a, b]

    def cross_attention(self, averages: dict[tuple[str, str], Tensor]) -> None:
        """Eq. (10) and (11): tokens of a take from those of b, by average (B, Ta, Tb); several at once all see the state before."""
        added = {}
        for (a, b), average in averages.items():
            across = normalised(self[a, a]).transpose(1, 2) @ average @ normalised(self[b, b])  # eq. (10)
            added[a, b] = added.get((a, b), 0) + across
            added[a, a] = added.get((a, a), 0) + average @ self[b, a]  # eq. (11)
        for pair, value in added.items():
            self[pair] = self[pair] + value


# -- any transformer -------------------------------------------------------------------------------------------------------


def one_stream(attention: Attention) -> tuple[str, str]:
    """Every attention is of one sequence to itself."""
    return "tokens", "tokens"


def encoder_decoder(attention: Attention) -> tuple[str, str]:
    """The encoder's sequence is "source", the decoder's "target", by the names that most such networks use.

    An attention across is the second one of a decoder's layer, or of a module called encoder_attn, multihead_attn, cross_attn or
    crossattention.
    """
    parts = attention.module.split(".")
    if not any(part.startswith("decoder") for part in parts):
        return "source", "source"
    across = attention.call == 1 or not {"encoder_attn", "multihead_attn", "cross_attn", "crossattention"}.isdisjoint(
        parts
    )
    return "target", "source" if across else "target"


class TransformerRelevance:
    """Relevancy of every token for a score.

    Args:
        model: any transformer; its attention is seen as `capture` says.
        streams: which modality attends to which. Two attentions in a row that go in
            opposite directions are a co-attention: both see the state before (as in LXMERT).
        prefix: tokens of an image before its patches (the class token, registers), for maps.
        read: the token whose row is read for maps, usually the class token; None: the mean of all rows, for networks that pool.
        grid: rows and columns of patches, for maps; None: as square as the images.
    """

    def __init__(
        self,
        model: nn.Module,
        streams: Streams = one_stream,
        prefix: int = 1,
        read: int | None = 0,
        grid: tuple[int, int] | None = None,
    ) -> None:
        self.model, self.streams, self.prefix, self.read, self.grid = model, streams, prefix, read, grid

    def attentions(self, inputs: Any, target: Target = None) -> tuple[list[Attention], list[Tensor]]:
        """Every attention of a forward pass, and the gradients of the target's score by their probabilities.

        Args:
            inputs: a tensor, or a tuple or dict of what the model takes.
            target: see `paperzoo.blocks.explaining.Target`.

        Raises:
            ValueError: if no attention is seen, or the score does not depend on one.
        """
        with explaining(self.model):
            with recording(self.model) as found:
                score = select(called(self.model, inputs), target)
            if not found:
                raise ValueError("no attention was seen: the model computes it in a way of its own")
            found = list(found)
            every = [attention.probabilities for attention in found]
            gradients = torch.autograd.grad(score.sum(), every, allow_unused=True) if score.requires_grad else [None]
        if all(gradient is None for gradient in gradients):
            raise ValueError("the target's score does not depend on any attention; choose another target")
        kept = [torch.zeros_like(p) if g is None else g for p, g in zip(every, gradients, strict=True)]
        return [Attention(a.module, a.call, a.probabilities.detach()) for a in found], kept

    def matrices(self, inputs: Any, target: Target = None) -> Relevancies:
        """The relevancy matrices after the last layer, by pair of modalities.

        Raises:
            ValueError: if a modality changes its number of tokens on the way, or attention runs within parts of the image
                (windows): the rules need one sequence from the first layer to the last.
        """
        attentions, gradients = self.attentions(inputs, target)
        for attention in attentions:
            if attention.probabilities.ndim != 4:
                shape = tuple(attention.probabilities.shape)
                raise ValueError(
                    f"'{attention.module}' attends with {shape}, not (B, heads, T, S); the rules need that"
                )
        averages = [head_average(a.probabilities, g) for a, g in zip(attentions, gradients, strict=True)]
        pairs = [self.streams(attention) for attention in attentions]
        batch, tokens = len(averages[0]), {}
        for (a, b), average, attention in zip(pairs, averages, attentions, strict=True):
            for name, count in ((a, average.shape[1]), (b, average.shape[2])):
                if tokens.setdefault(name, count) != count or len(average) != batch:
                    raise ValueError(
                        f"'{attention.module}' attends with {tuple(average.shape)} where '{name}' has "
                        f"{tokens[name]} tokens in a batch of {batch}; the rules need whole sequences of one length"
                    )
        found = Relevancies(tokens, batch, averages[0])
        waiting: dict[tuple[str, str], Tensor] = {}
        for (a, b), average in zip(pairs, averages, strict=True):
            if waiting and (b, a) not in waiting:
                found.cross_attention(waiting)
                waiting = {}
            if a == b:
                found.self_attention(a, average)
            else:
                waiting[a, b] = average
                if (b, a) in waiting:  # the two directions of a co-attention
                    found.cross_attention(waiting)
                    waiting = {}
        if waiting:
            found.cross_attention(waiting)
        return found

    def __call__(self, inputs: Tensor, target: Target = None) -> Tensor:
        """Maps for a batch of images (B, C, H, W): (B, H, W), bilinear between patches, each scaled to [0, 1]."""
        matrix = self.matrices(inputs, target)["tokens", "tokens"]
        return image_map(matrix, tuple(inputs.shape[-2:]), self.prefix, self.read, self.grid)


def called(model: nn.Module, inputs: Any) -> Any:
    """The model's output for a tensor, a tuple or a dict of inputs."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def image_map(
    matrix: Tensor,
    size: tuple[int, int],
    prefix: int = 1,
    read: int | None = 0,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """What a token (or all, on average) holds of the patches, (B, T, T) -> (B, *size) in [0, 1].

    Raises:
        ValueError: if the patches do not fill a grid of the image's proportions; give `grid`.
    """
    row = (matrix.mean(1) if read is None else matrix[:, read])[:, prefix:]
    if grid is None:
        height = round(math.sqrt(row.shape[1] * size[0] / size[1]))
        grid = (height, row.shape[1] // max(1, height))
    if grid[0] * grid[1] != row.shape[1]:
        raise ValueError(f"{row.shape[1]} patches do not fill a grid of {grid}; give grid, or another prefix")
    return rescale(upsample(row.unflatten(1, grid), size))


# -- what it is compared with ----------------------------------------------------------------------------------------------


def raw_attention(attentions: Sequence[Attention]) -> Tensor:
    """The last layer's attention, averaged over heads: (B, T, T). The same for every class."""
    return attentions[-1].probabilities.mean(1)


def rollout(attentions: Sequence[Attention]) -> Tensor:
    """Attention rollout (Abnar and Zuidema, arXiv:2005.00928): the product of (A + I), rows normalised, of all layers: (B, T, T)."""
    joint = None
    for attention in attentions:
        mean = attention.probabilities.mean(1)
        mixed = mean + torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        mixed = mixed / mixed.sum(-1, keepdim=True)
        joint = mixed if joint is None else mixed @ joint
    return joint
