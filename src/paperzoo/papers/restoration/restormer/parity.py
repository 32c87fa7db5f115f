"""Restormer against the released code (its outputs on weights from a rule are stored, see `golden.py`), and against the paper."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from paperzoo.engine.parity import Case
from paperzoo.papers.restoration.restormer import golden, model
from paperzoo.papers.restoration.swinir.golden import picture

SOURCE = "swz30/Restormer, stored outputs"


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    stored = load_file(str(golden.FILE))
    for name, (_, shape) in golden.NETWORKS.items():
        network = getattr(model, name)()
        network.load_state_dict(golden.by_rule(network.state_dict()))
        yield Case(
            f"{name}, {' x '.join(map(str, shape))}",
            network.eval(),
            lambda x, n=name: stored[n],
            (picture(shape, name),),
            SOURCE,
            rtol=1e-3,
            atol=1e-4,
        )
    for kind in ("WithBias", "BiasFree"):
        narrow = model.Restormer(1, None, 4, (1, 2, 1, 1), 1, golden.HEADS, bias_free=kind == "BiasFree")
        narrow.load_state_dict(golden.by_rule(narrow.state_dict()))
        yield Case(
            f"{kind}, one training step: loss and gradients",
            lambda n=narrow: golden.loss_and_gradients(n),
            lambda k=kind: [stored[f"{k}.{name}"] for name in ("loss", *golden.GRADIENTS)],
            (),
            SOURCE,
        )

    torch.manual_seed(0)
    attention = model.TransposedAttention(6, 2).double()
    attention.load_state_dict(golden.by_rule(attention.state_dict()))
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    yield Case("attention between channels", attention, lambda x: slow_attention(attention, x), (x,),
               "sec. 3.1, one pair of channels at a time", gradients=True)  # fmt: skip

    padded = model.restormer_small().eval()
    x = torch.rand(1, 3, 13, 22)
    yield Case("sizes that 8 does not divide", padded,
               lambda x: padded(F.pad(x, (0, 2, 0, 3), mode="reflect"))[:, :, :13, :22], (x,), "the released test script",
               rtol=0.0, atol=0.0)  # fmt: skip


def slow_attention(part: model.TransposedAttention, x: Tensor) -> Tensor:
    channels, width = x.shape[1], x.shape[1] // part.heads
    y = torch.einsum("bchw,oc->bohw", x, part.qkv.weight[:, :, 0, 0])
    y = F.conv2d(y, part.qkv_dwconv.weight, padding=1, groups=3 * channels).flatten(2)
    q, k, v = y[:, :channels], y[:, channels : 2 * channels], y[:, 2 * channels :]
    mixed = []
    for i in range(channels):
        head = i // width
        others = range(head * width, (head + 1) * width)
        logits = [F.cosine_similarity(q[:, i], k[:, j], dim=-1) * part.temperature[head, 0, 0] for j in others]
        weights = torch.stack(logits, dim=-1).softmax(-1)
        mixed.append(sum(weights[:, n, None] * v[:, j] for n, j in enumerate(others)))
    y = torch.stack(mixed, dim=1).unflatten(2, x.shape[2:])
    return torch.einsum("bchw,oc->bohw", y, part.project_out.weight[:, :, 0, 0])
