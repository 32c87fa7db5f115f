"""GoogLeNet: Going Deeper with Convolutions (Szegedy et al., CVPR 2015, arXiv:1409.4842).

Nine Inception modules (fig. 2b) between a plain stem and a global mean, with two auxiliary classifiers while training. Two
networks, one class: `googlenet_2014` is table 1 as printed, with biases and response normalisation; `googlenet` is the network
of torchvision's weights, with batch norm after every convolution.

Parameter names are torchvision's for both (`inception4a.branch2.0.conv`), so its file loads unchanged where the auxiliary
classifiers are built, and without them through `from_official`. Give `transform_input=True` to its weights: they
expect pixels scaled to -1 … 1 and undo ImageNet's normalisation first. Where torchvision departs from the paper:

- the third branch has a 3x3 convolution instead of 5x5, and the last pooling looks at 2x2 instead of 3x3 pixels;
- batch norm; no response normalisation; 20% of dropout instead of 40%;
- the auxiliary classifiers pool adaptively to 4x4, here in both after what the paper says, so that any size goes through.

The paper gives no constants for its response normalisation: AlexNet's are used. Poolings round up, as the 112, 56, 28, 14 and
7 pixels of table 1 need.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.papers.classification.alexnet.model import LocalResponseNorm

# Table 1: channels of 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, and the projection after pooling.
MODULES = {
    "inception3a": (64, 96, 128, 16, 32, 32),
    "inception3b": (128, 128, 192, 32, 96, 64),
    "inception4a": (192, 96, 208, 16, 48, 64),
    "inception4b": (160, 112, 224, 24, 64, 64),
    "inception4c": (128, 128, 256, 24, 64, 64),
    "inception4d": (112, 144, 288, 32, 64, 64),
    "inception4e": (256, 160, 320, 32, 128, 128),
    "inception5a": (256, 160, 320, 32, 128, 128),
    "inception5b": (384, 192, 384, 48, 128, 128),
}
SEGMENTS = (  # the network in order, cut where something listens
    ("conv1", "maxpool1", "norm1", "conv2", "conv3", "norm2"),
    ("maxpool2", "inception3a", "inception3b"),
    ("maxpool3", "inception4a"),
    ("inception4b", "inception4c", "inception4d"),
    ("inception4e",),
    ("maxpool4", "inception5a", "inception5b"),
)
IMAGENET = ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))  # mean and deviation of red, green, blue
STAGES, LISTENED = (0, 1, 4, 5), (2, 3)  # the last maps of a resolution; what the auxiliary classifiers see


class Outputs(NamedTuple):
    """Logits while training with auxiliary classifiers, in torchvision's order."""

    logits: Tensor
    aux_logits2: Tensor
    aux_logits1: Tensor


class Convolution(nn.Module):
    """Convolution and ReLU; between them batch norm, or without it a bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, batch_norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=not batch_norm)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3) if batch_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    """Four branches side by side, concatenated (fig. 2b): (B, inputs, H, W) -> (B, outputs, H, W).

    Args:
        inputs: channels in.
        widths: as the rows of `MODULES`; `outputs` is the sum of the first, third, fifth and sixth.
        large: kernel of the third branch, 5 in the paper.
        batch_norm: in every convolution.
    """

    def __init__(self, inputs: int, widths: tuple[int, ...], large: int = 5, batch_norm: bool = True) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pooled = widths
        self.outputs = one + three + five + pooled
        self.branch1 = Convolution(inputs, one, 1, batch_norm=batch_norm)
        self.branch2 = nn.Sequential(
            Convolution(inputs, reduce3, 1, batch_norm=batch_norm),
            Convolution(reduce3, three, 3, batch_norm=batch_norm),
        )
        self.branch3 = nn.Sequential(
            Convolution(inputs, reduce5, 1, batch_norm=batch_norm),
            Convolution(reduce5, five, large, batch_norm=batch_norm),
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), Convolution(inputs, pooled, 1, batch_norm=batch_norm)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class Auxiliary(nn.Module):
    """A small classifier on a middle map (sec. 5): (B, inputs, H, W) -> logits (B, num_classes)."""

    def __init__(
        self, inputs: int, num_classes: int, width: float, batch_norm: bool, paper_pool: bool, drop_rate: float
    ) -> None:
        super().__init__()
        self.paper_pool = paper_pool
        self.conv = Convolution(inputs, int(128 * width), 1, batch_norm=batch_norm)
        self.fc1 = nn.Linear(int(128 * width) * 16, int(1024 * width))
        self.fc2 = nn.Linear(int(1024 * width), num_classes)
        self.dropout = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        if self.paper_pool and min(x.shape[-2:]) >= 5:
            x = F.avg_pool2d(x, 5, 3)  # 14 pixels -> 4
        x = self.conv(F.adaptive_avg_pool2d(x, 4)).flatten(1)
        return self.fc2(self.dropout(F.relu(self.fc1(x), inplace=True)))


class GoogLeNet(nn.Module):
    """Table 1: images (B, in_channels, H, W) of at least 15 pixels -> logits (B, num_classes).

    While training with auxiliary classifiers the answer is `Outputs`, three logits.

    Args:
        batch_norm: after every convolution; without it they have biases, and the stem response normalisation.
        large: kernel of the modules' third branch, 5 in the paper.
        last_pool: window of the last max pooling, 3 in the paper.
        width: thins every layer.
        num_classes: columns of the logits; 0 for no head.
        in_channels: channels of the image.
        drop_rate: before the head.
        aux_logits: build the auxiliary classifiers.
        aux_drop_rate: dropout in them.
        transform_input: the images are normalised as usual for ImageNet, the weights want -1 … 1.
    """

    def __init__(
        self,
        batch_norm: bool = True,
        large: int = 5,
        last_pool: int = 3,
        width: float = 1.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_rate: float = 0.4,
        aux_logits: bool = False,
        aux_drop_rate: float = 0.7,
        transform_input: bool = False,
    ) -> None:
        super().__init__()
        if not 1 / 16 <= width:
            raise ValueError(f"width must be at least 1/16, the narrowest layer has 16 channels; got {width}")
        if transform_input and in_channels != 3:
            raise ValueError(f"transform_input is for colour images, got in_channels={in_channels}")
        self.width, self.batch_norm, self.aux_drop_rate = width, batch_norm, aux_drop_rate
        stem, wide = int(64 * width), int(192 * width)
        self.conv1 = Convolution(in_channels, stem, 7, 2, batch_norm)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.norm1 = nn.Identity() if batch_norm else LocalResponseNorm()
        self.conv2 = Convolution(stem, stem, 1, batch_norm=batch_norm)
        self.conv3 = Convolution(stem, wide, 3, batch_norm=batch_norm)
        self.norm2 = nn.Identity() if batch_norm else LocalResponseNorm()
        self.maxpool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.maxpool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.maxpool4 = nn.MaxPool2d(last_pool, stride=2, ceil_mode=True)
        channels = wide
        for name, widths in MODULES.items():
            module = Inception(channels, tuple(int(w * width) for w in widths), large, batch_norm)
            self.add_module(name, module)
            channels = module.outputs
        self.stage_channels = [wide, self.inception3b.outputs, self.inception4e.outputs, channels]
        self.stage_strides = [4, 8, 16, 32]
        self.num_features, self.in_channels = channels, in_channels
        self.aux1 = self.aux2 = None
        self.dropout = nn.Dropout(drop_rate)
        scale = torch.tensor([d / 0.5 for _, d in IMAGENET]).view(3, 1, 1)
        shift = torch.tensor([(m - 0.5) / 0.5 for m, _ in IMAGENET]).view(3, 1, 1)
        self.register_buffer("scale", scale if transform_input else None, persistent=False)
        self.register_buffer("shift", shift if transform_input else None, persistent=False)
        self.initialise(self)
        self.reset_classifier(num_classes)
        if aux_logits:
            self.add_auxiliary(num_classes)

    def initialise(self, network: nn.Module) -> None:
        """With batch norm as torchvision, N(0, 0.01); without as Caffe's copy of the network, Glorot's with biases 0.2."""
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                if self.batch_norm:
                    nn.init.trunc_normal_(module.weight, std=0.01)
                else:
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.constant_(module.bias, 0.2)

    def add_auxiliary(self, num_classes: int) -> None:
        """Fresh auxiliary classifiers on modules 4a and 4d."""
        for name, place in (("aux1", self.inception4a), ("aux2", self.inception4d)):
            options = (self.width, self.batch_norm, not self.batch_norm, self.aux_drop_rate)
            head = Auxiliary(place.outputs, num_classes, *options)
            self.initialise(head)
            setattr(self, name, head.to(self.conv1.conv.weight))

    def run(self, x: Tensor, keep: tuple[int, ...] = ()) -> tuple[Tensor, list[Tensor]]:
        """The last map, and those after the segments to keep."""
        if self.scale is not None:
            x = x * self.scale + self.shift
        kept = []
        for i, names in enumerate(SEGMENTS):
            for name in names:
                x = getattr(self, name)(x)
            if i in keep:
                kept.append(x)
        return x, kept

    def stages(self, x: Tensor) -> list[Tensor]:
        """The last maps at strides 4, 8, 16, 32: the stem's, and those of modules 3b, 4e and 5b."""
        return self.run(x, STAGES)[1]

    def embed(self, x: Tensor) -> Tensor:
        """Pooled features (B, num_features)."""
        return self.run(x)[0].mean((2, 3))

    def forward(self, x: Tensor) -> Tensor | Outputs:
        if self.aux1 is None or not self.training:
            return self.fc(self.dropout(self.embed(x)))
        x, (early, late) = self.run(x, LISTENED)
        return Outputs(self.fc(self.dropout(x.mean((2, 3)))), self.aux2(late), self.aux1(early))

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer, here and in the auxiliary classifiers, for another number of classes; 0 for none at all."""
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.initialise(self.fc)
        self.fc.to(self.conv1.conv.weight)
        if self.aux1 is not None:
            self.aux1 = self.aux2 = None
            if num_classes:
                self.add_auxiliary(num_classes)


# -- variants ------------------------------------------------------------------------------------------------------------


def googlenet(num_classes: int = 1000, in_channels: int = 3, **options) -> GoogLeNet:
    """torchvision's network, with batch norm; 6.6M parameters, `options` as `GoogLeNet`."""
    options = {"large": 3, "last_pool": 2, "drop_rate": 0.2} | options
    return GoogLeNet(num_classes=num_classes, in_channels=in_channels, **options)


def googlenet_2014(num_classes: int = 1000, in_channels: int = 3, **options) -> GoogLeNet:
    """The paper's network (table 1), 7.0M parameters; `options` as `GoogLeNet`."""
    return GoogLeNet(False, num_classes=num_classes, in_channels=in_channels, **options)


def googlenet_slim(num_classes: int = 10, in_channels: int = 3, **options) -> GoogLeNet:
    """Not of the paper: table 1 at a quarter of the width with batch norm, for 32 x 32 images."""
    options = {"width": 0.25, "drop_rate": 0.0, "aux_drop_rate": 0.2} | options
    return GoogLeNet(num_classes=num_classes, in_channels=in_channels, **options)


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's file without its auxiliary classifiers, which are untrained there."""
    return {name: value for name, value in state_dict.items() if not name.startswith(("aux1.", "aux2."))}
