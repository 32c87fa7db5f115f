"""SENet against torchvision's SqueezeExcitation, timm's seresnet, and the paper's own arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.classification.resnet.model import resnet50
from paperzoo.papers.classification.resnet.parity import images, settled
from paperzoo.papers.classification.senet import model as senet


def cases() -> Iterator[Case]:
    import timm
    import torchvision

    tv = f"torchvision {torchvision.__version__.split('+')[0]} ops.SqueezeExcitation"
    torch.manual_seed(0)
    for channels, squeeze, options in (
        (64, 4, {}),
        (24, 8, {"activation": nn.SiLU}),
        (16, 1, {"scale_activation": nn.Hardsigmoid}),
    ):
        reference = torchvision.ops.SqueezeExcitation(channels, squeeze, **options)
        ours = senet.SqueezeExcitation(channels, squeeze, **options)
        ours.load_state_dict(reference.state_dict())
        x = torch.randn(3, channels, 7, 5)
        yield Case(f"SqueezeExcitation {channels} -> {squeeze}", ours, reference, (x,), tv, gradients=True)

    for name, size in (("seresnet50", 224), ("seresnet101", 64), ("seresnet152", 64)):
        reference = settled(timm.create_model(name))
        ours = getattr(senet, name)()
        ours.load_state_dict(reference.state_dict())
        x = torch.randn(1, 3, size, size)
        yield Case(f"{name} eval {size}px", ours.eval(), reference.eval(), (x,), f"timm {timm.__version__} {name}")
    reference = settled(timm.create_model("seresnet50", num_classes=5, in_chans=1))
    ours = senet.seresnet50(num_classes=5, in_channels=1)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(3, 1, 65, 80)
    yield Case("seresnet50 training", ours.train(), reference.train(), (x,), f"timm {timm.__version__} seresnet50",
               gradients=True)  # fmt: skip

    # Sec. 4, eq. (5): the extra parameters are 2/r * sum_s N_s C_s^2, biases not counted.
    stated = 2 / 16 * sum(n * c**2 for n, c in ((3, 256), (4, 512), (6, 1024), (3, 2048)))
    yield Case(
        "parameters added to ResNet-50", added_weights, lambda: stated, (), "eq. (5): 2/r * sum N_s C_s^2", rtol=0
    )

    # With the gates pinned wide open the network is ResNet's.
    ours = settled(senet.seresnet50(num_classes=4)).eval()
    for name, p in ours.named_parameters():
        if ".se.fc2." in name:
            nn.init.constant_(p, 0.0 if name.endswith("weight") else 40.0)  # sigmoid(40) is 1 in float32
    plain = resnet50(num_classes=4).eval()
    plain.load_state_dict({k: v for k, v in ours.state_dict().items() if ".se." not in k})
    yield Case("gates open: ResNet-50", ours, plain, (torch.randn(2, 3, 64, 64),), "paperzoo resnet50")


def added_weights() -> int:
    with torch.device("meta"):
        net = senet.seresnet50()
    return sum(p.numel() for name, p in net.named_parameters() if ".se." in name and name.endswith("weight"))


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    import timm

    return {
        "seresnet50": Pair(
            senet.seresnet50, lambda: timm.create_model("seresnet50"), images, "timm:seresnet50", train_batch=2
        )
    }
