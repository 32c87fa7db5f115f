"""How golden.safetensors was made: facenet-pytorch 2.6.0 on weights from a rule, so that none are stored.

pip install --target FOLDER --no-deps facenet-pytorch==2.6.0
PYTHONPATH=FOLDER python -m paperzoo.papers.face.mtcnn.golden
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FILE = Path(__file__).with_name("golden.safetensors")
THRESHOLDS = (0.5, 0.2, 0.2)


@torch.no_grad()
def by_rule(network: nn.Module) -> nn.Module:
    """Every parameter from a generator that is seeded with its name: normal, of variance 2 / fan-in; slopes 0.25.

    Offsets are small, because facenet-pytorch fails on windows that were moved out of the picture.
    """
    for name, parameter in network.named_parameters():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if "prelu" in name:
            parameter.fill_(0.25)
            continue
        deviation = 0.1 if parameter.ndim == 1 else (2 / parameter[0].numel()) ** 0.5
        if name.split(".")[0] in ("conv4_2", "dense5_2", "dense6_2"):
            deviation *= 0.1
        parameter.copy_(torch.from_numpy(rng.normal(0, deviation, tuple(parameter.shape))))
    return network.eval()


def inputs() -> dict[str, Tensor]:
    """Windows and pictures: real pixels."""
    from paperzoo.data.scenes import photographs

    person, cat = photographs()[2], photographs()[3]
    pictures = torch.stack([person[:, 40:200, 150:330], cat[:, 60:220, 90:270]]).float()
    small = ((pictures[:, :, ::3, ::3] - 127.5) / 128).contiguous()
    return {
        "pnet": small[:, :, :29, :40],
        "rnet": torch.stack([small[0, :, i : i + 24, i : i + 24] for i in (0, 9, 17)]),
        "onet": torch.stack([small[1, :, i : i + 48, i : i + 48] for i in (0, 3)]),
        "pictures": pictures,
    }


def main() -> None:
    from facenet_pytorch.models.mtcnn import ONet, PNet, RNet
    from facenet_pytorch.models.utils.detect_face import detect_face
    from safetensors.torch import save_file

    nets = {name: by_rule(kind(pretrained=False)) for name, kind in (("pnet", PNet), ("rnet", RNet), ("onet", ONet))}
    given, stored = inputs(), {}
    with torch.no_grad():
        for name, net in nets.items():
            for i, value in enumerate(net(given[name])):
                stored[f"{name}.{i}"] = value.contiguous()
        boxes, points = detect_face(
            given["pictures"].permute(0, 2, 3, 1), 20, *nets.values(), THRESHOLDS, 0.709, torch.device("cpu")
        )
    for i, (b, p) in enumerate(zip(boxes, points, strict=True)):
        stored[f"boxes.{i}"] = torch.from_numpy(np.asarray(b, dtype=np.float32))
        stored[f"points.{i}"] = torch.from_numpy(np.asarray(p, dtype=np.float32))
    save_file(stored, str(FILE))
    print({name: tuple(value.shape) for name, value in stored.items()})


if __name__ == "__main__":
    main()
