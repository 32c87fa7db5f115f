"""How golden.safetensors was made: the authors' PyTorch code on weights from a rule, so that none are stored.

git clone https://github.com/hszhao/semseg FOLDER
PYTHONPATH=FOLDER python -m paperzoo.papers.segmentation.pspnet.golden
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).with_name("golden.safetensors")
NETWORKS = {50: "pspnet_resnet50", 101: "pspnet_resnet101"}
CLASSES = 5


def by_rule(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values for every name of a released state, from a generator seeded with the name: such that signals neither grow nor fade."""
    made = {}
    for name, value in state.items():
        rng, shape = np.random.default_rng(zlib.crc32(name.encode())), tuple(value.shape)
        if name.endswith("num_batches_tracked"):
            values = np.zeros(shape)
        elif name.endswith("running_var"):
            values = rng.uniform(0.6, 1.4, shape)
        elif value.ndim == 1 and name.endswith("weight"):
            values = rng.uniform(0.1, 0.25, shape) if ".bn3." in name else rng.uniform(0.7, 1.3, shape)
        elif value.ndim == 1:
            values = rng.normal(0, 0.1, shape)
        else:
            values = rng.normal(0, (1.4 / value[0].numel()) ** 0.5, shape)
        made[name] = torch.from_numpy(np.asarray(values)).to(value.dtype)
    return made


def pictures() -> Tensor:
    """Two parts of photographs, normalised, (2, 3, 105, 89): 8n + 1 pixels, which the authors' code needs."""
    from paperzoo.data.scenes import photographs

    person, cat = photographs()[2], photographs()[3]
    pixels = torch.stack([person[:, 20:230:2, 130:308:2], cat[:, 40:250:2, 90:268:2]]).float() / 255
    mean, deviation = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]


def masks() -> Tensor:
    """Class ids for the pictures, int64 (2, 105, 89), every seventh row ignored."""
    ids = torch.arange(2 * 105 * 89).view(2, 105, 89) // 300 % CLASSES
    ids[:, ::7] = 255
    return ids


def main() -> None:
    from model.pspnet import PSPNet  # the authors'
    from safetensors.torch import save_file

    stored = {}
    for layers, name in NETWORKS.items():
        network = PSPNet(layers=layers, classes=CLASSES, dropout=0.0, pretrained=False)
        network.load_state_dict(by_rule(network.state_dict()))
        with torch.no_grad():
            stored[f"{name}.logits"] = network.eval()(pictures())[:, :, ::4, ::4].contiguous()
        _, loss, aux_loss = network.double().train()(pictures().double(), masks())
        (loss + 0.4 * aux_loss).backward()
        stored[f"{name}.losses"] = torch.stack([loss.detach(), aux_loss.detach()])
        for which in ("layer0.0", "layer3.2.conv2", "layer4.0.conv2", "ppm.features.0.1", "ppm.features.3.1", "aux.4"):
            gradient = network.get_submodule(which).weight.grad
            stored[f"{name}.{which}"] = gradient.flatten()[:: max(1, gradient.numel() // 50)].contiguous()
    save_file(stored, str(FILE))


if __name__ == "__main__":
    main()
