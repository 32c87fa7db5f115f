"""MASTER against the authors' PyTorch code (stored answers), its equations as loops, and the whole sequence against step by step."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.ocr.master import golden
from paperzoo.papers.ocr.master.model import MASTER, MultiAspectGCAttention, from_official, master, master_tiny

SOURCE = "wenwenyu/MASTER-pytorch 8728c61, stored"
K = golden.CHARACTERS


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    answers = load_file(str(golden.FILE))
    torch.manual_seed(0)
    for name, (heads, fusion) in golden.BLOCKS.items():
        block = MultiAspectGCAttention(16, heads, 0.25, scale=False, fusion=fusion)
        golden.write_weights(block)
        yield Case(f"global contexts, {heads} heads, {fusion}", block, lambda x, n=name: answers[f"block.{n}"],
                   (golden.noise((2, 16, 3, 5)),), SOURCE)  # fmt: skip
    for channels, heads in ((12, 3), (8, 1)):
        block = MultiAspectGCAttention(channels, heads, 0.5)
        yield Case(f"global contexts with scale, {heads} heads", block, lambda x, b=block: slow_contexts(b, x),
                   (torch.randn(2, channels, 2, 3),), "the equation as loops", gradients=True)  # fmt: skip

    for name, (heads, fusion) in golden.NETWORKS.items():
        model = official(heads, fusion).eval()
        count = sum(p.numel() for p in model.parameters())
        yield Case(f"{name}: memory, logits, parameters", lambda m=model, n=count: whole(m) | {"parameters": n},
                   lambda n=name: their_whole(answers, n), (), SOURCE,
                   atol=1e-4)  # fmt: skip
        yield Case(f"{name}: greedy texts from cached steps", lambda m=model: read(m),
                   lambda n=name: their_greedy(answers, n), (), SOURCE, note="theirs computes all steps again for each")  # fmt: skip
    model = official(8, "add").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_rate"):
            module.drop_rate = 0.0
    yield Case("a training step: loss and gradients", lambda m=model: training_step(m),
               lambda: {k.removeprefix("train."): v for k, v in converted(answers).items() if k.startswith("train.")}, (),
               SOURCE, rtol=1e-3, atol=2.5e-5, note="float32 on both sides, sums in other orders")  # fmt: skip

    # keys and values that are kept, against everything anew
    for seed, (depth, heads) in enumerate(((1, 1), (3, 4))):
        torch.manual_seed(seed)
        small = tiny(depth=depth, num_heads=heads)
        images = torch.randn(2 + seed, 3, 16, 24 + 8 * seed)
        yield Case(f"greedy with a cache, {depth} layers", small, lambda x, m=small: uncached(m, x), (images,),
                   "the whole prefix at every step")  # fmt: skip
        yield Case(f"beam search with a cache, {depth} layers", lambda x, m=small: m.search(x, 3)[2],
                   lambda x, m=small: slow_beam(m, x, 3), (images,), "lists of prefixes, one picture at a time")  # fmt: skip
    small = tiny(depth=2, num_heads=2)
    tokens = torch.tensor([[0, 1, 2, 4, 5, 5], [3, 4, 5, 5, 5, 5], [0, 0, 1, 2, 3, 4]])
    lengths = torch.tensor([3, 1, 5])
    yield Case("loss of texts of several lengths", lambda: small(IMAGES, {"tokens": tokens, "lengths": lengths})["cross_entropy"],
               lambda: slow_loss(small, IMAGES, tokens, lengths), (), "one text and step at a time")  # fmt: skip
    with torch.device("meta"):
        model = master()
    yield Case("the map of a picture of 48 x 160", lambda: tuple(model.conv_embedding_gc.backbone(torch.empty(1, 3, 48, 160, device="meta")).shape),
               lambda: (1, 512, 6, 40), (), "table 1")  # fmt: skip
    yield Case("softmax over groups without weights", lambda x: plain(master_tiny()).contexts(x), lambda x: x.mean((2, 3), keepdim=True),
               (torch.randn(2, 32, 3, 4),), "equal weights give the mean")  # fmt: skip


IMAGES = torch.linspace(-1, 1, 3 * 3 * 16 * 24).sin().reshape(3, 3, 16, 24)


def plain(model: MASTER) -> MultiAspectGCAttention:
    block = model.conv_embedding_gc.backbone.layer2[0].context_block
    nn.init.zeros_(block.conv_mask.weight)
    return block


def tiny(**sizes: int) -> MASTER:
    """Four characters, five at most."""
    model = MASTER(
        4, max_length=5, embed_dim=16, hidden_dim=24, heads=2, stem=(4, 4), widths=(8, 8, 16, 16), depths=(1, 1, 1, 1), **sizes
    )  # fmt: skip
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_(std=0.2)
    nn.init.normal_(model.generator.fc.weight, std=0.7)
    return model.eval()


# -- the authors' network ------------------------------------------------------------------------------------------------


def official(heads: int, fusion: str) -> MASTER:
    """Ours with their weights, through `from_official`; which parameter gets which noise goes by their names."""
    model = MASTER(K, max_length=5, heads=heads, scale=False, fusion=fusion)
    theirs = nn.Module()  # a module that has their names is all that `write_weights` needs
    theirs.state_dict = lambda: {their_name(n): their_order(n, v.clone()) for n, v in model.state_dict().items()}
    state = theirs.state_dict()
    theirs.state_dict = lambda: state
    golden.write_weights(theirs)
    model.load_state_dict(from_official(state))
    return model


def their_name(name: str) -> str:
    for ours, new in ((".q_proj.", ".linears.0."), (".k_proj.", ".linears.1."), (".v_proj.", ".linears.2."),
                      (".out_proj.", ".linears.3."), ("conv_embedding_gc.", "src_embed.0."), ("embedding.", "tgt_embed.0.lut."),
                      ("decoder.norm.", "decoder.norm._norm.")):  # fmt: skip
        name = name.replace(ours, new) if ours.startswith(".") or name.startswith(ours) else name
    parts = name.split(".")
    if "norms" in parts:
        i = parts.index("norms")
        parts[i : i + 2] = ["sublayer", parts[i + 1], "norm", "_norm"]
    return ".".join(parts)


def their_order(name: str, value: Tensor) -> Tensor:
    """Rows of ours (characters, end, padding, unknown, start) in theirs (padding, end, start, unknown, characters)."""
    if name == "embedding.weight" or name.startswith("generator."):
        return torch.cat([value[[K + 1, K, K + 3, K + 2]], value[:K]])
    return value


def our_tokens(tokens: Tensor) -> Tensor:
    table = torch.cat([torch.tensor([K + 1, K, K + 3, K + 2]), torch.arange(K)])
    return table[tokens]


@torch.no_grad()
def whole(model: MASTER) -> dict[str, Tensor]:
    memory = model.features(golden.pictures())
    # `forced` puts the start token in front, and takes what should follow
    logits = model.forced(memory, our_tokens(golden.texts())[:, 1:])
    return {"memory": memory[:, ::7, ::16], "logits": their_columns(logits)[:, :5]}


def their_whole(answers: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    found = {k: answers[f"{name}.{k}"] for k in ("memory", "logits", "parameters")}
    return found | {"logits": found["logits"][:, :5]}  # at padding, which nobody reads, theirs attends to everything


def their_columns(logits: Tensor) -> Tensor:
    return torch.cat([logits[..., [K + 1, K, K + 3, K + 2]], logits[..., :K]], -1)


@torch.no_grad()
def read(model: MASTER) -> dict[str, Tensor]:
    best, tokens = model(golden.pictures()).softmax(2).max(2)
    return {"tokens": tokens, "probability": best}


def their_greedy(answers: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {
        "tokens": our_tokens(answers[f"{name}.greedy"][:, 1:]),
        "probability": answers[f"{name}.probability"][:, 1:],
    }


def training_step(model: MASTER) -> dict[str, Tensor]:
    tokens = our_tokens(golden.texts())[:, 1:]
    model.zero_grad()
    loss = model(golden.pictures(), {"tokens": tokens, "lengths": torch.tensor([5, 3])})["cross_entropy"]
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or name.endswith("conv_mask.weight"):
            found[f"gradient.{name}"] = their_order(name, parameter.grad).flatten()[::32]
    return found


def converted(answers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their gradients under our names."""
    found = {}
    for name, value in answers.items():
        if ".gradient." in name:
            # the row of tokens is turned back by `their_order`, so only the name is converted
            (new,) = from_official({name.removeprefix("train.gradient."): torch.zeros(8)})
            name = f"train.gradient.{new}"
        found[name] = value
    return found


# -- slow and obvious ----------------------------------------------------------------------------------------------------


def slow_contexts(block: MultiAspectGCAttention, x: Tensor) -> Tensor:
    size = x.shape[1] // block.heads
    temperature = math.sqrt(size) if block.heads > 1 else 1.0
    outputs = []
    for picture in x:
        contexts = []
        for h in range(block.heads):
            places = picture[h * size : (h + 1) * size].flatten(1).T  # (places, C / h)
            scores = torch.stack(
                [(p * block.conv_mask.weight[0, :, 0, 0]).sum() + block.conv_mask.bias[0] for p in places]
            )
            weights = (scores / temperature).exp()
            contexts.append(sum(w * p for w, p in zip(weights / weights.sum(), places, strict=True)))
        context = torch.cat(contexts)
        first, norm, _, last = block.channel_add_conv
        hidden = first.weight[:, :, 0, 0] @ context + first.bias
        hidden = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + norm.eps).sqrt()
        hidden = (hidden * norm.weight.flatten() + norm.bias.flatten()).clamp_min(0)
        outputs.append(picture + (last.weight[:, :, 0, 0] @ hidden + last.bias)[:, None, None])
    return torch.stack(outputs)


def slow_logits(model: MASTER, memory: Tensor, tokens: list[int]) -> Tensor:
    """One picture's logits behind a prefix (start included): every layer with its own softmax, no cache."""
    d = model.embed_dim
    rates = [10000 ** (-2 * (i // 2) / d) for i in range(d)]
    rows = []
    for t, token in enumerate(tokens):
        angles = torch.tensor([math.sin(t * r) if i % 2 == 0 else math.cos(t * r) for i, r in enumerate(rates)])
        rows.append(model.embedding.weight[token] * math.sqrt(d) + angles)
    x = torch.stack(rows)
    for layer in model.decoder.layers:
        y = layer.norms[0](x)
        x = x + attention(layer.self_attn, y, y, causal=True)
        x = x + attention(layer.src_attn, layer.norms[1](x), memory, causal=False)
        y = layer.norms[2](x)
        x = x + layer.feed_forward.w_2(layer.feed_forward.w_1(y).clamp_min(0))
    return model.generator.fc(model.decoder.norm(x))


def attention(part: nn.Module, query: Tensor, memory: Tensor, causal: bool) -> Tensor:
    size, heads = query.shape[1] // part.num_heads, []
    q, k, v = part.q_proj(query), part.k_proj(memory), part.v_proj(memory)
    for h in range(part.num_heads):
        here = slice(h * size, (h + 1) * size)
        scores = q[:, here] @ k[:, here].T / math.sqrt(size)
        if causal:
            scores = scores + torch.full_like(scores, -math.inf).triu(1)
        heads.append(scores.softmax(1) @ v[:, here])
    return part.out_proj(torch.cat(heads, 1))


@torch.no_grad()
def uncached(model: MASTER, images: Tensor) -> Tensor:
    found = []
    for memory in model.features(images):
        tokens, rows = [model.num_classes + 3], []
        for _ in range(model.max_length + 1):
            rows.append(slow_logits(model, memory, tokens)[-1])
            tokens.append(int(rows[-1].argmax()))
        found.append(torch.stack(rows))
    return torch.stack(found)


@torch.no_grad()
def slow_beam(model: MASTER, images: Tensor, beams: int) -> Tensor:
    """The best log-probability of each picture."""
    end, best = model.num_classes, []
    for memory in model.features(images):
        kept = [([model.num_classes + 3], 0.0)]
        for _ in range(model.max_length + 1):
            longer = []
            for tokens, score in kept:
                if tokens[-1] == end:
                    longer.append((tokens, score))
                    continue
                log_p = slow_logits(model, memory, tokens)[-1].log_softmax(0).tolist()
                longer += [([*tokens, i], score + p) for i, p in enumerate(log_p)]
            kept = sorted(longer, key=lambda pair: -pair[1])[:beams]
        best.append(kept[0][1])
    return torch.tensor(best)


def slow_loss(model: MASTER, images: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    total, count = 0.0, 0
    for memory, row, length in zip(model.features(images), tokens.tolist(), lengths.tolist(), strict=True):
        logits = slow_logits(model, memory, [model.num_classes + 3, *row[:length]])
        wanted = torch.tensor([*row[:length], model.num_classes])
        total, count = total + F.cross_entropy(logits, wanted, reduction="sum"), count + len(wanted)
    return total / count
