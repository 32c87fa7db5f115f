"""SlowFast against pytorchvideo's answers (`golden.py`), its lateral connection as a loop, and the costs that the paper states."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from paperzoo.engine.parity import Case
from paperzoo.papers.video.slowfast.golden import CLASSES, FILE, clip, gradients, write_weights
from paperzoo.papers.video.slowfast.model import (
    DEPTHS,
    Lateral,
    SlowFast,
    slowfast_r50_4x16,
    slowfast_r50_8x8,
)

SOURCE = "pytorchvideo 0.1.5 create_slowfast, stored answers"


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    golden = load_file(str(FILE))
    for name, function in (("4x16", slowfast_r50_4x16), ("8x8", slowfast_r50_8x8)):
        model = write_weights(function(CLASSES)).double().eval()
        expected = golden[f"{name}.logits"]
        yield Case(f"R50 {name}, 32 frames", model, lambda x, y=expected: y, (clip(32, 64),), SOURCE)
    narrow = write_weights(SlowFast(DEPTHS[50], 16, 4, num_classes=CLASSES, drop_rate=0.0).double()).train()
    yield Case(
        "a quarter of the channels, training: logits and gradients",
        lambda: gradients(narrow, clip(16, 32, 2)),
        lambda: {k.removeprefix("train."): v for k, v in golden.items() if k.startswith("train.")},
        (),
        SOURCE,
    )
    torch.manual_seed(0)
    for frames, alpha, taps in ((16, 4, 5), (13, 4, 7), (17, 8, 5)):
        lateral = Lateral(3, 2, taps, alpha).double().eval()
        lateral.norm.running_mean.normal_()
        fast = torch.randn(2, 3, frames, 4, 5, dtype=torch.float64)
        slow = torch.randn(2, 6, frames, 4, 5, dtype=torch.float64)[:, :, ::alpha]
        yield Case(
            f"a lateral connection, {frames} frames, alpha {alpha}",
            lateral,
            lambda s, f, layer=lateral, a=alpha: loop(layer, s, f, a),
            (slow, fast),
            "sec. 3.4: a loop over the Slow pathway's frames, each with the Fast frames around it",
        )
    model = write_weights(SlowFast((1, 1, 1, 1), 8, 4, num_classes=3, drop_rate=0.0).double()).eval()
    x = torch.randn(1, 3, 12, 32, 32, dtype=torch.float64)
    yield Case(
        "the pathways that a clip is taken apart into",
        model,
        lambda x: model.blocks[-1](model.pathways(x[:, :, [0, 4, 8]], x)),
        (x,),
        "sec. 3.1: the Slow pathway sees one frame in alpha",
    )
    yield Case(
        "res2 and res3 of the Slow pathway see frames apart",
        lambda: early(model, x[:, :, ::4]),
        lambda: torch.cat([early(model, x[:, :, t : t + 1]) for t in (0, 4, 8)], 2),
        (),
        "table 1: no temporal kernel before res4",
    )
    for name, function, billions in (("4x16", slowfast_r50_4x16, 36.1), ("8x8", slowfast_r50_8x8, 65.7)):
        with torch.device("meta"):
            network = function()
        yield Case(
            f"multiply-adds of a view of {name}, billions",
            lambda net=network: round(cost(net) / 1e9, 1),
            lambda n=billions: n,
            (),
            "table 5 of the paper, R50",
        )


def loop(layer: Lateral, slow: Tensor, fast: Tensor, alpha: int) -> Tensor:
    weight, norm = layer.conv_fast_to_slow.weight[..., 0, 0].detach(), layer.norm  # (out, in, taps)
    around = weight.shape[2] // 2
    padded = F.pad(fast, (0, 0, 0, 0, around, around))
    frames = []
    for k in range(slow.shape[2]):
        window = padded[:, :, k * alpha : k * alpha + weight.shape[2]]
        frames.append(torch.einsum("oit,bithw->bohw", weight, window))
    out = torch.stack(frames, 2)
    shape = (1, -1, 1, 1, 1)
    out = (out - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
    return torch.cat([slow, (out * norm.weight.view(shape) + norm.bias.view(shape)).clamp(min=0)], 1)


@torch.no_grad()
def early(model: SlowFast, slow: Tensor) -> Tensor:
    """The Slow pathway through res3, with nothing from the Fast one."""
    for i, stage in enumerate(model.blocks[:3]):
        if i:
            inputs = stage.multipathway_blocks[0].res_blocks[0].branch1_conv.in_channels
            slow = F.pad(slow, (0,) * 7 + (inputs - slow.shape[1],))
        slow = stage.multipathway_blocks[0](slow)
    return slow


def cost(network: SlowFast) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        network.eval()(torch.empty(1, 3, 32, 256, 256, device="meta"))
    return counter.get_total_flops() / 2
