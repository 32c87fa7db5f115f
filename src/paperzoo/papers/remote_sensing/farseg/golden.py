"""How golden.safetensors was made: torchgeo's network and the authors' loss, on weights from a rule, so that none are stored.

pip install --target TORCHGEO --no-deps torchgeo            # 0.8.1
git clone https://github.com/Z-Zheng/FarSeg AUTHORS         # at 35ba29f
python -m paperzoo.papers.remote_sensing.farseg.golden TORCHGEO AUTHORS
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

FILE = Path(__file__).with_name("golden.safetensors")
CLASSES = 5
STEPS = ((1, "cosine"), (400, "cosine"), (1000, "cosine"), (1001, "cosine"), (300, "poly"), (300, "linear"))
OVER = 1000  # steps of annealing
WATCHED = (
    "backbone.layer2.0.conv2",
    "fpn.inner_blocks.0.0",
    "fpn.layer_blocks.3.0",
    "fsr.scene_encoder.1.0",
    "fsr.content_encoders.2.0",
    "fsr.feature_reencoders.0.0",
    "decoder.blocks.3.2.0",
    "decoder.classifier.0",
)


def pictures() -> Tensor:
    """Two parts of photographs, normalised, (2, 3, 96, 128)."""
    from paperzoo.data.scenes import photographs

    person, cat = photographs()[2], photographs()[3]
    pixels = torch.stack([person[:, 20:212:2, 80:336:2], cat[:, 40:232:2, 60:316:2]]).float() / 255
    mean, deviation = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]


def masks() -> Tensor:
    """Class ids for the pictures, int64 (2, 96, 128), every seventh row ignored."""
    ids = torch.arange(2 * 96 * 128).view(2, 96, 128) // 300 % CLASSES
    ids[:, ::7] = 255
    return ids


def scores() -> Tensor:
    """Logits by a rule, (2, CLASSES, 96, 128) in double precision."""
    at = torch.arange(2 * CLASSES * 96 * 128, dtype=torch.float64)
    return (3 * (at * 0.37).sin() + (at * 0.0011).cos()).view(2, CLASSES, 96, 128)


def sampled(gradient: Tensor) -> Tensor:
    return gradient.flatten()[:: max(1, gradient.numel() // 50)].contiguous()


def load(path: Path) -> ModuleType:
    import importlib.util

    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    from safetensors.torch import save_file

    from paperzoo.papers.remote_sensing.farseg.parity import by_rule

    theirs = load(Path(sys.argv[1]) / "torchgeo" / "models" / "farseg.py")
    network = theirs.FarSeg("resnet50", CLASSES, backbone_pretrained=False)
    network.load_state_dict(by_rule(network.state_dict()))
    with torch.no_grad():
        stored = {"logits": network.eval()(pictures())[:, :, ::4, ::4].contiguous()}
    losses = load(Path(sys.argv[2]) / "module" / "loss.py")
    kinds = {"cosine": losses.cosine_annealing, "poly": losses.poly_annealing, "linear": losses.linear_annealing}
    logits = network.double().train()(pictures().double())
    loss = losses.annealing_softmax_focalloss(logits, masks(), 400, OVER)
    loss.backward()
    stored["loss"] = loss.detach()
    for name in WATCHED:
        stored[name] = sampled(network.get_submodule(name).weight.grad)
    for step, kind in STEPS:
        given = scores().requires_grad_()
        loss = losses.annealing_softmax_focalloss(given, masks(), step, OVER, annealing_function=kinds[kind])
        loss.backward()
        stored[f"{kind} {step}"] = torch.cat([loss.detach()[None], sampled(given.grad)])
    save_file(stored, str(FILE))


if __name__ == "__main__":
    main()
