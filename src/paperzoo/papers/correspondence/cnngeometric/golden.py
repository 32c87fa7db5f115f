"""Writes `golden.safetensors`: what the released code answers for weights and pictures that can be written down.

    python -m paperzoo.papers.correspondence.cnngeometric.golden path/to/cnngeometric_pytorch

needs a copy of the authors' repository (ignacio-rocco/cnngeometric_pytorch) and torchvision. The code was written when torch read corner pixels at the
corners, `align_corners=True`; so it is run here. Its readers of files, which want pandas and skimage, are replaced by nothing. `parity.py` makes the same
weights and pictures by the same rule and compares.
"""

from __future__ import annotations

import functools
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FILE = Path(__file__).with_name("golden.safetensors")
OUTPUTS = {"affine": 6, "tps": 18, "homography": 8}
NAMES = {"affine": "affine", "tps": "tps", "homography": "hom"}  # as the released code calls them
STILL = {
    "affine": (1, 0, 0, 0, 1, 0),
    "tps": (-1, -1, -1, 0, 0, 0, 1, 1, 1, -1, 0, 1, -1, 0, 1, -1, 0, 1),
    "homography": (-1, -1, 1, 1, -1, 1, -1, 1),
}
GRADIENTS = ("conv.0.weight", "conv.1.weight", "conv.3.bias", "linear.weight", "linear.bias")
CHANNELS, SIDE = 24, 15  # of the features that the regression alone is compared on
LONGEST = 1500  # numbers kept of a gradient


def noise(shape: tuple[int, ...], phase: float = 0.0) -> Tensor:
    """Numbers between 0 and 1 that look random and need no generator."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((n * 12.9898 + phase).sin() * 437.585).remainder(1).float().reshape(shape)


@torch.no_grad()
def write_weights(model: nn.Module) -> nn.Module:
    """Every parameter and statistic filled with `noise`, by the order of the names; signals keep their size, maps move little."""
    state = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    for phase, name in enumerate(sorted(state)):
        value = state[name]
        values = noise(tuple(value.shape), phase)
        if name.endswith("linear.weight"):
            value.copy_((values - 0.5) * 0.6 / value.shape[1] ** 0.5)
        elif name.endswith("linear.bias"):
            still = next(torch.tensor(v).float() for v in STILL.values() if len(v) == len(value))
            value.copy_(still + 0.1 * (values - 0.5))
        elif value.ndim > 1:
            value.copy_((values - 0.5) * 4.9 / value[0].numel() ** 0.5)
        elif name.endswith(("running_var", "weight")):
            value.copy_(0.7 + 0.6 * values)
        else:
            value.copy_(0.2 * (values - 0.5))
    return model


def pictures(size: int = 240) -> tuple[Tensor, Tensor]:
    """Two smooth pictures (1, 3, size, size), the second one a little further; about as bright as normalised ones."""
    rough = 4 * noise((1, 3, size // 10, size // 10)) - 2
    large = F.interpolate(rough, (size + 32, size + 32), mode="bicubic", align_corners=True)
    return large[..., 6 : 6 + size, 10 : 10 + size], large[..., 20 : 20 + size, 4 : 4 + size]


def features() -> tuple[Tensor, Tensor]:
    """Features (2, CHANNELS, SIDE, SIDE), twice."""
    return noise((2, CHANNELS, SIDE, SIDE), 0.3) - 0.5, noise((2, CHANNELS, SIDE, SIDE), 0.7) - 0.5


def parameters(kind: str, count: int = 2) -> Tensor:
    """Maps that move a little: (count, P)."""
    still = torch.tensor(STILL[kind]).float()
    return still + 0.4 * (noise((count, len(still)), 5.0) - 0.5)


def photograph() -> Tensor:
    """Two pictures (2, 3, 48, 64) in [0, 1]."""
    return F.interpolate(noise((2, 3, 12, 16), 2.0), (48, 64), mode="bilinear", align_corners=True)


def thinned(value: Tensor) -> Tensor:
    """At most LONGEST numbers of a tensor, evenly spread."""
    flat = value.detach().flatten()
    return flat[:: max(1, -(-len(flat) // LONGEST))].clone()


def load(folder: Path) -> dict[str, object]:
    """The released parts by name."""
    sys.path.insert(0, str(folder))
    for name, content in (("pandas", {}), ("skimage", {"io": None, "draw": None})):
        module = types.ModuleType(name)
        module.__dict__.update(content)
        module.__spec__ = ModuleSpec(name, None)
        sys.modules[name] = module
    for name in ("affine_grid", "grid_sample"):
        setattr(F, name, functools.partial(getattr(F, name), align_corners=True))
    import torchvision

    for name in ("vgg16", "resnet101"):
        plain = getattr(torchvision.models, name)
        setattr(torchvision.models, name, lambda pretrained, plain=plain: plain(weights=None))
    from geotnf.point_tnf import PointTnf
    from geotnf.transformation import GeometricTnf, SynthPairTnf
    from model.cnn_geometric_model import CNNGeometric, FeatureCorrelation, FeatureRegression
    from model.loss import TransformedGridLoss

    return {f.__name__: f for f in (PointTnf, GeometricTnf, SynthPairTnf, CNNGeometric, FeatureCorrelation,
                                    FeatureRegression, TransformedGridLoss)}  # fmt: skip


def make(folder: Path) -> dict[str, Tensor]:
    parts, found = load(folder), {}
    # whole networks: the affine one, then the spline one on the bent source, as eval.py does
    source, target = pictures()
    with torch.no_grad():
        networks = {
            kind: write_weights(parts["CNNGeometric"](output_dim=OUTPUTS[kind], use_cuda=False)).eval()
            for kind in ("affine", "tps")
        }
        first = networks["affine"]({"source_image": source, "target_image": target})
        bent = parts["GeometricTnf"]("affine", out_h=240, out_w=240, use_cuda=False)(source, first)
        second = networks["tps"]({"source_image": bent, "target_image": target})
        points = parts["PointTnf"](use_cuda=False)
        at = (2 * noise((1, 2, 50), 9.0) - 1) * 0.9
        found |= {"theta.affine": first, "theta.tps": second, "points": at}
        found["carried"] = points.affPointTnf(first, points.tpsPointTnf(second, at))
        found["parameters"] = torch.tensor(
            [float(sum(p.numel() for p in networks[k].parameters())) for k in ("affine", "tps")]
        )
    # the regression in training, on features alone
    correlate = parts["FeatureCorrelation"]()
    here, there = (f.requires_grad_(True) for f in features())
    regression = write_weights(parts["FeatureRegression"](6, use_cuda=False)).train()
    matches = correlate(here, there)
    theta = regression(matches)
    loss = parts["TransformedGridLoss"]("affine", use_cuda=False)(theta, parameters("affine"))
    loss.backward()
    found |= {"correlation": thinned(matches), "trained.theta": theta.detach(), "trained.loss": loss.detach()}
    found |= {f"gradient.{n}": thinned(regression.get_parameter(n).grad) for n in GRADIENTS}
    found["gradient.features"] = thinned(here.grad)
    # losses, and pairs
    for kind, name in NAMES.items():
        truth = parameters(kind)
        moved = truth + 0.2 * (noise(tuple(truth.shape), 7.0) - 0.5)
        found[f"loss.{kind}"] = parts["TransformedGridLoss"](name, use_cuda=False)(
            moved, truth[:, :, None, None] if kind == "tps" else truth
        )
        made = parts["SynthPairTnf"](use_cuda=False, geometric_model=name, output_size=(24, 24))(
            {"image": photograph(), "theta": truth}
        )
        found |= {f"pair.{kind}": made["target_image"], "pair.source": made["source_image"]}
    return {k: v.detach().float() for k, v in found.items()}


if __name__ == "__main__":
    from safetensors.torch import save_file

    save_file({k: v.contiguous().clone() for k, v in make(Path(sys.argv[1])).items()}, str(FILE))
    print(FILE, FILE.stat().st_size)
