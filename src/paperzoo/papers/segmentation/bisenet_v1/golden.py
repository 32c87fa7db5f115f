"""How golden.safetensors was made: CoinCheung's PyTorch code on weights from a rule, so that none are stored.

git clone https://github.com/CoinCheung/BiSeNet FOLDER      # at 6b4b67a
PYTHONPATH=FOLDER python -m paperzoo.papers.segmentation.bisenet_v1.golden
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from paperzoo.papers.segmentation.pspnet.golden import by_rule

FILE = Path(__file__).with_name("golden.safetensors")
CLASSES = 4
WATCHED = (
    "cp.resnet.layer3.1.conv2",
    "cp.arm16.conv_atten",
    "cp.conv_avg.conv",
    "sp.conv1.conv",
    "ffm.conv",
    "conv_out.conv_out",
    "conv_out32.conv.conv",
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


def step(outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The three cross-entropies, and their sum (eq. 2 with alpha = 1)."""
    losses = torch.stack([torch.nn.functional.cross_entropy(o, masks(), ignore_index=255) for o in outputs])
    return losses, losses.sum()


def main() -> None:
    import lib.models.resnet as theirs
    from safetensors.torch import save_file

    theirs.modelzoo.load_url = lambda url: {}  # no ImageNet weights: all come from the rule
    from lib.models.bisenetv1 import BiSeNetV1

    network = BiSeNetV1(CLASSES)
    network.load_state_dict(by_rule(network.state_dict()))
    with torch.no_grad():
        stored = {f"logits.{i}": o[:, :, ::5, ::5].contiguous() for i, o in enumerate(network.eval()(pictures()))}
    losses, loss = step(network.double().train()(pictures().double()))
    loss.backward()
    stored["losses"] = losses.detach()
    for name in WATCHED:
        gradient = network.get_submodule(name).weight.grad
        stored[name] = gradient.flatten()[:: max(1, gradient.numel() // 50)].contiguous()
    save_file(stored, str(FILE))


if __name__ == "__main__":
    main()
