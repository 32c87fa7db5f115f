"""Writes `golden.safetensors`: what pytorchvideo's `create_slowfast` answers for weights and clips that can be written down.

    python -m paperzoo.papers.video.slowfast.golden

needs pytorchvideo 0.1.5 with fvcore and iopath. `parity.py` makes the same weights and clips by the same rule and compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

FILE = Path(__file__).with_name("golden.safetensors")
CLASSES = 10
WATCHED = (
    "blocks.0.multipathway_blocks.0.conv.weight",
    "blocks.0.multipathway_blocks.1.norm.bias",
    "blocks.0.multipathway_fusion.conv_fast_to_slow.weight",
    "blocks.1.multipathway_blocks.1.res_blocks.0.branch1_conv.weight",
    "blocks.2.multipathway_fusion.norm.weight",
    "blocks.3.multipathway_blocks.0.res_blocks.5.branch2.norm_b.weight",
    "blocks.4.multipathway_blocks.1.res_blocks.2.branch2.conv_a.weight",
    "blocks.6.proj.weight",
)
"""Parameters whose gradients are compared."""


def noise(shape: tuple[int, ...], phase: float = 0.0) -> Tensor:
    """Numbers between 0 and 1 that look random and need no generator."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((n * 12.9898 + phase).sin() * 437.585).remainder(1).reshape(shape)


@torch.no_grad()
def write_weights(model: nn.Module) -> nn.Module:
    """Every parameter and buffer filled with `noise`, by the order of the names."""
    state = model.state_dict()
    for phase, name in enumerate(sorted(n for n in state if not n.endswith("num_batches_tracked"))):
        value = state[name]
        values = noise(tuple(value.shape), phase) - 0.5
        if value.ndim > 1:
            value.copy_(values * 4.5 / value[0].numel() ** 0.5)
        elif name.endswith(("running_var", "weight")):
            value.copy_(0.7 + 0.6 * values)
        else:
            value.copy_(0.3 * values)
    return model


def clip(frames: int, size: int, batch: int = 1) -> Tensor:
    return 4 * noise((batch, 3, frames, size, size), 0.5) - 2


def gradients(model: nn.Module, inputs: object) -> dict[str, Tensor]:
    """Logits in training mode, and the gradients of their mean square with respect to `WATCHED`."""
    logits = model(inputs)
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(logits.square().mean(), [parameters[n] for n in WATCHED])
    return {"logits": logits.detach(), **dict(zip(WATCHED, found, strict=True))}


def theirs(alpha: int, lateral: int, frames: int, size: int, width: int = 64) -> nn.Module:
    from pytorchvideo.models.slowfast import create_slowfast

    last = size // 32
    return create_slowfast(
        model_num_class=CLASSES,
        dropout_rate=0.0,
        slowfast_fusion_conv_kernel_size=(lateral, 1, 1),
        slowfast_fusion_conv_stride=(alpha, 1, 1),
        stem_dim_outs=(width, width // 8),
        head_pool_kernel_sizes=((frames // alpha, last, last), (frames, last, last)),
    )


def main() -> int:
    from safetensors.torch import save_file

    found = {}
    for name, alpha, lateral in (("4x16", 8, 5), ("8x8", 4, 7)):
        model = write_weights(theirs(alpha, lateral, 32, 64)).double().eval()
        x = clip(32, 64)
        with torch.no_grad():
            found[f"{name}.logits"] = model([x[:, :, ::alpha], x])
    model = write_weights(theirs(4, 5, 16, 32, 16).double()).train()
    x = clip(16, 32, 2)
    found |= {f"train.{k}": v for k, v in gradients(model, [x[:, :, ::4], x]).items()}
    save_file({k: v.detach().contiguous() for k, v in found.items()}, str(FILE))
    return 0


if __name__ == "__main__":
    sys.exit(main())
