"""Writes `golden.safetensors`: what the authors' code answers for weights, pictures and targets that can be written down.

    python -m paperzoo.papers.ocr.pixel_aggregation_network.golden path/to/pan_pp.pytorch

needs OpenCV, and their `models/post_processing/pa` built in place (python setup.py build_ext --inplace, with Cython). `parity.py` makes
the same weights, pictures and targets by the same rule and compares.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FILE = Path(__file__).with_name("golden.safetensors")
CANVASES = {"wide": (2, 64, 96), "odd": (1, 72, 100)}  # batch, height, width
BATCHES = (1, 3)
LOSS_CANVAS = (64, 96)

# -- what both sides start from ----------------------------------------------------------------------------------------


def noise(shape: tuple[int, ...], phase: float = 0.0) -> Tensor:
    """Numbers between 0 and 1 that look random and need no generator."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((n * 12.9898 + phase).sin() * 437.585).remainder(1).float().reshape(shape)


@torch.no_grad()
def write_weights(model: nn.Module) -> nn.Module:
    """Every parameter and buffer filled with `noise`, by the order of the names."""
    state = model.state_dict()
    for phase, name in enumerate(sorted(state)):
        value = state[name]
        if name.endswith("num_batches_tracked"):
            continue
        values = noise(tuple(value.shape), phase) - 0.5
        if value.ndim == 4:
            value.copy_(values * 3.6 / value[0].numel() ** 0.5)
        elif name.endswith("running_var") or (name.endswith("weight") and value.ndim == 1):
            value.copy_(1 + values)
        else:
            value.copy_(values)
    return model


def maps(batch: int) -> dict[str, Tensor]:
    """Instances, kernels and counted (batch, 64, 96): touching texts, one ignored; one whose kernel is lost; a picture without text."""
    height, width = LOSS_CANVAS
    instances = torch.zeros(batch, height, width, dtype=torch.int32)
    kernels, counted = torch.zeros(batch, height, width, dtype=torch.bool), torch.ones(batch, height, width).bool()
    places = [(4, 6, 20, 50), (20, 10, 34, 60), (40, 8, 58, 30), (40, 40, 56, 88)]
    for picture in range(min(batch, 2)):
        for number, (top, left, bottom, right) in enumerate(places[picture:], 1):
            instances[picture, top:bottom, left:right] = number
            if not (picture == 1 and number == 2):
                kernels[picture, top + 4 : bottom - 4, left + 4 : right - 4] = True
        counted[picture, places[2][0] : places[2][2], places[2][1] : places[2][3]] = picture == 1
    return {"instances": instances, "kernels": kernels, "counted": counted}


def grown() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, float]]:
    """For pixel aggregation: text, kernels, vectors, and the distance at which both codes ask the same.

    "far": no question, as the authors' code has it for kernels of like size. "near": a kernel of one pixel and one of more than
    1,024 in the same text, which is when it asks.
    """
    height, width = 48, 64
    field = torch.nn.functional.avg_pool2d(noise((1, 1, height + 6, width + 6), 3.0), 7, 1)[0, 0].numpy()
    vectors = (noise((4, height, width), 5.0).numpy() - 0.5) * 6
    text = field > np.quantile(field, 0.3)
    kernels = text & (noise((height, width), 7.0).numpy() < 0.05)
    block = np.zeros((height, width), dtype=bool)
    block[4:44, 4:40] = True
    corner = block.copy()
    corner[40, 60] = True
    vectors[:, :, 40:] += 1.5
    return {
        "far": (text, kernels, vectors, np.inf),
        "near": (np.ones((height, width), dtype=bool), corner, vectors, 3.0),
    }


def fingerprint(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of each gradient its length and its product with a written-down direction: names -> (2,)."""
    found = {}
    for phase, name in enumerate(sorted(gradients)):
        g = gradients[name].double()
        direction = noise(tuple(g.shape), phase).double() - 0.5
        found[name] = torch.stack([g.norm(), (g * direction).sum()]).float()
    return found


# -- the authors' code -------------------------------------------------------------------------------------------------


def their_network(folder: Path) -> tuple[nn.Module, Any]:
    """Their PAN as the released configurations have it, and their pixel aggregation."""
    sys.path[:0] = [str(folder), str(folder / "models" / "post_processing" / "pa")]
    from pa import pa  # the built extension

    package = types.ModuleType("models.post_processing")  # without the parts of PSENet and PAN++
    package.pa = pa
    sys.modules["models.post_processing"] = package
    for name, part in (
        ("pan_pp_rec_head", "PAN_PP_RecHead"),
        ("psenet_head", "PSENet_Head"),
    ):  # of the other two papers
        module = types.ModuleType(f"models.head.{name}")
        setattr(module, part, None)
        sys.modules[f"models.head.{name}"] = module
    from models.pan import PAN

    class Kind(dict):
        __getattr__ = dict.__getitem__

    head = Kind(
        type="PA_Head",
        in_channels=512,
        hidden_dim=128,
        num_classes=6,
        loss_text=Kind(type="DiceLoss", loss_weight=1.0),
        loss_kernel=Kind(type="DiceLoss", loss_weight=0.5),
        loss_emb=Kind(type="EmbLoss_v1", feature_dim=4, loss_weight=0.25),
    )
    neck = Kind(type="FPEM_v1", in_channels=(64, 128, 256, 512), out_channels=128)
    return PAN(Kind(type="resnet18"), neck, head), pa


def write(folder: Path) -> None:
    from safetensors.torch import save_file

    model, pa = their_network(folder)
    write_weights(model)
    found: dict[str, Tensor] = {}
    found["parameters"] = torch.tensor(sum(p.numel() for p in model.parameters()))
    with torch.no_grad():
        model.eval()
        for name, (batch, height, width) in CANVASES.items():
            f = model.backbone(noise((batch, 3, height, width)))
            f = [getattr(model, f"reduce_layer{i}")(x) for i, x in enumerate(f, 1)]
            one = model.fpem1(*f)
            two = model.fpem2(*one)
            sums = [a + b for a, b in zip(one, two, strict=True)]
            out = model.det_head(torch.cat([sums[0], *(model._upsample(x, sums[0].size()) for x in sums[1:])], 1))
            found[f"maps/{name}"] = model._upsample(out, (batch, 3, height, width), 4)
    for batch in BATCHES:
        model.train().zero_grad()
        write_weights(model)
        m = maps(batch)
        losses = model(
            noise((batch, 3, *LOSS_CANVAS)),
            gt_texts=(m["instances"] > 0).long(),
            gt_kernels=m["kernels"][:, None].long(),
            training_masks=m["counted"].long(),
            gt_instances=m["instances"].long(),
            gt_bboxes=torch.zeros(batch, 201, 4),
        )
        parts = [losses[key] for key in ("loss_text", "loss_kernels", "loss_emb")]
        found[f"losses/{batch}"] = torch.stack(parts).detach()
        sum(part.mean() for part in parts).backward()
        prints = fingerprint({n: p.grad for n, p in model.named_parameters()})
        found[f"gradients/{batch}"] = torch.stack([prints[name] for name in sorted(prints)])
    for name, (text, kernels, vectors, _) in grown().items():
        found[f"labels/{name}"] = torch.from_numpy(
            pa(np.stack([text, kernels & text]).astype(np.uint8), vectors.astype(np.float32)).astype(np.int16)
        )
    save_file({k: v.contiguous() for k, v in found.items()}, str(FILE))
    print(FILE, FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
