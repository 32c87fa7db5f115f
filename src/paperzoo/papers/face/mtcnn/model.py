"""MTCNN: Joint Face Detection and Alignment using Multi-task Cascaded Convolutional Networks (Zhang et al., IEEE SPL 2016,
arXiv:1604.02878).

The three networks of fig. 2: P-Net looks at every 12x12 window of a picture at once, R-Net and O-Net at windows of 24x24 and
48x48 that were cut out. What joins them is in `cascade.py`, what they learn from in `windows.py`.

Pixels are (p - 127.5) / 128. Parameter names are facenet-pytorch's (`pnet.conv1.weight`), whose file for all three
(`torch.save(MTCNN().state_dict(), …)`) loads unchanged into `mtcnn`, and whose pnet.pt, rnet.pt and onet.pt into `pnet`, `rnet`
and `onet`; `from_official` joins them. What differs from the paper, or is not in it:

- P-Net and R-Net learn landmarks too (fig. 2, sec. II-C), but the authors' released weights have no such branch, as only
  O-Net's landmarks are used: `landmarks=True` builds it.
- Poolings round up, as in the authors' Caffe networks; and what the dense layers see is flattened column by column, as
  their weights came from MATLAB.
- Logits are returned, not probabilities. How weights start is not in the paper: here from
  Xavier's distribution, as is usual in Caffe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def columnwise(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, W * H * C): columns first, channels innermost."""
    return x.permute(0, 3, 2, 1).flatten(1)


def initialise(network: nn.Module) -> None:
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


class PNet(nn.Module):
    """The proposal network: normalised images (B, 3, H, W), of at least 12 pixels a side -> maps over its windows.

    Returns:
        logits (B, 2, h, w), not a face and a face; offsets (B, 4, h, w), of x1 y1 x2 y2 in sides of the window; with
        `landmarks`, points (B, 10, h, w), x1 … x5 y1 … y5 in sides of the window. The window of cell (i, j) is the 12x12 square
        at row 2 i and column 2 j.
    """

    size, stride = 12, 2

    def __init__(self, landmarks: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 10, 3)
        self.prelu1 = nn.PReLU(10)
        self.pool1 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv2 = nn.Conv2d(10, 16, 3)
        self.prelu2 = nn.PReLU(16)
        self.conv3 = nn.Conv2d(16, 32, 3)
        self.prelu3 = nn.PReLU(32)
        self.conv4_1 = nn.Conv2d(32, 2, 1)
        self.conv4_2 = nn.Conv2d(32, 4, 1)
        self.conv4_3 = nn.Conv2d(32, 10, 1) if landmarks else None
        initialise(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        outputs = (self.conv4_1(x), self.conv4_2(x))
        return outputs if self.conv4_3 is None else (*outputs, self.conv4_3(x))


class RNet(nn.Module):
    """The refinement network: windows (B, 3, 24, 24) -> logits (B, 2), offsets (B, 4) and, with `landmarks`, points (B, 10).

    Args:
        landmarks: with the branch that learns them.
        channels: of the three convolutions and the dense layer (fig. 2).
    """

    size = 24

    def __init__(self, landmarks: bool = False, channels: Sequence[int] = (28, 48, 64, 128)) -> None:
        super().__init__()
        first, second, third, dense = channels
        self.conv1 = nn.Conv2d(3, first, 3)
        self.prelu1 = nn.PReLU(first)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = nn.Conv2d(first, second, 3)
        self.prelu2 = nn.PReLU(second)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3 = nn.Conv2d(second, third, 2)
        self.prelu3 = nn.PReLU(third)
        self.dense4 = nn.Linear(3 * 3 * third, dense)
        self.prelu4 = nn.PReLU(dense)
        self.dense5_1 = nn.Linear(dense, 2)
        self.dense5_2 = nn.Linear(dense, 4)
        self.dense5_3 = nn.Linear(dense, 10) if landmarks else None
        initialise(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.pool2(self.prelu2(self.conv2(x)))
        x = self.prelu4(self.dense4(columnwise(self.prelu3(self.conv3(x)))))
        outputs = (self.dense5_1(x), self.dense5_2(x))
        return outputs if self.dense5_3 is None else (*outputs, self.dense5_3(x))


class ONet(nn.Module):
    """The output network: windows (B, 3, 48, 48) -> logits (B, 2), offsets (B, 4), points (B, 10).

    Args:
        channels: of the four convolutions and the dense layer (fig. 2).
    """

    size = 48

    def __init__(self, channels: Sequence[int] = (32, 64, 64, 128, 256)) -> None:
        super().__init__()
        first, second, third, fourth, dense = channels
        self.conv1 = nn.Conv2d(3, first, 3)
        self.prelu1 = nn.PReLU(first)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = nn.Conv2d(first, second, 3)
        self.prelu2 = nn.PReLU(second)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3 = nn.Conv2d(second, third, 3)
        self.prelu3 = nn.PReLU(third)
        self.pool3 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv4 = nn.Conv2d(third, fourth, 2)
        self.prelu4 = nn.PReLU(fourth)
        self.dense5 = nn.Linear(3 * 3 * fourth, dense)
        self.prelu5 = nn.PReLU(dense)
        self.dense6_1 = nn.Linear(dense, 2)
        self.dense6_2 = nn.Linear(dense, 4)
        self.dense6_3 = nn.Linear(dense, 10)
        initialise(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.pool2(self.prelu2(self.conv2(x)))
        x = self.pool3(self.prelu3(self.conv3(x)))
        x = self.prelu5(self.dense5(columnwise(self.prelu4(self.conv4(x)))))
        return self.dense6_1(x), self.dense6_2(x), self.dense6_3(x)


class MTCNN(nn.Module):
    """The three networks. Called, it runs each on its own input: what an export holds; `cascade.detect` joins them."""

    num_classes = 1

    def __init__(self, pnet: PNet, rnet: RNet, onet: ONet) -> None:
        super().__init__()
        self.pnet, self.rnet, self.onet = pnet, rnet, onet

    def forward(self, pictures: Tensor, windows24: Tensor, windows48: Tensor) -> tuple[Tensor, ...]:
        """Pictures (B, 3, H, W) and windows (N, 3, 24, 24), (M, 3, 48, 48) -> P-Net's, R-Net's and O-Net's outputs in a row."""
        return (*self.pnet(pictures), *self.rnet(windows24), *self.onet(windows48))


# -- variants ------------------------------------------------------------------------------------------------------------


def pnet(landmarks: bool = False) -> PNet:
    """The proposal network, 6,632 parameters."""
    return PNet(landmarks)


def rnet(landmarks: bool = False) -> RNet:
    """The refinement network, 100,178 parameters."""
    return RNet(landmarks)


def onet() -> ONet:
    """The output network, 389,040 parameters."""
    return ONet()


def mtcnn(landmarks: bool = False, num_classes: int = 1) -> MTCNN:
    """All three, 495,850 parameters; `landmarks` adds the branches with which P-Net and R-Net learn landmarks."""
    only_faces(num_classes)
    return MTCNN(PNet(landmarks), RNet(landmarks), ONet())


def mtcnn_half(landmarks: bool = False, num_classes: int = 1) -> MTCNN:
    """R-Net and O-Net with half the channels; not in the paper."""
    only_faces(num_classes)
    return MTCNN(PNet(landmarks), RNet(landmarks, (14, 24, 32, 64)), ONet((16, 32, 32, 64, 128)))


def only_faces(num_classes: int) -> None:
    if num_classes != 1:
        raise ValueError(f"num_classes is {num_classes}; MTCNN knows one class, a face")


def from_official(state_dict: Mapping[str, Tensor] | Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """facenet-pytorch's weights to these names: of one file for all, or {"pnet": …, "rnet": …, "onet": …} of its three files."""
    joined = {}
    for name, value in state_dict.items():
        if isinstance(value, Mapping):
            joined |= {f"{name}.{key}": torch.as_tensor(v) for key, v in value.items()}
        else:
            joined[name.removeprefix("mtcnn.")] = value
    return joined
