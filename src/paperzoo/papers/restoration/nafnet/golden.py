"""How golden.safetensors was made: spandrel 0.4.2 (the released NAFNet) on weights from a rule, so that none are stored.

pip install --target FOLDER --no-deps spandrel==0.4.2 einops        (it needs torch, torchvision, safetensors)
PYTHONPATH=FOLDER python -m paperzoo.papers.restoration.nafnet.golden
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from paperzoo.papers.restoration.swinir.golden import picture

FILE = Path(__file__).with_name("golden.safetensors")

SIDD = {"enc_blk_nums": [2, 2, 4, 8], "middle_blk_num": 12, "dec_blk_nums": [2, 2, 2, 2]}
GOPRO = {"enc_blk_nums": [1, 1, 1, 28], "middle_blk_num": 1, "dec_blk_nums": [1, 1, 1, 1]}

# variant -> the released network's arguments, and the shape of its input: sides that 16 divides, and others
NETWORKS = {
    "nafnet_sidd_width32": ({"width": 32, **SIDD}, (2, 3, 33, 20)),
    "nafnet_gopro_width32": ({"width": 32, **GOPRO}, (1, 3, 48, 32)),
    "nafnet_gopro_width64": ({"width": 64, **GOPRO}, (1, 3, 17, 32)),
}

# a narrow network in training mode: the loss of one batch and gradients
TRAINED = {"width": 4, "enc_blk_nums": [1, 2], "middle_blk_num": 1, "dec_blk_nums": [2, 1], "img_channel": 1}
GRADIENTS = (
    "intro.weight",
    "encoders.1.0.norm1.weight",
    "encoders.1.1.conv2.weight",
    "middle_blks.0.sca.1.weight",
    "middle_blks.0.beta",
    "decoders.0.1.conv5.bias",
    "ups.0.0.weight",
    "decoders.1.0.gamma",
)


def by_rule(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values for every name of a state, from a generator seeded with the name: signals neither grow nor fade.

    beta and gamma, which start at zero, get 0.1 to 0.3, so that every branch counts.
    """
    made = {}
    for name, value in state.items():
        rng, shape = np.random.default_rng(zlib.crc32(name.encode())), tuple(value.shape)
        if name.endswith(("beta", "gamma")):
            values = rng.uniform(0.1, 0.3, shape)
        elif value.ndim == 1 and name.endswith("weight"):
            values = rng.uniform(0.5, 1.5, shape)
        elif value.ndim == 1:
            values = rng.normal(0, 0.1, shape)
        else:
            values = rng.normal(0, (1 / value[0].numel()) ** 0.5, shape)
        made[name] = torch.from_numpy(values).to(value.dtype)
    return made


def loss_and_gradients(network: nn.Module) -> list[Tensor]:
    """Of minus the PSNR of one batch of the narrow network, in training mode."""
    restored = network.train()(picture((2, 1, 12, 10), "degraded"))
    error = (restored - picture((2, 1, 12, 10), "clean")).square().mean((1, 2, 3))
    loss = 10 * (error + 1e-8).log10().mean()
    own = dict(network.named_parameters())
    return [loss.detach(), *torch.autograd.grad(loss, [own[name] for name in GRADIENTS])]


def by_definition(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """Layer norm over the channels, written out."""

    def forward(x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        y = centred / (centred.square().mean(1, keepdim=True) + norm.eps).sqrt()
        return y * norm.weight[:, None, None] + norm.bias[:, None, None]

    return forward


def main() -> None:
    from safetensors.torch import save_file
    from spandrel.architectures.NAFNet import NAFNet

    def made(arguments: dict) -> nn.Module:
        network = NAFNet(**arguments)
        network.load_state_dict(by_rule(network.state_dict()))
        return network.eval()

    stored = {}
    for name, (arguments, shape) in NETWORKS.items():
        with torch.no_grad():
            stored[name] = made(arguments)(picture(shape, name)).contiguous()
        print(name, tuple(stored[name].shape), float((stored[name] - picture(shape, name)).std()))
    network = made(TRAINED)
    for (
        module
    ) in network.modules():  # the released norm's backward reads a field that torch has no more: the same by definition
        if type(module).__name__ == "LayerNorm2d":
            module.forward = by_definition(module)
    stored |= dict(zip(("loss", *GRADIENTS), loss_and_gradients(network), strict=True))
    save_file({name: value.contiguous() for name, value in stored.items()}, str(FILE))


if __name__ == "__main__":
    main()
