"""How golden.safetensors was made: the authors' layer, and the most used PyTorch port's network, on weights from a rule, so that none are stored.

git clone https://github.com/NVIDIA/partialconv LAYER
git clone https://github.com/naoto0804/pytorch-inpainting-with-partial-conv PORT
python -m paperzoo.papers.restoration.partial_conv_inpainting.golden LAYER PORT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from paperzoo.papers.segmentation.pspnet.golden import by_rule

FILE = Path(__file__).with_name("golden.safetensors")
LAYERS = 6
# channels in and out, kernel, stride, of the authors' layer; the third has the masks of a decoder
SHAPES = ((3, 8, 7, 2), (6, 4, 5, 2), (7, 5, 3, 1))
WATCHED = (
    "enc_1.conv.input_conv",
    "enc_4.conv.input_conv",
    "enc_6.bn",
    "dec_5.conv.input_conv",
    "dec_2.bn",
    "dec_1.conv.input_conv",
)


def pictures() -> Tensor:
    """Two parts of photographs, 0 … 1: (2, 3, 64, 128)."""
    from paperzoo.data.scenes import photographs

    person, cat = photographs()[2], photographs()[3]
    return torch.stack([person[:, 20:148:2, 60:316:2], cat[:, 40:168:2, 30:286:2]]).float() / 255


def holes() -> Tensor:
    """(2, 1, 64, 128), 1 where known: large holes, so that some of the second layer's windows see nothing."""
    masks = torch.ones(2, 1, 64, 128)
    masks[0, :, 8:50, 20:100] = 0
    masks[1, :, :30, 70:] = 0
    masks[1, :, 40:44] = 0
    return masks


def layer_inputs(channels: int) -> tuple[Tensor, Tensor]:
    """x and its mask, (2, channels, 13, 16) each; the first 3 channels share a mask, the others another."""
    rng = torch.Generator().manual_seed(channels)
    x = torch.randn(2, channels, 13, 16, generator=rng)
    mask = torch.ones(2, channels, 13, 16)
    mask[:, :3, 2:9, 3:14] = 0
    mask[:, 3:, 4:12, :9] = 0
    return x, mask


def layer_weights(shape: tuple[int, int, int, int]) -> dict[str, Tensor]:
    inputs, outputs, kernel, _ = shape
    return by_rule({"weight": torch.empty(outputs, inputs, kernel, kernel), "bias": torch.empty(outputs)})


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the rule, times the number of a window's values, by which the port's layers divide. Constant kernels stay."""
    made = by_rule(state)
    for name, value in state.items():
        if "mask_conv" in name:
            made[name] = value
        elif name.endswith("input_conv.weight"):
            made[name] = made[name] * made[name][0].numel()
    return made


def sampled(gradient: Tensor) -> Tensor:
    return gradient.flatten()[:: max(1, gradient.numel() // 50)].contiguous()


def main() -> None:
    import importlib.util

    from safetensors.torch import save_file

    def opened(name: str, path: Path):
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    layer = opened("layer", Path(sys.argv[1]) / "models" / "partialconv2d.py").PartialConv2d
    port = opened("port", Path(sys.argv[2]) / "net.py").PConvUNet
    stored = {}
    for i, shape in enumerate(SHAPES):
        inputs, outputs, kernel, stride = shape
        theirs = layer(inputs, outputs, kernel, stride, kernel // 2, multi_channel=True, return_mask=True)
        theirs.load_state_dict(layer_weights(shape))
        with torch.no_grad():
            out, mask = theirs(*layer_inputs(inputs))
        stored[f"layer{i}.out"], stored[f"layer{i}.mask"] = out, mask[:, :1].contiguous()
    network = port(LAYERS)
    masks = holes().expand(-1, 3, -1, -1)
    network.load_state_dict(weights(network.state_dict()))
    network.train(False)  # its own version returns nothing
    with torch.no_grad():
        stored["answer"] = network(pictures(), masks)[0][:, :, ::2, ::2].contiguous()
    network.double().train(True)
    out, _ = network(pictures().double(), masks.double())
    loss = (out - pictures()).square().mean()
    loss.backward()
    stored["loss"] = loss.detach()
    for name in WATCHED:
        part: nn.Module = network.get_submodule(name)
        stored[name] = sampled(part.weight.grad)
    save_file(stored, str(FILE))


if __name__ == "__main__":
    main()
