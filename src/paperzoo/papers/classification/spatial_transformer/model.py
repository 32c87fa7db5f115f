"""The networks of the distorted-digits experiments (sec. 4.1): two classifiers, each alone and behind a spatial transformer.

The paper gives the kind of each network; the widths here are ours, such that both of a pair have about as many parameters. Names are
ours as well: no weights were published. The transformer itself is in `technique.py`.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.papers.classification.spatial_transformer.technique import (
    Affine,
    Attention,
    Projective,
    SpatialTransformer,
    ThinPlateSpline,
)

TRANSFORMS = {"affine": Affine, "attention": Attention, "projective": Projective, "tps": ThinPlateSpline}


class ConvFeatures(nn.Module):
    """9x9 and 7x7 convolutions without padding, each with ReLU and 2x2 max pooling. (B, C, S, S) -> two maps."""

    def __init__(self, in_channels: int, width: int, image_size: int) -> None:
        super().__init__()
        side = ((image_size - 8) // 2 - 6) // 2
        if side < 1:
            raise ValueError(f"image_size must be at least 24, got {image_size}")
        self.conv1 = nn.Conv2d(in_channels, width, 9)
        self.conv2 = nn.Conv2d(width, width, 7)
        self.stage_channels, self.stage_strides = [width, width], [2, 4]
        self.num_features = width * side * side

    def stages(self, x: Tensor) -> list[Tensor]:
        first = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return [first, F.max_pool2d(F.relu(self.conv2(first)), 2)]

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)[-1].flatten(1)


def dense(inputs: int, width: int, depth: int) -> nn.Sequential:
    """`depth` fully connected layers with ReLU over all pixels."""
    layers: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
    for i in range(depth):
        layers += [(f"fc{i + 1}", nn.Linear(inputs if i == 0 else width, width)), (f"relu{i + 1}", nn.ReLU())]
    return nn.Sequential(OrderedDict(layers))


def locating_cnn(in_channels: int, image_size: int) -> tuple[nn.Module, int]:
    """A localisation network of convolutions, at half the resolution; and its number of features."""
    side = ((image_size // 2 - 4) // 2 - 4) // 2
    network = nn.Sequential(
        nn.MaxPool2d(2), nn.Conv2d(in_channels, 20, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(20, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(20 * side * side, 50), nn.ReLU(),
    )  # fmt: skip
    return network, 50


class DigitNetwork(nn.Module):
    """A classifier, perhaps behind a spatial transformer: images (B, in_channels, S, S) -> logits (B, num_classes).

    Args:
        features: the classifier without its last layer; has or is given `num_features`.
        num_features: what it puts out.
        transformer: warps the images first; None leaves them.
        num_classes: columns of the logits; 0 for features.
        in_channels, image_size: of the images; the size is fixed.
    """

    def __init__(
        self,
        features: nn.Module,
        num_features: int,
        transformer: SpatialTransformer | None,
        num_classes: int,
        in_channels: int,
        image_size: int,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_channels, self.image_size = num_classes, in_channels, image_size
        self.transformer = transformer
        self.features, self.num_features = features, num_features
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(num_features, num_classes) if num_classes else nn.Identity()
        if isinstance(features, ConvFeatures):
            self.stage_channels, self.stage_strides = features.stage_channels, features.stage_strides

    def warp(self, x: Tensor) -> Tensor:
        """What the classifier sees."""
        if tuple(x.shape[1:]) != (self.in_channels, self.image_size, self.image_size):
            wanted = f"(batch, {self.in_channels}, {self.image_size}, {self.image_size})"
            raise ValueError(f"images must be {wanted}, as image_size says, got {tuple(x.shape)}")
        return x if self.transformer is None else self.transformer(x)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The maps behind each pooling, strides 2 and 4; of the warped image. Fully connected networks have none."""
        return self.features.stages(self.warp(x)) if isinstance(self.features, ConvFeatures) else []

    def embed(self, x: Tensor) -> Tensor:
        """What the last layer sees (B, num_features)."""
        return self.features(self.warp(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.embed(x)))

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer for another number of classes; 0 leaves none."""
        self.num_classes = num_classes
        like = next(self.features.parameters())
        self.fc = (nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()).to(like)


def convolutional(width: int, transformer: SpatialTransformer | None, **settings) -> DigitNetwork:
    features = ConvFeatures(settings["in_channels"], width, settings["image_size"])
    return DigitNetwork(features, features.num_features, transformer, **settings)


def connected(width: int, transformer: SpatialTransformer | None, **settings) -> DigitNetwork:
    features = dense(settings["in_channels"] * settings["image_size"] ** 2, width, 2)
    return DigitNetwork(features, width, transformer, **settings)


def transform_named(name: str) -> nn.Module:
    if name not in TRANSFORMS:
        raise ValueError(f"transform is one of {', '.join(TRANSFORMS)}, got '{name}'")
    return TRANSFORMS[name]()


# -- variants ------------------------------------------------------------------------------------------------------------


def stn_cnn(
    num_classes: int = 10, in_channels: int = 3, image_size: int = 42, transform: str = "affine", drop_rate: float = 0.0
) -> DigitNetwork:
    """ST-CNN: a convolutional localisation network before a convolutional classifier. `transform`: affine, attention, projective, tps."""
    locating, count = locating_cnn(in_channels, image_size)
    transformer = SpatialTransformer(locating, count, transform_named(transform))
    return convolutional(32, transformer, num_classes=num_classes, in_channels=in_channels,
                         image_size=image_size, drop_rate=drop_rate)  # fmt: skip


def stn_fcn(
    num_classes: int = 10, in_channels: int = 3, image_size: int = 42, transform: str = "affine", drop_rate: float = 0.0
) -> DigitNetwork:
    """ST-FCN: fully connected layers for both. `transform`: affine, attention, projective, tps."""
    locating = dense(in_channels * image_size**2, 32, 3)
    transformer = SpatialTransformer(locating, 32, transform_named(transform))
    return connected(128, transformer, num_classes=num_classes, in_channels=in_channels,
                     image_size=image_size, drop_rate=drop_rate)  # fmt: skip


def plain_cnn(
    num_classes: int = 10, in_channels: int = 3, image_size: int = 42, drop_rate: float = 0.0
) -> DigitNetwork:
    """CNN: the classifier of ST-CNN alone, a little wider for as many parameters."""
    return convolutional(40, None, num_classes=num_classes, in_channels=in_channels,
                         image_size=image_size, drop_rate=drop_rate)  # fmt: skip


def plain_fcn(
    num_classes: int = 10, in_channels: int = 3, image_size: int = 42, drop_rate: float = 0.0
) -> DigitNetwork:
    """FCN: the classifier of ST-FCN alone, a little wider for as many parameters."""
    return connected(160, None, num_classes=num_classes, in_channels=in_channels,
                     image_size=image_size, drop_rate=drop_rate)  # fmt: skip
