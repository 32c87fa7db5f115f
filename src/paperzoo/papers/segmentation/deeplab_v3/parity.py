"""DeepLabv3 against torchvision, layer by layer against plain functions where torchvision departs from the paper, and two identities."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.segmentation.deeplab_v3 import model
from paperzoo.papers.segmentation.fcn.parity import MainOutput
from paperzoo.papers.segmentation.pspnet.golden import by_rule


def cases() -> Iterator[Case]:
    import torchvision
    from torchvision.models import segmentation

    against = f"torchvision {torchvision.__version__}"
    torch.manual_seed(0)
    for name, train, size in (
        ("deeplabv3_resnet50", False, (65, 64)),
        ("deeplabv3_resnet50", True, (48, 40)),
        ("deeplabv3_resnet101", False, (33, 47)),
        ("deeplabv3_mobilenet_v3_large", False, (97, 64)),
        ("deeplabv3_mobilenet_v3_large", True, (64, 81)),
    ):
        ours = getattr(model, name)(num_classes=5, drop_rate=0.0)
        ours.load_state_dict(by_rule(ours.state_dict()))
        theirs = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=5, aux_loss=True)
        theirs.load_state_dict(ours.state_dict())
        for head in (*ours.modules(), *theirs.modules()):
            if isinstance(head, nn.Dropout):
                head.p = 0.0
        x = torch.randn(2, 3, *size)
        if (
            train
        ):  # in double precision: fp32 gradients through 50 batch norms of a batch of two carry rounding of a percent
            ours, theirs, x = ours.double(), theirs.double(), x.double()
        yield Case(
            f"{name} {'train, out and aux' if train else 'eval'} {size}",
            (ours if train else MainOutput(ours)).train(train),
            (theirs if train else MainOutput(theirs)).train(train),
            (x,),
            against,
            gradients=train,
            note="in double precision" if train else "",
        )
    yield from paper_cases()
    yield from identities()


def paper_cases() -> Iterator[Case]:
    """What torchvision has not: the multi-grid, and the cascade."""
    torch.manual_seed(0)
    with torch.no_grad():
        for stride, variant in ((16, "multigrid"), (8, "multigrid"), (16, "cascade"), (8, "cascade")):
            network = getattr(model, f"deeplabv3_{variant}")(3, output_stride=stride).eval()
            if stride == 16:  # the weights know nothing of strides
                weights = by_rule(network.state_dict())
            network.load_state_dict(weights)
            yield Case(
                f"{variant} at output stride {stride}",
                network,
                lambda x, n=network, s=stride, v=variant: plainly(n.state_dict(), x, s, v),
                (torch.randn(1, 3, 81, 97),),
                "the paper's networks written out, every stride and rate a literal number",
            )


def plainly(state: dict[str, Tensor], x: Tensor, output_stride: int, variant: str) -> Tensor:
    """Sec. 3 as plain functions: ResNet-101 with the rates of the paper, then the pyramid (fig. 5) or blocks 5 to 7 (fig. 3b)."""

    def conv(x: Tensor, name: str, norm: str, stride: int = 1, rate: int = 1, relu: bool = True) -> Tensor:
        weight = state[f"{name}.weight"]
        x = F.conv2d(x, weight, None, stride, rate * (weight.shape[-1] // 2), rate)
        mean, var, scale, shift = (
            state[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt() * scale[:, None, None] + shift[:, None, None]
        return x.clamp(min=0) if relu else x

    def unit(x: Tensor, name: str, stride: int, rate: int) -> Tensor:
        h = conv(x, f"{name}.conv1", f"{name}.bn1")
        h = conv(h, f"{name}.conv2", f"{name}.bn2", stride, rate)
        h = conv(h, f"{name}.conv3", f"{name}.bn3", relu=False)
        down = f"{name}.downsample"
        if f"{down}.0.weight" in state:
            x = conv(x, f"{down}.0", f"{down}.1", stride, relu=False)
        return (h + x).clamp(min=0)

    h = F.max_pool2d(conv(x, "backbone.conv1", "backbone.bn1", 2), 3, 2, 1)
    strides = {16: (1, 2, 2, 1), 8: (1, 2, 1, 1)}[output_stride]
    last = {
        ("multigrid", 16): (2, 4, 8),
        ("multigrid", 8): (4, 8, 16),
        ("cascade", 16): (2, 4, 2),
        ("cascade", 8): (4, 8, 4),
    }
    rates = ((1,) * 3, (1,) * 4, ({16: 1, 8: 2}[output_stride],) * 23, last[variant, output_stride])
    for layer, (stride, rates_of_units) in enumerate(zip(strides, rates, strict=True), 1):
        for i, rate in enumerate(rates_of_units):
            h = unit(h, f"backbone.layer{layer}.{i}", stride if i == 0 else 1, rate)
    if variant == "cascade":
        for block, rates_of_units in enumerate(
            {16: ((4, 8, 4), (8, 16, 8), (16, 32, 16)), 8: ((8, 16, 8), (16, 32, 16), (32, 64, 32))}[output_stride]
        ):
            for i, rate in enumerate(rates_of_units):
                h = unit(h, f"classifier.{block}.{i}", 1, rate)
        scores = F.conv2d(h, state["classifier.4.weight"], state["classifier.4.bias"])
    else:
        parts = [conv(h, "classifier.0.convs.0.0", "classifier.0.convs.0.1")]
        for i, rate in enumerate({16: (6, 12, 18), 8: (12, 24, 36)}[output_stride], 1):
            parts.append(conv(h, f"classifier.0.convs.{i}.0", f"classifier.0.convs.{i}.1", rate=rate))
        mean = conv(h.mean((2, 3), keepdim=True), "classifier.0.convs.4.1", "classifier.0.convs.4.2")
        parts.append(F.interpolate(mean, h.shape[-2:], mode="bilinear"))
        h = conv(torch.cat(parts, 1), "classifier.0.project.0", "classifier.0.project.1")
        scores = F.conv2d(h, state["classifier.1.weight"], state["classifier.1.bias"])
    return F.interpolate(scores, x.shape[-2:], mode="bilinear")


def identities() -> Iterator[Case]:
    torch.manual_seed(0)
    conv = model.ASPPConv(4, 6, 18)[0]
    yield Case(
        "a 3x3 filter of rate 18 on a map of 17 x 17 is its centre alone",
        lambda x: conv(x),
        lambda x: F.conv2d(x, conv.weight[:, :, 1:2, 1:2]),
        (torch.randn(2, 4, 17, 17),),
        "sec. 3.3: with a rate near the map's size the filter degenerates to 1x1",
    )
    x = torch.randn(1, 4, 20, 20)
    rate2 = nn.Conv2d(4, 3, 3, padding=2, dilation=2, bias=False)

    def interleaved(x: Tensor) -> Tensor:
        """Every second position apart, filtered without holes, put together again."""
        out = torch.empty(1, 3, 20, 20)
        for i in range(2):
            for j in range(2):
                out[:, :, i::2, j::2] = F.conv2d(x[:, :, i::2, j::2], rate2.weight, padding=1)
        return out

    yield Case("atrous convolution of rate 2", rate2, interleaved, (x,), "eq. 1, on the four interleaved maps")


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    from torchvision.models import segmentation

    def images(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 3, 224, 224),)

    found = {}
    for name in ("deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large"):

        def reference(name: str = name) -> nn.Module:
            options = {"weights": None, "weights_backbone": None, "aux_loss": True, "num_classes": 21}
            return getattr(segmentation, name)(**options)

        found[name] = Pair(getattr(model, name), reference, images, f"torchvision:{name}", train_batch=2)
    return found
