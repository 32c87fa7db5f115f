"""AlexNet against torchvision, torch's own response normalisation, and the paper's formulas and counts written out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.classification.alexnet import model
from paperzoo.papers.classification.resnet.parity import images


def cases() -> Iterator[Case]:
    import torchvision

    peer = f"torchvision {torchvision.__version__.split('+')[0]} alexnet"
    torch.manual_seed(0)
    reference = torchvision.models.alexnet(weights=None)
    ours = model.alexnet()
    ours.load_state_dict(reference.state_dict())
    for shape in ((2, 3, 224, 224), (1, 3, 63, 95)):
        x = torch.randn(shape)
        yield Case(f"alexnet eval {shape[2]}x{shape[3]}", ours.eval(), reference.eval(), (x,), peer)
    yield Case("stages", ours.stages, lambda x: [reference.features[:n](x) for n in (3, 6, 13)], (x,), peer)
    yield Case("embed", ours.embed, Fc7(reference), (x,), peer)

    reference = torchvision.models.alexnet(weights=None, num_classes=7, dropout=0.0)
    ours = model.alexnet(num_classes=7, drop_rate=0.0)
    ours.load_state_dict(model.from_official(reference.state_dict()))
    x = torch.randn(2, 3, 97, 130)
    yield Case("alexnet training", ours.train(), reference.train(), (x,), peer, gradients=True)
    reference = torchvision.models.alexnet(weights=None)
    ours = model.alexnet()
    ours.load_state_dict(reference.state_dict())
    yield Case("alexnet training, dropout", Seeded(ours.train()), Seeded(reference.train()), (x,), peer)

    # Sec. 3.3. torch's alpha multiplies the mean over the window.
    x = 20 * torch.randn(2, 11, 6, 5)
    for size, alpha in ((5, 1e-4), (3, 1e-2)):
        norm = model.LocalResponseNorm(size, alpha)
        yield Case(f"response normalisation over {size}", norm, nn.LocalResponseNorm(size, alpha * size, 0.75, 2.0), (x,),
                   f"torch {torch.__version__.split('+')[0]} LocalResponseNorm", gradients=True)  # fmt: skip
    yield Case(
        "response normalisation, the sum", model.LocalResponseNorm(), normalised_slowly, (x,), "sec. 3.3 in loops"
    )

    # The paper's own network, from Caffe's names; at its size, and smaller.
    named = model.alexnet_2012().state_dict()
    named = {k: torch.randn_like(v) * (2 / v[0].numel()) ** 0.5 if v.ndim > 1 else v for k, v in named.items()}
    caffe = dict(zip(model.PLACES, model.CAFFE, strict=True))
    renamed = {f"{caffe[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in named.items()}
    ours = model.alexnet_2012()
    ours.load_state_dict(model.from_official(renamed))
    for shape in ((1, 3, 224, 224), (2, 3, 223, 227)):
        yield Case(f"alexnet_2012 {shape[2]}x{shape[3]}", ours.eval(), written_out(renamed), (torch.randn(shape),),
                   "fig. 2 written out, the halves apart")  # fmt: skip

    # Sec. 3.5: "253,440-186,624-64,896-64,896-43,264-4096-4096-1000" neurons; the second layer's count.
    yield Case("neurons of layers 2 to 5", lambda: neurons(ours), lambda: [186624, 64896, 64896, 43264], (), "sec. 3.5")


class Fc7(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.classifier[:-1](self.net.avgpool(self.net.features(x)).flatten(1))


class Seeded(nn.Module):
    """The same random numbers for both sides."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return self.net(x)


def normalised_slowly(a: Tensor, n: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75) -> Tensor:
    b, count = torch.empty_like(a), a.shape[1]
    for i in range(count):
        window = range(max(0, i - n // 2), min(count - 1, i + n // 2) + 1)
        b[:, i] = a[:, i] / (k + alpha * sum(a[:, j] ** 2 for j in window)) ** beta
    return b


def written_out(w: dict[str, Tensor]):
    """The paper's network with its two halves computed apart, from Caffe's names."""

    def conv(x: Tensor, name: str, stride: int = 1, padding: int = 0) -> Tensor:
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride, padding).clamp_min(0)

    def apart(x: Tensor, name: str, padding: int) -> Tensor:
        halves = zip(x.chunk(2, 1), w[f"{name}.weight"].chunk(2), w[f"{name}.bias"].chunk(2), strict=True)
        return torch.cat([F.conv2d(*half, padding=padding).clamp_min(0) for half in halves], 1)

    def forward(x: Tensor) -> Tensor:
        x = F.max_pool2d(normalised_slowly(conv(x, "conv1", 4, 2)), 3, 2)
        x = F.max_pool2d(normalised_slowly(apart(x, "conv2", 2)), 3, 2)
        x = apart(apart(conv(x, "conv3", padding=1), "conv4", 1), "conv5", 1)
        x = F.max_pool2d(x, 3, 2).reshape(len(x), -1)
        for name in ("fc6", "fc7"):
            x = (x @ w[f"{name}.weight"].T + w[f"{name}.bias"]).clamp_min(0)
        return x @ w["fc8.weight"].T + w["fc8.bias"]

    return forward


def neurons(net: nn.Module) -> list[int]:
    counts, x = [], torch.zeros(1, 3, 224, 224)
    for layer in net.features:
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            counts.append(x.numel())
    return counts[1:]


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    from torchvision import models

    return {
        "alexnet": Pair(
            model.alexnet, lambda: models.alexnet(weights=None), images, "torchvision:alexnet", train_batch=8
        )
    }
