"""OpenPose: Realtime Multi-Person 2D Pose Estimation using Part Affinity Fields (Cao et al., CVPR 2017, arXiv:1611.08050).

The first ten layers of VGG-19, then six stages of two branches: part affinity fields and confidence maps, each stage seeing the
image's features and what the stage before made of them (sec. 2.1, fig. 3).

Names are those of the public PyTorch conversions (`model0.conv1_1`, `model1_1.conv5_1_CPM_L1`, …); `from_official` takes the files
that leave the first part out. Those weights know images as BGR of pixel / 256 - 0.5; `forward` turns RGB around. One of the
conversions ends its last confidence branch with a ReLU that the authors' network does not have; here there is none.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from paperzoo.papers.classification.vgg.model import PLANS, POOL

FRONT = PLANS["E"][:13]  # VGG-19's convolutions conv1_1 to conv4_2 and the three poolings between them


Layer = tuple[str, int, int, int]


def convolutions(layers: Sequence[Layer], last: bool = False, batch_norm: bool = False) -> nn.Sequential:
    """Convolutions (name, channels in, channels out, kernel), each with a ReLU; with `last`, the last one without."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (name, before, after, kernel) in enumerate(layers):
        parts[name] = nn.Conv2d(before, after, kernel, padding=kernel // 2)
        if not (last and i == len(layers) - 1):
            if batch_norm:
                parts[f"bn_{name}"] = nn.BatchNorm2d(after)
            parts[f"relu_{name}"] = nn.ReLU(inplace=True)
    return nn.Sequential(parts)


def front(plan: Sequence[int], in_channels: int, features: tuple[int, int], batch_norm: bool) -> nn.Sequential:
    """The image's features F: the plan's convolutions and poolings under VGG's names, then two layers that narrow them."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    block, number, channels = 1, 1, in_channels
    for width in plan:
        if width == POOL:
            parts[f"pool{block}_stage1"] = nn.MaxPool2d(2)
            block, number = block + 1, 1
            continue
        parts |= convolutions([(f"conv{block}_{number}", channels, width, 3)], batch_norm=batch_norm)._modules
        channels, number = width, number + 1
    for width in features:
        parts |= convolutions([(f"conv{block}_{number}_CPM", channels, width, 3)], batch_norm=batch_norm)._modules
        channels, number = width, number + 1
    return nn.Sequential(parts)


def first_stage(branch: int, channels: int, width: int, wide: int, outputs: int) -> list[Layer]:
    """Three 3x3 and two 1x1 convolutions (fig. 3, stage 1)."""
    sizes = [(channels, width, 3), (width, width, 3), (width, width, 3), (width, wide, 1), (wide, outputs, 1)]
    return [(f"conv5_{i}_CPM_L{branch}", *s) for i, s in enumerate(sizes, 1)]


def later_stage(stage: int, branch: int, channels: int, width: int, kernel: int, outputs: int) -> list[Layer]:
    """Five 7x7 and two 1x1 convolutions (fig. 3, stage t >= 2)."""
    sizes = [(channels, width, kernel), *[(width, width, kernel)] * 4, (width, width, 1), (width, outputs, 1)]
    return [(f"Mconv{i}_stage{stage}_L{branch}", *s) for i, s in enumerate(sizes, 1)]


class OpenPose(nn.Module):
    """Images (B, in_channels, H, W), sides multiples of 8 -> affinity fields (B, T, 2 num_limbs, H / 8, W / 8) and confidence
    maps (B, T, num_keypoints + 1, H / 8, W / 8) of every stage in training; of the last one alone, without T, in eval.

    The last confidence map is the background. Cell u lies at pixel stride * u + (stride - 1) / 2.

    Args:
        num_keypoints, num_limbs: J and C of the paper.
        in_channels: channels of the image.
        stages: T.
        plan: channels of the front's convolutions, POOL for poolings; three make a stride of 8.
        features: channels of the two layers after it.
        width, wide: of the stages; `wide` is that of the first stage's fourth layer.
        kernel: of the later stages.
        batch_norm: after each convolution but the branches' last; not in the paper, whose front is a trained classifier.
    """

    channels_last = False  # 7x7 convolutions of 128 channels on small maps are a little faster without

    def __init__(
        self,
        num_keypoints: int = 18,
        num_limbs: int = 19,
        in_channels: int = 3,
        stages: int = 6,
        plan: Sequence[int] = FRONT,
        features: tuple[int, int] = (256, 128),
        width: int = 128,
        wide: int = 512,
        kernel: int = 7,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if num_keypoints < 1 or num_limbs < 1 or stages < 1:
            raise ValueError("num_keypoints, num_limbs and stages must be 1 or more")
        self.num_keypoints, self.num_limbs, self.stages = num_keypoints, num_limbs, stages
        self.stride = self.multiple = 2 ** sum(w == POOL for w in plan)
        self.model0 = front(plan, in_channels, features, batch_norm)
        outputs = (2 * num_limbs, num_keypoints + 1)
        for stage in range(1, stages + 1):
            for branch, out in enumerate(outputs, 1):
                if stage == 1:
                    layers = first_stage(branch, features[1], width, wide, out)
                else:
                    layers = later_stage(stage, branch, features[1] + sum(outputs), width, kernel, out)
                self.add_module(f"model{stage}_{branch}", convolutions(layers, last=True, batch_norm=batch_norm))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model0(images.flip(1))  # RGB to the BGR that the public weights know
        fields, maps = [], []
        x = features
        for stage in range(1, self.stages + 1):
            fields.append(self.get_submodule(f"model{stage}_1")(x))
            maps.append(self.get_submodule(f"model{stage}_2")(x))
            x = torch.cat([fields[-1], maps[-1], features], 1)
        if self.training:
            return torch.stack(fields, 1), torch.stack(maps, 1)
        return fields[-1], maps[-1]

    def load_backbone(self, state_dict: dict[str, Tensor]) -> None:
        """A VGG-19 classifier's weights (torchvision's names, RGB) for the front.

        Raises:
            ValueError: if a weight is missing or has another shape.
        """
        own = [
            layer for name, layer in self.model0.named_children() if isinstance(layer, nn.Conv2d) and "CPM" not in name
        ]
        numbers = sorted({int(k.split(".")[1]) for k in state_dict if k.startswith("features.")})[: len(own)]
        if len(numbers) < len(own):
            raise ValueError(f"state_dict has {len(numbers)} convolutions called features.N; {len(own)} are needed")
        for i, (layer, number) in enumerate(zip(own, numbers, strict=True)):
            weight, bias = (torch.as_tensor(state_dict[f"features.{number}.{kind}"]) for kind in ("weight", "bias"))
            if weight.shape != layer.weight.shape:
                raise ValueError(
                    f"features.{number}.weight has the shape {tuple(weight.shape)}, {tuple(layer.weight.shape)} is needed"
                )
            with torch.no_grad():
                layer.weight.copy_(weight.flip(1) if i == 0 else weight)
                layer.bias.copy_(bias)


# -- variants ------------------------------------------------------------------------------------------------------------


def openpose_coco18(num_keypoints: int = 18, num_limbs: int = 19, in_channels: int = 3, stages: int = 6) -> OpenPose:
    """The published network with COCO's joints and the neck: 52.3M parameters. Layers start from N(0, 0.01), as in the released code."""
    network = OpenPose(num_keypoints, num_limbs, in_channels, stages)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
    return network


def openpose_slim(num_keypoints: int = 14, num_limbs: int = 13, in_channels: int = 3, stages: int = 2) -> OpenPose:
    """A thin one for small pictures and quick runs, not in the paper: a stride of 4, as the front lacks the third pooling, and
    batch norm, as it starts from nothing."""
    plan = (12, POOL, 32, POOL, 64, 64)
    network = OpenPose(num_keypoints, num_limbs, in_channels, stages, plan, (48, 32), 24, 64, 5, batch_norm=True)
    for stage in range(1, stages + 1):  # maps and fields start near 0, which most of them are
        for branch in (1, 2):
            nn.init.normal_(network.get_submodule(f"model{stage}_{branch}")[-1].weight, std=0.01)
    return network


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Public conversions whose names lack the part (`conv1_1.weight` for `model0.conv1_1.weight`); others come through unchanged."""
    return {place(name.removeprefix("module.")): torch.as_tensor(value) for name, value in state_dict.items()}


def place(name: str) -> str:
    """ "Mconv3_stage4_L2.bias" -> "model4_2.Mconv3_stage4_L2.bias" """
    layer = name.split(".")[0]
    if layer.startswith("model"):
        return name
    if layer.startswith("conv5_"):
        return f"model1_{layer[-1]}.{name}"
    if layer.startswith("Mconv"):
        stage = layer.split("_stage")[1].split("_")[0]
        return f"model{stage}_{layer[-1]}.{name}"
    return f"model0.{name}"
