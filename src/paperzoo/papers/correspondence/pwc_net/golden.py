"""Writes `golden.safetensors`: what ptlflow's PWCDCNet answers for weights and pictures that can be written down.

    python -m paperzoo.papers.correspondence.pwc_net.golden path/to/ptlflow

needs ptlflow 0.4.2 unpacked (a folder with ptlflow/models in it) and einops. ptlflow's network is the authors' PyTorch code
(NVlabs/PWC-Net, three convolutions a level) with a correlation in plain torch. Its base class, which resizes pictures, is replaced by a
plain one. `parity.py` makes the same weights and pictures by the same rule and compares.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import torch
from torch import Tensor, nn

FILE = Path(__file__).with_name("golden.safetensors")
SIZES = {"small": (128, 192), "wide": (128, 320)}
GRADIENTS = ("conv1a.0.weight", "conv6aa.0.bias", "deconv5.weight", "upfeat4.bias", "conv2_4.0.bias", "dc_conv7.weight")
"""Parameters whose gradients are compared."""


def noise(shape: tuple[int, ...], phase: float = 0.0) -> Tensor:
    """Numbers between 0 and 1 that look random and need no generator."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((n * 12.9898 + phase).sin() * 437.585).remainder(1).float().reshape(shape)


@torch.no_grad()
def write_weights(model: nn.Module) -> nn.Module:
    """Every parameter filled with `noise`, by the order of the names, so that signals keep their size."""
    state = model.state_dict()
    for phase, name in enumerate(sorted(n for n in state if not n.startswith("deconv2."))):
        value = state[name]
        values = noise(tuple(value.shape), phase) - 0.5
        if value.ndim > 1:
            head = "predict_flow" in name or "dc_conv7" in name
            gain = 5.0 if head else 1.5 if "deconv" in name or "upfeat" in name else 4.6
            value.copy_(values * gain / value[0].numel() ** 0.5)
        else:
            value.copy_(0.2 * values)
    return model


def pictures(kind: str) -> tuple[Tensor, Tensor]:
    """Two smooth pictures (1, 3, H, W), the second one a little further."""
    height, width = SIZES[kind]
    rough = noise((1, 3, height // 16, width // 16))
    large = nn.functional.interpolate(rough, (height + 8, width + 8), mode="bicubic", align_corners=True)
    return large[..., 3 : 3 + height, 5 : 5 + width], large[..., 6 : 6 + height, 1 : 1 + width]


class Base(nn.Module):
    """In the place of ptlflow's base class: pictures are taken as they are."""

    def __init__(self, **_: object) -> None:
        super().__init__()

    def preprocess_images(self, images: Tensor, **_: object) -> tuple[Tensor, None]:
        return images, None

    def postprocess_predictions(self, flow: Tensor, *_: object, **__: object) -> Tensor:
        return flow


def load(folder: Path) -> type[nn.Module]:
    """ptlflow's PWCDCNet."""
    sys.path.insert(0, str(folder))

    def module(name: str, **content: object) -> None:
        made = types.ModuleType(name)
        made.__path__ = [str(folder / name.replace(".", "/"))]
        made.__dict__.update(content)
        sys.modules[name] = made

    for name in ("ptlflow", "ptlflow.utils", "ptlflow.models", "ptlflow.models.pwcnet"):
        module(name)
    module("ptlflow.models.base_model")
    module("ptlflow.models.base_model.base_model", BaseModel=Base)
    module("ptlflow.models.flownet")
    module("ptlflow.models.flownet.losses", MultiScale=lambda **_: None)
    module("ptlflow.utils.registry", register_model=lambda c: c, trainable=lambda c: c)
    from ptlflow.models.pwcnet.pwcnet import PWCDCNet

    return PWCDCNet


def make(folder: Path) -> dict[str, Tensor]:
    model, found = write_weights(load(folder)()).train(), {}  # in training it returns every level
    found["parameters"] = torch.tensor(
        sum(p.numel() for n, p in model.named_parameters() if not n.startswith("deconv2.")), dtype=torch.float64
    )
    for kind in SIZES:
        flows = model({"images": torch.stack(pictures(kind), 1)})["flow_preds"]
        found |= {f"{kind}.flow{level}": flow.detach() for level, flow in enumerate(flows, 2)}
        if kind == "small":
            sum(flow.square().sum() for flow in flows).backward()
            found |= {f"gradient.{name}": model.get_parameter(name).grad.flatten()[::2].clone() for name in GRADIENTS}
    return found


if __name__ == "__main__":
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in make(Path(sys.argv[1])).items()}, str(FILE))
    print(FILE, FILE.stat().st_size)
