"""VGG: Very Deep Convolutional Networks for Large-Scale Image Recognition (arXiv 1409.1556).

One idea, carried through: only 3x3 convolutions, stacked between five 2x2 max poolings, the channels doubling from 64 to 512,
then three dense layers. Depth (11 to 19 weight layers, table 1) is the only thing that varies.

Parameter names and initialisation are torchvision's (`features.N`, `classifier.N`), so its files load as they are. What differs from the paper:
- weights start from He's normal initialisation; the paper trained the 11-layer net from N(0, 0.01) and grew the deeper ones
  from it (sec. 3.1), and added that Glorot's initialisation made this unnecessary;
- the `_bn` variants (batch norm after every convolution) came after the paper;
- an adaptive 7x7 pooling before the dense layers lets any input size of at least 32 through; at 224 pixels it changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paperzoo.blocks.classifier import last_layer

POOL = 0
# Table 1 of the paper: output channels of each 3x3 convolution; POOL is a 2x2 max pooling.
PLANS: dict[str, tuple[int, ...]] = {
    "A": (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL),
    "B": (64, 64, POOL, 128, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL),
    "D": (64, 64, POOL, 128, 128, POOL) + (256,) * 3 + (POOL,) + (512,) * 3 + (POOL,) + (512,) * 3 + (POOL,),
    "E": (64, 64, POOL, 128, 128, POOL) + (256,) * 4 + (POOL,) + (512,) * 4 + (POOL,) + (512,) * 4 + (POOL,),
}


def narrow(plan: tuple[int, ...], divisor: int) -> tuple[int, ...]:
    """The same plan with every width divided: for small images and small machines."""
    return tuple(width // divisor for width in plan)


def conv_stack(plan: tuple[int, ...], batch_norm: bool = False, in_channels: int = 3) -> nn.Sequential:
    """The convolutional part of a plan: (B, in_channels, H, W) -> (B, plan's last width, H // 32, W // 32).

    A flat Sequential whose indices are torchvision's; other papers (FCN, SSD, perceptual losses) build on it.
    """
    layers: list[nn.Module] = []
    channels = in_channels
    for width in plan:
        if width == POOL:
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            continue
        layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
        if batch_norm:
            layers.append(nn.BatchNorm2d(width))
        layers.append(nn.ReLU(inplace=True))
        channels = width
    return nn.Sequential(*layers)


def pooled_maps(stack: nn.Sequential, x: Tensor) -> list[Tensor]:
    """The feature map after each max pooling of a `conv_stack`: strides 2, 4, 8, 16, 32."""
    maps = []
    for layer in stack:
        x = layer(x)
        if isinstance(layer, nn.MaxPool2d):
            maps.append(x)
    return maps


class VGG(nn.Module):
    """(B, in_channels, H, W), H and W at least 32 -> logits (B, num_classes)."""

    def __init__(
        self,
        plan: tuple[int, ...],
        *,
        batch_norm: bool = False,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_rate: float = 0.5,
        pool_size: int = 7,
        num_features: int = 4096,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.stage_channels = [plan[i - 1] for i, width in enumerate(plan) if width == POOL]
        self.stage_strides = [2 << i for i in range(len(self.stage_channels))]
        self.features = conv_stack(plan, batch_norm, in_channels)
        self.avgpool = nn.AdaptiveAvgPool2d(pool_size)
        self.classifier = nn.Sequential(
            nn.Linear(self.stage_channels[-1] * pool_size**2, num_features),
            nn.ReLU(inplace=True),
            nn.Dropout(drop_rate),
            nn.Linear(num_features, num_features),
            nn.ReLU(inplace=True),
            nn.Dropout(drop_rate),
            last_layer(num_features, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)  # sec. 3.1
                nn.init.zeros_(module.bias)

    def stages(self, x: Tensor) -> list[Tensor]:
        """Feature maps after the five poolings: (B, stage_channels[i], H / 2**(i + 1), W / 2**(i + 1))."""
        _check_size(x)
        return pooled_maps(self.features, x)

    def embed(self, x: Tensor) -> Tensor:
        """Activations of the second dense layer ("fc7"): (B, num_features)."""
        _check_size(x)
        x = torch.flatten(self.avgpool(self.features(x)), 1)
        return self.classifier[:-1](x)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier[-1](self.embed(x))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last dense layer by a new one for `num_classes`; 0 for none."""
        last = last_layer(self.num_features, num_classes)
        if num_classes:
            nn.init.normal_(last.weight, 0, 0.01)
            nn.init.zeros_(last.bias)
        self.classifier[-1] = last.to(self.classifier[0].weight.device)


def _check_size(x: Tensor) -> None:
    if min(x.shape[-2:]) < 32:
        raise ValueError(
            f"image_size: VGG halves its input five times and needs at least 32 x 32 pixels, got {tuple(x.shape[-2:])}"
        )


def vgg11(**options) -> VGG:
    """Configuration A: 8 convolutions and 3 dense layers."""
    return VGG(PLANS["A"], **options)


def vgg13(**options) -> VGG:
    """Configuration B."""
    return VGG(PLANS["B"], **options)


def vgg16(**options) -> VGG:
    """Configuration D, the "VGG-16" most later papers build on."""
    return VGG(PLANS["D"], **options)


def vgg19(**options) -> VGG:
    """Configuration E."""
    return VGG(PLANS["E"], **options)


def vgg11_bn(**options) -> VGG:
    """Configuration A with batch norm."""
    return VGG(PLANS["A"], batch_norm=True, **options)


def vgg13_bn(**options) -> VGG:
    """Configuration B with batch norm."""
    return VGG(PLANS["B"], batch_norm=True, **options)


def vgg16_bn(**options) -> VGG:
    """Configuration D with batch norm."""
    return VGG(PLANS["D"], batch_norm=True, **options)


def vgg19_bn(**options) -> VGG:
    """Configuration E with batch norm."""
    return VGG(PLANS["E"], batch_norm=True, **options)


def vgg11_slim(num_classes: int = 10, num_features: int = 128, drop_rate: float = 0.0, **options) -> VGG:
    """Not of the paper: configuration A at a quarter of the width, for 32 x 32 images (the last map is 1 x 1 there).

    Its small dense layers start from Glorot's initialisation, which the paper recommends in hindsight (sec. 3.1).
    """
    options |= {"num_classes": num_classes, "num_features": num_features, "drop_rate": drop_rate}
    model = VGG(narrow(PLANS["A"], 4), batch_norm=True, pool_size=1, **options)
    for layer in model.classifier:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
    return model
