"""Parity of CCNet: with the released network (stored outputs), and of the attention with full attention under a cross-shaped mask."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.segmentation.bisenet_v1.golden import CLASSES, masks, pictures
from paperzoo.papers.segmentation.ccnet import golden, model
from paperzoo.papers.segmentation.pspnet.golden import by_rule

SOURCE = "github speedinghzl/CCNet, stored outputs"
STEM = {"conv1.0": "conv1", "conv1.1": "bn1", "conv1.3": "conv2", "conv1.4": "bn2", "conv1.6": "conv3", "bn1": "bn3"}


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    stored = load_file(str(golden.FILE))
    network = model.ccnet_resnet101(CLASSES, drop_rate=0.0).eval()
    network.load_state_dict(model.from_official(by_rule(released_names(network.state_dict()))))
    yield Case(
        "ccnet_resnet101, R = 2: logits of two photographs, both heads",
        lambda x: {f"logits.{i}": y[:, :, ::5, ::5].detach() for i, y in enumerate(both_heads(network, x))},
        lambda x: {name: value for name, value in stored.items() if name.startswith("logits")},
        (pictures(),),
        SOURCE,
        note="names converted; every fifth pixel",
    )
    yield Case(
        "ccnet_resnet101: losses and gradients of a training step",
        lambda: training_step(network),
        lambda: {name: value for name, value in stored.items() if not name.startswith("logits")},
        against=SOURCE,
        rtol=1e-6,
        atol=1e-10,
        note="in double precision; 40 values each of ten gradients",
    )

    for shape in ((2, 16, 5, 7), (1, 8, 1, 6), (3, 16, 6, 1), (1, 8, 1, 1), (2, 24, 8, 8)):
        layer = attention(shape[1])
        for passes in (1, 2):
            yield Case(
                f"criss-cross attention {shape}, {passes} pass{'es' if passes > 1 else ''}",
                Repeated(layer, passes),
                Repeated(Masked(layer), passes),
                (torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),),
                "full attention under a cross-shaped mask",
                gradients=True,
            )
    layer = attention(8)
    yield Case(
        "the pixels that one answer depends on: the cross after one pass, all after two",
        lambda: [depends_on(Repeated(layer, passes)) for passes in (1, 2)],
        lambda: [cross(5, 6).reshape(5, 6, 5, 6)[2, 3], torch.ones(5, 6, dtype=torch.bool)],
        against="fig. 4",
    )
    yield Case(
        "gamma starts at 0: a fresh module passes its input on",
        model.CrissCrossAttention(16),
        lambda x: x,
        (torch.randn(2, 16, 4, 6),),
        "the released code's start",
    )


def attention(channels: int) -> model.CrissCrossAttention:
    torch.manual_seed(channels)
    layer = model.CrissCrossAttention(channels).double()
    nn.init.constant_(layer.gamma, 0.7)
    return layer


class Repeated(nn.Module):
    """A layer applied several times, with its own weights each time."""

    def __init__(self, layer: nn.Module, passes: int) -> None:
        super().__init__()
        self.layer, self.passes = layer, passes

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.passes):
            x = self.layer(x)
        return x


def cross(height: int, width: int) -> Tensor:
    """bool (H * W, H * W): whether two positions share a row or a column."""
    y = torch.arange(height).repeat_interleave(width)
    x = torch.arange(width).repeat(height)
    return (y[:, None] == y) | (x[:, None] == x)


class Masked(nn.Module):
    """Attention of all positions to all, those off the cross at minus infinity; the parameters are a layer's."""

    def __init__(self, layer: model.CrissCrossAttention) -> None:
        super().__init__()
        self.query_conv, self.key_conv, self.value_conv = layer.query_conv, layer.key_conv, layer.value_conv
        self.gamma = layer.gamma

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (c(x).flatten(2).transpose(1, 2) for c in (self.query_conv, self.key_conv, self.value_conv))
        scores = (query @ key.transpose(1, 2)).masked_fill(~cross(*x.shape[2:]), -torch.inf)
        return self.gamma * (scores.softmax(2) @ value).transpose(1, 2).reshape(x.shape) + x


def depends_on(layer: nn.Module) -> Tensor:
    """Where the input moves the answer at row 2, column 3 of 5 x 6: bool (5, 6)."""
    x = torch.randn(1, 8, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[0, :, 2, 3].sum(), x)
    return gradient[0].abs().sum(0) > 0


def released_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names as released: the inverse of `from_official`."""
    found = {}
    for name, value in state.items():
        name = name.removeprefix("backbone.").replace("bottleneck.4.", "bottleneck.3.").replace("dsn.4.", "dsn.3.")
        module, _, leaf = name.rpartition(".")
        found[f"{STEM.get(module, module)}.{leaf}"] = value
    return found


def both_heads(network: model.CCNet, x: Tensor) -> list[Tensor]:
    """Logits and the auxiliary head's, with running statistics."""
    network.training = True  # of the network itself: its layers stay in eval
    output = network(x)
    network.training = False
    return [output["out"], output["aux"]]


def training_step(network: model.CCNet) -> dict[str, Tensor]:
    network.double().train().zero_grad()
    output = network(pictures().double())
    losses = torch.stack([F.cross_entropy(output[key], masks(), ignore_index=255) for key in ("out", "aux")])
    (losses[0] + 0.4 * losses[1]).backward()
    found = {"losses": losses.detach(), "head.cca.gamma": network.head.cca.gamma.grad}
    for which in golden.WATCHED:
        gradient = network.get_submodule(f"backbone.{which}" if which.startswith("layer") else which).weight.grad
        found[which] = gradient.flatten()[:: max(1, gradient.numel() // 40)]
    return found


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: one pass against attention of all positions to all, which it stands for."""

    def full() -> nn.Module:
        class Full(Masked):
            def forward(self, x: Tensor) -> Tensor:
                parts = (self.query_conv, self.key_conv, self.value_conv)
                query, key, value = (c(x).flatten(2).transpose(1, 2) for c in parts)
                return self.gamma * F.scaled_dot_product_attention(query, key, value, scale=1.0).mT.view_as(x) + x

        return Full(model.CrissCrossAttention(512))

    def maps(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 512, 65, 65),)

    against = "non-local attention of all 4225 positions, scaled_dot_product_attention"
    return {"criss_cross": Pair(lambda: model.CrissCrossAttention(512), full, maps, against, train_batch=2)}
