"""GoogLeNet against torchvision, and table 1 written out with functions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.classification.alexnet.parity import normalised_slowly
from paperzoo.papers.classification.googlenet import model
from paperzoo.papers.classification.mobilenet_v1.parity import lively
from paperzoo.papers.classification.resnet.parity import images


def cases() -> Iterator[Case]:
    import torchvision

    peer = f"torchvision {torchvision.__version__.split('+')[0]} googlenet"
    torch.manual_seed(0)
    reference = lively(torch_googlenet(dropout=0.0, dropout_aux=0.0))
    ours = model.googlenet(aux_logits=True, drop_rate=0.0, aux_drop_rate=0.0)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(3, 3, 97, 65, dtype=torch.float64)
    yield Case("googlenet training", ours.double().train(), reference.double().train(), (x,), peer, gradients=True,
               note="in double precision: batch norm of few values amplifies rounding")  # fmt: skip
    reference = lively(torch_googlenet(transform_input=True), top=1.4)
    ours = model.googlenet(transform_input=True)
    ours.load_state_dict(model.from_official(reference.state_dict()))
    for shape in ((1, 3, 224, 224), (2, 3, 15, 70)):
        x = torch.randn(shape)
        yield Case(f"googlenet eval {shape[2]}x{shape[3]}", ours.eval(), reference.eval(), (x,), peer)
    yield Case("stages", ours.stages, staged(reference), (x,), peer)

    net = model.googlenet_2014(aux_logits=True, drop_rate=0.0, aux_drop_rate=0.0)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    for shape in ((1, 3, 224, 224), (2, 3, 223, 226)):
        yield Case(f"googlenet_2014 training {shape[2]}x{shape[3]}", net.train(), written_out(net), (torch.randn(shape),),
                   "table 1 and sec. 5 written out with functions")  # fmt: skip
    x = torch.randn(2, 3, 64, 50)
    yield Case("googlenet_2014 eval 64x50", net.eval(), lambda x: written_out(net, False)(x)[0], (x,),
               "table 1 written out with functions")  # fmt: skip


def torch_googlenet(**options) -> nn.Module:
    from torchvision import models

    return models.googlenet(weights=None, init_weights=False, **options)


def staged(net: nn.Module):
    def maps(x: Tensor) -> list[Tensor]:
        x = net.maxpool1(net.conv1(net._transform_input(x)))
        c2 = net.conv3(net.conv2(x))
        c3 = net.inception3b(net.inception3a(net.maxpool2(c2)))
        x = net.inception4c(net.inception4b(net.inception4a(net.maxpool3(c3))))
        c4 = net.inception4e(net.inception4d(x))
        return [c2, c3, c4, net.inception5b(net.inception5a(net.maxpool4(c4)))]

    return maps


def written_out(net: nn.Module, auxiliary: bool = True):
    """The paper's network without modules, from its weights."""
    w = net.state_dict()

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = w[f"{name}.conv.weight"]
        return F.conv2d(x, kernel, w[f"{name}.conv.bias"], stride, kernel.shape[-1] // 2).clamp_min(0)

    def pool(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, ceil_mode=True)

    def dense(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def module(x: Tensor, name: str) -> Tensor:
        name = f"inception{name}"
        three = conv(conv(x, f"{name}.branch2.0"), f"{name}.branch2.1")
        five = conv(conv(x, f"{name}.branch3.0"), f"{name}.branch3.1")
        near = F.max_pool2d(x, 3, 1, 1)
        return torch.cat([conv(x, f"{name}.branch1"), three, five, conv(near, f"{name}.branch4.1")], 1)

    def aux(x: Tensor, name: str) -> Tensor:
        x = conv(F.avg_pool2d(x, 5, 3), f"{name}.conv").reshape(len(x), -1)
        return dense(dense(x, f"{name}.fc1").clamp_min(0), f"{name}.fc2")

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        x = normalised_slowly(pool(conv(x, "conv1", 2)))
        x = pool(normalised_slowly(conv(conv(x, "conv2"), "conv3")))
        heads = []
        for name in ("3a", "3b", "pool", "4a", "4b", "4c", "4d", "4e", "pool", "5a", "5b"):
            x = pool(x) if name == "pool" else module(x, name)
            if auxiliary and name in ("4a", "4d"):
                heads.append(aux(x, "aux1" if name == "4a" else "aux2"))
        return (dense(x.flatten(2).mean(2), "fc"), *reversed(heads))

    return forward


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    return {
        "googlenet": Pair(
            model.googlenet,
            lambda: torch_googlenet(aux_logits=False),
            images,
            "torchvision:googlenet",
            train_batch=4,
        )
    }
