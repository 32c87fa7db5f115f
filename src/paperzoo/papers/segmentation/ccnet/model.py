"""CCNet: Criss-Cross Attention for Semantic Segmentation (Huang et al., ICCV 2019, arXiv:1811.11721).

Full self-attention lets every pixel look at all H * W others. Here a pixel looks at the H + W - 1 of its own row and column; done twice
with the same weights, what any pixel holds has reached any other by way of the two corners between them (sec. 3.3, fig. 4).

The layers are those of the released code (`networks/ccnet.py`), whose files convert with `from_official`: PSPNet's ResNet with whole
stages dilated, and in the head leaky ReLUs of slope 0.01, the default of the in-place batch norm used there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from paperzoo.blocks.backbones import headless, load_body
from paperzoo.blocks.dilation import dilate, dilated_backbone
from paperzoo.papers.classification.resnet.model import conv3x3
from paperzoo.papers.segmentation.pspnet.model import DeepStemResNet, SlimResNet, classifier_names, enlarge


class CrissCrossAttention(nn.Module):
    """One pass (eq. 1 to 3): (B, C, H, W) -> the same shape.

    Each position's query meets the keys of its column and of its row in one softmax over H + W - 1 entries; gamma, which starts at 0,
    scales what is gathered, and the input is added.
    """

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        self.query_conv = nn.Conv2d(channels, channels // reduction, 1)
        self.key_conv = nn.Conv2d(channels, channels // reduction, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query_conv(x), self.key_conv(x), self.value_conv(x)
        height = x.shape[2]
        itself = torch.eye(height, dtype=torch.bool, device=x.device)[
            :, None
        ]  # in the row already; here it would count twice
        column = torch.einsum("bchw,bcgw->bhwg", query, key).masked_fill(itself, -torch.inf)
        row = torch.einsum("bchw,bchv->bhwv", query, key)
        attention = torch.cat([column, row], 3).softmax(3).to(value.dtype)
        gathered = torch.einsum("bhwg,bcgw->bchw", attention[..., :height], value)
        gathered = gathered + torch.einsum("bhwv,bchv->bchw", attention[..., height:], value)
        return self.gamma * gathered + x


def activated(layer: nn.Conv2d) -> list[nn.Module]:
    return [layer, nn.BatchNorm2d(layer.out_channels), nn.LeakyReLU(0.01, inplace=True)]


class RecurrentCrissCross(nn.Module):
    """Sec. 3.1 and 3.3: reduce, attend `recurrence` times with the same weights, join with the map. (B, C, h, w) -> (B, num_classes, h, w)."""

    def __init__(
        self, channels: int, reduced: int, hidden: int, num_classes: int, recurrence: int, drop_rate: float
    ) -> None:
        super().__init__()
        if recurrence < 0:
            raise ValueError(f"recurrence is {recurrence}; it is the number of passes, 2 in the paper, 0 for none")
        self.recurrence = recurrence
        self.conva = nn.Sequential(*activated(conv3x3(channels, reduced)))
        self.cca = CrissCrossAttention(reduced)
        self.convb = nn.Sequential(*activated(conv3x3(reduced, reduced)))
        self.bottleneck = nn.Sequential(
            *activated(conv3x3(channels + reduced, hidden)),
            nn.Dropout2d(drop_rate),
            nn.Conv2d(hidden, num_classes, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conva(x)
        for _ in range(self.recurrence):
            y = self.cca(y)
        return self.bottleneck(torch.cat([x, self.convb(y)], 1))


class CCNet(nn.Module):
    """(B, in_channels, H, W) -> logits (B, num_classes, H, W); in training with the auxiliary head {"out": …, "aux": …} of that shape.

    Args:
        backbone: has `stages(x)` and `stage_channels`; the last two maps are used.
        reduced, hidden: channels of the attention, and before the scores (and in the auxiliary head).
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        drop_rate: float = 0.1,
        aux_loss: bool = True,
        recurrence: int = 2,
        reduced: int = 512,
        hidden: int = 512,
    ) -> None:
        super().__init__()
        *_, aux_channels, channels = backbone.stage_channels
        self.backbone = headless(backbone)
        self.head = RecurrentCrissCross(channels, reduced, hidden, num_classes, recurrence, drop_rate)
        self.dsn = None
        if aux_loss:
            self.dsn = nn.Sequential(
                *activated(nn.Conv2d(aux_channels, hidden, 3, padding=1)),
                nn.Dropout2d(drop_rate),
                nn.Conv2d(hidden, num_classes, 1),
            )

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        *_, middle, last = self.backbone.stages(x)
        out = enlarge(self.head(last), x.shape[-2:])
        if not self.training or self.dsn is None:
            return out
        return {"out": out, "aux": enlarge(self.dsn(middle), x.shape[-2:])}

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        """Start from an ImageNet classifier (its state dict) with the same body.

        Raises:
            ValueError: if something is missing or has another shape.
        """
        load_body(getattr(self.backbone, "body", self.backbone), classifier_names(state))


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The released names to these: all but `head` and `dsn` is the backbone; activations have a place of their own."""
    heads = {name: value for name, value in state.items() if name.startswith(("head.", "dsn."))}
    body = classifier_names({name: value for name, value in state.items() if name not in heads})
    moved = {
        name.replace("bottleneck.3.", "bottleneck.4.").replace("dsn.3.", "dsn.4."): value
        for name, value in heads.items()
    }
    return {f"backbone.{name}": value for name, value in body.items()} | moved


# -- variants ------------------------------------------------------------------------------------------------------------


def _ccnet(layers: Sequence[int], num_classes: int, in_channels: int, backbone: str | None, **options) -> CCNet:
    if backbone is None:
        body = DeepStemResNet(layers, 0, in_channels)
        body.maxpool.ceil_mode = True
        body = dilate(body, 8, whole_stage=True)
    else:
        body = dilated_backbone(backbone, 8, whole_stage=True, in_channels=in_channels)
    return CCNet(body, num_classes, **options)


def ccnet_resnet50(
    num_classes: int = 19,
    in_channels: int = 3,
    drop_rate: float = 0.1,
    aux_loss: bool = True,
    recurrence: int = 2,
    backbone: str | None = None,
) -> CCNet:
    """On ResNet-50 of stride 8, or on another classifier by name."""
    options = {"drop_rate": drop_rate, "aux_loss": aux_loss, "recurrence": recurrence}
    return _ccnet((3, 4, 6, 3), num_classes, in_channels, backbone, **options)


def ccnet_resnet101(
    num_classes: int = 19,
    in_channels: int = 3,
    drop_rate: float = 0.1,
    aux_loss: bool = True,
    recurrence: int = 2,
    backbone: str | None = None,
) -> CCNet:
    """On ResNet-101 of stride 8, the paper's, or on another classifier by name."""
    options = {"drop_rate": drop_rate, "aux_loss": aux_loss, "recurrence": recurrence}
    return _ccnet((3, 4, 23, 3), num_classes, in_channels, backbone, **options)


def ccnet_slim(
    num_classes: int = 8, in_channels: int = 3, drop_rate: float = 0.0, aux_loss: bool = True, recurrence: int = 2
) -> CCNet:
    """Not of the paper: on a small ResNet of stride 4, for images of 64 pixels."""
    body = dilate(SlimResNet(in_channels), 4, whole_stage=True)
    return CCNet(body, num_classes, drop_rate, aux_loss, recurrence, reduced=32, hidden=48)
