"""The Transformer against torch.nn.Transformer with the weights copied, and against its own equations written out slowly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.language.transformer.model import (
    MultiHeadAttention,
    Transformer,
    padding_mask,
    sinusoids,
    transformer_base,
)
from paperzoo.tasks.translation import beam_search, greedy_search, smoothed_loss, warmup_inverse_sqrt


def copy_attention(ours: MultiHeadAttention, theirs: nn.MultiheadAttention) -> None:
    for part, weight in zip((ours.q_proj, ours.k_proj, ours.v_proj), theirs.in_proj_weight.chunk(3), strict=True):
        part.weight.data.copy_(weight)
    for part, bias in zip((ours.q_proj, ours.k_proj, ours.v_proj), theirs.in_proj_bias.chunk(3), strict=True):
        part.bias.data.copy_(bias)
    ours.out_proj.load_state_dict(theirs.out_proj.state_dict())


def copy_layers(ours: Transformer, theirs: nn.Transformer) -> None:
    """Every layer of torch.nn.Transformer into ours."""
    for a, b in [
        *zip(ours.encoder, theirs.encoder.layers, strict=True),
        *zip(ours.decoder, theirs.decoder.layers, strict=True),
    ]:
        copy_attention(a.self_attn, b.self_attn)
        if hasattr(a, "encoder_attn"):
            copy_attention(a.encoder_attn, b.multihead_attn)
        a.feed_forward.fc1.load_state_dict(b.linear1.state_dict())
        a.feed_forward.fc2.load_state_dict(b.linear2.state_dict())
        norms = [a.self_attn_layer_norm, *([a.encoder_attn_layer_norm] if hasattr(a, "encoder_attn") else [])]
        for norm, name in zip([*norms, a.final_layer_norm], ("norm1", "norm2", "norm3"), strict=False):
            norm.load_state_dict(getattr(b, name).state_dict())


def torch_transformer(embed_dim: int, num_heads: int, depth: int, hidden_dim: int) -> nn.Transformer:
    """torch.nn.Transformer without the norms that it adds after each stack, and with random norms and biases."""
    layer = (embed_dim, num_heads, hidden_dim, 0.0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(*layer, batch_first=True), depth, enable_nested_tensor=False
    )
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(*layer, batch_first=True), depth)
    model = nn.Transformer(embed_dim, num_heads, batch_first=True, custom_encoder=encoder, custom_decoder=decoder)
    for p in model.parameters():
        if p.ndim == 1:
            nn.init.uniform_(p, -0.3, 0.3)
    return model


class Reference(nn.Module):
    """torch.nn.Transformer between our embedding and output, with its own masks for padding and order."""

    def __init__(self, ours: Transformer, layers: nn.Transformer) -> None:
        super().__init__()
        self.embedding, self.layers, self.embed_dim = ours.embedding, layers, ours.embed_dim

    def embed(self, ids: Tensor) -> Tensor:
        table = torch.zeros(ids.shape[1], self.embed_dim)
        for position, column in itertools.product(range(ids.shape[1]), range(self.embed_dim)):
            angle = position / 10000 ** (2 * (column // 2) / self.embed_dim)
            table[position, column] = math.cos(angle) if column % 2 else math.sin(angle)
        return self.embedding(ids) * self.embed_dim**0.5 + table

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        out = self.layers(
            self.embed(source),
            self.embed(target),
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(target.shape[1]),
            src_key_padding_mask=source == 0,
            memory_key_padding_mask=source == 0,
        )
        return out @ self.embedding.weight.T


def ids(batch: int, length: int, vocab: int) -> Tensor:
    """Random tokens, with the ends of all rows but the first padded."""
    rows = torch.randint(1, vocab, (batch, length))
    for i in range(1, batch):
        rows[i, length - 2 * i :] = 0
    return rows


@torch.no_grad()
def exhaustive(
    model: Transformer, source: Tensor, vocab: int, longest: int, alpha: float
) -> list[tuple[list[int], float]]:
    """The best output of every row among all outputs of up to `longest` tokens (token 1 starts, 2 ends, 0 pads)."""
    best: list[tuple[list[int], float]] = [([], -math.inf)] * len(source)
    for length in range(longest + 1):
        for words in itertools.product(range(3, vocab), repeat=length):
            target = torch.tensor([1, *words]).expand(len(source), -1)
            log_p = model(source, target).log_softmax(-1)
            steps = torch.tensor([*words, 2])
            scores = log_p.gather(2, steps.expand(len(source), -1)[..., None]).sum((1, 2)) / ((6 + length) / 6) ** alpha
            best = [
                max(b, (list(words), float(s)), key=lambda pair: pair[1]) for b, s in zip(best, scores, strict=True)
            ]
    return best


@torch.no_grad()
def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    peer = f"torch {torch.__version__} nn"
    attention, reference = MultiHeadAttention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    nn.init.uniform_(reference.in_proj_bias, -0.5, 0.5)
    copy_attention(attention, reference)
    x, y, tokens = torch.randn(3, 5, 32), torch.randn(3, 7, 32), ids(3, 7, 9)
    mask, hidden = padding_mask(tokens, 0), torch.zeros(3, 7).masked_fill(tokens == 0, -math.inf)
    both = [
        lambda q, k: attention(q, k, mask=mask),
        lambda q, k: reference(q, k, k, key_padding_mask=hidden, need_weights=False)[0],
    ]
    yield Case("attention over padded keys", *both, (x, y), f"{peer}.MultiheadAttention", gradients=True)
    both = [
        lambda q, k: attention.weights(q, k, mask),
        lambda q, k: reference(q, k, k, hidden, average_attn_weights=False)[1],
    ]
    yield Case("attention weights", *both, (x, y), f"{peer}.MultiheadAttention")
    future = nn.Transformer.generate_square_subsequent_mask(7)
    both = [lambda q: attention(q, mask=mask, causal=True), lambda q: reference(q, q, q, hidden, False, future)[0]]
    yield Case("attention, causal and padded", *both, (y,), f"{peer}.MultiheadAttention", gradients=True)

    for mode in ("eval", "train"):
        layers = torch_transformer(32, 4, 2, 48)
        ours = Transformer(23, 32, 2, 4, 48, drop_rate=0.0, attention_bias=True)
        copy_layers(ours, layers)
        theirs = Reference(ours, layers)
        inputs = (ids(3, 9, 23), ids(3, 6, 23))
        note = (
            "without the norms that nn.Transformer adds after the stacks; the gradient is that of the shared embedding"
        )
        both = [getattr(net, mode)() for net in (ours, theirs)]
        yield Case(f"whole network, {mode}", *both, inputs, f"{peer}.Transformer", gradients=True, atol=1e-4, note=note)
        gradients = [lambda n=n, i=inputs: layer_gradients(n, i) for n in both]
        yield Case(f"gradients of layers, {mode}", *gradients, (), f"{peer}.Transformer", atol=1e-3)
    base = transformer_base(500, attention_bias=True, drop_rate=0.0).eval()
    layers = torch_transformer(512, 8, 6, 2048)
    copy_layers(base, layers)
    inputs = (ids(2, 8, 500), ids(2, 5, 500))
    yield Case(
        "transformer_base at its published size", base, Reference(base, layers).eval(), inputs, f"{peer}.Transformer"
    )
    del base, layers

    ours.eval()
    sources, targets = inputs = (ids(3, 9, 23), ids(3, 6, 23))
    yield Case("one token at a time", lambda *t: stepwise(ours, *t), ours, inputs, "the whole sequence at once")
    table = lambda: [[trigonometry(p, c, 24) for c in range(24)] for p in range(50)]  # noqa: E731
    yield Case(
        "sinusoids",
        lambda: sinusoids(50, 24),
        lambda: torch.tensor(table()),
        (),
        "section 3.5, term by term",
        atol=1e-6,
    )
    shift = lambda: rotated(sinusoids(60, 24), 7)  # noqa: E731
    note = "section 3.5: the encoding of pos + k is a linear function (a rotation) of that of pos"
    yield Case(
        "positions shift by rotation", shift, lambda: sinusoids(60, 24)[7:], (), "an identity of section 3.5", note=note
    )
    slow = lambda: [512**-0.5 * (s / 4000**1.5 if s < 4000 else s**-0.5) for s in (1, 400, 4000, 9000)]  # noqa: E731
    fast = lambda: [warmup_inverse_sqrt(s, 512, 4000) for s in (1, 400, 4000, 9000)]  # noqa: E731
    yield Case("learning rate", fast, slow, (), "equation 3 in its two halves", atol=1e-12, rtol=1e-12)
    logits = torch.randn(3, 6, 23)
    loss = lambda z: smoothed_loss(z, targets, 0.1, 0)[0]  # noqa: E731
    yield Case(
        "label smoothing",
        loss,
        lambda z: smoothing_written_out(z, targets, 0.1),
        (logits,),
        "its distribution",
        gradients=True,
    )

    tiny = Transformer(6, 16, 1, 2, 16, drop_rate=0.0).eval()
    nn.init.normal_(tiny.embedding.weight, std=0.6)
    source, limits = ids(3, 6, 6), torch.full((3,), 3)
    wide = lambda: [row[0] for row in beam_search(tiny, source, 1, 2, limits, 40, 0.6, forbidden=(0, 1))]  # noqa: E731
    every = lambda: exhaustive(tiny, source, 6, 3, 0.6)  # noqa: E731
    note = "the beam is as wide as the search space: 1 + 3 + 9 + 27 outputs of up to three tokens"
    yield Case("beam search", wide, every, (), "exhaustive search", note=note)
    greedy = lambda: greedy_search(ours, sources, 1, 2, torch.full((3,), 8))  # noqa: E731
    slow = lambda: [argmax_again(ours, row[row != 0][None], 8) for row in sources]  # noqa: E731
    yield Case(
        "greedy search in a padded batch", greedy, slow, (), "each sentence alone, from the start at every token"
    )


def argmax_again(model: Transformer, source: Tensor, limit: int) -> list[int]:
    words: list[int] = []
    while len(words) < limit:
        best = int(model(source, torch.tensor([[1, *words]]))[0, -1].argmax())
        if best == 2:
            break
        words.append(best)
    return words


def layer_gradients(net: nn.Module, inputs: tuple) -> dict[str, Tensor]:
    """Gradients of the first and last feed-forward and attention output matrices, by the same names on both sides."""
    if isinstance(net, Reference):
        encoder, decoder = net.layers.encoder.layers, net.layers.decoder.layers
        parts = {"ffn": encoder[0].linear1, "attention": encoder[-1].self_attn.out_proj}
        parts |= {"cross": decoder[0].multihead_attn.out_proj, "norm": decoder[-1].norm3}
    else:
        parts = {"ffn": net.encoder[0].feed_forward.fc1, "attention": net.encoder[-1].self_attn.out_proj}
        parts |= {"cross": net.decoder[0].encoder_attn.out_proj, "norm": net.decoder[-1].final_layer_norm}
    with torch.enable_grad():
        loss = net(*inputs).pow(3).sum()
        return dict(zip(parts, torch.autograd.grad(loss, [p.weight for p in parts.values()]), strict=True))


def stepwise(model: Transformer, source: Tensor, target: Tensor) -> Tensor:
    state, outputs = model.start(source), []
    for tokens in target.T:
        logits, state = model.advance(tokens, state)
        outputs.append(logits)
    return torch.stack(outputs, 1)


def trigonometry(position: int, column: int, dim: int) -> float:
    angle = position / 10000 ** (2 * (column // 2) / dim)
    return math.cos(angle) if column % 2 else math.sin(angle)


def rotated(table: Tensor, k: int) -> Tensor:
    rates = 10000.0 ** (-torch.arange(0, table.shape[1], 2, dtype=torch.float64) / table.shape[1])
    sin, cos = table[:-k, 0::2].double(), table[:-k, 1::2].double()
    s, c = (k * rates).sin(), (k * rates).cos()
    return torch.stack([sin * c + cos * s, cos * c - sin * s], -1).flatten(1).float()


def smoothing_written_out(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    v = logits.shape[-1]
    wanted = torch.full_like(logits, smoothing / v).scatter(2, targets[..., None], 1 - smoothing + smoothing / v)
    return -(wanted * logits.log_softmax(-1)).sum(-1)[targets != 0].sum()


class Plain(nn.Module):
    """What a user writes around torch.nn.Transformer: embedding, positions, masks, tied output."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 512)
        self.layers = nn.Transformer(512, 8, 6, 6, 2048, 0.1, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("positions", sinusoids(1024, 512))

    def embed(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.embedding(tokens) * 512**0.5 + self.positions[: tokens.shape[1]])

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1]).to(target.device)
        padding = source == 0
        out = self.layers(
            self.embed(source),
            self.embed(target),
            tgt_mask=causal,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return out @ self.embedding.weight.T


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: 64 tokens to 64, a vocabulary of 8,000."""

    def tokens(batch: int) -> tuple[Tensor, Tensor]:
        return ids(batch, 64, 8000), torch.randint(1, 8000, (batch, 64))

    def ours() -> nn.Module:
        return transformer_base(vocab_size=8000)

    return {"transformer_base": Pair(ours, lambda: Plain(8000), tokens, "torch:nn.Transformer", train_batch=4)}
