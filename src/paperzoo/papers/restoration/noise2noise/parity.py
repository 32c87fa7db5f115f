"""Noise2Noise: the network against a version written out from the released code, the losses and the noise against their definitions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.data.restoration import Pictures
from paperzoo.engine.parity import Case
from paperzoo.papers.restoration.noise2noise.model import NoiseUNet, n2n_unet
from paperzoo.papers.restoration.noise2noise.recipe import PRESETS, Corruption, Noise2Noise, TwoCopies


class Plain(nn.Module):
    """The released network, line by line, for extents that are multiples of 32."""

    def __init__(self, network: NoiseUNet) -> None:
        super().__init__()
        for name, module in network.named_children():
            setattr(self, name, module)

    def forward(self, images: Tensor) -> Tensor:
        state = dict(self.named_parameters())

        def conv(name: str, x: Tensor) -> Tensor:
            return F.conv2d(F.pad(x, (1, 1, 1, 1)), state[f"{name}.weight"], state[f"{name}.bias"])

        def conv_lr(name: str, x: Tensor) -> Tensor:
            x = conv(name, x)
            return torch.where(x > 0, x, 0.1 * x)

        def pool(x: Tensor) -> Tensor:
            return torch.stack([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]).amax(0)

        def twice(x: Tensor) -> Tensor:
            return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

        x0 = images - 0.5
        x1 = pool(conv_lr("enc_conv1", conv_lr("enc_conv0", x0)))
        x2 = pool(conv_lr("enc_conv2", x1))
        x3 = pool(conv_lr("enc_conv3", x2))
        x4 = pool(conv_lr("enc_conv4", x3))
        y = conv_lr("enc_conv6", pool(conv_lr("enc_conv5", x4)))
        for k, passed in ((5, x4), (4, x3), (3, x2), (2, x1)):
            y = conv_lr(f"dec_conv{k}b", conv_lr(f"dec_conv{k}", torch.cat([twice(y), passed], 1)))
        y = conv_lr("dec_conv1b", conv_lr("dec_conv1a", torch.cat([twice(y), x0], 1)))
        return conv("dec_conv1", y) + 0.5


class Bare(Noise2Noise):
    """The recipe's loss alone, at a share of the steps."""

    def __init__(self, progress: float) -> None:
        self.config = replace(PRESETS["embedded"], annealed=True, steps=100)
        self.runtime = type("At", (), {"step": round(100 * progress)})()


def power_by_hand(restored: Tensor, noisy: Tensor, gamma: float) -> Tensor:
    terms = [
        (abs(float(a) - float(b)) + 1e-8) ** gamma for a, b in zip(restored.flatten(), noisy.flatten(), strict=True)
    ]
    return torch.tensor(sum(terms) / len(terms))


def moments(corruption: Corruption, level: float) -> Tensor:
    """Mean and deviation of many noisy copies of one grey."""
    noisy = corruption(torch.full((1, 400, 400), level), torch.Generator().manual_seed(3))
    return torch.stack([noisy.mean(), noisy.std()])


def copies() -> tuple[Tensor, Tensor]:
    """The noise of both sides of many pairs drawn from a grey picture."""
    torch.manual_seed(5)
    data = TwoCopies(Pictures([torch.full((3, 64, 64), 51, dtype=torch.uint8)]), [[Corruption(sigma=25.0)]], 48, 3)
    drawn = [data[0] for _ in range(20)]
    return tuple(torch.stack([pair[k] - 0.2 for pair in drawn]) for k in (0, 1))


def independence() -> Tensor:
    """Deviation of the two noises in 1/255, and their correlation."""
    first, second = copies()
    return torch.stack(
        [first.std() * 255, second.std() * 255, 25 * (first * second).mean() / (first.std() * second.std())]
    )


def gradient_of(network: nn.Module, x: Tensor, targets: list[Tensor]) -> list[Tensor]:
    loss = sum(F.mse_loss(network(x), y) for y in targets) / len(targets)
    return list(torch.autograd.grad(loss, list(network.parameters())))


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    for width, shape in ((48, (1, 3, 64, 96)), (6, (2, 3, 32, 64)), (12, (3, 1, 96, 32))):
        network = NoiseUNet(shape[1], width).double()
        x = torch.rand(shape, dtype=torch.float64)
        yield Case(
            f"U-Net of {width} channels, {shape[2]} x {shape[3]}, every gradient", network, Plain(network), (x,),
            "the released network, line by line", gradients=True, rtol=1e-6, atol=1e-8,
        )  # fmt: skip
    network, x = n2n_unet().eval(), torch.rand(1, 3, 45, 70)
    padded = F.pad(x, (0, 26, 0, 19), mode="replicate")
    yield Case("other sizes", network, lambda x: Plain(network)(padded)[..., :45, :70], (x,), "padded by hand")

    restored, noisy = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    for progress in (0.0, 0.5, 0.9):
        gamma = 2 * (1 - progress)
        yield Case(
            f"annealed loss at gamma {gamma:g}",
            Bare(progress).loss,
            lambda a, b, g=gamma: power_by_hand(a, b, g),
            (restored, noisy),
            "section 3.2",
        )
    level = 0.6
    for name, corruption, wanted in (
        ("gaussian", Corruption(sigma=25.0), (level, 25 / 255)),
        ("poisson", Corruption(noise="poisson", peak=30.0), (level, (level / 30) ** 0.5)),
        ("impulse", Corruption(noise="impulse", share=0.5), (0.55, (0.25 * (level - 0.5) ** 2 + 0.5 / 12) ** 0.5)),
    ):
        yield Case(
            f"mean and deviation, {name}",
            lambda c=corruption: moments(c, level),
            lambda w=wanted: torch.tensor(w),
            (),
            "of the distribution",
            rtol=0.02,
            atol=0,
        )
    yield Case(
        "the two copies",
        independence,
        lambda: torch.tensor([25.0, 25.0, 0.0]),
        (),
        "equal levels, no correlation",
        rtol=0.02,
        atol=0.3,
    )
    small, x = NoiseUNet(1, 3).double(), torch.rand(1, 1, 32, 32, dtype=torch.float64)
    targets = [torch.rand(1, 1, 32, 32, dtype=torch.float64) for _ in range(4)]
    mean = [torch.stack(targets).mean(0)]
    yield Case(
        "many noisy targets teach what their mean teaches",
        lambda: gradient_of(small, x, targets),
        lambda: gradient_of(small, x, mean),
        (),
        "section 2: the gradient is linear in the target",
        rtol=1e-8,
        atol=1e-10,
    )
