"""Relevancy against the rules carried out one example and one layer at a time, on networks of timm, transformers and torch.

The reference never looks through the tape: it reads probabilities where each library shows them (an attention's dropout, an eager
attention's output) and multiplies two-dimensional matrices in the order in which the authors' code does
(github.com/hila-chefer/Transformer-MM-Explainability, `ExplanationGenerator.py` of LXMERT and of DETR, and their notebook for ViT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.detection.yolos.model import Attention as PaperAttention
from paperzoo.papers.interpretability.generic_attention_explainability.capture import Attention, recording
from paperzoo.papers.interpretability.generic_attention_explainability.technique import (
    TransformerRelevance,
    encoder_decoder,
    normalised,
    rollout,
)
from paperzoo.papers.language.transformer.model import MultiHeadAttention, Transformer


def rule_5(attention: Tensor, gradient: Tensor) -> Tensor:
    """(heads, T, S) -> (T, S)."""
    return torch.stack([(g * a).relu() for g, a in zip(gradient, attention, strict=True)]).sum(0) / len(attention)


def rules_8_9(relevancy: Tensor) -> Tensor:
    rows = []
    for i, row in enumerate(relevancy):
        gathered = row.clone()
        gathered[i] -= 1
        total = gathered.sum()
        rows.append(gathered / total if total != 0 else gathered)
        rows[-1][i] += 1
    return torch.stack(rows)


def watched(module: nn.Module, name: str, seen: dict[str, Tensor]) -> None:
    """What goes into a module (an attention's dropout), kept with its gradient."""

    def hook(m: nn.Module, args: tuple) -> None:
        args[0].retain_grad()
        seen[name] = args[0]

    module.register_forward_pre_hook(hook)


def of_one(seen: dict[str, Tensor], name: str, i: int) -> Tensor:
    grad = seen[name].grad
    return rule_5(seen[name][i].detach(), torch.zeros_like(seen[name][i]) if grad is None else grad[i])


def one_stream_reference(seen: dict[str, Tensor], names: list[str], i: int) -> Tensor:
    relevancy = torch.eye(seen[names[0]].shape[-1])
    for name in names:
        relevancy = relevancy + of_one(seen, name, i) @ relevancy
    return relevancy


def shaken(net: nn.Module, seed: int = 0) -> nn.Module:
    """Weights at which attention is neither flat nor saturated."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        scale = 1.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.2
        parameter.data = torch.randn(parameter.shape, generator=rng) * scale + (parameter.ndim == 1)
    return net.eval()


def cases() -> Iterator[Case]:
    exact = {"rtol": 1e-4, "atol": 1e-6}
    yield from vision(exact)
    yield from lxmert(exact)
    yield from encoder_and_decoder(exact)
    yield from capturing(exact)

    torch.manual_seed(0)
    gathered = torch.eye(4) + torch.rand(4, 4)
    gathered[2] = torch.eye(4)[2]
    yield Case(
        "rows that hold themselves alone", lambda x: normalised(x[None])[0], rules_8_9, (gathered,), "eq. 8 and 9"
    )


def vision(exact: dict) -> Iterator[Case]:
    import timm
    import transformers

    net = shaken(timm.create_model("vit_tiny_patch16_224", depth=3, img_size=64, num_classes=5))
    other = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=64, num_classes=5).eval()
    other.load_state_dict(net.state_dict())
    seen: dict[str, Tensor] = {}
    for i, block in enumerate(other.blocks):
        block.attn.fused_attn = False
        watched(block.attn.attn_drop, str(i), seen)
    torch.manual_seed(1)
    x, classes = torch.randn(3, 3, 64, 64), torch.tensor([4, 0, 2])

    def by_hooks(x: Tensor) -> Tensor:
        other.zero_grad()
        other(x).gather(1, classes[:, None]).sum().backward()
        return torch.stack([one_stream_reference(seen, list(seen), i) for i in range(len(x))])

    yield Case("ViT of timm, fused attention", lambda x: TransformerRelevance(net).matrices(x, classes)["tokens", "tokens"],
               by_hooks, (x,), f"timm {timm.__version__}, hooks and the authors' loop", **exact)  # fmt: skip

    def by_rollout(x: Tensor) -> Tensor:
        other(x)
        joint = torch.eye(17)
        for value in seen.values():
            mixed = value.mean(1)[0].detach() + torch.eye(17)
            joint = (mixed / mixed.sum(1, keepdim=True)) @ joint
        return joint

    yield Case("attention rollout", lambda x: rollout(TransformerRelevance(net).attentions(x, 1)[0])[0], by_rollout, (x,),
               "the authors' loop", **exact)  # fmt: skip

    settings = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
    )
    for kind in ("sdpa", "eager"):
        settings._attn_implementation = kind
        net = shaken(transformers.ViTForImageClassification(settings))
        settings._attn_implementation = "eager"
        eager = transformers.ViTForImageClassification(settings).eval()
        eager.load_state_dict(net.state_dict())
        x = torch.randn(2, 3, 32, 32)

        def by_outputs(x: Tensor, eager: nn.Module = eager) -> Tensor:
            output = eager(x, output_attentions=True)
            for attention in output.attentions:
                attention.retain_grad()
            output.logits[:, 1].sum().backward()
            shown = {str(i): a for i, a in enumerate(output.attentions)}
            return torch.stack([one_stream_reference(shown, list(shown), i) for i in range(len(x))])

        yield Case(f"ViT of transformers, {kind}",
                   lambda x, net=net: TransformerRelevance(net).matrices(x, lambda o: o.logits[:, 1])["tokens", "tokens"],
                   by_outputs, (x,), f"transformers {transformers.__version__}, output_attentions", **exact)  # fmt: skip


def lxmert(exact: dict) -> Iterator[Case]:
    """Two streams that attend to each other: text and image."""
    import transformers

    settings = transformers.LxmertConfig(
        vocab_size=40, hidden_size=32, num_attention_heads=4, intermediate_size=48, l_layers=2, x_layers=2, r_layers=2,
        visual_feat_dim=12, max_position_embeddings=16,
    )  # fmt: skip
    net = shaken(transformers.LxmertModel(settings))
    torch.manual_seed(2)
    words, features, places = torch.randint(1, 40, (2, 6)), torch.randn(2, 5, 12), torch.rand(2, 5, 4)
    inputs = {"input_ids": words, "visual_feats": features, "visual_pos": places}
    seen: dict[str, Tensor] = {}

    def streams(attention: Attention) -> tuple[str, str]:
        module = attention.module
        if "r_layers" in module or "visn_self_att" in module:
            return "image", "image"
        if "visual_attention" in module:  # the one module serves both directions: text comes first
            return ("image", "text") if attention.call else ("text", "image")
        return "text", "text"

    def ours(*_: Tensor) -> dict[str, Tensor]:
        found = TransformerRelevance(net, streams).matrices(inputs, lambda o: o.pooled_output.sum(1))
        return {f"{a} {b}": value for (a, b), value in found.items()}

    def theirs(*_: Tensor) -> dict[str, Tensor]:
        seen.clear()
        encoder, handles = net.encoder, []

        def watch(module: nn.Module, name: str) -> None:
            def hook(m: nn.Module, args: tuple) -> None:
                args[0].retain_grad()
                seen[name if name not in seen else name + " back"] = args[0]

            handles.append(module.register_forward_pre_hook(hook))

        for i, layer in enumerate(encoder.layer):
            watch(layer.attention.self.dropout, f"l{i}")
        for i, layer in enumerate(encoder.r_layers):
            watch(layer.attention.self.dropout, f"r{i}")
        for i, layer in enumerate(encoder.x_layers):
            watch(layer.visual_attention.att.dropout, f"x{i}")
            watch(layer.lang_self_att.self.dropout, f"xl{i}")
            watch(layer.visn_self_att.self.dropout, f"xr{i}")
        net(**inputs).pooled_output.sum().backward()
        for handle in handles:
            handle.remove()
        return {k: torch.stack(v) for k, v in lxmert_rules(seen, batch=2, text=6, image=5).items()}

    yield Case("LXMERT, co-attention", ours, theirs, (features,),
               f"transformers {transformers.__version__}, hooks and the authors' loop", **exact)  # fmt: skip


def lxmert_rules(seen: dict[str, Tensor], batch: int, text: int, image: int) -> dict[str, list[Tensor]]:
    """The authors' order: text layers, image layers, then each cross layer; both directions see the state before."""
    found: dict[str, list[Tensor]] = {"text text": [], "text image": [], "image text": [], "image image": []}
    for i in range(batch):
        tt, ii, ti, it = torch.eye(text), torch.eye(image), torch.zeros(text, image), torch.zeros(image, text)
        for name in (n for n in seen if n[0] == "l"):
            tt, ti = tt + of_one(seen, name, i) @ tt, ti + of_one(seen, name, i) @ ti
        for name in (n for n in seen if n[0] == "r"):
            ii, it = ii + of_one(seen, name, i) @ ii, it + of_one(seen, name, i) @ it
        for layer in range(2):
            to_image, to_text = of_one(seen, f"x{layer}", i), of_one(seen, f"x{layer} back", i)
            ti_more, tt_more = rules_8_9(tt).T @ to_image @ rules_8_9(ii), to_image @ it
            it_more, ii_more = rules_8_9(ii).T @ to_text @ rules_8_9(tt), to_text @ ti
            ti, tt, it, ii = ti + ti_more, tt + tt_more, it + it_more, ii + ii_more
            words, regions = of_one(seen, f"xl{layer}", i), of_one(seen, f"xr{layer}", i)
            tt, ti = tt + words @ tt, ti + words @ ti
            ii, it = ii + regions @ ii, it + regions @ it
        for name, value in (("text text", tt), ("text image", ti), ("image text", it), ("image image", ii)):
            found[name].append(value)
    return found


def encoder_and_decoder(exact: dict) -> Iterator[Case]:
    """An encoder's tokens seen by a decoder's, as in DETR: R of the decoder by the encoder's tokens."""
    net = shaken(Transformer(30, embed_dim=32, depth=2, num_heads=4, hidden_dim=48, drop_rate=0.0, max_length=16))
    torch.manual_seed(3)
    source, target = torch.randint(1, 30, (2, 7)), torch.randint(1, 30, (2, 5))
    score = lambda logits: logits[:, -1, 3]  # noqa: E731

    def theirs(*_: Tensor) -> dict[str, Tensor]:
        kept: list[Tensor] = []
        plain = MultiHeadAttention.attend

        def attend(self, query, keys, values, mask=None, causal=False):
            weights = self.split(self.q_proj(query)) @ keys.transpose(2, 3) / keys.shape[-1] ** 0.5
            if causal:
                weights = weights + torch.full(weights.shape[2:], -torch.inf).triu(1)
            if mask is not None:
                weights = weights.masked_fill(~mask, -torch.inf)
            weights = weights.softmax(-1)
            weights.retain_grad()
            kept.append(weights)
            return self.out_proj((weights @ values).transpose(1, 2).flatten(2))

        MultiHeadAttention.attend = attend
        try:
            score(net(source, target)).sum().backward()
        finally:
            MultiHeadAttention.attend = plain
        seen = {str(i): w for i, w in enumerate(kept)}
        across, within = [], []
        for i in range(len(source)):
            memory, own, cross = torch.eye(7), torch.eye(5), torch.zeros(5, 7)
            for name in ("0", "1"):
                memory = memory + of_one(seen, name, i) @ memory
            for layer in range(2):
                mixed = of_one(seen, str(2 + 2 * layer), i)
                own, cross = own + mixed @ own, cross + mixed @ cross
                cross = cross + rules_8_9(own).T @ of_one(seen, str(3 + 2 * layer), i) @ rules_8_9(memory)
            across.append(cross)
            within.append(own)
        return {"target source": torch.stack(across), "target target": torch.stack(within)}

    def ours(*_: Tensor) -> dict[str, Tensor]:
        found = TransformerRelevance(net, encoder_decoder).matrices((source, target), score)
        return {f"{a} {b}": found[a, b] for a, b in (("target", "source"), ("target", "target"))}

    yield Case("encoder and decoder", ours, theirs, (), "the authors' loop for DETR", **exact)


def capturing(exact: dict) -> Iterator[Case]:
    """What the tape shows, and that a network computes under it what it computes without."""
    torch.manual_seed(4)
    x = torch.randn(2, 6, 16)
    layer = shaken(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True))

    def tape(x: Tensor) -> tuple:
        with recording(layer) as found, torch.enable_grad():
            output = layer(x)
        return output.detach(), found[0].probabilities.detach()

    def shown(x: Tensor) -> tuple:
        weights = layer.self_attn(x, x, x, need_weights=True, average_attn_weights=False)[1]
        return layer(x), weights

    yield Case("nn.MultiheadAttention", tape, shown, (x,), "torch, need_weights", **exact)

    q, k, v, bias = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(6, 6)
    for name, options in (
        ("bias, scale and grouped queries", {"attn_mask": bias, "scale": 0.3, "enable_gqa": True}),
        ("no heads, boolean mask of each example", {"attn_mask": torch.rand(2, 6, 6) > 0.3}),
        ("causal", {"is_causal": True, "enable_gqa": True}),
        ("boolean mask", {"attn_mask": bias > -1, "enable_gqa": True}),
    ):

        def literal(q: Tensor, k: Tensor, v: Tensor, options: dict = options) -> Tensor:
            with recording(nn.Identity()):
                return F.scaled_dot_product_attention(q, k, v, **options)

        def fused(q: Tensor, k: Tensor, v: Tensor, options: dict = options) -> Callable:
            return F.scaled_dot_product_attention(q, k, v, **options)

        given = (q[:, 0], k[:, 0], v[:, 0]) if name.startswith("no heads") else (q, k, v)
        yield Case(f"attention, {name}", literal, fused, given, "torch", gradients=True)

    attention = shaken(PaperAttention(16, 4))
    for parameter in attention.parameters():
        parameter.requires_grad_(False)

    def hooks(*_: Tensor) -> list[int]:
        TransformerRelevance(attention).matrices(x, lambda o: o.sum((1, 2)))
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in attention.modules()]

    yield Case("frozen weights, nothing left behind", hooks, lambda *_: [0] * len(list(attention.modules())), (),
               "its state before", rtol=0, atol=0)  # fmt: skip
