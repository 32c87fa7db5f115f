"""Monodepth2: Digging Into Self-Supervised Monocular Depth Estimation (Godard et al., ICCV 2019, arXiv:1806.01260).

Two networks, sec. 3.4 and the appendix's tables: a ResNet encoder with a decoder of nearest-neighbour upsampling, skips, reflection
padding and ELUs that gives sigmoid disparities at four scales; and a ResNet on two frames laid on each other that gives the
camera's motion between them. The second is for training alone.

Images are (B, 3, H, W) in [0, 1], height and width multiples of 32, at least 64; the networks normalise them themselves.
Parameter names below `encoder` and `depth` (`pose_encoder` and `pose`) are those of the released files `encoder.pth` and `depth.pth`
(`pose_encoder.pth` and `pose.pth`): `paperzoo.create("monodepth2_resnet18", weights="mono_640x192")` reads the folder, or either file with
the other beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.papers.classification.resnet.model import BasicBlock, ResNet, conv1x1, initialise, resnet18, resnet50

# -- encoder -------------------------------------------------------------------------------------------------------------


class ThinResNet(nn.Module):
    """A ResNet-10 of any width: one basic block a stage. Not of the paper; for small images and learning from scratch.

    Has what `Encoder` uses of a ResNet: conv1, bn1, relu, maxpool, layer1 … layer4, stage_channels.
    """

    def __init__(self, channels: Sequence[int], in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inplanes = channels[0]
        for i, planes in enumerate(channels[1:]):
            stride = 1 if i == 0 else 2
            shortcut = None
            if stride != 1 or inplanes != planes:
                shortcut = nn.Sequential(conv1x1(inplanes, planes, stride), nn.BatchNorm2d(planes))
            self.add_module(f"layer{i + 1}", nn.Sequential(BasicBlock(inplanes, planes, stride, shortcut)))
            inplanes = planes
        self.stage_channels = list(channels[1:])
        initialise(self)


class Encoder(nn.Module):
    """A ResNet's five maps: after the stem and after each stage, strides 2, 4, 8, 16, 32. (B, 3 * frames, H, W) -> list."""

    def __init__(self, body: ResNet | ThinResNet) -> None:
        super().__init__()
        self.encoder = body
        body.fc, body.avgpool = nn.Identity(), nn.Identity()
        self.channels = [body.conv1.out_channels, *body.stage_channels]

    def forward(self, images: Tensor) -> list[Tensor]:
        body = self.encoder
        x = (images - 0.45) / 0.225  # one mean and deviation for all channels, as the released code
        maps = [body.relu(body.bn1(body.conv1(x)))]
        x = body.maxpool(maps[0])
        for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
            x = stage(x)
            maps.append(x)
        return maps

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        """Take over a ResNet classifier's weights; for several frames its first kernels are repeated and divided by their number."""
        wanted = self.encoder.conv1.in_channels
        state = {k: v for k, v in state.items() if not k.startswith("fc.")}
        kernels = state["conv1.weight"]
        frames = wanted // kernels.shape[1]
        state["conv1.weight"] = torch.cat([kernels] * frames, 1) / frames
        self.encoder.load_state_dict(state)


# -- depth ---------------------------------------------------------------------------------------------------------------


class Conv3x3(nn.Module):
    """A 3x3 convolution with reflection padding, which the paper found to keep borders of depth maps clean; keeps the size."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.pad = nn.ReflectionPad2d(1)
        self.conv = nn.Conv2d(in_channels, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pad(x))


class ConvBlock(nn.Module):
    """`Conv3x3` and an ELU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(in_channels, out_channels)
        self.nonlin = nn.ELU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlin(self.conv(x))


class DepthDecoder(nn.Module):
    """Five levels: convolve, enlarge twofold, join with the encoder's map, convolve; sigmoids at the four finest.

    The list `decoder` holds two blocks a level, coarsest first, then the four disparity convolutions, finest first.

    Args:
        encoder_channels: of the encoder's maps, finest first.
        widths: channels of the decoder's levels, finest first.
    """

    def __init__(self, encoder_channels: Sequence[int], widths: Sequence[int] = (16, 32, 64, 128, 256)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inside = encoder_channels[-1]
        for level in range(4, -1, -1):
            skip = encoder_channels[level - 1] if level > 0 else 0
            layers += [ConvBlock(inside, widths[level]), ConvBlock(widths[level] + skip, widths[level])]
            inside = widths[level]
        layers += [Conv3x3(widths[scale], 1) for scale in range(4)]
        self.decoder = nn.ModuleList(layers)

    def forward(self, maps: list[Tensor], scales: int = 4) -> list[Tensor]:
        """The `scales` finest sigmoids (B, 1, H / 2^s, W / 2^s), finest first."""
        x, found = maps[-1], []
        for i, level in enumerate(range(4, -1, -1)):
            x = F.interpolate(self.decoder[2 * i](x), scale_factor=2.0, mode="nearest")
            if level > 0:
                x = torch.cat([x, maps[level - 1]], 1)
            x = self.decoder[2 * i + 1](x)
            if level < scales:
                found.append(torch.sigmoid(self.decoder[10 + level](x)))
        return found[::-1]


class DepthNetwork(nn.Module):
    """Images (B, 3, H, W) -> sigmoid disparity (B, 1, H, W); in training the list of four, finest first.

    `technique.disparity_to_depth` makes depth of it, up to one unknown scale.
    """

    def __init__(self, body: ResNet | ThinResNet, widths: Sequence[int] = (16, 32, 64, 128, 256)) -> None:
        super().__init__()
        self.encoder = Encoder(body)
        self.depth = DepthDecoder(self.encoder.channels, widths)

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        found = self.depth(self.encoder(images), 4 if self.training else 1)
        return found if self.training else found[0]

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        self.encoder.load_backbone(state)


# -- pose ----------------------------------------------------------------------------------------------------------------


class PoseDecoder(nn.Module):
    """The encoder's last map (B, C, h, w) -> axis-angle and translation, (B, 2, 3) each, averaged over the places, times 0.01.

    Two motions come out, as in the released code; the first is used.
    """

    def __init__(self, in_channels: int, width: int = 256) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [
                nn.Conv2d(in_channels, width, 1),
                nn.Conv2d(width, width, 3, padding=1),
                nn.Conv2d(width, width, 3, padding=1),
                nn.Conv2d(width, 12, 1),
            ]
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.net[:3]:
            x = F.relu(layer(x))
        motion = 0.01 * self.net[3](x).mean((2, 3)).view(-1, 2, 6)
        return motion[..., :3], motion[..., 3:]


class PoseNetwork(nn.Module):
    """Two frames in their order in time, (B, 6, H, W) -> axis-angle (B, 3) and translation (B, 3) from the first to the second."""

    def __init__(self, body: ResNet | ThinResNet, width: int = 256) -> None:
        super().__init__()
        self.pose_encoder = Encoder(body)
        self.pose = PoseDecoder(self.pose_encoder.channels[-1], width)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        axis_angle, translation = self.pose(self.pose_encoder(frames)[-1])
        return axis_angle[:, 0], translation[:, 0]

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        self.pose_encoder.load_backbone(state)


# -- variants --------------------------------------------------------------------------------------------------------------

THIN = (16, 16, 32, 48, 64)


def monodepth2_resnet18() -> DepthNetwork:
    """The paper's network on a ResNet-18."""
    return DepthNetwork(resnet18(num_classes=0))


def monodepth2_resnet50() -> DepthNetwork:
    """The paper's network on a ResNet-50 (appendix)."""
    return DepthNetwork(resnet50(num_classes=0))


def monodepth2_slim() -> DepthNetwork:
    """Not of the paper: narrow and shallow, for small images and learning from scratch.

    Its disparities start low: the motion network settles on whatever scale the first depths have, and near things need room above it.
    """
    network = DepthNetwork(ThinResNet(THIN), (8, 16, 16, 24, 32))
    for scale in network.depth.decoder[10:]:
        nn.init.constant_(scale.conv.bias, -1.5)
    return network


def monodepth2_pose_resnet18() -> PoseNetwork:
    """The motion of two frames, on a ResNet-18."""
    return PoseNetwork(resnet18(num_classes=0, in_channels=6))


def monodepth2_pose_resnet50() -> PoseNetwork:
    """The motion of two frames, on a ResNet-50."""
    return PoseNetwork(resnet50(num_classes=0, in_channels=6))


def monodepth2_pose_slim() -> PoseNetwork:
    """Not of the paper: the motion network that goes with `monodepth2_slim`."""
    return PoseNetwork(ThinResNet(THIN, 6), 64)


# -- the released files ------------------------------------------------------------------------------------------------------


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `encoder.pth` and `depth.pth` in one dict (or of `pose_encoder.pth` and `pose.pth`) under our names.

    The classifier of the encoder's ResNet, which the files still hold, is left out.
    """
    pose = any(name.startswith("net.") for name in state)
    encoder, decoder = ("pose_encoder", "pose") if pose else ("encoder", "depth")
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("encoder.fc."):
            continue
        renamed[f"{encoder if name.startswith('encoder.') else decoder}.{name}"] = tensor
    return renamed


def read_official(path: Path, model: nn.Module) -> dict[str, Tensor] | None:
    """The released files of a network, by their folder or by one of the two; None where they are not there."""
    from paperzoo.engine.weights import read_state

    names = ("pose_encoder.pth", "pose.pth") if isinstance(model, PoseNetwork) else ("encoder.pth", "depth.pth")
    parts = [path.parent / name for name in names]
    named = path.name in names or (path.name == "model.safetensors" and not path.exists())
    if not named or not all(part.is_file() for part in parts):
        return None
    state: dict[str, Tensor] = {}
    for part in parts:
        state.update(read_state(part))
    return from_official(state)
