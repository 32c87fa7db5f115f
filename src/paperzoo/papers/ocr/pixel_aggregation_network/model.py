"""PAN: Efficient and Accurate Arbitrary-Shaped Text Detection with Pixel Aggregation Network (Wang et al., ICCV 2019,
arXiv:1908.05900).

A light backbone, a cascade of feature pyramid enhancement modules and their fusion (sec. 3.2, 3.3), a head with six maps, losses
and pixel aggregation (sec. 3.4, 3.5; `technique.py`). Parameter names are those of the authors' code (pan_pp.pytorch); its
checkpoints load as they are. What differs from the paper:

- `pan_resnet18` has the backbone of the released code: a ResNet-18 whose 7x7 convolution is three 3x3 ones, the last with 128
  channels. The paper says "ResNet-18"; that, or any other classifier, is `pan(backbone="resnet18")`.
- The similarity loss has a third part, the size of the kernels' vectors, with a weight of 0.001: only in the released code.
- Growing asks for a distance below 6 everywhere, as the paper says. The released code asks (for 3) only where kernels of one
  connected text differ a thousandfold in area, that is almost never.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.backbones import at_strides, headless, load_body
from paperzoo.papers.classification.resnet.model import BasicBlock, ResNet, conv1x1, conv3x3
from paperzoo.papers.ocr.pixel_aggregation_network.technique import (
    KernelTargets,
    dice_loss,
    hard_pixels,
    similarity_losses,
    stacked_targets,
    texts_from_maps,
)

STRIDES = (4, 8, 16, 32)


def initialise(network: nn.Module) -> nn.Module:
    """Normal weights with variance 2 / fan_out for convolutions, as in the released code; norms 1 and 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    return network


class ConvBNReLU(nn.Module):
    """A 1x1 convolution, norm, ReLU: (B, inputs, H, W) -> (B, outputs, H, W)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class DeepStemResNet18(ResNet):
    """The released code's backbone: images (B, in_channels, H, W) -> maps of strides 4, 8, 16, 32 with 64 to 512 channels."""

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__(BasicBlock, (2, 2, 2, 2), 0, in_channels)
        self.conv1, self.bn1 = conv3x3(in_channels, 64, 2), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = conv3x3(64, 64), nn.BatchNorm2d(64)
        self.conv3, self.bn3 = conv3x3(64, 128), nn.BatchNorm2d(128)
        self.layer1[0] = BasicBlock(128, 64, 1, nn.Sequential(conv1x1(128, 64), nn.BatchNorm2d(64)))
        self.out_channels, self.strides = list(self.stage_channels), list(self.stage_strides)
        initialise(headless(self))

    def forward(self, x: Tensor) -> list[Tensor]:
        for convolution, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = self.relu(norm(convolution(x)))
        x, maps = self.maxpool(x), []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps

    stages = forward

    def load_body(self, state_dict: dict[str, Tensor]) -> None:
        """Weights of a classifier with the same body; its last layer is left out."""
        load_body(self, state_dict)


def resized_like(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


class FPEM(nn.Module):
    """Feature pyramid enhancement (sec. 3.2, fig. 4): coarse into fine, then fine into coarse, by separable convolutions.

    Four maps (B, channels, H_i, W_i), finest first -> the same. `_1` is the way up, `_2` the way down, whose depthwise
    convolutions have stride 2. The FLOPs are a fifth of an FPN's.
    """

    def __init__(self, channels: int = 128) -> None:
        super().__init__()
        for name, stride in (("3_1", 1), ("2_1", 1), ("1_1", 1), ("2_2", 2), ("3_2", 2), ("4_2", 2)):
            depthwise = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
            self.add_module(f"dwconv{name}", depthwise)
            self.add_module(f"smooth_layer{name}", ConvBNReLU(channels, channels))

    def enhance(self, name: str, x: Tensor) -> Tensor:
        return getattr(self, f"smooth_layer{name}")(getattr(self, f"dwconv{name}")(x))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        f1, f2, f3, f4 = maps
        f3 = self.enhance("3_1", resized_like(f4, f3) + f3)
        f2 = self.enhance("2_1", resized_like(f3, f2) + f2)
        f1 = self.enhance("1_1", resized_like(f2, f1) + f1)
        f2 = self.enhance("2_2", resized_like(f2, f1) + f1)
        f3 = self.enhance("3_2", resized_like(f3, f2) + f2)
        f4 = self.enhance("4_2", resized_like(f4, f3) + f3)
        return [f1, f2, f3, f4]


class PAHead(nn.Module):
    """(B, inputs, h, w) -> (B, outputs, h, w): text, kernel and similarity (sec. 3.1)."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, hidden, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(hidden, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.relu1(self.bn1(self.conv1(x))))


class PAN(nn.Module):
    """Images (B, 3, H, W), normalised -> raw maps (B, 2 + similarity, H/4, W/4): logits of text and of kernels, and vectors.

    With targets (see `tasks/text_detection.py`): the losses {"text", "kernel", "aggregation", "discrimination", "size"}, weighted as in
    eq. 5, alpha = 0.5 and beta = 0.25, averaged over the pictures; the maps are compared at the size of the images.

    Args:
        backbone: gives four maps of strides 4, 8, 16, 32; has `out_channels` and `load_body`.
        channels: of the pyramid.
        fpem: modules in the cascade; the paper's default is 2 (table 1).
        similarity: length of the similarity vectors.
        kernel_ratio: how far the kernels are shrunk: 0.7, for ICDAR 2015 0.5 (sec. 4.2).
        distance, min_score, min_area, rectangles: of the post-processing, see `texts_from_maps`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        channels: int = 128,
        fpem: int = 2,
        similarity: int = 4,
        kernel_ratio: float = 0.7,
        distance: float = 6.0,
        min_score: float = 0.88,
        min_area: float = 16.0,
        rectangles: bool = False,
    ) -> None:
        super().__init__()
        if fpem < 1:
            raise ValueError(f"fpem is {fpem}; the cascade has 1 module or more")
        if not 0 < kernel_ratio <= 1:
            raise ValueError(f"kernel_ratio is {kernel_ratio}; it is above 0 and at most 1")
        self.backbone, self.fpem = backbone, fpem
        for i, width in enumerate(backbone.out_channels, 1):
            self.add_module(f"reduce_layer{i}", initialise(ConvBNReLU(width, channels)))
        for i in range(1, fpem + 1):
            # the released code leaves the depthwise convolutions as torch makes them
            module = FPEM(channels)
            for name, part in module.named_children():
                if name.startswith("smooth"):
                    initialise(part)
            self.add_module(f"fpem{i}", module)
        self.det_head = initialise(PAHead(4 * channels, channels, 2 + similarity))
        self.encode = KernelTargets(kernel_ratio)
        self.reading = {
            "distance": distance,
            "min_score": min_score,
            "min_area": min_area,
            "rectangles": rectangles,
        }

    def features(self, images: Tensor) -> Tensor:
        """The fused map (B, 4 channels, H/4, W/4): each scale summed over the cascade, then all at the finest (sec. 3.3)."""
        maps = [getattr(self, f"reduce_layer{i}")(x) for i, x in enumerate(self.backbone(images), 1)]
        total = None
        for i in range(1, self.fpem + 1):
            maps = getattr(self, f"fpem{i}")(maps)
            total = maps if total is None else [a + b for a, b in zip(total, maps, strict=True)]
        return torch.cat([total[0], *(resized_like(x, total[0]) for x in total[1:])], dim=1)

    def forward(self, images: Tensor, targets: Sequence[dict] | None = None) -> Tensor | dict[str, Tensor]:
        maps = self.det_head(self.features(images))
        if targets is None:
            return maps
        return self.loss(resized_like(maps.float(), images), *stacked_targets(targets, self.encode, images))

    def loss(self, maps: Tensor, instances: Tensor, kernels: Tensor, counted: Tensor) -> dict[str, Tensor]:
        """Maps (B, 2 + D, H, W) against those of `KernelTargets`, (B, H, W) each."""
        text = instances > 0
        chosen = hard_pixels(maps[:, 0], text, counted)
        aggregation, discrimination, size = similarity_losses(maps[:, 2:], instances, kernels, counted)
        return {
            "text": dice_loss(maps[:, 0], text, chosen).mean(),
            "kernel": 0.5 * dice_loss(maps[:, 1], kernels, text & counted).mean(),
            "aggregation": 0.25 * aggregation.mean(),
            "discrimination": 0.25 * discrimination.mean(),
            "size": 0.25 * 0.001 * size.mean(),
        }

    def postprocess(self, maps: Tensor, sizes: Tensor, canvas: tuple[int, int]) -> list[dict]:
        """Raw maps to the texts of each picture; see `tasks/text_detection.py`."""
        stride = canvas[0] / maps.shape[2]
        found = []
        for picture, (height, width) in zip(maps.float().cpu().numpy(), sizes.tolist(), strict=True):
            inside = picture[:, : int(np.ceil(height / stride)), : int(np.ceil(width / stride))]
            polygons, scores = texts_from_maps(inside, stride, **self.reading)
            found.append({"polygons": [torch.from_numpy(p) for p in polygons], "scores": torch.from_numpy(scores)})
        return found

    def load_backbone(self, state_dict: dict[str, Tensor]) -> None:
        """A classifier's weights into the backbone; its last layer is left out.

        Raises:
            ValueError: if weights are missing or have another shape.
        """
        self.backbone.load_body(state_dict)


# -- variants ----------------------------------------------------------------------------------------------------------


def pan_resnet18(in_channels: int = 3, **options) -> PAN:
    """The released network; `options` as `PAN`."""
    return PAN(DeepStemResNet18(in_channels), **options)


def pan(backbone: str = "resnet18", in_channels: int = 3, **options) -> PAN:
    """On any classifier of the catalogue that has maps of strides 4, 8, 16 and 32; `options` as `PAN`."""
    return PAN(at_strides(backbone, STRIDES, in_channels=in_channels), **options)
