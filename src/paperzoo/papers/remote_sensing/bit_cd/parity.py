"""Parity of BIT: with the authors' code (stored outputs), and the paper's equations line by line, as the authors compute them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.remote_sensing.bit_cd import golden, model
from paperzoo.papers.segmentation.pspnet.golden import by_rule
from paperzoo.papers.segmentation.segnet.parity import lively

SOURCE = "github justchenhao/BIT_CD, stored outputs"


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    stored = load_file(str(golden.FILE))
    for name in golden.NETWORKS:
        network = getattr(model, name)().eval()
        network.load_state_dict(model.from_official(by_rule(authors_names(network.state_dict()))))
        yield Case(
            f"{name}: logits of two pairs",
            lambda a, b, n=network: n(a, b)[:, :, ::3, ::3].detach(),
            lambda a, b, n=name: stored[f"{n}.logits"],
            golden.pictures(),
            SOURCE,
            note="names converted; every third pixel",
        )
        yield Case(
            f"{name}: loss and gradients of a training step",
            lambda n=network: training_step(n),
            lambda n=name: of_network(stored, n),
            against=SOURCE,
            rtol=1e-6,
            atol=1e-9,
            note="in double precision; 50 values each of up to ten gradients",
        )
    for name, size, train in (
        ("bit_resnet18", (2, 3, 64, 32), False),
        ("bit_resnet18_released", (1, 3, 47, 70), False),
        ("bit_slim", (3, 3, 30, 41), True),
        ("bit_base_slim", (2, 3, 32, 32), True),
    ):
        net = lively(getattr(model, name)().double().eval()).train(train)
        rng = torch.Generator().manual_seed(1)
        yield Case(
            f"{name} {'train' if train else 'eval'} {size}",
            net,
            WrittenOut(net),
            tuple(torch.randn(size, dtype=torch.float64, generator=rng) for _ in range(2)),
            "sec. III, line by line: every head and pixel by itself",
            gradients=True,
        )
    yield from identities()


def identities() -> Iterator[Case]:
    net = lively(model.bit_slim().double().eval())
    rng = torch.Generator().manual_seed(2)
    a, b = (torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=rng) for _ in range(2))
    with torch.no_grad():
        nn.init.zeros_(net.pos_embedding)
    yield Case(
        "dates in the other order, positions all equal: the same answer",
        lambda: net(a, b).detach(),
        lambda: net(b, a).detach(),
        against="eq. 3 and 10: only positions tell the dates apart",
    )
    yield Case(
        "one token a date: every pixel of a date is told the same",
        lambda: spread(a),
        lambda: torch.zeros((), dtype=torch.float64),
        against="eq. 9 with a softmax over one token",
        atol=1e-12,
    )


def spread(images: Tensor) -> Tensor:
    """How much an attention to a single token differs between pixels."""
    torch.manual_seed(0)
    attention = model.CrossAttention(3, 2, 4).double()
    told = attention(images.flatten(2).transpose(1, 2), images.mean((2, 3))[:, None])
    return (told - told[:, :1]).abs().max().detach()


def authors_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`from_official` turned round."""
    renamed = {}
    for name, value in state.items():
        name = name.replace("tokenizer.conv_a.", "conv_a.")
        if name.startswith(("encoder.", "decoder.")):
            for theirs, ours in (model.PARTS[1], model.PARTS[0], *model.PARTS[2:]):
                name = name.replace(ours, theirs)
            name = name.replace("encoder.", "transformer.layers.").replace("decoder.", "transformer_decoder.layers.")
        renamed[name] = value
    return renamed


def training_step(network: nn.Module) -> dict[str, Tensor]:
    network.double().train().zero_grad()
    logits = network(*(x.double() for x in golden.pictures()))
    loss = F.cross_entropy(logits, golden.masks(), ignore_index=255)
    loss.backward()
    modules = dict(network.named_modules())
    found = {"loss": loss.detach()}
    for theirs, ours in golden.WATCHED.items():
        if ours in modules:
            found[theirs] = golden.sampled(modules[ours].weight.grad)
    return found


def of_network(stored: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    mine = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
    return {key: value for key, value in mine.items() if key != "logits"}


class WrittenOut(nn.Module):
    """A network's forward pass as the authors order it: queries of every pixel and head, softmax, values, projection."""

    def __init__(self, network: model.SiameseBase) -> None:
        super().__init__()
        for name, part in network.named_children():
            self.add_module(name, part)
        for name, parameter in network.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.stage, self.enlarge = network.stage, network.enlarge

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        maps = []
        for images in (before, after):  # one after the other, so that batch norm sees one date at a time
            x = self.resnet.stages(images)[self.stage]
            x = x.repeat_interleave(self.enlarge, 2).repeat_interleave(self.enlarge, 3)
            maps.append(F.conv2d(x, self.conv_pred.weight, self.conv_pred.bias, padding=1))
        if hasattr(self, "tokenizer"):
            maps = self.transformer(maps)
        x = (maps[0] - maps[1]).abs()
        x = F.interpolate(x, before.shape[-2:], mode="bilinear", align_corners=False)
        first, norm, _, last = self.classifier
        x = norm(F.conv2d(x, first.weight, padding=1)).clamp(min=0)
        return F.conv2d(x, last.weight, last.bias, padding=1)

    def transformer(self, maps: list[Tensor]) -> list[Tensor]:
        tokens = []
        for x in maps:
            weight = self.tokenizer.conv_a.weight[:, :, 0, 0]
            logits = torch.einsum("lc,bchw->blhw", weight, x).flatten(2)
            attention = logits.exp() / logits.exp().sum(-1, keepdim=True)
            tokens.append(torch.einsum("bln,bcn->blc", attention, x.flatten(2)))
        t = torch.cat(tokens, 1) + self.pos_embedding
        for layer in self.encoder:
            q, k, v = layer.attention.to_qkv(norm(layer.norm1, t)).chunk(3, -1)
            t = t + self.heads_apart(layer, q, k, v)
            t = t + mlp(layer, t)
        pairs = []
        for x, m in zip(maps, t.chunk(2, 1), strict=True):
            p = x.flatten(2).transpose(1, 2)
            for layer in self.decoder:
                asked, told, part = norm(layer.norm1, p), norm(layer.norm1, m), layer.attention
                p = p + self.heads_apart(layer, part.to_q(asked), part.to_k(told), part.to_v(told))
                p = p + mlp(layer, p)
            pairs.append(p.transpose(1, 2).reshape(x.shape))
        return pairs

    @staticmethod
    def heads_apart(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        part, dim = layer.attention, layer.norm1.weight.numel()
        answers = []
        for qh, kh, vh in zip(*(t.chunk(part.heads, -1) for t in (q, k, v)), strict=True):
            scores = (qh @ kh.transpose(1, 2) / dim**0.5).exp()
            answers.append(scores / scores.sum(-1, keepdim=True) @ vh)
        return torch.cat(answers, -1) @ part.to_out.weight.T + part.to_out.bias


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def mlp(layer: nn.Module, x: Tensor) -> Tensor:
    first, _, second = layer.mlp
    h = norm(layer.norm2, x) @ first.weight.T + first.bias
    h = h * 0.5 * (1 + torch.erf(h / 2**0.5))
    return h @ second.weight.T + second.bias


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures. The reference computes as the authors' code does, on the same backbone."""

    def images(batch: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, 3, 256, 256), torch.randn(batch, 3, 256, 256)

    def reference() -> nn.Module:
        return AuthorsOrder(model.bit_resnet18())

    return {
        "bit_resnet18": Pair(model.bit_resnet18, reference, images, "the authors' order of operations", train_batch=2)
    }


class AuthorsCross(nn.Module):
    """The authors' cross-attention on our parameters."""

    def __init__(self, part: model.CrossAttention) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = part.to_q, part.to_k, part.to_v, part.to_out
        self.heads, self.scale = part.heads, part.scale

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(x), self.to_k(m), self.to_v(m))
        )
        attention = (torch.einsum("bhid,bhjd->bhij", q, k) * self.scale).softmax(-1)
        return self.to_out(torch.einsum("bhij,bhjd->bhid", attention, v).transpose(1, 2).flatten(2))


class AuthorsOrder(nn.Module):
    """A BIT whose dates and pixels go through the decoder as in the authors' code."""

    def __init__(self, network: model.BIT) -> None:
        super().__init__()
        self.network = network
        for layer in network.decoder:
            layer.attention = AuthorsCross(layer.attention)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        n = self.network
        maps = [n.embed(before), n.embed(after)]
        tokens = torch.cat([n.tokenizer(x) for x in maps], 1) + n.pos_embedding
        for layer in n.encoder:
            tokens = layer(tokens)
        for i, memory in enumerate(tokens.chunk(2, 1)):
            x = maps[i].flatten(2).transpose(1, 2)
            for layer in n.decoder:
                x = layer(x, memory)
            maps[i] = x.transpose(1, 2).reshape(maps[i].shape)
        difference = F.interpolate((maps[0] - maps[1]).abs(), scale_factor=4, mode="bilinear")
        return n.classifier(difference)
