"""EfficientNet against torchvision, timm and, through timm, the authors' arithmetic; and the paper's counts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.classification.efficientnet import model as efficientnet
from paperzoo.papers.classification.resnet.parity import images, settled


def cases() -> Iterator[Case]:
    import timm
    import torchvision

    tv, peer = f"torchvision {torchvision.__version__.split('+')[0]}", f"timm {timm.__version__}"
    torch.manual_seed(0)
    for name, sizes in (
        ("efficientnet_b0", ((224, 224), (97, 65))),
        ("efficientnet_b1", ((65, 96),)),
        ("efficientnet_b2", ((64, 65),)),
        ("efficientnet_b3", ((64, 64),)),
        ("efficientnet_b5", ((65, 64),)),
    ):
        reference = lively(torchvision.models.get_model(name)).eval()
        ours = getattr(efficientnet, name)().eval()
        ours.load_state_dict(reference.state_dict())
        for height, width in sizes:
            x = torch.randn(1, 3, height, width)
            yield Case(f"{name} eval {height}x{width}", ours, reference, (x,), f"{tv} {name}")

    for name in ("b4", "b6", "b7"):  # names and shapes of every tensor, without memory
        with torch.device("meta"):
            reference = timm.create_model(f"efficientnet_{name}")
            ours = getattr(efficientnet, f"efficientnet_{name}")()
        yield Case(f"{name}: names and shapes", lambda o=ours: shapes(o.state_dict()),
                   lambda r=reference: shapes(efficientnet.from_official(r.state_dict())), (),
                   f"{peer} efficientnet_{name}")  # fmt: skip

    # The authors' arithmetic: uneven padding, epsilon 1e-3.
    for name, sizes in (("efficientnet_b0", ((224, 224), (97, 128))), ("efficientnet_b1", ((66, 65),))):
        reference = lively(timm.create_model(f"tf_{name}")).eval()
        ours = getattr(efficientnet, name)(same_padding=True, norm_eps=1e-3).eval()
        ours.load_state_dict(efficientnet.from_official(reference.state_dict()))
        for height, width in sizes:
            x = torch.randn(2, 3, height, width)
            yield Case(f"{name} with the authors' padding {height}x{width}", ours, reference, (x,), f"{peer} tf_{name}")

    reference = lively(timm.create_model("efficientnet_b0", num_classes=5, in_chans=1))
    ours = efficientnet.efficientnet_b0(num_classes=5, in_channels=1, drop_rate=0.0, drop_path_rate=0.0)
    ours.load_state_dict(efficientnet.from_official(reference.state_dict()))
    x = torch.randn(3, 1, 65, 80)
    yield Case("embed", ours.eval().embed,
               lambda x: reference.eval().forward_head(reference.forward_features(x), pre_logits=True), (x,),
               f"{peer} efficientnet_b0")  # fmt: skip
    stages = timm.create_model("efficientnet_b0", in_chans=1, features_only=True).eval()
    stages.load_state_dict({k: v for k, v in reference.state_dict().items() if k in stages.state_dict()})
    yield Case("stages", ours.stages, stages, (x,), f"{peer} efficientnet_b0 features_only")
    yield Case("efficientnet_b0 training, one channel", with_loss(ours), with_loss(reference), (x,),
               f"{peer} efficientnet_b0", gradients=True)  # fmt: skip
    reference = lively(torchvision.models.efficientnet_b0(num_classes=7))
    ours = efficientnet.efficientnet_b0(num_classes=7)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 64, 64)
    yield Case("every parameter's gradient", ours.eval(), reference.eval(), (x,), f"{tv} efficientnet_b0",
               gradients=True, rtol=1e-3, atol=1e-3)  # fmt: skip
    yield Case("dropout and shares of left-out branches", lambda: shares(ours), lambda: shares(reference), (),
               f"{tv} efficientnet_b0")  # fmt: skip

    for number in range(len(STATED)):
        yield Case(f"B{number}: cost within 5% and size within 2%", lambda n=number: as_stated(n), lambda: [True, True],
                   (), "table 2")  # fmt: skip
    depth, width, resolution = efficientnet.compound(1)
    yield Case("cost doubles with phi, within 5%", lambda: abs(depth * width**2 * resolution**2 / 2 - 1) < 0.05,
               lambda: True, (), "eq. (3)")  # fmt: skip


# Table 2: billions of multiply-adds, millions of parameters; and the released image sizes, which the table does not give.
STATED = ((0.39, 5.3, 224), (0.70, 7.8, 240), (1.0, 9.2, 260), (1.8, 12, 300), (4.2, 19, 380), (9.9, 30, 456),
          (19, 43, 528), (37, 66, 600))  # fmt: skip


def lively(network: nn.Module) -> nn.Module:
    """Norms as after some training, and kernels and scales that keep the signal's size: the input reaches the output."""
    for module in settled(network).modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.4)
    return network


def with_loss(network: nn.Module):
    return lambda x: F.cross_entropy(network.train()(x), torch.arange(len(x)))


def shapes(state: dict[str, Tensor]) -> list:
    """Names as numbers, so that the two sides are compared name by name."""
    return [[float(sum(name.encode())), *map(float, value.shape)] for name, value in sorted(state.items())]


def shares(network: nn.Module) -> list[float]:
    return [m.p for m in network.modules() if type(m).__name__ in ("StochasticDepth", "Dropout")]


def as_stated(number: int) -> list[bool]:
    """Whether the multiply-adds of one image and the parameters are those of table 2."""
    from torch.utils.flop_counter import FlopCounterMode

    work, parameters, size = STATED[number]
    with torch.device("meta"):
        net = getattr(efficientnet, f"efficientnet_b{number}")().eval()
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            net(torch.empty(1, 3, size, size))
    counted = counter.get_total_flops() / 2e9, sum(p.numel() for p in net.parameters()) / 1e6
    return [abs(counted[0] / work - 1) < 0.05, abs(counted[1] / parameters - 1) < 0.02]


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    from torchvision import models

    return {
        "efficientnet_b0": Pair(
            efficientnet.efficientnet_b0,
            lambda: models.efficientnet_b0(weights=None),
            images,
            "torchvision:efficientnet_b0",
            train_batch=4,
        )
    }
