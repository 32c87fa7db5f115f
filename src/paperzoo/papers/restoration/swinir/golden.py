"""How golden.safetensors was made: spandrel 0.4.2 (the released SwinIR) on weights from a rule, so that none are stored.

pip install --target FOLDER --no-deps spandrel==0.4.2 einops        (it needs torch, torchvision, safetensors)
PYTHONPATH=FOLDER python -m paperzoo.papers.restoration.swinir.golden
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FILE = Path(__file__).with_name("golden.safetensors")

PUBLISHED = {
    "embed_dim": 180,
    "depths": [6] * 6,
    "num_heads": [6] * 6,
    "window_size": 8,
    "mlp_ratio": 2,
    "img_size": 48,
}
LIGHT = PUBLISHED | {"embed_dim": 60, "depths": [6] * 4, "num_heads": [6] * 4, "upsampler": "pixelshuffledirect"}
LARGE = PUBLISHED | {"embed_dim": 240, "depths": [6] * 9, "num_heads": [8] * 9, "resi_connection": "3conv"}
SAME = {"upsampler": "", "upscale": 1}

# variant -> the released network's arguments, and the shape of its input: sides that windows divide, and others
NETWORKS = {
    "swinir_classical_x3": (PUBLISHED | {"upsampler": "pixelshuffle", "upscale": 3}, (1, 3, 11, 16)),
    "swinir_classical_x4": (PUBLISHED | {"upsampler": "pixelshuffle", "upscale": 4}, (1, 3, 8, 9)),
    "swinir_light_x2": (LIGHT | {"upscale": 2}, (2, 3, 17, 20)),
    "swinir_real_x2": (PUBLISHED | {"upsampler": "nearest+conv", "upscale": 2}, (1, 3, 13, 8)),
    "swinir_real_large_x4": (LARGE | {"upsampler": "nearest+conv", "upscale": 4}, (1, 3, 8, 8)),
    "swinir_colour_denoising": (PUBLISHED | SAME, (1, 3, 24, 21)),
    "swinir_grey_jpeg": (PUBLISHED | SAME | {"in_chans": 1, "window_size": 7, "img_range": 255.0, "img_size": 49}, (2, 1, 15, 21)),
}  # fmt: skip

# a narrow network in training mode: the loss of one batch and gradients
NARROW = {"embed_dim": 12, "depths": [2, 3], "num_heads": [2, 3], "window_size": 4, "mlp_ratio": 2}
TRAINED = NARROW | {"upsampler": "pixelshuffle", "upscale": 2, "img_size": 12, "drop_path_rate": 0.0}
GRADIENTS = (
    "conv_first.weight",
    "patch_embed.norm.weight",
    "layers.0.residual_group.blocks.1.attn.relative_position_bias_table",
    "layers.1.residual_group.blocks.0.attn.qkv.weight",
    "layers.1.residual_group.blocks.2.mlp.fc1.bias",
    "layers.1.conv.weight",
    "upsample.0.bias",
)


def by_rule(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values for every floating-point name of a state, from a generator seeded with the name: signals neither grow nor fade."""
    made = {}
    for name, value in state.items():
        rng, shape = np.random.default_rng(zlib.crc32(name.encode())), tuple(value.shape)
        if name.endswith("relative_position_bias_table"):
            values = rng.normal(0, 1, shape)
        elif value.ndim == 1 and "norm" in name and name.endswith("weight"):
            values = rng.uniform(0.5, 1.5, shape)
        elif value.ndim == 1:
            values = rng.normal(0, 0.1, shape)
        else:
            values = rng.normal(0, (1 / value[0].numel()) ** 0.5, shape)
        made[name] = torch.from_numpy(values).to(value.dtype)
    return made


def picture(shape: tuple[int, int, int, int], name: str) -> Tensor:
    """Waves and noise in [0, 1], from the name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    waves = np.sin(np.arange(shape[2])[:, None] * 0.7) * np.cos(np.arange(shape[3]) * 0.4)
    return torch.from_numpy(np.clip(0.5 + 0.3 * waves + rng.normal(0, 0.1, shape), 0, 1)).float()


def loss_and_gradients(network: nn.Module) -> list[Tensor]:
    """Of the L1 loss of one batch of the narrow network, in training mode."""
    loss = F.l1_loss(network.train()(picture((2, 3, 12, 8), "degraded")), picture((2, 3, 24, 16), "clean"))
    own = dict(network.named_parameters())
    return [loss.detach(), *torch.autograd.grad(loss, [own[name] for name in GRADIENTS])]


def main() -> None:
    from safetensors.torch import save_file
    from spandrel.architectures.SwinIR import SwinIR

    def made(arguments: dict) -> nn.Module:
        network = SwinIR(**arguments)
        own = network.state_dict()
        learned = {name: own[name] for name, _ in network.named_parameters()}
        network.load_state_dict({**own, **by_rule(learned)})
        return network.eval()

    stored = {}
    for name, (arguments, shape) in NETWORKS.items():
        with torch.no_grad():
            stored[name] = made(arguments)(picture(shape, name)).contiguous()
        print(name, tuple(stored[name].shape), float(stored[name].std()))
    network = made(TRAINED)
    stored |= dict(zip(("loss", *GRADIENTS), loss_and_gradients(network), strict=True))
    stored["names"] = torch.tensor([zlib.crc32(name.encode()) for name in sorted(network.state_dict())])
    save_file({name: value.contiguous() for name, value in stored.items()}, str(FILE))


if __name__ == "__main__":
    main()
