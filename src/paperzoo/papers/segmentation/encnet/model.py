"""EncNet: Context Encoding for Semantic Segmentation (Zhang et al., CVPR 2018, arXiv:1803.08904).

What scene this is, is written into one vector: every pixel's feature is compared with K learned codewords, the differences are
summed with soft weights, and the K sums become one (sec. 3.1, the encoding layer of Deep TEN). From it one layer makes a gate for each
channel of the map, and another says which classes the image holds, which the semantic encoding loss asks for (fig. 2).

Parameter names of the head are those of the authors' PyTorch-Encoding, whose files convert with `from_official`; their ResNet has PSPNet's
stem and torchvision's dilations. Where their code departs from the text it is followed: the K vectors are averaged, not summed, and the
smoothing factors are stored with their minus sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.backbones import headless, load_body
from paperzoo.blocks.dilation import dilate, dilated_backbone
from paperzoo.blocks.precision import full_precision
from paperzoo.papers.classification.resnet.model import conv1x1, conv3x3
from paperzoo.papers.segmentation.fcn.model import Head
from paperzoo.papers.segmentation.pspnet.model import DeepStemResNet, SlimResNet, classifier_names, enlarge


def exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Encoding(nn.Module):
    """Residual encoding with a codebook (eq. 1): (B, C, H, W) -> (B, K, C), float32 at least.

    e_k = sum_i a_ik (x_i - d_k), the a_ik a softmax over k of scale_k |x_i - d_k|^2. No tensor of pixels times codewords times channels
    is made: distances and sums are matrix products.
    """

    def __init__(self, channels: int, codewords: int) -> None:
        super().__init__()
        spread = (channels * codewords) ** -0.5
        self.codewords = nn.Parameter(torch.empty(codewords, channels).uniform_(-spread, spread))
        self.scale = nn.Parameter(torch.empty(codewords).uniform_(-1, 0))  # minus the paper's s_k

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x):  # differences of squares, and sums over all pixels
            x, words, scale = exact(x.flatten(2)), exact(self.codewords), exact(self.scale)
            squares = x.square().sum(1, keepdim=True) + words.square().sum(1)[:, None]  # (B, K, N)
            weights = (scale[:, None] * (squares - 2 * words @ x)).softmax(1)
            return weights @ x.transpose(1, 2) - weights.sum(2)[..., None] * words


class ContextEncoding(nn.Module):
    """Fig. 2: (B, C, H, W) -> the map with gated channels of that shape, and logits (B, num_classes) of the classes' presence.

    Training needs more than one image.
    """

    def __init__(self, channels: int, num_classes: int, codewords: int) -> None:
        super().__init__()
        self.encoding = nn.Sequential(
            conv1x1(channels, channels),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            Encoding(channels, codewords),
            nn.BatchNorm1d(codewords),
            nn.ReLU(inplace=True),
        )
        self.fc = nn.Sequential(nn.Linear(channels, channels), nn.Sigmoid())
        self.selayer = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        vector = self.encoding(x).mean(1)
        gates = self.fc(vector)
        return F.relu(x + x * gates[..., None, None]), self.selayer(vector)


class EncHead(nn.Module):
    """The backbone's maps -> scores (B, num_classes, h, w) and the presence logits.

    Args:
        channels: of the backbone's maps; `lateral` reads the last three, else the last alone.
        lateral: two finer maps, of the same size, join before the module, as in the released networks for PASCAL Context and COCO.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        hidden: int = 512,
        codewords: int = 32,
        drop_rate: float = 0.1,
        lateral: bool = False,
    ) -> None:
        super().__init__()

        def joined(layer: nn.Module) -> nn.Sequential:
            return nn.Sequential(layer, nn.BatchNorm2d(hidden), nn.ReLU(inplace=True))

        self.conv5 = joined(conv3x3(channels[-1], hidden))
        self.lateral = lateral
        if lateral:
            self.connect = nn.ModuleList(joined(conv1x1(width, hidden)) for width in channels[-3:-1])
            self.fusion = joined(conv3x3(3 * hidden, hidden))
        self.encmodule = ContextEncoding(hidden, num_classes, codewords)
        self.conv6 = nn.Sequential(nn.Dropout(drop_rate), nn.Conv2d(hidden, num_classes, 1))

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        x = self.conv5(maps[-1])
        if self.lateral:
            finer = [connect(y) for connect, y in zip(self.connect, maps[-3:-1], strict=True)]
            x = self.fusion(torch.cat([x, *finer], 1))
        x, presence = self.encmodule(x)
        return self.conv6(x), presence


class EncNet(nn.Module):
    """(B, in_channels, H, W) -> logits (B, num_classes, H, W).

    In training {"out": logits, "presence": (B, num_classes), "aux": logits of the auxiliary head}, the last if there is one.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, drop_rate: float, aux_loss: bool, **head) -> None:
        super().__init__()
        channels = backbone.stage_channels
        self.backbone = headless(backbone)
        self.head = EncHead(channels, num_classes, drop_rate=drop_rate, **head)
        self.auxlayer = Head(channels[-2], num_classes) if aux_loss else None
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = drop_rate

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        maps = self.backbone.stages(x)
        scores, presence = self.head(maps)
        out = enlarge(scores, x.shape[-2:])
        if not self.training:
            return out
        aux = {} if self.auxlayer is None else {"aux": enlarge(self.auxlayer(maps[-2]), x.shape[-2:])}
        return {"out": out, "presence": presence, **aux}

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        """Start from an ImageNet classifier (its state dict) with the same body.

        Raises:
            ValueError: if something is missing or has another shape.
        """
        load_body(getattr(self.backbone, "body", self.backbone), classifier_names(state))


def presence_of(masks: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Which classes a mask holds, whatever their size (sec. 3.2): int64 (B, H, W) -> bool (B, num_classes), and bool (B,): any at all."""
    found = torch.zeros(len(masks), 256, dtype=torch.bool, device=masks.device)
    found.scatter_(1, masks.flatten(1), True)
    found = found[:, :num_classes]
    return found, found.any(1)


def semantic_encoding_loss(presence: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy of the presence of each class (sec. 3.2), averaged over classes and images; images without a labelled pixel do not count.

    Args:
        presence: logits (B, K). masks: int64 (B, H, W), class ids or 255.
    """
    found, known = presence_of(masks, presence.shape[1])
    losses = F.binary_cross_entropy_with_logits(presence.float(), found.float(), reduction="none").mean(1)
    return (losses * known).sum() / known.sum().clamp(min=1)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PyTorch-Encoding's names to these: `pretrained.` is the backbone, the auxiliary head is FCN's."""
    renamed = {}
    for name, value in state.items():
        name = f"backbone.{name.removeprefix('pretrained.')}" if name.startswith("pretrained.") else name
        renamed[name.replace("auxlayer.conv5.", "auxlayer.")] = value
    return renamed


# -- variants ------------------------------------------------------------------------------------------------------------


def _encnet(layers: Sequence[int], num_classes: int, in_channels: int, backbone: str | None, **options) -> EncNet:
    if backbone is None:
        body = dilate(DeepStemResNet(layers, 0, in_channels), 8)
    else:
        body = dilated_backbone(backbone, 8, in_channels=in_channels)
    return EncNet(body, num_classes, **options)


def encnet_resnet50(
    num_classes: int = 150,
    in_channels: int = 3,
    drop_rate: float = 0.1,
    aux_loss: bool = True,
    lateral: bool = False,
    backbone: str | None = None,
) -> EncNet:
    """On the authors' ResNet-50 of stride 8, or on another classifier by name."""
    options = {"drop_rate": drop_rate, "aux_loss": aux_loss, "lateral": lateral}
    return _encnet((3, 4, 6, 3), num_classes, in_channels, backbone, **options)


def encnet_resnet101(
    num_classes: int = 150,
    in_channels: int = 3,
    drop_rate: float = 0.1,
    aux_loss: bool = True,
    lateral: bool = False,
    backbone: str | None = None,
) -> EncNet:
    """On the authors' ResNet-101 of stride 8, or on another classifier by name."""
    options = {"drop_rate": drop_rate, "aux_loss": aux_loss, "lateral": lateral}
    return _encnet((3, 4, 23, 3), num_classes, in_channels, backbone, **options)


def encnet_slim(num_classes: int = 8, in_channels: int = 3, drop_rate: float = 0.0, aux_loss: bool = True) -> EncNet:
    """Not of the paper: on a small ResNet of stride 4, for images of 64 pixels."""
    body = dilate(SlimResNet(in_channels), 4)
    return EncNet(body, num_classes, drop_rate, aux_loss, hidden=48, codewords=16)
