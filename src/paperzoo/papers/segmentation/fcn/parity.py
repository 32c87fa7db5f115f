"""Parity of FCN: with torchvision for the ResNet versions, with a plain transcription of the authors' network, and sec. 3.1."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.classification.vgg.model import vgg16
from paperzoo.papers.segmentation.fcn import model


def cases() -> Iterator[Case]:
    import torchvision
    from torchvision.models import segmentation

    against = f"torchvision {torchvision.__version__}"
    torch.manual_seed(0)
    for name, aux, train, size in (
        ("fcn_resnet50", True, False, (65, 64)),
        ("fcn_resnet50", True, True, (48, 40)),
        ("fcn_resnet101", False, False, (33, 47)),
    ):
        ours = getattr(model, name)(num_classes=5, aux_loss=aux).train(train)
        reference = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=5, aux_loss=aux).train(
            train
        )
        reference.load_state_dict(ours.state_dict())
        for head in (*ours.modules(), *reference.modules()):
            if isinstance(head, nn.Dropout):
                head.p = 0.0
        x = torch.randn(2, 3, *size)
        if (
            train
        ):  # in double precision: fp32 gradients through 50 batch norms of a batch of two carry rounding of a percent
            ours, reference, x = ours.double(), reference.double(), x.double()
        yield Case(
            name=f"{name} {'train, out and aux' if train else 'eval'} {size}",
            ours=ours if train else MainOutput(ours),
            reference=reference if train else MainOutput(reference),
            inputs=(x,),
            against=f"{against} {name}",
            gradients=train,
            note="in double precision" if train else "",
        )
        del ours, reference

    with torch.no_grad():
        for stride, small in ((32, True), (16, True), (8, True), (8, False)):
            plan = (4, 0, 4, 0, 6, 0, 8, 0, 8, 0) if small else model.PLANS["D"]
            ours = model.FCN(stride, plan, num_classes=3, head_features=16).eval()
            for layer in ours.children():
                if isinstance(layer, nn.Conv2d):
                    nn.init.normal_(layer.weight, std=0.1)
            size = (37, 64) if small else (20, 33)
            yield Case(
                name=f"fcn{stride}s {'small' if small else 'VGG-16 stack'} {size}",
                ours=ours,
                reference=lambda x, net=ours, stride=stride: _plain(net, stride, x),
                inputs=(torch.randn(1, 3, *size),),
                against="the authors' net.py written out, with its literal crops (5, 9; 19, 27, 31)",
            )

    # Sec. 3.1: the dense layers as convolutions, on the image size that they were trained for, are the classifier.
    classifier = vgg16(num_classes=2).eval()
    net = model.fcn32s_vgg16(num_classes=2).eval()
    net.load_backbone(classifier.state_dict())
    net.features[0].padding = (1, 1)
    yield Case(
        name="fc7 of a 224 x 224 image is VGG-16's",
        ours=lambda x: F.relu(net.fc7(F.relu(net.fc6(net.features(x))))).flatten(1),
        reference=classifier.embed,
        inputs=(torch.rand(1, 3, 224, 224),),
        against="identity of sec. 3.1",
    )

    for factor in (2, 8):
        layer = model.Upsample(3, factor, learned=False)
        x = torch.randn(1, 3, 7, 5)
        inner = slice(
            factor, -factor
        )  # the transposed convolution fades to zero at the border, resizing repeats the edge
        yield Case(
            name=f"upsampling by {factor} starts bilinear",
            ours=lambda x, layer=layer, inner=inner, f=factor: layer(x)[..., f // 2 : -(f // 2), f // 2 : -(f // 2)][
                ..., inner, inner
            ],
            reference=lambda x, f=factor, inner=inner: F.interpolate(x, scale_factor=f, mode="bilinear")[
                ..., inner, inner
            ],
            inputs=(x,),
            against="torch.nn.functional.interpolate, away from the border",
        )


class MainOutput(nn.Module):
    """The main output, whether a network returns a tensor or a dict."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        output = self.network(x)
        return output["out"] if isinstance(output, dict) else output


def _plain(net: model.FCN, stride: int, x: Tensor) -> Tensor:
    """The authors' network line by line, with numbers in place of rules."""
    pools, h = [], x
    for layer in net.features:
        if isinstance(layer, nn.Conv2d):
            h = F.conv2d(h, layer.weight, layer.bias, padding=100 if layer is net.features[0] else 1)
        elif isinstance(layer, nn.ReLU):
            h = h.clamp(min=0)
        else:
            h = F.max_pool2d(h, 2, 2, ceil_mode=True)
            pools.append(h)
    h = F.conv2d(h, net.fc6.weight, net.fc6.bias).clamp(min=0)
    h = F.conv2d(h, net.fc7.weight, net.fc7.bias).clamp(min=0)
    h = F.conv2d(h, net.score_fr.weight, net.score_fr.bias)
    if stride == 32:
        h = F.conv_transpose2d(h, net.upscore32.weight, stride=32)
        return h[:, :, 19 : 19 + x.shape[2], 19 : 19 + x.shape[3]]
    h = F.conv_transpose2d(h, net.upscore2.weight, stride=2)
    skip = F.conv2d(pools[3], net.score_pool4.weight, net.score_pool4.bias)
    h = h + skip[:, :, 5 : 5 + h.shape[2], 5 : 5 + h.shape[3]]
    if stride == 16:
        h = F.conv_transpose2d(h, net.upscore16.weight, stride=16)
        return h[:, :, 27 : 27 + x.shape[2], 27 : 27 + x.shape[3]]
    h = F.conv_transpose2d(h, net.upscore_pool4.weight, stride=2)
    skip = F.conv2d(pools[2], net.score_pool3.weight, net.score_pool3.bias)
    h = h + skip[:, :, 9 : 9 + h.shape[2], 9 : 9 + h.shape[3]]
    h = F.conv_transpose2d(h, net.upscore8.weight, stride=8)
    return h[:, :, 31 : 31 + x.shape[2], 31 : 31 + x.shape[3]]


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    from torchvision.models import segmentation

    def images(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 3, 224, 224),)

    def reference() -> nn.Module:
        return segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True, num_classes=21)

    return {"fcn_resnet50": Pair(model.fcn_resnet50, reference, images, "torchvision:fcn_resnet50", train_batch=2)}
