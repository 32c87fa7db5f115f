"""NAFNet against spandrel's released network (its outputs on weights from a rule are stored, see `golden.py`), and against the paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.restoration.nafnet import golden, model
from paperzoo.papers.restoration.swinir.golden import picture

SOURCE = "spandrel 0.4.2 NAFNet, stored outputs"


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    stored = load_file(str(golden.FILE))
    for name, (_, shape) in golden.NETWORKS.items():
        network = getattr(model, name)()
        network.load_state_dict(golden.by_rule(network.state_dict()))
        yield Case(
            f"{name}, {' x '.join(map(str, shape))}",
            network.eval(),
            lambda x, n=name: stored[n],
            (picture(shape, name),),
            SOURCE,
            rtol=1e-3,
            atol=1e-4,
        )
    narrow = model.NAFNet(4, (1, 2), 1, (2, 1), in_channels=1)
    narrow.load_state_dict(golden.by_rule(narrow.state_dict()))
    yield Case(
        "one training step: loss and gradients",
        lambda: golden.loss_and_gradients(narrow),
        lambda: [stored[name] for name in ("loss", *golden.GRADIENTS)],
        (),
        SOURCE,
    )

    for window in (3, 4, 9):
        x = torch.randn(2, 3, 7, 10)
        yield Case(f"local pooling over {window} x {window}", model.LocalPool(window), slow_pool(window), (x,),
                   "the mean of every window by itself", gradients=True)  # fmt: skip
    yield Case("local pooling of a small map", model.LocalPool(12), lambda x: x.mean((2, 3), keepdim=True), (x,),
               "the paper: as in training")  # fmt: skip
    local = model.NAFNet(4, (1, 1), 1, (1, 1), train_size=16)
    local.load_state_dict(golden.by_rule(local.state_dict()))
    plain = model.NAFNet(4, (1, 1), 1, (1, 1))
    plain.load_state_dict(local.state_dict())
    small = torch.rand(1, 3, 24, 20)
    yield Case(
        "up to 1.5 times the training size nothing is local", local.eval(), plain.eval(), (small,), "the same weights"
    )
    yield Case(
        "windows of each level",
        lambda: [m.window for m in local.modules() if isinstance(m, model.LocalPool)],
        lambda: [24, 12, 6, 12, 24],  # down, the bottom, up
        (),
        "1.5 x 16, halved at each level",
        rtol=0.0,
    )

    for kind, slow in ((model.NAFBlock, slow_nafblock), (model.BaselineBlock, slow_baseline)):
        block = kind(6).double()
        block.load_state_dict(golden.by_rule(block.state_dict()))
        x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
        yield Case(kind.__name__, block, lambda x, b=block, s=slow: s(dict(b.named_parameters()), x), (x,),
                   "figure 3 written out with functions", gradients=True)  # fmt: skip
    fresh = model.nafnet_small().eval()
    nn.init.zeros_(fresh.ending.weight)
    nn.init.zeros_(fresh.ending.bias)
    yield Case("the network gives a residual", fresh, lambda x: x, (torch.rand(1, 3, 10, 9),), "figure 2", atol=1e-6)


def slow_pool(window: int) -> Callable[[Tensor], Tensor]:
    """Every place by itself: its window is moved inside the map, and cut where the map is smaller."""

    def pooled(x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        sides = (min(window, height), min(window, width))
        rows = []
        for i in range(height):
            row = []
            for j in range(width):
                first = [
                    min(max(at - (extent - (extent - side + 1)) // 2, 0), extent - side)
                    for at, extent, side in ((i, height, sides[0]), (j, width, sides[1]))
                ]
                part = x[:, :, first[0] : first[0] + sides[0], first[1] : first[1] + sides[1]]
                row.append(part.mean((2, 3)))
            rows.append(torch.stack(row, dim=-1))
        return torch.stack(rows, dim=-2)

    return pooled


def norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    x = x - x.mean(1, keepdim=True)
    x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return x * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def pointwise(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return torch.einsum("bchw,oc->bohw", x, w[f"{name}.weight"][:, :, 0, 0]) + w[f"{name}.bias"][:, None, None]


def slow_nafblock(w: dict[str, Tensor], x: Tensor) -> Tensor:
    y = pointwise(norm(x, w, "norm1"), w, "conv1")
    y = F.conv2d(y, w["conv2.weight"], w["conv2.bias"], padding=1, groups=y.shape[1])
    y = y[:, :6] * y[:, 6:]
    y = y * pointwise(y.mean((2, 3), keepdim=True), w, "sca.1")
    x = x + pointwise(y, w, "conv3") * w["beta"]
    y = pointwise(norm(x, w, "norm2"), w, "conv4")
    return x + pointwise(y[:, :6] * y[:, 6:], w, "conv5") * w["gamma"]


def slow_baseline(w: dict[str, Tensor], x: Tensor) -> Tensor:
    def gelu(x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    y = pointwise(norm(x, w, "norm1"), w, "conv1")
    y = gelu(F.conv2d(y, w["conv2.weight"], w["conv2.bias"], padding=1, groups=y.shape[1]))
    gate = pointwise(y.mean((2, 3), keepdim=True), w, "se.1").clamp_min(0)
    y = y * torch.sigmoid(pointwise(gate, w, "se.3"))
    x = x + pointwise(y, w, "conv3") * w["beta"]
    return x + pointwise(gelu(pointwise(norm(x, w, "norm2"), w, "conv4")), w, "conv5") * w["gamma"]
