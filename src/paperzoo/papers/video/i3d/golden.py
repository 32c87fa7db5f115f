"""Writes `golden.safetensors`: what piergiaj/pytorch-i3d answers for weights and clips that can be written down.

    python -m paperzoo.papers.video.i3d.golden path/to/pytorch-i3d

The port's last mean looks at 7 x 7 places; for smaller clips it is given the size that the last maps have there.
`parity.py` makes the same weights and clips by the same rule and compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

FILE = Path(__file__).with_name("golden.safetensors")
CLASSES = 10
CLIPS = {"full": (3, 9, 224, 1), "odd": (2, 21, 75, 2), "train": (3, 24, 64, 2)}  # channels, frames, pixels, batch
WATCHED = (
    "Conv3d_1a_7x7.conv3d.weight",
    "Conv3d_2c_3x3.bn.bias",
    "Mixed_3b.b1b.conv3d.weight",
    "Mixed_4d.b2a.conv3d.weight",
    "Mixed_4f.b3b.bn.weight",
    "Mixed_5c.b2b.conv3d.weight",
    "logits.conv3d.bias",
)
"""Parameters whose gradients are compared; of large ones the first 1,000 numbers are stored."""
KEPT = 1000


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
            value.copy_(1 + 0.6 * values)
        else:
            value.copy_(0.3 * values)
    return model


def clip(name: str) -> Tensor:
    channels, frames, size, batch = CLIPS[name]
    return 4 * noise((batch, channels, frames, size, size), 0.5) - 2


def gradients(model: nn.Module, clips: Tensor) -> dict[str, Tensor]:
    """Logits in training mode, and the gradients of their mean square with respect to `WATCHED`."""
    logits = model(clips)
    logits = logits.mean(2) if logits.ndim == 3 else logits
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(logits.square().mean(), [parameters[n] for n in WATCHED])
    return {"logits": logits.detach(), **{n: g.flatten()[:KEPT] for n, g in zip(WATCHED, found, strict=True)}}


def main(folder: str) -> int:
    sys.path.insert(0, folder)
    from pytorch_i3d import InceptionI3d
    from safetensors.torch import save_file

    found = {}
    for name, (channels, _, size, _) in CLIPS.items():
        model = write_weights(InceptionI3d(CLASSES, in_channels=channels, dropout_keep_prob=0.0)).double()
        last = -(-size // 32)
        model.avg_pool = nn.AvgPool3d((2, last, last), 1)
        if name == "train":
            found |= {f"train.{k}": v for k, v in gradients(model.train(), clip(name)).items()}
        else:
            with torch.no_grad():
                found[f"{name}.logits"] = model.eval()(clip(name)).mean(2)
    save_file({k: v.detach().contiguous() for k, v in found.items()}, str(FILE))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
