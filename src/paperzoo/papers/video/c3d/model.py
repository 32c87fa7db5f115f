"""C3D: Learning Spatiotemporal Features with 3D Convolutional Networks (Tran et al., ICCV 2015, arXiv:1412.0767).

Eight convolutions of 3x3x3 (frames, rows, columns), five max poolings, two fully connected layers of 4096 (fig. 3). The first pooling keeps
time, so that frames are not merged too early.

Parameters have the names of the PyTorch port that is used most (github.com/DavideA/c3d-pytorch), whose file of Sports-1M weights loads
unchanged; `from_official` takes mmaction2's. The fifth pooling is padded by one pixel, as both have it, so that 7x7 becomes 4x4 and fc6 sees
8,192 numbers; the authors' Caffe code reaches the same 4x4 by rounding up, with windows that begin one pixel later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = (  # name, which of the five widths, and the pooling behind it
    ("conv1", 0, (1, 2, 2)),
    ("conv2", 1, (2, 2, 2)),
    ("conv3a", 2, None),
    ("conv3b", 2, (2, 2, 2)),
    ("conv4a", 3, None),
    ("conv4b", 3, (2, 2, 2)),
    ("conv5a", 4, None),
    ("conv5b", 4, (2, 2, 2)),
)


class C3D(nn.Module):
    """Clips (B, in_channels, frames, image_size, image_size) -> logits (B, num_classes). fc6 makes the sizes fixed.

    Args:
        widths: channels of the five groups of convolutions.
        hidden: of fc6 and fc7.
        depth: of the kernels in time. 3 is the paper's choice; 1, 5 and 7 are those it was chosen from (sec. 3.2). 1 treats frames apart.
        drop_rate: behind fc6 and fc7, in training.

    Raises:
        ValueError: for an even depth, or clips that five poolings leave nothing of.
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        hidden: int = 4096,
        num_classes: int = 487,
        in_channels: int = 3,
        frames: int = 16,
        image_size: int = 112,
        depth: int = 3,
        drop_rate: float = 0.5,
    ) -> None:
        super().__init__()
        if depth < 1 or depth % 2 == 0:
            raise ValueError(f"depth must be odd, so that a clip keeps its length; got {depth}")
        if frames < 16 or image_size < 16:
            raise ValueError(f"five poolings need 16 frames of 16 x 16 pixels; got {frames} of {image_size}")
        channels = in_channels
        for name, width, _ in LAYERS:
            self.add_module(name, nn.Conv3d(channels, widths[width], (depth, 3, 3), padding=(depth // 2, 1, 1)))
            channels = widths[width]
        side = (image_size // 16 + 2) // 2
        self.fc6 = nn.Linear(channels * (frames // 16) * side**2, hidden)
        self.fc7 = nn.Linear(hidden, hidden)
        self.fc8 = nn.Linear(hidden, num_classes)
        self.dropout = nn.Dropout(drop_rate)
        self.num_features, self.drop_rate = hidden, drop_rate
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
                with (
                    torch.no_grad()
                ):  # without batch norm, what all clips have in common would drown what they differ in
                    module.weight -= module.weight.flatten(1).mean(1).view(-1, *[1] * (module.weight.ndim - 1))
        nn.init.normal_(self.fc8.weight, std=0.01)

    def maps(self, x: Tensor) -> Tensor:
        """What fc6 sees: (B, channels, frames / 16, …)."""
        for name, _, pool in LAYERS:
            x = F.relu(getattr(self, name)(x), inplace=True)
            if pool is not None:
                x = F.max_pool3d(x, pool, padding=(0, 1, 1) if name == "conv5b" else 0)
        return x

    def descriptor(self, x: Tensor) -> Tensor:
        """fc6's activations, the feature of a clip (sec. 3.3): (B, hidden)."""
        return F.relu(self.fc6(self.maps(x).flatten(1)))

    def embed(self, x: Tensor) -> Tensor:
        """What the classifier sees, fc7: (B, hidden)."""
        return self.dropout(F.relu(self.fc7(self.dropout(self.descriptor(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc8(self.embed(x))

    def reset_classifier(self, num_classes: int) -> None:
        self.fc8 = nn.Linear(self.num_features, num_classes)
        nn.init.normal_(self.fc8.weight, std=0.01)
        nn.init.zeros_(self.fc8.bias)


def video_descriptor(model: C3D, video: Tensor, frames: int = 16, overlap: int = 8) -> Tensor:
    """The feature of a whole video (sec. 3.3): fc6 of clips that overlap by 8 frames, averaged, of length 1.

    Args:
        video: (channels, T, H, W), normalised; T at least `frames`. Frames behind the last whole clip are left out.

    Returns:
        (hidden,)

    Raises:
        ValueError: if the video is shorter than a clip.
    """
    if video.shape[1] < frames:
        raise ValueError(f"the video has {video.shape[1]} frames, a clip has {frames}")
    clips = video.unfold(1, frames, frames - overlap).permute(1, 0, 4, 2, 3)  # (clips, channels, frames, H, W)
    return F.normalize(model.descriptor(clips).mean(0), dim=0)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """mmaction2's names to ours: `backbone.conv1a.conv.weight` is `conv1.weight`, `cls_head.fc_cls` is `fc8`."""
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"^backbone\.(conv\d[ab])\.conv\.", r"\1.", name)
        name = re.sub(r"^conv([12])a\.", r"conv\1.", name).replace("cls_head.fc_cls.", "fc8.")
        renamed[name.removeprefix("backbone.")] = value
    return renamed


def c3d(
    num_classes: int = 487,
    in_channels: int = 3,
    frames: int = 16,
    image_size: int = 112,
    depth: int = 3,
    drop_rate: float = 0.5,
) -> C3D:
    """The paper's network (fig. 3), for clips of 16 frames of 112 x 112 pixels and Sports-1M's 487 classes."""
    return C3D((64, 128, 256, 512, 512), 4096, num_classes, in_channels, frames, image_size, depth, drop_rate)


def c3d_slim(
    num_classes: int = 8,
    in_channels: int = 3,
    frames: int = 16,
    image_size: int = 24,
    depth: int = 3,
    drop_rate: float = 0.0,
) -> C3D:
    """Not of the paper: an eighth of the channels, 128 hidden units, for 24 x 24 pixels and learning in seconds."""
    return C3D((8, 16, 32, 64, 64), 128, num_classes, in_channels, frames, image_size, depth, drop_rate)


__all__ = ["C3D", "c3d", "c3d_slim", "from_official", "video_descriptor"]
