"""Xception against timm's port of the author's network, the paper's counts, and a separable convolution written out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.engine.weights import parameter_count
from paperzoo.papers.classification.mobilenet_v1.parity import lively
from paperzoo.papers.classification.xception.model import SeparableConvolution, Xception, xception, xception_digits


def cases() -> Iterator[Case]:
    import timm

    peer = f"timm {timm.__version__} legacy_xception"
    torch.manual_seed(0)
    reference = lively(timm.create_model("legacy_xception"), top=1.2).eval()
    ours = xception()
    ours.load_state_dict(reference.state_dict())
    for shape in ((1, 3, 299, 299), (2, 3, 97, 130)):
        x = torch.randn(shape)
        yield Case(f"eval, {shape[2]} x {shape[3]}", ours.eval(), reference, (x,), peer)
    # timm's maps are taken behind the ReLU that the next module begins with
    theirs = lambda x: reference.forward_intermediates(x, intermediates_only=True)  # noqa: E731
    yield Case("stages", Rectified(ours), theirs, (x,), f"{peer} forward_intermediates")
    reference_of_five = lively(timm.create_model("legacy_xception", num_classes=5, in_chans=1), top=1.2)
    ours = xception(num_classes=5, in_channels=1)
    ours.load_state_dict(reference_of_five.state_dict())
    x = torch.randn(2, 1, 80, 96).double()
    yield Case(
        "training, one channel",
        ours.double().train(),
        reference_of_five.double().train(),
        (x,),
        peer,
        gradients=True,
        note="in float64, as gradients of many channels nearly cancel before a batch norm",
    )

    layer = SeparableConvolution(6, 4, nn.ELU)
    yield Case("with ELU between (fig. 10)", layer, written_out(layer), (torch.randn(2, 6, 9, 7),), "sec. 1.2, a channel at a time", gradients=True)  # fmt: skip
    yield Case("parameters", lambda: on_meta(xception), lambda: 22_855_952, against="paper, table 3: 22,855,952")
    # "36 convolutional layers": the stem's 2, and the separable ones
    yield Case("convolutional layers", lambda: 2 + separable(xception()), lambda: 36, against="paper, sec. 3")
    net = lively(xception_digits()).eval()
    yield Case("without a middle flow a block is the next", flows(net), net, (torch.randn(2, 3, 32, 32),), "fig. 5, as one chain of functions")  # fmt: skip


class Rectified(nn.Module):
    def __init__(self, net: Xception) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> list[Tensor]:
        return [F.relu(m) for m in self.net.stages(x)]


def written_out(layer: SeparableConvolution):
    def forward(x: Tensor) -> Tensor:
        depthwise = layer.conv1.weight
        maps = [F.conv2d(x[:, i : i + 1], depthwise[i : i + 1], padding=1) for i in range(x.shape[1])]
        maps = torch.cat([m if layer.between is None else layer.between(m) for m in maps], dim=1)
        return torch.einsum("bihw,oi->bohw", maps, layer.pointwise.weight[:, :, 0, 0])

    return forward


def flows(net: Xception):
    """Entry, middle and exit flow from the weights' names alone."""
    w = net.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        return F.batch_norm(
            x, w[f"{name}.running_mean"], w[f"{name}.running_var"], w[f"{name}.weight"], w[f"{name}.bias"]
        )

    def separable(x: Tensor, name: str) -> Tensor:
        return F.conv2d(
            F.conv2d(x, w[f"{name}.conv1.weight"], padding=1, groups=x.shape[1]), w[f"{name}.pointwise.weight"]
        )

    def module(x: Tensor, name: str, count: int, first: bool, halve: bool) -> Tensor:
        y, place = x, 0
        for i in range(count):
            if i or first:
                y, place = F.relu(y), place + 1
            y = norm(separable(y, f"{name}.rep.{place}"), f"{name}.rep.{place + 1}")
            place += 2
        if not halve:
            return x + y
        return F.max_pool2d(y, 3, 2, 1) + norm(F.conv2d(x, w[f"{name}.skip.weight"], stride=2), f"{name}.skipbn")

    def forward(x: Tensor) -> Tensor:
        x = F.relu(norm(F.conv2d(x, w["conv1.weight"]), "bn1"))
        x = F.relu(norm(F.conv2d(x, w["conv2.weight"]), "bn2"))
        for i, (count, first, halve) in enumerate(
            [(2, False, True), (2, True, True), (2, True, True), (3, True, False), (3, True, False), (2, True, True)], 1
        ):
            x = module(x, f"block{i}", count, first, halve)
        for i in (3, 4):
            x = F.relu(norm(separable(x, f"conv{i}"), f"bn{i}"))
        return x.flatten(2).mean(2) @ w["fc.weight"].T + w["fc.bias"]

    return forward


def on_meta(make) -> int:
    with torch.device("meta"):
        return parameter_count(make())


def separable(net: nn.Module) -> int:
    return sum(isinstance(m, SeparableConvolution) for m in net.modules())


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    import timm

    def images(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 3, 299, 299),)

    return {
        "xception": Pair(
            xception, lambda: timm.create_model("legacy_xception"), images, "timm:legacy_xception", train_batch=2
        )
    }
