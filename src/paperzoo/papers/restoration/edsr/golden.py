"""What the released networks answer. Run as a module with the folder `src` of EDSR-PyTorch importable; writes golden.safetensors.

Weights and pictures follow from sines (see DnCNN's golden.py), so that neither has to be stored; the mean shifts keep what they are.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from torch import Tensor

from paperzoo.papers.restoration.dncnn import golden

VERSION = "EDSR-PyTorch"
# scale, blocks, channels, res_scale, (pictures, height, width), and a factor that keeps the answers near those of pictures
EDSRS = {
    "baseline x2": (2, 16, 64, 1.0, (1, 12, 14), 1.0),
    "x3, one block of 256 channels": (3, 1, 256, 0.1, (1, 7, 9), 1.0),
    "x4": (4, 3, 16, 0.1, (2, 8, 11), 0.6),
    "x8": (8, 2, 8, 1.0, (1, 5, 6), 1.0),
}
MDSR_SIZE = (3, 16, 0.2)  # blocks, channels, factor
MDSR_PICTURES = (2, 9, 10)


def weights(state: dict[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]:
    """Values for a state, by the names' order in the alphabet, kernels times a factor; the mean shifts as they are."""
    inner = {name: state[name] for name in sorted(state) if "_mean." not in name}
    found = {name: value * factor if value.ndim > 1 else value for name, value in golden.weights(inner).items()}
    return state | found


def main() -> None:
    import torch
    from model.edsr import EDSR
    from model.mdsr import MDSR
    from safetensors.torch import save_file

    answers = {}
    with torch.inference_mode():
        for name, (scale, blocks, width, res_scale, shape, factor) in EDSRS.items():
            args = SimpleNamespace(
                scale=[scale], n_resblocks=blocks, n_feats=width, res_scale=res_scale, rgb_range=255, n_colors=3
            )
            network = EDSR(args).eval()
            network.load_state_dict(weights(network.state_dict(), factor))
            answers[name] = network(golden.picture(3, *shape) * 255) / 255
        args = SimpleNamespace(
            scale=[2, 3, 4], n_resblocks=MDSR_SIZE[0], n_feats=MDSR_SIZE[1], rgb_range=255, n_colors=3
        )
        network = MDSR(args).eval()
        network.load_state_dict(weights(network.state_dict(), MDSR_SIZE[2]))
        for k, scale in enumerate((2, 3, 4)):
            network.set_scale(k)
            answers[f"mdsr x{scale}"] = network(golden.picture(3, *MDSR_PICTURES) * 255) / 255
    save_file({k: v.contiguous() for k, v in answers.items()}, str(Path(__file__).with_name("golden.safetensors")))


if __name__ == "__main__":
    main()
