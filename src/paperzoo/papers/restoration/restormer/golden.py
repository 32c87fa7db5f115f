"""How golden.safetensors was made: the released code on weights from a rule, so that none are stored.

restormer_arch.py of github.com/swz30/Restormer (basicsr/models/archs, commit df766d5) in a FOLDER, with einops 0.8.2
PYTHONPATH=FOLDER python -m paperzoo.papers.restoration.restormer.golden
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

# variant -> the released network's arguments, and the shape of its input, of which 8 divides the sides
NETWORKS = {
    "restormer": ({}, (1, 3, 24, 16)),
    "restormer_denoising": ({"LayerNorm_type": "BiasFree"}, (2, 3, 16, 24)),
    "restormer_dual_pixel": ({"inp_channels": 6, "dual_pixel_task": True}, (1, 6, 16, 16)),
}

# a narrow network in training mode: the loss of one batch and gradients
TRAINED = {"inp_channels": 1, "out_channels": 1, "dim": 4, "num_blocks": [1, 2, 1, 1], "num_refinement_blocks": 1}
HEADS = [1, 2, 2, 4]
GRADIENTS = (
    "patch_embed.proj.weight",
    "encoder_level2.1.attn.temperature",
    "encoder_level2.0.norm1.body.weight",
    "latent.0.attn.qkv_dwconv.weight",
    "reduce_chan_level3.weight",
    "decoder_level1.0.ffn.project_in.weight",
    "refinement.0.ffn.dwconv.weight",
    "output.weight",
)


def by_rule(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values for every name of a state, from a generator seeded with the name: signals neither grow nor fade."""
    made = {}
    for name, value in state.items():
        rng, shape = np.random.default_rng(zlib.crc32(name.encode())), tuple(value.shape)
        if name.endswith("temperature"):
            values = rng.uniform(1, 4, shape)
        elif value.ndim == 1:
            values = rng.uniform(0.5, 1.5, shape) if name.endswith("weight") else rng.normal(0, 0.1, shape)
        else:
            values = rng.normal(0, (1 / value[0].numel()) ** 0.5, shape)
        made[name] = torch.from_numpy(values).to(value.dtype)
    return made


def loss_and_gradients(network: nn.Module) -> list[Tensor]:
    """Of the L1 loss of one batch of the narrow network, in training mode."""
    loss = F.l1_loss(network.train()(picture((2, 1, 16, 8), "degraded")), picture((2, 1, 16, 8), "clean"))
    own = dict(network.named_parameters())
    return [loss.detach(), *torch.autograd.grad(loss, [own[name] for name in GRADIENTS])]


def main() -> None:
    from restormer_arch import Restormer
    from safetensors.torch import save_file

    def made(**arguments) -> nn.Module:
        network = Restormer(**arguments)
        network.load_state_dict(by_rule(network.state_dict()))
        return network.eval()

    stored = {}
    for name, (arguments, shape) in NETWORKS.items():
        with torch.no_grad():
            stored[name] = made(**arguments)(picture(shape, name)).contiguous()
        print(name, tuple(stored[name].shape), float(stored[name].std()))
    for kind in ("WithBias", "BiasFree"):
        network = made(**TRAINED, heads=HEADS, LayerNorm_type=kind)
        found = dict(zip(("loss", *GRADIENTS), loss_and_gradients(network), strict=True))
        stored |= {f"{kind}.{name}": value.contiguous() for name, value in found.items()}
    save_file(stored, str(FILE))


if __name__ == "__main__":
    main()
