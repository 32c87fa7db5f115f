"""BiSeNet: Bilateral Segmentation Network for Real-time Semantic Segmentation (Yu et al., ECCV 2018, arXiv:1808.00897).

Detail and context are two networks' work. A spatial path of three strided convolutions keeps a wide map of stride 8 (sec. 3.1). A
context path goes down fast to stride 32, gates its last two maps by their own averages and lifts them again, with the average over the
image on top (sec. 3.2). A fusion module puts both side by side and gates the sum (sec. 3.3).

Widths are the authors' (TorchSeg); the layers' names are those of CoinCheung's PyTorch implementation, whose weights convert for
`bisenet_v1_resnet18_released`: its gate is one convolution and a batch norm where the paper's figure 2c has two
convolutions, and its heads are of another width. Resizing is CoinCheung's as well: nearest inside, bilinear with free corners at the end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.backbones import Backbone, at_strides, load_body
from paperzoo.blocks.classifier import last_layer
from paperzoo.papers.segmentation.pspnet.model import SlimResNet

# -- parts ---------------------------------------------------------------------------------------------------------------


class ConvNormReLU(nn.Sequential):
    """A convolution that keeps the size at stride 1, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        layers = {
            "conv": nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
            "bn": nn.BatchNorm2d(outputs),
            "relu": nn.ReLU(inplace=True),
        }
        super().__init__(OrderedDict(layers))


class SpatialPath(nn.Module):
    """Fig. 2a: (B, in_channels, H, W) -> (B, outputs, H / 2**depth, W / 2**depth), rounded up."""

    def __init__(self, in_channels: int = 3, width: int = 64, outputs: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.depth = depth
        for i in range(depth):
            self.add_module(f"conv{i + 1}", ConvNormReLU(width if i else in_channels, width, 3 if i else 7, stride=2))
        self.conv_out = ConvNormReLU(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.depth):
            x = getattr(self, f"conv{i + 1}")(x)
        return self.conv_out(x)


class AttentionRefinement(nn.Module):
    """Fig. 2b: the map, each channel times a gate from its average over the image. (B, inputs, h, w) -> (B, outputs, h, w)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = ConvNormReLU(inputs, outputs)
        self.conv_atten = nn.Conv2d(outputs, outputs, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.bn_atten(self.conv_atten(x.mean((2, 3), keepdim=True))).sigmoid()


class ContextPath(nn.Module):
    """Sec. 3.2: the images and the size of the spatial path's map -> that size's map, and one of half of it, `channels` wide both.

    Args:
        backbone: has `stages(x)` and `stage_channels`; its last two maps are used, of strides 16 and 32 in the paper.
    """

    def __init__(self, backbone: nn.Module, channels: int = 128) -> None:
        super().__init__()
        *_, middle, last = backbone.stage_channels
        self.backbone = backbone
        self.arm16 = AttentionRefinement(middle, channels)
        self.arm32 = AttentionRefinement(last, channels)
        self.conv_head32 = ConvNormReLU(channels, channels)
        self.conv_head16 = ConvNormReLU(channels, channels)
        self.conv_avg = ConvNormReLU(last, channels, 1)

    def forward(self, x: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
        *_, middle, last = self.backbone.stages(x)
        return self.refine(middle, last, size)

    def refine(self, middle: Tensor, last: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
        tail = self.conv_avg(last.mean((2, 3), keepdim=True))
        lifted = self.conv_head32(F.interpolate(self.arm32(last) + tail, size=middle.shape[-2:]))
        return self.conv_head16(F.interpolate(self.arm16(middle) + lifted, size=size)), lifted


class FeatureFusion(nn.Module):
    """Fig. 2c: both paths side by side, mixed, and a gated copy added: y = f + f * sigmoid(W2 relu(W1 mean(f))).

    Args:
        inputs: channels of both maps together.
        reduction: of the gate's hidden layer; 1 in the authors' code.
        released: CoinCheung's gate, sigmoid(batch norm(W mean(f))), instead.
    """

    def __init__(self, inputs: int, outputs: int, reduction: int = 1, released: bool = False) -> None:
        super().__init__()
        self.convblk = ConvNormReLU(inputs, outputs, 1)
        self.released = released
        if released:
            self.conv = nn.Conv2d(outputs, outputs, 1, bias=False)
            self.bn = nn.BatchNorm2d(outputs)
        else:
            self.conv1 = nn.Conv2d(outputs, outputs // reduction, 1, bias=False)
            self.conv2 = nn.Conv2d(outputs // reduction, outputs, 1, bias=False)

    def forward(self, spatial: Tensor, context: Tensor) -> Tensor:
        x = self.convblk(torch.cat([spatial, context], 1))
        average = x.mean((2, 3), keepdim=True)
        gate = self.bn(self.conv(average)) if self.released else self.conv2(F.relu(self.conv1(average)))
        return x + x * gate.sigmoid()


class Scores(nn.Module):
    """A head: 3x3 convolution, then a score for each class."""

    def __init__(self, inputs: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.conv = ConvNormReLU(inputs, hidden)
        self.conv_out = nn.Conv2d(hidden, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.conv(x))


# -- the network ---------------------------------------------------------------------------------------------------------


class BiSeNetV1(nn.Module):
    """Images (B, in_channels, H, W) of any size -> logits (B, num_classes, H, W); in training {"out": …, "aux": [two of that shape]}.

    The auxiliary heads read the context path at strides 8 and 16 (eq. 2). Training needs more than one image: the averages over
    an image go through batch norm.

    Args:
        backbone: see `ContextPath`.
        channels: of both paths' maps; the fused map has twice as many.
        hidden: channels in the head and in the auxiliary heads.
        spatial: width and depth of the spatial path.
        released: see `FeatureFusion`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        in_channels: int = 3,
        channels: int = 128,
        hidden: tuple[int, int] = (64, 256),
        spatial: tuple[int, int] = (64, 3),
        aux_loss: bool = True,
        released: bool = False,
    ) -> None:
        super().__init__()
        self.sp = SpatialPath(in_channels, spatial[0], channels, spatial[1])
        self.cp = ContextPath(backbone, channels)
        self.ffm = FeatureFusion(2 * channels, 2 * channels, released=released)
        self.conv_out = Scores(2 * channels, hidden[0], num_classes)
        self.conv_out16 = Scores(channels, hidden[1], num_classes) if aux_loss else None
        self.conv_out32 = Scores(channels, hidden[1], num_classes) if aux_loss else None
        kept = set(backbone.modules())
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module not in kept:
                nn.init.kaiming_normal_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor | list[Tensor]]:
        spatial = self.sp(x)
        context, coarse = self.cp(x, spatial.shape[-2:])
        heads = [(self.conv_out, self.ffm(spatial, context))]
        if self.training and self.conv_out16 is not None:
            heads += [(self.conv_out16, context), (self.conv_out32, coarse)]
        out, *aux = [F.interpolate(head(y), size=x.shape[-2:], mode="bilinear") for head, y in heads]
        return {"out": out, "aux": aux} if aux else out

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        """Start from a classifier with the same body (its state dict); its last layer is left out.

        Raises:
            ValueError: if something is missing or has another shape.
        """
        backbone = self.cp.backbone
        load_body(backbone.body if isinstance(backbone, Backbone) else backbone, dict(state))


# -- Xception39, the light context path ------------------------------------------------------------------------------------


class Separable(nn.Module):
    """A 3x3 convolution for each channel, batch norm, 1x1 across channels, batch norm (and ReLU)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False)
        self.bn = nn.BatchNorm2d(inputs)
        pointwise = ConvNormReLU(inputs, outputs, 1)
        self.point_wise_cbr = pointwise if relu else nn.Sequential(OrderedDict(conv=pointwise.conv, bn=pointwise.bn))

    def forward(self, x: Tensor) -> Tensor:
        return self.point_wise_cbr(self.bn(self.conv1(x)))


class XceptionBlock(nn.Module):
    """Three separable convolutions, the last four times as wide, and a shortcut, itself separable where the shape changes."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.proj = Separable(inputs, outputs, stride, relu=False) if stride > 1 or inputs != outputs else None
        self.residual_branch = nn.Sequential(
            Separable(inputs, width, stride), Separable(width, width), Separable(width, outputs, relu=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.proj is None else self.proj(x)
        return F.relu(self.residual_branch(x) + shortcut)


class Xception39(nn.Module):
    """The authors' light Xception as a classifier: images (B, in_channels, H, W) -> logits (B, num_classes); 0 classes give features."""

    def __init__(self, num_classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = ConvNormReLU(in_channels, 8, 3, stride=2)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        before = 8
        for i, (depth, width) in enumerate(((4, 16), (8, 32), (4, 64)), 1):
            first, *more = (before, *(4 * width,) * (depth - 1))
            blocks = [XceptionBlock(first, width, 2), *(XceptionBlock(channels, width) for channels in more)]
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
            before = 4 * width
        self.stage_channels, self.stage_strides, self.num_features = [64, 128, 256], [8, 16, 32], 256
        self.fc = last_layer(256, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def stages(self, x: Tensor) -> list[Tensor]:
        """The maps of strides 8, 16 and 32."""
        x = self.maxpool(self.conv1(x))
        fine = self.layer1(x)
        middle = self.layer2(fine)
        return [fine, middle, self.layer3(middle)]

    def embed(self, x: Tensor) -> Tensor:
        return self.stages(x)[-1].mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.embed(x))

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer for another number of classes; 0 for none."""
        self.fc = last_layer(self.num_features, num_classes).to(self.conv1.conv.weight)


# -- variants ------------------------------------------------------------------------------------------------------------


def xception39(num_classes: int = 1000, in_channels: int = 3) -> Xception39:
    """The classifier under the light BiSeNet."""
    return Xception39(num_classes, in_channels)


def bisenet_v1_resnet18(
    num_classes: int = 19, in_channels: int = 3, aux_loss: bool = True, backbone: str = "resnet18"
) -> BiSeNetV1:
    """On ResNet-18, or on another classifier by name that has maps of strides 16 and 32."""
    body = at_strides(backbone, (16, 32), in_channels=in_channels)
    return BiSeNetV1(body, num_classes, in_channels, aux_loss=aux_loss)


def bisenet_v1_xception39(num_classes: int = 19, in_channels: int = 3, aux_loss: bool = True) -> BiSeNetV1:
    """On Xception39: the fast one."""
    return bisenet_v1_resnet18(num_classes, in_channels, aux_loss, backbone="xception39")


def bisenet_v1_resnet18_released(num_classes: int = 19, in_channels: int = 3, aux_loss: bool = True) -> BiSeNetV1:
    """CoinCheung's: another gate, a wider head and narrower auxiliary heads."""
    body = at_strides("resnet18", (16, 32), in_channels=in_channels)
    return BiSeNetV1(body, num_classes, in_channels, hidden=(256, 64), aux_loss=aux_loss, released=True)


def bisenet_v1_slim(num_classes: int = 8, in_channels: int = 3, aux_loss: bool = True) -> BiSeNetV1:
    """Not of the paper: narrow, the context path at strides 8 and 16 and the spatial path at 4, for images of 64 pixels."""
    options = {"channels": 32, "hidden": (32, 32), "spatial": (16, 2), "aux_loss": aux_loss}
    return BiSeNetV1(SlimResNet(in_channels), num_classes, in_channels, **options)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CoinCheung's names to these: the ResNet is a backbone's body here."""
    return {
        f"cp.backbone.body.{name.removeprefix('cp.resnet.')}" if name.startswith("cp.resnet.") else name: value
        for name, value in state.items()
    }
