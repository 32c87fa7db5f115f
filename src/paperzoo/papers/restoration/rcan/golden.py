"""How golden.safetensors was made: spandrel 0.4.2 (the released RCAN) on weights from a rule, so that none are stored.

pip install --target FOLDER --no-deps spandrel==0.4.2 einops        (it needs torch, torchvision, safetensors)
PYTHONPATH=FOLDER python -m paperzoo.papers.restoration.rcan.golden
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.papers.restoration.swinir.golden import picture

FILE = Path(__file__).with_name("golden.safetensors")

# variant -> scale and the shape of its input
NETWORKS = {"rcan_x2": (2, (2, 3, 13, 17)), "rcan_x3": (3, (1, 3, 9, 14)), "rcan_x8": (8, (1, 3, 6, 5))}

# a narrow network in training mode: the loss of one batch and gradients, by the released names
TRAINED = {"n_resgroups": 2, "n_resblocks": 2, "n_feats": 8, "reduction": 4, "scale": 4}
GRADIENTS = (
    "head.0.weight",
    "body.0.body.1.body.0.weight",
    "body.1.body.0.body.3.conv_du.0.weight",
    "body.1.body.1.body.3.conv_du.2.bias",
    "body.1.body.2.bias",
    "body.2.weight",
    "tail.0.2.bias",
    "tail.1.weight",
)


def by_rule(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values for every name of a released state, from a generator seeded with the name; the fixed means stay as they are.

    Branches are so small that two hundred of them do not let signals grow.
    """
    made = {}
    for name, value in state.items():
        rng, shape = np.random.default_rng(zlib.crc32(name.encode())), tuple(value.shape)
        if "_mean." in name:
            values = value.numpy()
        elif value.ndim == 1:
            values = rng.normal(0, 0.1, shape)
        else:
            values = rng.normal(0, (0.7 / value[0].numel()) ** 0.5, shape)
        made[name] = torch.from_numpy(np.asarray(values)).to(value.dtype)
    return made


def loss_and_gradients(network: nn.Module, names: tuple[str, ...]) -> list[Tensor]:
    """Of the L1 loss of one batch of the narrow network, in training mode."""
    loss = F.l1_loss(network.train()(picture((2, 3, 6, 7), "degraded")), picture((2, 3, 24, 28), "clean"))
    own = dict(network.named_parameters())
    return [loss.detach(), *torch.autograd.grad(loss, [own[name] for name in names])]


def main() -> None:
    from safetensors.torch import save_file
    from spandrel.architectures.RCAN import RCAN

    def made(**arguments) -> nn.Module:
        network = RCAN(**arguments)
        network.load_state_dict(by_rule(network.state_dict()))
        return network.eval()

    stored = {}
    for name, (scale, shape) in NETWORKS.items():
        with torch.no_grad():
            stored[name] = made(scale=scale)(picture(shape, name)).contiguous()
        print(name, tuple(stored[name].shape), float(stored[name].std()), float(stored[name].mean()))
    network = made(**TRAINED)
    stored |= dict(zip(("loss", *GRADIENTS), loss_and_gradients(network, GRADIENTS), strict=True))
    stored["names"] = torch.tensor([zlib.crc32(name.encode()) for name in sorted(made(scale=2).state_dict())])
    save_file({name: value.contiguous() for name, value in stored.items()}, str(FILE))


if __name__ == "__main__":
    main()
