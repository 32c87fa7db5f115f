"""EDSR and MDSR against the released networks, by stored numbers, and written out with functions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.restoration.dncnn.golden import picture
from paperzoo.papers.restoration.edsr import golden
from paperzoo.papers.restoration.edsr.model import DIV2K_MEAN, EDSR, MDSR, Upsampler, edsr_baseline

STORED = Path(__file__).with_name("golden.safetensors")


def filled(network: nn.Module, factor: float = 1.0) -> nn.Module:
    network.load_state_dict(golden.weights(network.state_dict(), factor))
    return network


def shuffled(x: Tensor, factor: int) -> Tensor:
    """Channel c * factor^2 + i * factor + j becomes pixel (i, j) of each square of channel c."""
    count, channels, height, width = x.shape
    out = x.new_zeros(count, channels // factor**2, height * factor, width * factor)
    for i in range(factor):
        for j in range(factor):
            out[:, :, i::factor, j::factor] = x[:, i * factor + j :: factor**2]
    return out


class Plain(nn.Module):
    """The figures 2c, 3 and 5 as one function over the parameters of a network."""

    def __init__(self, network: EDSR | MDSR) -> None:
        super().__init__()
        for name, module in network.named_children():
            setattr(self, name, module)
        self.known = {"scale": network.scale, "range": network.value_range, "network": [network]}

    def forward(self, images: Tensor) -> Tensor:
        state = dict(self.named_parameters())
        (network,) = self.known["network"]
        factor, several = self.known["scale"], isinstance(network, MDSR)
        mean = (torch.tensor(DIV2K_MEAN) * self.known["range"]).to(images)[
            :, None, None
        ]  # rounded to float32, as stored

        def conv(x: Tensor, name: str) -> Tensor:
            weight = state[f"{name}.weight"]
            return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

        def block(x: Tensor, name: str, scale: float = 1.0) -> Tensor:
            return x + scale * conv(conv(x, f"{name}.body.0").relu(), f"{name}.body.2")

        x = conv(images * self.known["range"] - mean, "head.0")
        if several:
            k = network.scales.index(factor)
            x = block(block(x, f"pre_process.{k}.0"), f"pre_process.{k}.1")
        blocks = len(network.body) - 1
        y = x
        for i in range(blocks):
            y = block(y, f"body.{i}", network.body[i].res_scale)
        y = x + conv(y, f"body.{blocks}")
        up = f"upsample.{k}" if several else "tail.0"
        for i, step in enumerate([3] if factor == 3 else [2] * {2: 1, 4: 2, 8: 3}[factor]):
            y = shuffled(conv(y, f"{up}.{2 * i}"), step)
        return (conv(y, "tail.0" if several else "tail.1") + mean) / self.known["range"]


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    stored = load_file(str(STORED))
    against = f"{golden.VERSION}, stored"
    for name, (scale, blocks, width, res_scale, shape, factor) in golden.EDSRS.items():
        network = filled(EDSR(scale, blocks, width, res_scale), factor).eval()
        yield Case(name, network, lambda _, a=stored[name]: a, (picture(3, *shape),), against)
    blocks, width, factor = golden.MDSR_SIZE
    for scale in (2, 3, 4):
        network = filled(MDSR((2, 3, 4), blocks, width, scale), factor).eval()
        answer = stored[f"mdsr x{scale}"]
        yield Case(f"MDSR x{scale}", network, lambda _, a=answer: a, (picture(3, *golden.MDSR_PICTURES),), against)
    torch.manual_seed(0)
    for name, network in (
        ("EDSR x4", EDSR(4, 3, 12, 0.1, value_range=1.0)),
        ("EDSR x3", EDSR(3, 2, 8)),
        ("MDSR x4", MDSR((2, 3, 4), 2, 8, 4)),
    ):
        network = network.double().train()
        x = torch.rand(2, 3, 9, 7, dtype=torch.float64)
        yield Case(
            f"{name}, training step, every gradient", network, Plain(network), (x,), "the figures written out",
            gradients=True, rtol=1e-6, atol=1e-8,
        )  # fmt: skip
    first, second = torch.nn.Conv2d(4, 16, 3, padding=1), torch.nn.Conv2d(4, 16, 3, padding=1)
    up = Upsampler(4, 4)
    up[0].load_state_dict(first.state_dict())
    up[2].load_state_dict(second.state_dict())
    yield Case(
        "sub-pixel convolution",
        up,
        lambda x: shuffled(second(shuffled(first(x), 2)), 2),
        (torch.rand(2, 4, 5, 6),),
        "pixel by pixel",
    )
    network = filled(EDSR(2, 5, 8))
    yield Case(
        "receptive radius",
        lambda: reach(network),
        lambda: network.receptive_radius,
        (),
        "the gradient's extent",
        atol=0,
        rtol=0,
    )


def reach(network: nn.Module) -> int:
    """How many small pixels to one side change the middle of the large picture: the largest over the pixel's sub-pixels."""
    x = torch.rand(1, 3, 63, 63, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(x)[0, :, 62:64, 62:64].sum(), x)
    seen = (gradient[0].abs().amax((0, 1)) > 0).nonzero().flatten()
    return max(31 - int(seen.min()), int(seen.max()) - 31)


class Reference(nn.Module):
    """The baseline as the released code runs it: every sum in place, the mean shifts as convolutions."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        network = edsr_baseline(scale)
        for name, module in network.named_children():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.sub_mean(x * 255))
        y = x
        for block in list(self.body)[:-1]:
            change = block.body(y).mul(block.res_scale)
            change += y
            y = change
        y = self.body[-1](y)
        y += x
        return self.add_mean(self.tail(y)) / 255


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    return {
        "edsr_baseline": Pair(
            lambda: edsr_baseline(2),
            lambda: Reference(2),
            lambda batch: (torch.rand(batch, 3, 64, 64),),
            "EDSR-PyTorch's forward pass",
        )
    }
