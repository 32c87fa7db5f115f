"""HED: Holistically-Nested Edge Detection (Xie and Tu, ICCV 2015, arXiv:1504.06375).

VGG-16 without its last pooling and dense layers. A 1x1 convolution after each of its five stages makes an edge map at strides 1 to 16, each
is enlarged and learns the edges by itself (sec. 2.2); a weighted sum of the five is the answer and learns too.

Enlarging is a fixed bilinear transposed convolution, cropped so that pixels lie on one another. That is bilinear interpolation, but for the
borders, where a transposed convolution fades; the authors pad the picture by 34 pixels more than VGG does, so that the crop
leaves those out: `hed_vgg16`. The most used PyTorch port (sniklaus/pytorch-hed) pads as VGG and interpolates: `hed_vgg16_interpolated`. Both have
the same parameters; `from_official` takes the port's file, and an ImageNet VGG-16 starts either by `load_backbone`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.papers.classification.vgg.model import PLANS, conv_stack

PAD = 34  # the authors' first convolution pads by 35, VGG's by 1


class HED(nn.Module):
    """Images (B, 3, H, W) -> logits (B, 1, H, W); in training {"out": …, "aux": the five side outputs'}.

    Args:
        plan: VGG's widths and poolings (see `classification/vgg`), up to the last stage's last convolution.
        pad: pixels of zeros around the picture; with some, poolings count incomplete cells as in Caffe, and maps are
            cropped; with 0, maps are brought to the picture's size.
        batch_norm: after every convolution of the stages; not of the paper, for learning without a classifier's weights.
        merge: "fused", the weighted sum; or "average" of its probability and the side outputs', the paper's final result (eq. 8).
    """

    def __init__(self, plan: tuple[int, ...], pad: int = PAD, merge: str = "fused", batch_norm: bool = False) -> None:
        super().__init__()
        if merge not in ("fused", "average"):
            raise ValueError(f"merge is '{merge}'; it is 'fused' or 'average'")
        self.pad, self.merge = pad, merge
        self.features = conv_stack(plan, batch_norm)
        self.ends, widths = [], []  # after which layers a stage ends
        for i, layer in enumerate(self.features):
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = pad > 0
                self.ends.append(i)
        self.ends.append(len(self.features))
        for end in self.ends:
            widths.append(next(m.out_channels for m in reversed(self.features[:end]) if isinstance(m, nn.Conv2d)))
        self.side = nn.ModuleList(nn.Conv2d(width, 1, 1) for width in widths)
        self.fuse = nn.Conv2d(len(widths), 1, 1)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                nn.init.zeros_(module.bias)
        for convolution in self.side:  # sec. 3.1
            nn.init.zeros_(convolution.weight)
            nn.init.zeros_(convolution.bias)
        nn.init.constant_(self.fuse.weight, 1 / len(widths))  # 0.2
        nn.init.zeros_(self.fuse.bias)

    def load_backbone(self, state_dict: dict[str, Tensor]) -> None:
        """Start from a VGG classifier's convolutions, in torchvision's names, which are this repository's too."""
        wanted = {name: state_dict[f"features.{name}"] for name in self.features.state_dict()}
        self.features.load_state_dict(wanted)

    def sides(self, images: Tensor) -> list[Tensor]:
        """The five side outputs' logits, (B, 1, H, W) each."""
        height, width = images.shape[-2:]
        x = F.pad(images, (self.pad,) * 4) if self.pad else images
        found, start = [], 0
        for level, (end, score) in enumerate(zip(self.ends, self.side, strict=True)):
            for layer in self.features[start:end]:
                x = layer(x)
            start, logits = end, score(x)
            if level:
                size = (height, width)
                if self.pad:
                    size = (logits.shape[2] << level, logits.shape[3] << level)
                logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
            found.append(
                logits[:, :, self.pad : self.pad + height, self.pad : self.pad + width] if self.pad else logits
            )
        return found

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor | list[Tensor]]:
        sides = self.sides(images)
        fused = self.fuse(torch.cat(sides, 1))  # eq. 3
        if self.training:
            return {"out": fused, "aux": sides}
        if self.merge == "average":
            return torch.stack([fused, *sides]).sigmoid().mean(0).logit(eps=1e-6)
        return fused


def cut(plan: tuple[int, ...]) -> tuple[int, ...]:
    """Without the last pooling: "the last stage, including the 5th pooling, is cut" (sec. 3)."""
    return plan[:-1]


def hed_vgg16(merge: str = "fused") -> HED:
    """The paper's network: 14.7M parameters."""
    return HED(cut(PLANS["D"]), PAD, merge)


def hed_vgg16_interpolated(merge: str = "fused") -> HED:
    """As in sniklaus/pytorch-hed: no padding beyond VGG's."""
    return HED(cut(PLANS["D"]), 0, merge)


def hed_slim() -> HED:
    """Not of the paper: four narrow stages with batch norm, which learn from nothing, for pictures of about 64 pixels."""
    return HED((16, 16, 0, 32, 32, 0, 48, 48, 0, 64, 64), 0, batch_norm=True)


STAGES = {"One": 0, "Two": 1, "Thr": 2, "Fou": 3, "Fiv": 4}


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of sniklaus/pytorch-hed to these, and the first convolution's input channels from blue-green-red to red-green-blue.

    Raises:
        KeyError: if the names are others.
    """
    starts = (0, 4, 9, 16, 23)  # where each stage begins in VGG-16's flat list, its pooling left out or first
    renamed = {}
    for name, value in state_dict.items():
        head, _, rest = name.partition(".")
        head = head.replace("module", "net")
        if head.startswith("netVgg"):
            stage = STAGES[head.removeprefix("netVgg")]
            number, _, kind = rest.partition(".")
            if stage == 0 and rest == "0.weight":
                value = value.flip(1)
            renamed[f"features.{starts[stage] + int(number)}.{kind}"] = value
        elif head.startswith("netScore"):
            renamed[f"side.{STAGES[head.removeprefix('netScore')]}.{rest}"] = value
        elif head == "netCombine":
            renamed[f"fuse.{rest.removeprefix('0.')}"] = value
        else:
            raise KeyError(name)
    return renamed
