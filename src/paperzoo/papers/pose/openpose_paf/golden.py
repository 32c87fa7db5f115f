"""Writes `golden.safetensors`: what a public conversion of OpenPose answers for weights, pictures and people that can be written down.

    python -m paperzoo.papers.pose.openpose_paf.golden path/to/controlnet_aux/open_pose

(controlnet-aux 0.0.10 was used.) `parity.py` makes the same weights, pictures and people by the same rule and compares.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from paperzoo.data.skeletons import OPENPOSE
from paperzoo.papers.pose.openpose_paf.technique import affinity_fields, confidence_maps

FILE = Path(__file__).with_name("golden.safetensors")
SIDE = 184  # pixels: half of OpenPose's 368, so that the conversion keeps the size
CROWDS = (2, 5, 9)  # how many people

TEMPLATE = (  # x, y of the 18 joints of someone who stands, in units of the height
    "0 -.4 0 -.3 -.1 -.29 -.14 -.15 -.15 -.02 .1 -.29 .15 -.16 .17 -.03 -.06 .02 -.07 .23 -.07 .44 .06 .02 .07 .24 .08 .45 "
    "-.02 -.42 .02 -.42 -.05 -.41 .05 -.41"
)


def noise(shape: tuple[int, ...], phase: float = 0.0) -> Tensor:
    """float64 between -0.5 and 0.5, numbers that look random and need no generator."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((n * 12.9898 + phase).sin() * 437.585).remainder(1).reshape(shape) - 0.5


@torch.no_grad()
def write_weights(network: nn.Module) -> nn.Module:
    """Every weight and bias filled with `noise`, by its name."""
    for name, value in network.state_dict().items():
        values = noise(tuple(value.shape), sum(map(ord, name)) % 1009)
        value.copy_(values * (4.9 / value[0].numel() ** 0.5 if value.ndim > 1 else 0.2))
    return network.eval()


def picture() -> Tensor:
    """RGB, (1, 3, 48, 64)."""
    return noise((1, 3, 48, 64), 3.0).float()


def crowd(people: int) -> tuple[Tensor, Tensor]:
    """Fields (38, SIDE, SIDE) and maps (19, SIDE, SIDE), float64, of people who overlap, with gaps and with noise."""
    pose = torch.tensor([float(v) for v in TEMPLATE.split()], dtype=torch.float64).reshape(18, 2)
    where = noise((people, 2), 1.0 + people)
    height = 75 + 30 * noise((people, 1, 1), 2.0)
    keypoints = pose * height + SIDE / 2 + (where * 70)[:, None] + 0.06 * height * noise((people, 18, 2), 5.0)
    weight = (noise((people, 18), 9.0) > -0.4).double()  # one joint in ten is missing
    size, limbs = (SIDE, SIDE), OPENPOSE.limbs
    maps = confidence_maps(keypoints[None], weight[None], size, 1, 3.5)[0]
    fields = affinity_fields(keypoints[None], weight[None], limbs, size, 1, 4.0)[0]
    return fields + 0.1 * noise(tuple(fields.shape), 11.0), maps + 0.05 * noise(tuple(maps.shape), 13.0)


def conversion(folder: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """The modules `model` and `body` of the conversion, without the package around them."""
    import scipy.ndimage

    sys.modules.setdefault("scipy.ndimage.filters", scipy.ndimage)  # where the conversion still looks for it
    package = types.ModuleType("open_pose_conversion")
    package.__path__ = [str(folder)]
    sys.modules["open_pose_conversion"] = package
    return tuple(importlib.import_module(f"open_pose_conversion.{name}") for name in ("util", "model", "body"))[1:]


def assembled(body: types.ModuleType, fields: Tensor, maps: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The conversion's candidates and people for given maps: its resizing hands them out instead."""
    whole = {19: maps.permute(1, 2, 0).numpy(), 38: fields.permute(1, 2, 0).numpy()}
    body.util.smart_resize_k = body.util.smart_resize = lambda x, *_, **__: whole.get(x.shape[2], x)
    finder = body.Body.__new__(body.Body)

    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nothing = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.zeros(1, 38, 4, 4), torch.zeros(1, 19, 4, 4)

    finder.model = Outputs()
    return finder(np.zeros((SIDE, SIDE, 3), dtype=np.uint8))


def main(folder: str) -> None:
    from safetensors.torch import save_file

    model, body = conversion(Path(folder))
    network = write_weights(model.bodypose_model())
    with torch.no_grad():
        fields, maps = network(picture().flip(1))  # the conversion takes BGR
    found = {"fields": fields, "maps": maps}
    for people in CROWDS:
        candidate, subset = assembled(body, *crowd(people))
        found[f"candidates {people}"] = torch.from_numpy(np.asarray(candidate, dtype=np.float64))
        found[f"people {people}"] = torch.from_numpy(np.asarray(subset, dtype=np.float64))
    save_file({name: value.contiguous() for name, value in found.items()}, FILE)
    print(FILE, FILE.stat().st_size, {k: tuple(v.shape) for k, v in found.items()})


if __name__ == "__main__":
    main(sys.argv[1])
