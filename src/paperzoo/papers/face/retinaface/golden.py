"""How golden.safetensors was made: facexlib 0.3.0 on weights from a rule, so that none are stored.

pip install --target FOLDER --no-deps facexlib==0.3.0        (it needs opencv-python)
PYTHONPATH=FOLDER python -m paperzoo.papers.face.retinaface.golden
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).with_name("golden.safetensors")
NETWORKS = {"resnet50": "retinaface_resnet50", "mobile0.25": "retinaface_mobilenet025"}
KEPT = 97  # of the outputs' rows every 97th is stored
THRESHOLD, SUPPRESSION = 0.5, 0.4


def released_names(names: list[str]) -> list[str]:
    """Names of this project's MobileNet layers as the released code has them; others come back unchanged."""
    blocks = [(stage, block) for stage, depth in enumerate((1, 2, 2, 6, 2)) for block in range(depth)]
    layers = {"conv_dw": 0, "bn1": 1, "conv_pw": 3, "bn2": 4}
    renamed = []
    for name in names:
        parts = name.split(".")
        if parts[:2] in (["body", "conv_stem"], ["body", "bn1"]) and "body.conv_stem.weight" in names:
            name = f"body.stage1.0.{int(parts[1] == 'bn1')}.{parts[2]}"
        elif parts[:2] == ["body", "blocks"]:
            number = 1 + blocks.index((int(parts[2]), int(parts[3])))
            stage, layer = (1, number) if number < 6 else (2, number - 6) if number < 12 else (3, number - 12)
            name = f"body.stage{stage}.{layer}.{layers[parts[4]]}.{parts[5]}"
        renamed.append(name)
    return renamed


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
            gain = 0.001 if name.startswith(("BboxHead", "ClassHead")) else 0.03 if "Head" in name else 1.4
            values = rng.normal(0, (gain / value[0].numel()) ** 0.5, shape)
        made[name] = torch.from_numpy(np.asarray(values)).to(value.dtype)
    return made


def pictures() -> Tensor:
    """RGB pixels uint8 (2, 3, 96, 120)."""
    from paperzoo.data.scenes import photographs

    person, cat = photographs()[2], photographs()[3]
    return torch.stack([person[:, 40:232:2, 130:370:2], cat[:, 60:252:2, 90:330:2]])


def main() -> None:
    from facexlib.detection.retinaface import RetinaFace
    from safetensors.torch import save_file

    stored = {}
    rgb = pictures().float()
    pixels = rgb.flip(1) - torch.tensor([104.0, 117, 123])[:, None, None]  # BGR less the mean
    for network in NETWORKS:
        model = RetinaFace(network, device=torch.device("cpu"), phase="train").eval()
        model.load_state_dict(by_rule(model.state_dict()))
        with torch.no_grad():
            boxes, logits, points = model(pixels)
            stored |= {
                f"{network}.logits": logits[:, ::KEPT].contiguous(),
                f"{network}.offsets": boxes[:, ::KEPT].contiguous(),
                f"{network}.points": points[:, ::KEPT].contiguous(),
            }
            model.phase = "test"
            bgr = rgb[0].flip(0).permute(1, 2, 0).numpy()
            found = model.detect_faces(bgr, THRESHOLD, SUPPRESSION)
        stored[f"{network}.found"] = torch.from_numpy(found.astype(np.float32))[:40].contiguous()
        print(network, logits.std(), boxes.std(), points.std(), found.shape)
    save_file(stored, str(FILE))


if __name__ == "__main__":
    main()
