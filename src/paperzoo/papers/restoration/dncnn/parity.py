"""DnCNN against the network of the authors' PyTorch code (as spandrel carries it), by stored numbers and written out with functions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.restoration.dncnn import golden
from paperzoo.papers.restoration.dncnn.model import DnCNN, dncnn_b, dncnn_s, from_official
from paperzoo.papers.restoration.dncnn.recipe import PRESETS, DnCNNRecipe

STORED = Path(__file__).with_name("golden.safetensors")


def plain(network: nn.Module, noisy: Tensor) -> Tensor:
    """The layers one after the other, batch norm from its formula."""
    state = dict(network.named_parameters()) | dict(network.named_buffers())
    numbers = [i for i, layer in enumerate(network.model) if isinstance(layer, nn.Conv2d)]
    x = noisy
    for k, i in enumerate(numbers):
        x = F.conv2d(F.pad(x, (1, 1, 1, 1)), state[f"model.{i}.weight"], state[f"model.{i}.bias"])
        if 0 < k < len(numbers) - 1:
            name = f"model.{i + 1}"
            mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
            if network.training:
                mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            mean, variance, weight, bias = (
                t[:, None, None] for t in (mean, variance, state[f"{name}.weight"], state[f"{name}.bias"])
            )
            x = (x - mean) / (variance + 1e-4).sqrt() * weight + bias
        if k < len(numbers) - 1:
            x = torch.where(x > 0, x, 0.0)
    return noisy - x


def released(state: dict[str, Tensor], depth: int, noisy: Tensor) -> Tensor:
    """The authors' network without batch norm, from a released file's names."""
    x = noisy
    for k in range(depth):
        x = F.conv2d(x, state[f"model.{2 * k}.weight"], state[f"model.{2 * k}.bias"], padding=1)
        x = x.relu() if k < depth - 1 else x
    return noisy - x


class WithoutNorm(nn.Module):
    """The authors' network as its released files have it."""

    def __init__(self, depth: int, width: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for k in range(depth):
            extents = (channels if k == 0 else width, channels if k == depth - 1 else width)
            layers += [nn.Conv2d(*extents, 3, padding=1), nn.ReLU(inplace=True)]
        self.model = nn.Sequential(*layers[:-1])


class Plain(nn.Module):
    """`plain` as a module, with the parameters of a network."""

    def __init__(self, network: DnCNN) -> None:
        super().__init__()
        self.model = network.model
        self.train(network.training)

    def forward(self, x: Tensor) -> Tensor:
        return plain(self, x)


def filled(network: nn.Module) -> nn.Module:
    network.load_state_dict(golden.weights(network.state_dict()))
    return network


def equation_1(restored: Tensor, noisy: Tensor, clean: Tensor) -> Tensor:
    """1 / (2N) sum ||R(y) - (y - x)||^2, patch by patch."""
    total = torch.zeros(())
    for x_hat, y, x in zip(restored, noisy, clean, strict=True):
        residual = y - x_hat
        total = total + (residual - (y - x)).square().sum()
    return total / (2 * len(clean))


class Bare(DnCNNRecipe):
    """The recipe's loss alone."""

    def __init__(self) -> None:
        self.config = PRESETS["embedded"]


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    stored = load_file(str(STORED))
    for name, make in golden.NETWORKS.items():
        network = filled(DnCNN(*make[:2], in_channels=make[2])).eval()
        for i, shape in enumerate(golden.SHAPES):
            x = golden.picture(make[2], *shape)
            answer = stored[f"{name}.{i}"]
            yield Case(
                f"{name} {tuple(x.shape)}",
                network,
                lambda _, a=answer: a,
                (x,),
                f"spandrel {golden.VERSION} DnCNN, stored",
                rtol=1e-4,
                atol=1e-5,
            )
    torch.manual_seed(0)
    for training in (True, False):
        network = filled(DnCNN(7, 12, 3)).double().train(training)  # batch norm's gradients are differences
        x = torch.rand(3, 3, 19, 24, dtype=torch.float64)
        title = "training step, every gradient" if training else "inference, every gradient"
        yield Case(title, network, Plain(network), (x,), "the layers written out", gradients=True, rtol=1e-6, atol=1e-9)
    for depth, make in ((17, dncnn_s), (20, dncnn_b)):
        theirs = golden.weights(WithoutNorm(depth, 64, 1).state_dict())
        network = make().eval()
        network.load_state_dict(from_official(theirs))
        x = torch.rand(1, 1, 40, 33)
        yield Case(
            f"released names, {depth} layers",
            network,
            partial(released, theirs, depth),
            (x,),
            "convolutions alone",
            atol=1e-4,
        )
    x, noisy, clean = (torch.rand(4, 1, 9, 8) for _ in range(3))
    yield Case("loss", lambda a, b, c: Bare().loss(a, c), equation_1, (x, noisy, clean), "equation 1", gradients=False)
    yield Case(
        "receptive field",
        lambda: receptive_field(dncnn_s().eval()),
        lambda: 35,
        (),
        "section III-A: 35 x 35 for 17 layers",
        atol=0,
        rtol=0,
    )


def receptive_field(network: nn.Module) -> int:
    """How many pixels in a row change the middle of a picture's answer."""
    filled(network)
    x = torch.rand(1, 1, 61, 61, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(x)[0, 0, 30, 30], x)
    return int((gradient[0, 0].abs().amax(0) > 0).sum())


def pairs() -> dict[str, Pair]:
    """The released network, whose batch norms are merged, at the size of a benchmark's picture."""

    class Reference(WithoutNorm):
        def forward(self, x: Tensor) -> Tensor:
            return x - self.model(x)

    return {
        "dncnn_s": Pair(
            dncnn_s,
            lambda: Reference(17, 64, 1),
            lambda batch: (torch.rand(batch, 1, 128, 128),),
            "the authors' layers, batch norm merged",
        )
    }
