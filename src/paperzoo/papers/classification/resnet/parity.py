"""ResNet against torchvision, timm and a version of the CIFAR network written out with functions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.classification.resnet import model as resnet


def cases() -> Iterator[Case]:
    import timm
    import torchvision

    tv = f"torchvision {torchvision.__version__.split('+')[0]}"
    torch.manual_seed(0)
    for name, size in (("resnet18", 224), ("resnet34", 65), ("resnet50", 224), ("resnet101", 64), ("resnet152", 64)):
        reference = settled(torchvision.models.get_model(name))
        ours = getattr(resnet, name)()
        ours.load_state_dict(reference.state_dict())
        x = torch.randn(2 if size < 224 else 1, 3, size, size)
        yield Case(f"{name} eval {size}px", ours.eval(), reference.eval(), (x,), f"{tv} {name}")

    reference = settled(torchvision.models.resnet18(num_classes=7))
    ours = resnet.resnet18(num_classes=7)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(3, 3, 97, 65)
    yield Case("resnet18 training, odd size", ours.train(), reference.train(), (x,), f"{tv} resnet18", gradients=True)
    reference = settled(torchvision.models.resnet50(num_classes=7))
    ours = resnet.resnet50(num_classes=7)
    ours.load_state_dict(reference.state_dict())
    yield Case("resnet50 gradients", ours.eval(), reference.eval(), (x,), f"{tv} resnet50", gradients=True)

    reference = settled(timm.create_model("resnet50", num_classes=5, in_chans=1))
    ours = resnet.resnet50(num_classes=5, in_channels=1)
    ours.load_state_dict(resnet.from_official(reference.state_dict()))
    x = torch.randn(2, 1, 64, 80)
    yield Case("resnet50, one channel", ours.eval(), reference.eval(), (x,), f"timm {timm.__version__} resnet50")
    yield Case("embed", ours.embed, lambda x: reference.forward_head(reference.forward_features(x), pre_logits=True), (x,),
               f"timm {timm.__version__} forward_head(pre_logits=True)")  # fmt: skip

    dilated = [False, True, True]
    reference = settled(torchvision.models.resnet50(replace_stride_with_dilation=dilated))
    ours = resnet.resnet50(replace_stride_with_dilation=dilated)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(1, 3, 72, 64)
    yield Case("stages, dilated", ours.eval().stages, staged(reference.eval()), (x,), f"{tv} resnet50 layer1 to layer4")
    wider = {"wide_resnet50_2": {"width_per_group": 128}, "resnext50_32x4d": {"groups": 32, "width_per_group": 4}}
    for name, options in wider.items():
        reference = settled(torchvision.models.get_model(name, num_classes=3))
        ours = resnet.resnet50(3, **options)
        ours.load_state_dict(reference.state_dict())
        yield Case(f"Bottleneck of {name}", ours.eval(), reference.eval(), (x,), f"{tv} {name}")

    for shape in ((2, 3, 32, 32), (1, 3, 29, 35)):
        net = settled(resnet.resnet20_cifar()).eval()
        yield Case(f"resnet20_cifar {shape[2]}x{shape[3]}", net, written_out(net, 3), (torch.randn(shape),),
                   "sec. 4.2 written out with functions")  # fmt: skip
    net = settled(resnet.resnet56_cifar()).eval()
    renamed = {"module." + k.replace("fc.", "linear."): v for k, v in net.state_dict().items()}
    loaded = resnet.resnet56_cifar()
    loaded.load_state_dict(resnet.from_official(renamed))
    yield Case("resnet56_cifar from_official", loaded.eval(), written_out(net, 9), (torch.randn(2, 3, 32, 32),),
               "sec. 4.2 written out with functions")  # fmt: skip


def settled(network: nn.Module) -> nn.Module:
    """Norms as after some training: random affine and running statistics, so that a mix-up of any of them shows."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


def staged(reference: nn.Module):
    from torchvision.models.feature_extraction import create_feature_extractor

    extract = create_feature_extractor(reference, ["layer1", "layer2", "layer3", "layer4"])
    return lambda x: list(extract(x).values())


def written_out(net: nn.Module, n: int):
    """The CIFAR network without modules, from the same weights."""
    w = net.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = w[f"{name}.running_mean"].view(-1, 1, 1), w[f"{name}.running_var"].view(-1, 1, 1)
        return (x - mean) / (var + 1e-5).sqrt() * w[f"{name}.weight"].view(-1, 1, 1) + w[f"{name}.bias"].view(-1, 1, 1)

    def forward(x: Tensor) -> Tensor:
        x = norm(F.conv2d(x, w["conv1.weight"], padding=1), "bn1").clamp_min(0)
        for stage in (1, 2, 3):
            for block in range(n):
                name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
                y = norm(F.conv2d(x, w[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1").clamp_min(0)
                y = norm(F.conv2d(y, w[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
                if stride == 2:
                    zeros = torch.zeros(len(y), y.shape[1] // 4, *y.shape[2:])
                    x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1)
                x = (x + y).clamp_min(0)
        return x.sum((2, 3)) / (x.shape[2] * x.shape[3]) @ w["fc.weight"].T + w["fc.bias"]

    return forward


def images(batch: int) -> tuple[Tensor]:
    return (torch.randn(batch, 3, 224, 224),)


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    from torchvision import models

    return {
        "resnet50": Pair(
            resnet.resnet50, lambda: models.resnet50(weights=None), images, "torchvision:resnet50", train_batch=2
        ),
        "resnet18": Pair(
            resnet.resnet18, lambda: models.resnet18(weights=None), images, "torchvision:resnet18", train_batch=4
        ),
    }
