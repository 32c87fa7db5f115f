"""Wide ResNet against pytorchcv (small images) and torchvision (ImageNet), weights copied across."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.classification.wide_resnet.model import (
    from_official,
    wide_resnet16_10,
    wide_resnet28_10,
    wide_resnet50_2,
)


def cases() -> Iterator[Case]:
    import pytorchcv
    import torchvision
    from pytorchcv.model_provider import get_model

    torch.manual_seed(0)
    peer = f"pytorchcv {pytorchcv.__version__}" if hasattr(pytorchcv, "__version__") else "pytorchcv 0.0.74"
    for name, ours, batch in (("wrn16_10_cifar10", wide_resnet16_10(), 2), ("wrn28_10_cifar10", wide_resnet28_10(), 1)):
        reference = get_model(name)
        ours.load_state_dict(from_official(reference.state_dict()))
        images = torch.randn(batch, 3, 32, 32)
        yield Case(f"{name}, inference", ours.eval(), reference.eval(), (images,), f"{peer} {name}")
    small = torch.randn(4, 3, 32, 32)
    ours, reference = wide_resnet16_10(), get_model("wrn16_10_cifar10")
    ours.load_state_dict(from_official(reference.state_dict()))
    yield Case(
        "training mode, input gradient", ours.train(), reference.train(), (small,), f"{peer}", gradients=True, atol=1e-3
    )
    reference = torchvision.models.wide_resnet50_2(weights=None).eval()
    ours = wide_resnet50_2().eval()
    ours.load_state_dict(reference.state_dict())
    images = torch.randn(2, 3, 96, 96)
    yield Case("wide_resnet50_2", ours, reference, (images,), f"torchvision {torchvision.__version__}", gradients=True)
    official = {"conv0": 0, "group1.block0.bn0.weight": 1, "group1.block0.bn1.weight": 2, "group1.block0.conv1": 3}
    official |= {"group2.block3.convdim": 4, "bn.running_mean": 5, "fc.bias": 6, "group0.block1.conv0": 7}
    expected = {"conv1.weight": 0, "layer2.0.bn1.weight": 1, "layer2.0.bn2.weight": 2, "layer2.0.conv2.weight": 3}
    expected |= {"layer3.3.shortcut.weight": 4, "bn.running_mean": 5, "fc.bias": 6, "layer1.1.conv1.weight": 7}
    yield Case(
        "the authors' parameter names", lambda: from_official(official), lambda: expected, (), "the released code"
    )


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    import torchvision
    from pytorchcv.model_provider import get_model

    def small(batch: int) -> tuple[torch.Tensor]:
        return (torch.randn(batch, 3, 32, 32),)

    def large(batch: int) -> tuple[torch.Tensor]:
        return (torch.randn(batch, 3, 224, 224),)

    wide = torchvision.models.wide_resnet50_2
    return {
        "wide_resnet16_10": Pair(
            wide_resnet16_10, lambda: get_model("wrn16_10_cifar10"), small, "pytorchcv:wrn16_10_cifar10", train_batch=4
        ),
        "wide_resnet50_2": Pair(
            wide_resnet50_2, lambda: wide(weights=None), large, "torchvision:wide_resnet50_2", train_batch=2
        ),
    }
