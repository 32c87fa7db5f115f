"""Writes `golden.safetensors`: what mmaction2's STGCN, set to be ST-GCN++, answers for weights and skeletons that can be written down.

    python -m paperzoo.papers.video.stgcn_plus_plus.golden path/to/packages

needs mmaction2 1.2.0, mmengine 0.10 and mmcv-lite 2.1 in that folder. mmaction2 has the network of the authors' toolbox, with its configurations. `parity.py`
makes the same weights and skeletons by the same rule and compares.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import torch
from torch import Tensor, nn

FILE = Path(__file__).with_name("golden.safetensors")
LAYOUTS = {"ntu": ("nturgb+d", 25), "coco": ("coco", 17), "openpose": ("openpose", 18)}
GRADIENTS = (
    "data_bn.weight",
    "gcn.0.gcn.A",
    "gcn.3.tcn.branches.1.3.conv.weight",
    "gcn.4.residual.bn.bias",
    "gcn.9.tcn.transform.0.weight",
)
FRAMES = 20


def noise(shape: tuple[int, ...], phase: float = 0.0) -> Tensor:
    """Numbers between 0 and 1 that look random and need no generator."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((n * 12.9898 + phase).sin() * 437.585).remainder(1).float().reshape(shape)


@torch.no_grad()
def write_weights(backbone: nn.Module) -> nn.Module:
    """Every parameter and statistic but the graphs' filled with `noise`, by the order of the names; graphs are changed a little."""
    state = backbone.state_dict()
    for phase, name in enumerate(sorted(state)):
        value = state[name]
        if not value.is_floating_point():
            continue
        values = noise(tuple(value.shape), phase)
        if name.endswith(".A"):
            value.add_(0.1 * (values - 0.5))
        elif value.ndim > 1:
            value.copy_((values - 0.5) * 3 / value[0].numel() ** 0.5)
        elif "running_var" in name or name.endswith(("bn.weight", ".1.weight", "transform.0.weight")):
            value.copy_(0.5 + values)
        else:
            value.copy_(0.2 * (values - 0.5))
    return backbone


def skeletons(joints: int) -> Tensor:
    return 2 * noise((1, 2, FRAMES, joints, 3), joints) - 1


def load(folder: Path) -> tuple[type[nn.Module], type]:
    """mmaction2's STGCN and Graph, without all that the packages' own imports bring."""
    sys.path.insert(0, str(folder))
    for name in ("mmaction", "mmaction.models", "mmaction.models.backbones", "mmaction.models.utils"):
        made = types.ModuleType(name)
        made.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = made

    class Registry:
        def register_module(self, *_: object, **__: object):
            return lambda kind: kind

    registry = types.ModuleType("mmaction.registry")
    registry.MODELS = Registry()
    sys.modules["mmaction.registry"] = registry
    from mmaction.models.utils import gcn_utils
    from mmaction.models.utils.graph import Graph

    utils = sys.modules["mmaction.models.utils"]
    utils.Graph, utils.mstcn, utils.unit_gcn, utils.unit_tcn = (
        Graph,
        gcn_utils.mstcn,
        gcn_utils.unit_gcn,
        gcn_utils.unit_tcn,
    )
    from mmaction.models.backbones.stgcn import STGCN

    return STGCN, Graph


def make(folder: Path) -> dict[str, Tensor]:
    kind, graphs = load(folder)
    found: dict[str, Tensor] = {}
    for name, (theirs, joints) in LAYOUTS.items():
        setting = {"layout": theirs, "mode": "spatial"}
        found[f"{name}.graph"] = torch.tensor(graphs(**setting).A, dtype=torch.float32)
        if name == "openpose":
            continue
        net = kind(graph_cfg=setting, gcn_adaptive="init", gcn_with_res=True, tcn_type="mstcn")
        found[f"{name}.parameters"] = torch.tensor(float(sum(p.numel() for p in net.parameters())), dtype=torch.float64)
        write_weights(net).eval()
        with torch.no_grad():
            found[f"{name}.eval"] = net(skeletons(joints)).flatten(0, 1)[:, ::4]
        if name == "ntu":
            net.double().train()(skeletons(joints).double()).square().mean().backward()
            parameters = dict(net.named_parameters())
            found |= {f"gradient.{n}": parameters[n].grad.flatten()[::3].float() for n in GRADIENTS}
    return found


if __name__ == "__main__":
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in make(Path(sys.argv[1])).items()}, str(FILE))
    print(FILE, FILE.stat().st_size)
