"""CNNGeo: the map between two pictures, regressed from how well their features match (Rocco et al., CVPR 2017, arXiv:1703.05593), sec. 3.

    model(source, target)       pictures (B, 3, S, S), normalised -> where each pixel of the target is in the source, (B, S, S, 2): x and y in
                                -1 … 1 between the middles of the corner pixels, ready for `grid_sample(source, …, align_corners=True)`
    model.estimate(source, target)      the maps' parameters, one tensor (B, P) a stage; see `technique` for their order

One stage estimates a map at once; of two, the first one's map bends the source, the second one sees the result, and both are combined (sec. 3.3).
Parameter names are those of the released code: `FeatureExtraction.model.0.weight`, `FeatureRegression.conv.0.weight`; the second stage's regression is
`FeatureRegression2`, as in the authors' next work, WeakAlign, whose two-stage files load too.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.backbones import at_strides, load_body
from paperzoo.blocks.cost_volume import global_correlation
from paperzoo.papers.classification.resnet.model import resnet101
from paperzoo.papers.classification.spatial_transformer.technique import output_points, sample
from paperzoo.papers.classification.vgg.model import PLANS, POOL, conv_stack
from paperzoo.papers.correspondence.cnngeometric.technique import MAPS

EPSILON = 1e-6
STRIDE = 16


def normalised(x: Tensor) -> Tensor:
    """Each place's channels scaled to length 1: (B, C, H, W)."""
    return x / (x.square().sum(1, keepdim=True) + EPSILON).sqrt()


class LastMap(nn.Module):
    """The last feature map of a backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.body = backbone

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)[-1]


def cropped(name: str, in_channels: int) -> nn.Module:
    """A classifier up to stride 16: VGG-16 to pool4, ResNet-101 to conv4, both layer by layer as released; any other by its name."""
    if name == "vgg16":
        plan = PLANS["D"]
        end = [i for i, width in enumerate(plan) if width == POOL][3]
        return conv_stack(plan[: end + 1], in_channels=in_channels)
    if name == "resnet101":
        body = resnet101(in_channels=in_channels)
        return nn.Sequential(body.conv1, body.bn1, body.relu, body.maxpool, body.layer1, body.layer2, body.layer3)
    return LastMap(at_strides(name, [STRIDE], in_channels=in_channels))


class FeatureExtraction(nn.Module):
    """Dense features of unit length (sec. 3.1): (B, 3, H, W) -> (B, C, H / 16, W / 16).

    Args:
        model: (B, 3, H, W) -> (B, C, h, w).
        centred: each channel's mean over the picture is taken away first. Not of the paper: features that were not learned from millions of
            pictures have much in common everywhere, and their products say little.
    """

    def __init__(self, model: nn.Module, centred: bool = False) -> None:
        super().__init__()
        self.model, self.centred = model, centred

    def forward(self, x: Tensor) -> Tensor:
        x = self.model(x)
        return normalised(x - x.mean((2, 3), keepdim=True) if self.centred else x)


class FeatureRegression(nn.Module):
    """Matches to a map's parameters (sec. 3.3): convolutions without padding, each with batch norm and ReLU, then one dense layer.

    (B, side^2, side, side) -> (B, outputs).
    """

    def __init__(self, side: int, kernels: Sequence[int], widths: Sequence[int], identity: Sequence[float]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before, left = side * side, side
        for kernel, width in zip(kernels, widths, strict=True):
            layers += [nn.Conv2d(before, width, kernel), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            before, left = width, left - kernel + 1
        if left < 1:
            raise ValueError(f"image_size gives {side} x {side} features, too few for kernels of {tuple(kernels)}")
        self.conv = nn.Sequential(*layers)
        self.linear = nn.Linear(before * left * left, len(identity))
        with torch.no_grad():  # begins near no motion; the released code does so for homographies
            self.linear.bias += torch.tensor(identity)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).flatten(1))


class CNNGeometric(nn.Module):
    """See the module's docstring.

    Args:
        extraction: the features of both pictures.
        transforms: the map of each stage, one or two of "affine", "tps" and "homography"; a spline is the last one.
        image_size: S, pixels along each side.
        stride: of the features.
        kernels, widths: of the regression's convolutions.
    """

    def __init__(
        self,
        extraction: FeatureExtraction,
        transforms: Sequence[str] = ("affine", "tps"),
        image_size: int = 240,
        stride: int = STRIDE,
        kernels: Sequence[int] = (7, 5),
        widths: Sequence[int] = (128, 64),
    ) -> None:
        super().__init__()
        unknown = [name for name in transforms if name not in MAPS]
        if unknown or not 1 <= len(transforms) <= 2 or "tps" in transforms[:-1]:
            raise ValueError(
                f"transform is '{'_'.join(transforms)}'; it is one of {', '.join(MAPS)}, or two joined by _, a spline last"
            )
        self.image_size, self.transforms = image_size, tuple(transforms)
        self.FeatureExtraction = extraction
        self.maps = nn.ModuleList(MAPS[name]() for name in transforms)
        self.regressions = [f"FeatureRegression{i + 1 if i else ''}" for i in range(len(transforms))]
        side = -(-image_size // stride) if isinstance(extraction.model, LastMap) else image_size // stride
        for name, transform in zip(self.regressions, self.maps, strict=True):
            self.add_module(name, FeatureRegression(side, kernels, widths, transform.identity))

    def theta(self, stage: int, source: Tensor, target: Tensor) -> Tensor:
        """A stage's parameters (B, P) from the features of both pictures, (B, C, h, w)."""
        return self.get_submodule(self.regressions[stage])(correlation(source, target))

    def places(self, thetas: Sequence[Tensor], points: Tensor) -> Tensor:
        """Places (N, 2) of the target, seen by the combined map: (B, N, 2) in the source. The last stage's map comes first."""
        answered = list(zip(self.maps, thetas, strict=False))  # only the first stage, while the second one is asked
        for transform, theta in reversed(answered):
            points = transform(theta, points)
        return points

    def grid(self, thetas: Sequence[Tensor]) -> Tensor:
        """The combined map at every pixel, (B, S, S, 2), in single precision: half of it would move places by pixels."""
        thetas = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in thetas]
        device = thetas[0].device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            points = self.places(thetas, output_points(self.image_size, self.image_size, thetas[0]))
        return points.unflatten(1, (self.image_size, self.image_size))

    def estimate(self, source: Tensor, target: Tensor) -> list[Tensor]:
        """The parameters of each stage."""
        for x in (source, target):
            if tuple(x.shape[2:]) != (self.image_size, self.image_size):
                raise ValueError(
                    f"pictures are {tuple(x.shape[2:])}; this network takes {self.image_size} pixels a side"
                )
        both = self.FeatureExtraction(torch.cat([source, target]))
        count = source.shape[0]  # `len` would fix the batch of an exported program
        here, there = both[:count], both[count:]
        thetas = [self.theta(0, here, there)]
        if len(self.maps) == 2:
            again = self.FeatureExtraction(sample(source, self.grid(thetas)))
            thetas.append(self.theta(1, again, there))
        return thetas

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.grid(self.estimate(source, target))

    def load_backbone(self, state: dict[str, Tensor]) -> None:
        """A classifier's weights for the features, under torchvision's names; its later layers are left out."""
        model = self.FeatureExtraction.model
        if isinstance(model, LastMap):
            model.body.load_body(state)
            return
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
        if any(key.startswith("layer1.") for key in state):
            heads = {name: str(i) for i, name in enumerate(names)}
            parts = ((key.partition("."), value) for key, value in state.items())
            renamed = {f"{heads[head]}.{rest}": value for (head, _, rest), value in parts if head in heads}
        else:
            renamed = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
        load_body(model, renamed)


def correlation(source: Tensor, target: Tensor) -> Tensor:
    """c(i, j, k) = f_target(i, j)^T f_source(i_k, j_k), ReLU, then length 1 over k, eq. (1) and (2): (B, C, h, w) twice -> (B, h w, h, w).

    k runs down the source's columns, one after the other, as in the released networks.
    """
    costs = global_correlation(source.mT, target)  # (B, w, h, h', w')
    return normalised(F.relu(costs.flatten(1, 2)))


# -- variants ------------------------------------------------------------------------------------------------------------


def cnngeo(
    transform: str = "affine_tps", backbone: str = "vgg16", image_size: int = 240, in_channels: int = 3
) -> CNNGeometric:
    """The paper's network. `transform`: "affine", "tps", "homography", or two of them joined by _; `backbone`: any classifier with a map of stride 16."""
    return CNNGeometric(FeatureExtraction(cropped(backbone, in_channels)), transform.split("_"), image_size)


def cnngeo_resnet101(transform: str = "affine_tps", image_size: int = 240, in_channels: int = 3) -> CNNGeometric:
    """With ResNet-101 up to conv4, as in the journal version."""
    return cnngeo(transform, "resnet101", image_size, in_channels)


def cnngeo_slim(
    transform: str = "affine_tps", image_size: int = 64, in_channels: int = 3, width: int = 16, centred: bool = True
) -> CNNGeometric:
    """Not of the paper: half the resolution at once, few channels, stride 8, batch norm, centred features. For small pictures and small machines."""
    begin = [nn.Conv2d(in_channels, width, 5, 2, 2, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    rest = conv_stack((2 * width, POOL, 4 * width, POOL), batch_norm=True, in_channels=width)
    extraction = FeatureExtraction(nn.Sequential(*begin, rest), centred)
    return CNNGeometric(extraction, transform.split("_"), image_size, 8, (5, 3), (64, 32))


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released files call the VGG's layers `FeatureExtraction.vgg`, those of later code `.model`."""
    return {key.replace("FeatureExtraction.vgg.", "FeatureExtraction.model."): value for key, value in state.items()}


def combined(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two released one-stage files, an affine and a spline network on the same features, as one two-stage network's weights.

    Raises:
        ValueError: if their features differ.
    """
    first, second = from_official(first), from_official(second)
    found = dict(first)
    for key, value in second.items():
        if key.startswith("FeatureExtraction."):
            if key not in first or not torch.equal(first[key], value):
                raise ValueError(f"the two networks have different features, the first difference is in {key}")
        else:
            found[key.replace("FeatureRegression.", "FeatureRegression2.")] = value
    return found
