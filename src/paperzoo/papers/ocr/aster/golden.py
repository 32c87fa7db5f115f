"""Writes `golden.safetensors`: what ayumiymk/aster.pytorch answers for weights, pictures and texts that can be written down.

    python -m paperzoo.papers.ocr.aster.golden path/to/aster.pytorch

needs a checkout of ayumiymk/aster.pytorch at be67004. Two things of today's torch are set back to what they were when it
was written: `grid_sample` measured between the centres of the corner pixels, and a division of integers rounded down.
`parity.py` makes the same weights, pictures and texts by the same rule and compares.
"""

from __future__ import annotations

import functools
import sys
import types
from pathlib import Path

import torch
from torch import Tensor, nn

FILE = Path(__file__).with_name("golden.safetensors")
CHARACTERS, LONGEST = 94, 7  # the code counts the end token among the longest
SIZES = {"full": (64, 256), "small": (40, 90)}
RECTIFIED = (32, 100)
RECOGNISER = ("encoder.layer0.0.weight", "encoder.layer3.0.bn1.weight", "encoder.rnn.bias_hh_l1", "decoder.decoder.fc.bias",
              "decoder.decoder.gru.bias_ih_l0", "decoder.decoder.attention_unit.sEmbed.bias")  # fmt: skip
LOCATING = ("stn_head.stn_fc2.bias", "stn_head.stn_fc1.0.bias", "stn_head.stn_convnet.0.0.weight")
"""Parameters whose gradients are compared."""


def noise(shape: tuple[int, ...], phase: float = 0.0) -> Tensor:
    """Numbers between 0 and 1 that look random and need no generator."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((n * 12.9898 + phase).sin() * 437.585).remainder(1).float().reshape(shape)


@torch.no_grad()
def write_weights(model: nn.Module) -> nn.Module:
    """Every parameter and buffer filled with `noise`, by the order of the names; control points stay near the borders."""
    state = model.state_dict()
    names = sorted(n for n in state if not n.startswith("tps.") and not n.endswith("num_batches_tracked"))
    for phase, name in enumerate(names):
        value = state[name]
        values = noise(tuple(value.shape), phase) - 0.5
        if name.endswith("stn_fc2.bias"):
            value.add_(0.2 * values)
        elif value.ndim > 1:
            gain = 0.5 if "stn_fc2" in name else 8.0 if "tgt_embedding" in name or "fc.weight" in name else 3.4
            value.copy_(values * gain / value[0].numel() ** 0.5)
        elif name.endswith("running_var") or ("bn" in name or ".1.weight" in name) and name.endswith("weight"):
            value.copy_(1 + values)
        else:
            value.copy_(0.4 * values)
    return model


def pictures(kind: str) -> Tensor:
    """Smooth enough that a thousandth of a pixel does not matter."""
    height, width = SIZES.get(kind, RECTIFIED)
    rough = 2 * noise((2, 3, height // 8, width // 8)) - 1
    return nn.functional.interpolate(rough, (height, width), mode="bicubic", align_corners=True)


def texts() -> tuple[Tensor, Tensor]:
    """Texts of five and two characters, their ends and padding, int64 (2, 6); and their lengths without the end."""
    end, pad = CHARACTERS, CHARACTERS + 1
    return torch.tensor([[3, 50, 50, 93, 0, end], [7, 8, end, pad, pad, pad]]), torch.tensor([5, 2])


def load(checkout: Path) -> type:
    """The authors' ModelBuilder."""
    source = checkout / "lib/models/attention_recognition_head.py"
    text = source.read_text()
    fixed = text.replace("(candidates / self.num_classes", "(candidates // self.num_classes")
    fixed = fixed.replace("int(idx[0] / beam_width)", "int(idx[0] // beam_width)")
    if fixed != text:
        source.write_text(fixed)
    sys.path.insert(0, str(checkout))
    sys.argv = [sys.argv[0], "--with_lstm", "--STN_ON"]
    package = types.ModuleType("lib")  # without its metrics and pictures, which want other packages
    package.__path__ = [str(checkout / "lib")]
    sys.modules |= {"lib": package, "six": types.ModuleType("six")}
    torch.nn.functional.grid_sample = functools.partial(torch.nn.functional.grid_sample, align_corners=True)
    from lib.models.model_builder import ModelBuilder

    return ModelBuilder


def make(checkout: Path) -> dict[str, Tensor]:
    builder = load(checkout)
    tokens, lengths = texts()
    targets = {"rec_targets": tokens, "rec_lengths": (lengths + 1).tolist()}
    arguments = ("ResNet_ASTER", CHARACTERS + 3, 512, 512, LONGEST, CHARACTERS)
    model, found = write_weights(builder(*arguments, STN_ON=True)).eval(), {}
    found["parameters"] = torch.tensor(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for kind in SIZES:
        images = pictures(kind)
        with torch.no_grad():
            answer = model({"images": images} | targets)
            rectified = answer["output"]["rectified_images"]
            features = model.encoder(rectified).contiguous()
            ids, scores = model.decoder.sample([features, None, None])
            found |= {
                f"{kind}.points": answer["output"]["ctrl_points"],
                f"{kind}.rectified": rectified[:, :, ::3, ::5],
                f"{kind}.features": features[:, :, ::16],
                f"{kind}.logits": model.decoder([features, tokens, (lengths + 1).tolist()]),
                f"{kind}.loss": answer["losses"]["loss_rec"],
                f"{kind}.greedy": ids,
                f"{kind}.scores": scores,
                f"{kind}.beam": answer["output"]["pred_rec"],
            }
    model({"images": pictures("full")} | targets)["losses"]["loss_rec"].backward()
    found |= {f"whole.gradient.{name}": gradient(model, name) for name in LOCATING}

    # in training mode without the spline, whose rounding batch norm of two pictures would blow up
    model = write_weights(builder(*arguments, STN_ON=False)).train()
    loss = model({"images": pictures("rectified")} | targets)["losses"]["loss_rec"]
    loss.backward()
    return (
        found | {"train.loss": loss.detach()} | {f"train.gradient.{name}": gradient(model, name) for name in RECOGNISER}
    )


def gradient(model: nn.Module, name: str) -> Tensor:
    return dict(model.named_parameters())[name].grad.flatten()[::3].clone()


if __name__ == "__main__":
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in make(Path(sys.argv[1])).items()}, str(FILE))
    print(FILE, FILE.stat().st_size)
