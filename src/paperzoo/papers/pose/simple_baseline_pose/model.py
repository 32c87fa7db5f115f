"""Simple Baselines for Human Pose Estimation and Tracking (Xiao, Wu and Wei, ECCV 2018, arXiv:1804.06208).

A classifier without its head, three deconvolutions, a 1x1 convolution (sec. 2, fig. 1c). Parameter names are those of the
released code (`conv1`, `layer1.0.…`, `deconv_layers.0`, `final_layer`), so its checkpoints load as they are. As there, the stride
of a bottleneck sits on its 3x3 convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from paperzoo.papers.classification.resnet.model import BasicBlock, Bottleneck, conv1x1

FILTERS = (256, 256, 256)


def deconvolutions(in_channels: int, filters: Sequence[int]) -> nn.Sequential:
    """4x4 deconvolutions of stride 2, each with batch norm and ReLU: (B, in_channels, h, w) -> (B, filters[-1], 2^n h, 2^n w)."""
    layers: list[nn.Module] = []
    for channels in filters:
        layers.append(nn.ConvTranspose2d(in_channels, channels, 4, stride=2, padding=1, bias=False))
        layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        in_channels = channels
    return nn.Sequential(*layers)


class DeconvolutionHead(nn.Module):
    """What both networks share; a subclass has `features(x)` and calls `finish`."""

    def finish(self, in_channels: int, filters: Sequence[int], num_keypoints: int) -> None:
        """The head: deconvolutions with normal weights of deviation 0.001, as are those of the last layer (sec. 4)."""
        if num_keypoints < 1:
            raise ValueError(f"num_keypoints is {num_keypoints}; it must be 1 or more")
        self.num_keypoints, self.stride = num_keypoints, 4
        self.deconv_layers = deconvolutions(in_channels, filters)
        self.final_layer = nn.Conv2d(filters[-1] if filters else in_channels, num_keypoints, 1)
        for layer in (*self.deconv_layers, self.final_layer):
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(layer.weight, std=0.001)
        nn.init.zeros_(self.final_layer.bias)

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not say what its features are")

    def forward(self, x: Tensor) -> Tensor:
        return self.final_layer(self.deconv_layers(self.features(x)))


class PoseResNet(DeconvolutionHead):
    """Images (B, in_channels, H, W), sides multiples of 32 -> heat maps (B, num_keypoints, H / 4, W / 4).

    Args:
        block, layers: as `ResNet`'s.
        num_keypoints: heat maps.
        in_channels: channels of the image.
        widths: of the four stages, before a bottleneck's expansion; the first is also that of the first convolution.
        filters: channels of each deconvolution.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_keypoints: int = 17,
        in_channels: int = 3,
        widths: Sequence[int] = (64, 128, 256, 512),
        filters: Sequence[int] = FILTERS,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = widths[0]
        for i, (planes, depth) in enumerate(zip(widths, layers, strict=True)):
            stride, wide = (1 if i == 0 else 2), planes * block.expansion
            shortcut = None
            if stride != 1 or channels != wide:
                shortcut = nn.Sequential(conv1x1(channels, wide, stride), nn.BatchNorm2d(wide))
            # a bottleneck's inner width is planes * base_width / 64: 64 keeps it
            blocks = [block(channels, planes, stride, shortcut), *(block(wide, planes) for _ in range(1, depth))]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            channels = wide
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.finish(channels, filters, num_keypoints)

    def features(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def load_backbone(self, state_dict: dict[str, Tensor]) -> None:
        """Weights of a ResNet classifier with the same layers (torchvision's names).

        Raises:
            ValueError: if weights are missing or have another shape.
        """
        here = self.state_dict()
        wanted = [k for k in here if k.split(".")[0] not in ("deconv_layers", "final_layer")]
        for name in wanted:
            if name.endswith("num_batches_tracked"):
                continue
            if name not in state_dict or state_dict[name].shape != here[name].shape:
                found = tuple(state_dict[name].shape) if name in state_dict else "missing"
                raise ValueError(f"{name} is {found}, {tuple(here[name].shape)} is needed")
        self.load_state_dict({name: state_dict[name] for name in wanted if name in state_dict}, strict=False)


class SimpleBaseline(DeconvolutionHead):
    """The same head on any classifier of the catalogue: images -> heat maps at a quarter of their size.

    Args:
        backbone: a classifier by name; as many deconvolutions follow as its last stride needs to become 4.
        num_keypoints: heat maps.
        in_channels: channels of the image.
        filters: channels of every deconvolution.
    """

    def __init__(self, backbone: str, num_keypoints: int = 17, in_channels: int = 3, filters: int = 256) -> None:
        from paperzoo.blocks.backbones import create_backbone

        super().__init__()
        body = create_backbone(backbone, in_channels=in_channels, out_indices=(-1,))
        stride = body.strides[-1]
        if stride < 4 or stride & (stride - 1):
            raise ValueError(f"backbone {backbone} ends at stride {stride}; 4, 8, 16 or 32 is needed")
        self.backbone = body
        self.finish(body.out_channels[-1], [filters] * int(math.log2(stride // 4)), num_keypoints)

    def features(self, x: Tensor) -> Tensor:
        return self.backbone(x)[-1]

    def load_backbone(self, state_dict: dict[str, Tensor]) -> None:
        """Weights of the classifier; its last layer is left out."""
        self.backbone.load_body(state_dict)


# -- variants ------------------------------------------------------------------------------------------------------------


def pose_resnet50(num_keypoints: int = 17, in_channels: int = 3, **options) -> PoseResNet:
    """ResNet-50: 34.0M parameters with COCO's 17 keypoints; `options` as `PoseResNet`."""
    return PoseResNet(Bottleneck, (3, 4, 6, 3), num_keypoints, in_channels, **options)


def pose_resnet101(num_keypoints: int = 17, in_channels: int = 3, **options) -> PoseResNet:
    """ResNet-101: 53.0M."""
    return PoseResNet(Bottleneck, (3, 4, 23, 3), num_keypoints, in_channels, **options)


def pose_resnet152(num_keypoints: int = 17, in_channels: int = 3, **options) -> PoseResNet:
    """ResNet-152: 68.6M."""
    return PoseResNet(Bottleneck, (3, 8, 36, 3), num_keypoints, in_channels, **options)


def pose_resnet_slim(num_keypoints: int = 14, in_channels: int = 3) -> PoseResNet:
    """One thin basic block a stage, for small pictures and quick runs; not in the paper."""
    return PoseResNet(BasicBlock, (1, 1, 1, 1), num_keypoints, in_channels, (16, 32, 64, 128), (64, 48, 32))


def simple_baseline(
    backbone: str = "resnet50", num_keypoints: int = 17, in_channels: int = 3, filters: int = 256
) -> SimpleBaseline:
    """The head on any classifier: `simple_baseline(backbone="convnext_tiny")`."""
    return SimpleBaseline(backbone, num_keypoints, in_channels, filters)


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released checkpoints, whose names may begin with `module.`; what a classifier has beside its body goes."""
    names = {name.removeprefix("module."): torch.as_tensor(value) for name, value in state_dict.items()}
    return {name: value for name, value in names.items() if not name.startswith("fc.")}
