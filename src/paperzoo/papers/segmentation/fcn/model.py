"""FCN: Fully Convolutional Networks for Semantic Segmentation (arXiv 1411.4038).

A classifier's dense layers are convolutions that see one position; run over a large image they give a coarse map of class scores
(sec. 3.1). Transposed convolutions, started as bilinear interpolation, bring the map back to the input's size (3.3), and scores
computed from finer layers are added on the way (4.2): FCN-32s, FCN-16s, FCN-8s.

`fcn*_vgg16` follow the authors' Caffe networks: 100 pixels of padding at the first convolution, pooling that rounds up, and fixed crops that
undo the offsets. The last interpolation is fixed and those in between are learned, as in the paper (4.3); the released code fixes all.
Caffe's names convert with `from_official`; that file expects BGR input of 0-255 minus (104.007, 116.669, 122.679).

`fcn_resnet*` are torchvision's later networks of the same name, with its parameter names: a dilated ResNet of stride 8, one small head, and
bilinear resizing. In training they return {"out", "aux"}, the second from an auxiliary head on layer3 (0.5 of its loss is torchvision's choice).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.papers.classification.resnet.model import resnet50, resnet101
from paperzoo.papers.classification.vgg.model import PLANS, POOL, conv_stack, pooled_maps


def bilinear_kernel(channels: int, stride: int) -> Tensor:
    """Weights (channels, channels, 2 * stride, 2 * stride) with which a transposed convolution is bilinear upsampling."""
    at = torch.arange(2 * stride, dtype=torch.float32)
    tent = 1 - (at - (stride - 0.5)).abs() / stride
    weight = torch.zeros(channels, channels, 2 * stride, 2 * stride)
    weight[range(channels), range(channels)] = tent[:, None] * tent[None, :]
    return weight


class Upsample(nn.ConvTranspose2d):
    """Upsampling by `stride` as a transposed convolution that starts as bilinear interpolation (sec. 3.3).

    (B, K, h, w) -> (B, K, (h + 1) * stride, (w + 1) * stride).
    """

    def __init__(self, channels: int, stride: int, learned: bool) -> None:
        super().__init__(channels, channels, 2 * stride, stride=stride, bias=False)
        self.weight.requires_grad_(learned)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.copy_(bilinear_kernel(self.in_channels, self.stride[0]))


class FCN(nn.Module):
    """FCN-32s, 16s or 8s on a VGG stack: (B, in_channels, H, W) -> logits (B, num_classes, H, W).

    Args:
        stride: 32, 16 or 8: the finest map that contributes scores is pool5, pool4 or pool3.
        plan: the VGG plan, `paperzoo.papers.classification.vgg.model.PLANS`.
        head_features: width of fc6 and fc7.
        fc6_size: kernel of fc6; 7 as the dense layer over a 7 x 7 map that it came from.
        padding: of the first convolution; below the paper's 100 small images are padded, far below it is refused.
    """

    def __init__(
        self,
        stride: int,
        plan: tuple[int, ...] = PLANS["D"],
        *,
        batch_norm: bool = False,
        num_classes: int = 21,
        in_channels: int = 3,
        drop_rate: float = 0.5,
        head_features: int = 4096,
        fc6_size: int = 7,
        padding: int = 100,
    ) -> None:
        super().__init__()
        self.stride, self.fc6_size, self.padding = stride, fc6_size, padding
        # Where map A's pixel 0 lies on map B follows from kernels, strides and paddings; with fc6_size 7 and padding 100
        # the crops are 5 and 9, then 31, 27 and 19, as in the authors' networks.
        self.offset = padding - 16 * (fc6_size - 1) + {32: 15, 16: 23, 8: 27}[stride]
        if self.offset < 0:
            raise ValueError(
                f"padding must be at least {padding - self.offset} for fc6_size {fc6_size} and stride {stride}, got {padding}"
            )
        self.features = conv_stack(plan, batch_norm, in_channels)
        self.features[0].padding = (padding, padding)
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = True  # as Caffe
        widths = [plan[i - 1] for i, width in enumerate(plan) if width == POOL]
        self.fc6 = nn.Conv2d(widths[4], head_features, fc6_size)
        self.fc7 = nn.Conv2d(head_features, head_features, 1)
        self.dropout = nn.Dropout(drop_rate)
        self.score_fr = nn.Conv2d(head_features, num_classes, 1)
        if stride <= 16:
            self.upscore2 = Upsample(num_classes, 2, learned=True)
            self.score_pool4 = nn.Conv2d(widths[3], num_classes, 1)
        if stride == 8:
            self.upscore_pool4 = Upsample(num_classes, 2, learned=True)
            self.score_pool3 = nn.Conv2d(widths[2], num_classes, 1)
        self.add_module(f"upscore{stride}", Upsample(num_classes, stride, learned=False))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
        for name, module in self.named_children():
            if name.startswith("score"):
                nn.init.zeros_(module.weight)  # sec. 4.1, 4.2: scoring layers start at zero

    def forward(self, x: Tensor) -> Tensor:
        # fc6 needs a map of its own size: with less padding than the paper's 100, small images are padded below and on the right
        smallest = 32 * (self.fc6_size - 1) + 3 - 2 * self.padding
        below, right = (max(0, smallest - extent) for extent in x.shape[-2:])
        padded = F.pad(x, (0, right, 0, below)) if below or right else x
        _, _, pool3, pool4, pool5 = pooled_maps(self.features, padded)
        h = self.dropout(F.relu(self.fc6(pool5)))
        h = self.dropout(F.relu(self.fc7(h)))
        score = self.score_fr(h)
        if self.stride <= 16:
            score = self.upscore2(score)
            score = score + crop(self.score_pool4(pool4), self.fc6_size - 2, score.shape)
        if self.stride == 8:
            score = self.upscore_pool4(score)
            score = score + crop(self.score_pool3(pool3), 2 * self.fc6_size - 5, score.shape)
        score = getattr(self, f"upscore{self.stride}")(score)
        return crop(score, self.offset, x.shape)

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        """Start from a VGG classifier or from the next coarser FCN (their state dicts).

        Of a classifier the stack is taken as it is, and the first two dense layers become fc6 and fc7 (sec. 3.1). Of a coarser
        net everything is taken (sec. 4.2: 16s from 32s, 8s from 16s); the new scoring layer stays at zero.

        Raises:
            ValueError: if something is missing or has another shape.
        """
        coarser = "score_fr.weight" in state
        taken = {name: value for name, value in state.items() if coarser or name.startswith("features.")}
        for dense, layer in (("classifier.0", "fc6"), ("classifier.3", "fc7")):
            if f"{dense}.weight" in state:
                weight = getattr(self, layer).weight
                if state[f"{dense}.weight"].numel() != weight.numel():
                    raise ValueError(
                        f"{dense} has {state[f'{dense}.weight'].numel()} weights, {layer} needs {weight.numel()}"
                    )
                taken[f"{layer}.weight"] = state[f"{dense}.weight"].reshape(weight.shape)
                taken[f"{layer}.bias"] = state[f"{dense}.bias"]
        needed = [name for name in self.state_dict() if name.startswith(("features.", "fc6", "fc7"))]
        missing = [name for name in needed if name not in taken]
        if missing:
            raise ValueError(
                f"no '{missing[0]}'; the weights of a VGG of the same configuration, or of a coarser FCN, are expected"
            )
        here = self.state_dict()
        self.load_state_dict({name: value for name, value in taken.items() if name in here}, strict=False)


def crop(x: Tensor, offset: int, shape: torch.Size) -> Tensor:
    """The window of `x` that starts at `offset` in both directions and has the height and width of `shape`."""
    return x[:, :, offset : offset + shape[-2], offset : offset + shape[-1]]


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Caffe's names (`conv1_1`, …, as in the authors' models and the files converted from them) to ours."""
    convolutions = [i for i, layer in enumerate(conv_stack(PLANS["D"])) if isinstance(layer, nn.Conv2d)]
    names = [f"conv{block}_{i}" for block, count in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, count + 1)]
    table = dict(zip(names, convolutions, strict=True))

    def rename(name: str) -> str:
        return re.sub(r"^conv\d_\d", lambda match: f"features.{table[match.group()]}", name)

    return {rename(name): value for name, value in state.items()}


class Head(nn.Sequential):
    """3x3 convolution to a quarter of the channels, batch norm, then class scores."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        hidden = in_channels // 4
        super().__init__(
            nn.Conv2d(in_channels, hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(hidden, num_classes, 1),
        )


class FCNResNet(nn.Module):
    """(B, 3, H, W) -> logits (B, num_classes, H, W); in training, with the auxiliary head, {"out": …, "aux": …} of that shape."""

    def __init__(self, backbone: nn.Module, num_classes: int, aux_loss: bool) -> None:
        super().__init__()
        *_, aux_channels, channels = backbone.stage_channels
        for unused in ("avgpool", "fc"):
            delattr(backbone, unused)
        self.backbone = backbone
        self.classifier = Head(channels, num_classes)
        self.aux_classifier = Head(aux_channels, num_classes) if aux_loss else None

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        *_, middle, last = self.backbone.stages(x)
        out = F.interpolate(self.classifier(last), size=x.shape[-2:], mode="bilinear", align_corners=False)
        if not self.training or self.aux_classifier is None:
            return out
        aux = F.interpolate(self.aux_classifier(middle), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return {"out": out, "aux": aux}

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        """Take over a ResNet classifier (its state dict), whose dense layer is left out."""
        self.backbone.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc.")})


def fcn32s_vgg16(num_classes: int = 21, in_channels: int = 3, drop_rate: float = 0.5) -> FCN:
    """One stream: scores of fc7, upsampled 32 times."""
    return FCN(32, num_classes=num_classes, in_channels=in_channels, drop_rate=drop_rate)


def fcn16s_vgg16(num_classes: int = 21, in_channels: int = 3, drop_rate: float = 0.5) -> FCN:
    """Two streams: pool4's scores are added."""
    return FCN(16, num_classes=num_classes, in_channels=in_channels, drop_rate=drop_rate)


def fcn8s_vgg16(num_classes: int = 21, in_channels: int = 3, drop_rate: float = 0.5) -> FCN:
    """Three streams: pool4's and pool3's scores are added. The paper's best network."""
    return FCN(8, num_classes=num_classes, in_channels=in_channels, drop_rate=drop_rate)


def fcn8s_slim(num_classes: int = 11, in_channels: int = 3, drop_rate: float = 0.0) -> FCN:
    """Not of the paper: FCN-8s on a stack of six narrow convolutions with batch norm, for small images and learning from scratch."""
    plan = (16, POOL, 32, POOL, 64, 64, POOL, 128, POOL, 128, POOL)
    options = {"head_features": 128, "fc6_size": 5, "padding": 40, "batch_norm": True}
    return FCN(8, plan, num_classes=num_classes, in_channels=in_channels, drop_rate=drop_rate, **options)


def fcn_resnet50(num_classes: int = 21, aux_loss: bool = True) -> FCNResNet:
    """torchvision's FCN on a ResNet-50 of stride 8."""
    return FCNResNet(resnet50(replace_stride_with_dilation=[False, True, True]), num_classes, aux_loss)


def fcn_resnet101(num_classes: int = 21, aux_loss: bool = True) -> FCNResNet:
    """torchvision's FCN on a ResNet-101 of stride 8."""
    return FCNResNet(resnet101(replace_stride_with_dilation=[False, True, True]), num_classes, aux_loss)
