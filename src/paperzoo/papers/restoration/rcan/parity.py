"""RCAN against spandrel's released network (its outputs on weights from a rule are stored, see `golden.py`), and against the paper."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.restoration.rcan import golden, model
from paperzoo.papers.restoration.swinir.golden import picture

SOURCE = "spandrel 0.4.2 RCAN, stored outputs"


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    stored = load_file(str(golden.FILE))
    for name, (_, shape) in golden.NETWORKS.items():
        network = filled(getattr(model, name)())
        yield Case(
            f"{name}, {' x '.join(map(str, shape))}",
            network.eval(),
            lambda x, n=name: stored[n],
            (picture(shape, name),),
            SOURCE,
        )
    narrow = filled(model.RCAN(4, groups=2, blocks=2, channels=8, reduction=4))
    yield Case(
        "one training step: loss and gradients",
        lambda: golden.loss_and_gradients(narrow, tuple(own_name(name) for name in golden.GRADIENTS)),
        lambda: [stored[name] for name in ("loss", *golden.GRADIENTS)],
        (),
        SOURCE,
    )
    with torch.device("meta"):
        full = model.rcan_x2()
    yield Case(
        "the released names",
        lambda: [float(zlib.crc32(name.encode())) for name in sorted(map(released_name, full.state_dict()))],
        lambda: stored["names"].double().tolist(),
        (),
        "spandrel 0.4.2 RCAN's state",
        rtol=0.0,
        atol=0.0,
    )
    yield Case("parameters that learn", lambda: size("rcan_x4"), lambda: 16, (), "the paper: 16M", rtol=0.0)
    yield Case("layers", lambda: convolutions("rcan_x4"), lambda: 10 * (20 * 2 + 1) + 1 + 1 + 2 + 1, (),
               "sec. 3: over 400 convolutions", rtol=0.0)  # fmt: skip

    torch.manual_seed(0)
    for scale in (2, 3, 4, 8):
        network = model.RCAN(scale, groups=2, blocks=1, channels=8, reduction=4).eval()
        yield Case(f"x{scale}, all layers", network, written_out(network.state_dict(), scale),
                   (torch.rand(2, 3, 7, 5),), "the equations written out with functions", gradients=True)  # fmt: skip


def own_name(name: str) -> str:
    """A released parameter's name here."""
    return next(iter(model.from_official({name: torch.zeros(())})))


def released_name(name: str) -> str:
    return re.sub(r"\.fc([12])\.", lambda m: f".conv_du.{2 * int(m[1]) - 2}.", name)


def filled(network: nn.Module) -> nn.Module:
    """The rule's values, loaded as a released file."""
    released = {released_name(name): value for name, value in network.state_dict().items()}
    network.load_state_dict(model.from_official(golden.by_rule(released)))
    return network


def size(name: str) -> int:
    with torch.device("meta"):
        return round(sum(p.numel() for p in getattr(model, name)().parameters() if p.requires_grad) / 1e6)


def convolutions(name: str) -> int:
    """Of 3 x 3."""
    with torch.device("meta"):
        return sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in getattr(model, name)().modules())


def written_out(w: dict[str, Tensor], scale: int) -> Callable[[Tensor], Tensor]:
    def conv(x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=w[f"{name}.weight"].shape[-1] // 2)

    def shuffled(x: Tensor, r: int) -> Tensor:
        batch, channels, height, width = x.shape
        x = x.reshape(batch, channels // r**2, r, r, height, width)
        return x.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels // r**2, height * r, width * r)

    def forward(x: Tensor) -> Tensor:
        mean = x.new_tensor([0.4488, 0.4371, 0.4040])[:, None, None] * 255
        shallow = conv(x * 255 - mean, "head.0")
        deep = shallow
        for g in range(2):
            y = conv(deep, f"body.{g}.body.0.body.0").clamp_min(0)
            y = conv(y, f"body.{g}.body.0.body.2")
            s = conv(y.mean((2, 3), keepdim=True), f"body.{g}.body.0.body.3.fc1").clamp_min(0)
            s = torch.sigmoid(conv(s, f"body.{g}.body.0.body.3.fc2"))
            deep = deep + conv(deep + s * y, f"body.{g}.body.1")
        up = shallow + conv(deep, "body.2")
        for i, r in enumerate({2: [2], 3: [3], 4: [2, 2], 8: [2, 2, 2]}[scale]):
            up = shuffled(conv(up, f"tail.0.{2 * i}"), r)
        return (conv(up, "tail.1") + mean) / 255

    return forward
