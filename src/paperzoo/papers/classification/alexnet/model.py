"""AlexNet: ImageNet Classification with Deep Convolutional Neural Networks (Krizhevsky et al., NeurIPS 2012).

Two networks, one class. `alexnet_2012` is the paper's (sec. 3, fig. 2): 96 to 384 channels in two halves that meet only in the
third convolution and in the dense layers, and local response normalisation after the first two. `alexnet` is the one-column
network of torchvision's weights, after "One weird trick" (arXiv:1404.5997): 64 to 384 channels, no halves, no normalisation.

Parameter names are torchvision's for both (`features.0`, `classifier.6`), so its file loads unchanged; `from_official` takes
the Caffe names (`conv1` to `fc8`) of the paper's network. What differs from the paper:

- The image is padded by 2 pixels. The paper's 224 pixels with kernel 11 and stride 4 do not give its 55 x 55 maps without.
- The two halves of a layer are two groups of one convolution, on one device.
- An adaptive 6x6 pooling before the dense layers lets other image sizes through; at 224 pixels it changes nothing.
- Dropout scales in training (by 2) instead of in testing (by 1/2), which is the same up to a constant.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (96, 256, 384, 384, 256)


class LocalResponseNorm(nn.Module):
    """b_c = a_c / (k + alpha * sum of a_j^2 over the `size` channels around c)^beta (sec. 3.3). Keeps the shape (B, C, H, W).

    `alpha` is the paper's: it multiplies the sum. Caffe's and torch's `local_response_norm` multiply the mean, so the same
    numbers give them an effect `size` times weaker.
    """

    def __init__(self, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0) -> None:
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size must be odd, so that as many channels lie before as behind, got {size}")
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, x: Tensor) -> Tensor:
        square, half = x.square(), self.size // 2
        near = F.pad(square, (0, 0, 0, 0, half, half))
        total = sum(near[:, i : i + x.shape[1]] for i in range(self.size))
        return x * (self.k + self.alpha * total).pow(-self.beta)


class AlexNet(nn.Module):
    """Five convolutions, three dense layers: images (B, in_channels, H, W) of at least 63 pixels -> (B, num_classes).

    Args:
        widths: channels of the five convolutions.
        groups: of the second, fourth and fifth; 2 is the paper's two halves.
        local_norm: response normalisation after the first two.
        num_features: width of the two hidden dense layers.
        pool_size: side of the map before them.
        gaussian: start as sec. 5: N(0, 0.01), biases 1 in convolutions 2, 4, 5 and the hidden dense layers, else 0. False
            leaves torch's own start, as torchvision does.
        num_classes: columns of the logits; 0 for no head.
        in_channels: channels of the image.
        drop_rate: before both hidden dense layers.
    """

    def __init__(
        self,
        widths: Sequence[int] = WIDTHS,
        groups: int = 2,
        local_norm: bool = True,
        num_features: int = 4096,
        pool_size: int = 6,
        gaussian: bool = True,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_rate: float = 0.5,
    ) -> None:
        super().__init__()
        if len(widths) != 5:
            raise ValueError(f"widths has five entries, one a convolution, got {tuple(widths)}")
        one, two, three, four, five = widths
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, one, 11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            overlapping_pool(local_norm),
            nn.Conv2d(one, two, 5, padding=2, groups=groups),
            nn.ReLU(inplace=True),
            overlapping_pool(local_norm),
            nn.Conv2d(two, three, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(three, four, 3, padding=1, groups=groups),
            nn.ReLU(inplace=True),
            nn.Conv2d(four, five, 3, padding=1, groups=groups),
            nn.ReLU(inplace=True),
            overlapping_pool(False),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(pool_size)
        self.classifier = nn.Sequential(
            nn.Dropout(drop_rate),
            nn.Linear(five * pool_size**2, num_features),
            nn.ReLU(inplace=True),
            nn.Dropout(drop_rate),
            nn.Linear(num_features, num_features),
            nn.ReLU(inplace=True),
            nn.Identity(),
        )
        self.stage_channels = [one, two, five]
        self.stage_strides = [8, 16, 32]
        self.num_features, self.in_channels, self.gaussian = num_features, in_channels, gaussian
        if gaussian:
            for place in (0, 3, 6, 8, 10):
                start(self.features[place], bias=float(place in (3, 8, 10)))
            for place in (1, 4):
                start(self.classifier[place], bias=1.0)
        self.reset_classifier(num_classes)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The maps after the three poolings: 27, 13 and 6 pixels of 224."""
        check_size(x)
        first = self.features[:3](x)
        second = self.features[3:6](first)
        return [first, second, self.features[6:](second)]

    def embed(self, x: Tensor) -> Tensor:
        """What the second hidden dense layer answers ("fc7"): (B, num_features)."""
        check_size(x)
        return self.classifier[:-1](self.avgpool(self.features(x)).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier[-1](self.embed(x))

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer for another number of classes; 0 for none."""
        last = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if num_classes and self.gaussian:
            start(last, bias=0.0)
        self.classifier[-1] = last.to(self.classifier[1].weight)


def overlapping_pool(local_norm: bool) -> nn.Module:
    """Windows of 3 pixels every 2 (sec. 3.4), after response normalisation where there is one."""
    pool = nn.MaxPool2d(3, stride=2)
    return nn.Sequential(LocalResponseNorm(), pool) if local_norm else pool


def start(layer: nn.Module, bias: float) -> None:
    nn.init.normal_(layer.weight, 0, 0.01)
    nn.init.constant_(layer.bias, bias)


def check_size(x: Tensor) -> None:
    if min(x.shape[-2:]) < 63:
        raise ValueError(
            f"image_size: AlexNet strides by 4 and pools three times, and needs 63 x 63 pixels, got {tuple(x.shape[-2:])}"
        )


# -- variants ------------------------------------------------------------------------------------------------------------


def alexnet(num_classes: int = 1000, in_channels: int = 3, **options) -> AlexNet:
    """The one-column network of torchvision, 61.1M parameters; `options` as `AlexNet`."""
    options = {"widths": (64, 192, 384, 256, 256), "groups": 1, "local_norm": False, "gaussian": False} | options
    return AlexNet(num_classes=num_classes, in_channels=in_channels, **options)


def alexnet_2012(num_classes: int = 1000, in_channels: int = 3, **options) -> AlexNet:
    """The paper's network (fig. 2), 61.0M parameters; `options` as `AlexNet`."""
    return AlexNet(num_classes=num_classes, in_channels=in_channels, **options)


def alexnet_slim(num_classes: int = 10, in_channels: int = 3, **options) -> AlexNet:
    """Not of the paper: its network at a quarter of the width with small dense layers, for 64 x 64 images.

    Its weights start from He's normal distribution: 0.01 is too little for sums of so few.
    """
    options = {"widths": (24, 64, 96, 96, 64), "num_features": 128, "pool_size": 1} | options
    model = AlexNet(num_classes=num_classes, in_channels=in_channels, **options)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


CAFFE = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
PLACES = ("features.0", "features.3", "features.6", "features.8", "features.10") + tuple(
    f"classifier.{i}" for i in (1, 4, 6)
)


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """`conv1.weight` … `fc8.bias`, as converted from Caffe, to these names; torchvision's come through unchanged."""
    names = dict(zip(CAFFE, PLACES, strict=True))
    split = {name: name.removeprefix("module.").rpartition(".") for name in state_dict}
    return {f"{names.get(layer, layer)}.{kind}": state_dict[name] for name, (layer, _, kind) in split.items()}
