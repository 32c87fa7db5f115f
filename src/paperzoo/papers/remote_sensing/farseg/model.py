"""FarSeg: Foreground-Aware Relation Network for Geospatial Object Segmentation (Zheng et al., CVPR 2020, arXiv:2011.09766).

From above, objects are few and small and the background has everything. A pyramid's pixels are therefore held against an embedding of the
whole scene: what has to do with it is enhanced, the rest damped (sec. 3.2). A light decoder adds the levels up (sec. 3.3), and the loss
turns, while training goes on, from all pixels to the hard ones (sec. 3.4, `foreground_aware_loss`).

Parameter names are torchgeo's (`backbone`, `fpn`, `fsr`, `decoder`); `from_official` takes the authors' files and torchgeo's. Levels are resized
to the size of the next finer one instead of by two, so that any image size is legal; at multiples of 32 that is the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.backbones import at_strides, headless, load_body
from paperzoo.papers.classification.resnet.model import resnet50
from paperzoo.papers.detection.fpn.model import FeaturePyramidNetwork, TinyBody

# -- foreground-scene relation (sec. 3.2) --------------------------------------------------------------------------------


def unit(in_channels: int, out_channels: int) -> nn.Sequential:
    """A 1x1 convolution, batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class SceneRelation(nn.Module):
    """A scene (B, S, 1, 1) and pyramid levels (B, C, H_l, W_l) -> the levels re-encoded (B, out_channels, H_l, W_l).

    z = k(v) / (1 + exp(-psi(v) . u)), with u the scene's vector for that level (eq. 1 to 3).
    """

    def __init__(self, scene_channels: int, in_channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.scene_encoder = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(scene_channels, out_channels, 1),
                nn.ReLU(inplace=True),
                nn.Conv2d(out_channels, out_channels, 1),
            )
            for _ in in_channels
        )
        self.content_encoders = nn.ModuleList(unit(c, out_channels) for c in in_channels)
        self.feature_reencoders = nn.ModuleList(unit(c, out_channels) for c in in_channels)

    def forward(self, scene: Tensor, levels: Sequence[Tensor]) -> list[Tensor]:
        refined = []
        parts = zip(self.scene_encoder, self.content_encoders, self.feature_reencoders, levels, strict=True)
        for encode, content, reencode, level in parts:
            u, psi = encode(scene), content(level)
            relation = torch.einsum("bchw,bc->bhw", psi, u[:, :, 0, 0])  # no product of the map's size is kept
            refined.append(relation.sigmoid()[:, None] * reencode(level))
        return refined


# -- light decoder (sec. 3.3) --------------------------------------------------------------------------------------------


class LightDecoder(nn.Module):
    """Levels (B, C, H_l, W_l), finest first -> logits (B, num_classes, *size).

    Each level goes through as many units (3x3 convolution, batch norm, ReLU, twice as large) as bring it to the finest
    one's size, that one through a unit without enlarging; their mean is classified.

    Args:
        kernel: of the last convolution; 1 in the authors' code, 3 in torchgeo.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, levels: int = 4, kernel: int = 1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(
                    nn.Sequential(
                        nn.Conv2d(in_channels if i == 0 else channels, channels, 3, padding=1, bias=False),
                        nn.BatchNorm2d(channels),
                        nn.ReLU(inplace=True),
                    )
                    for i in range(max(1, level))
                )
            )
            for level in range(levels)
        )
        self.classifier = nn.Sequential(nn.Conv2d(channels, num_classes, kernel, padding=kernel // 2))

    def forward(self, levels: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        sizes = [level.shape[-2:] for level in levels]
        total = self.blocks[0](levels[0])
        for level in range(1, len(levels)):
            x = levels[level]
            for i, block in enumerate(self.blocks[level]):
                x = F.interpolate(block(x), sizes[level - 1 - i], mode="bilinear", align_corners=True)
            total = total + x
        logits = self.classifier(total / len(levels))
        return F.interpolate(logits, size, mode="bilinear", align_corners=True)


# -- the network ---------------------------------------------------------------------------------------------------------


class FarSeg(nn.Module):
    """Images (B, 3, H, W) -> logits (B, num_classes, H, W); fig. 3.

    Args:
        body: a classifier whose four stages have strides 4, 8, 16, 32.
        channels: of the pyramid; `decoder_channels`: of the decoder; `kernel`: see `LightDecoder`.
    """

    def __init__(
        self, body: nn.Module, num_classes: int, channels: int = 256, decoder_channels: int = 128, kernel: int = 1
    ) -> None:
        super().__init__()
        self.backbone = headless(body)
        self.fpn = FeaturePyramidNetwork(body.stage_channels, channels)
        self.fsr = SceneRelation(body.stage_channels[-1], [channels] * len(body.stage_channels), channels)
        self.decoder = LightDecoder(channels, decoder_channels, num_classes, len(body.stage_channels), kernel)

    def load_backbone(self, state_dict: dict[str, Tensor]) -> None:
        """Start from a classifier's weights; its last layer is left out."""
        load_body(self.backbone, state_dict)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.backbone.stages(images)
        scene = maps[-1].mean((2, 3), keepdim=True)
        return self.decoder(self.fsr(scene, self.fpn(maps)), images.shape[-2:])


# -- foreground-aware loss (sec. 3.4) ------------------------------------------------------------------------------------

Annealing = Literal["cosine", "poly", "linear"]


def annealed(done: float, kind: Annealing = "cosine") -> float:
    """zeta: the share of the focal weights after so much (0 … 1) of the annealing; from 0 to 1 (eq. 6 and its relatives)."""
    done = min(1.0, done)
    if kind == "cosine":
        return 0.5 * (1 - math.cos(math.pi * done))
    return 1 - (1 - done) ** (0.9 if kind == "poly" else 1.0)


def foreground_aware_loss(
    logits: Tensor, masks: Tensor, share: float = 1.0, gamma: float = 2.0, ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """Cross-entropy with weights w = zeta (1 - p)^gamma / Z + (1 - zeta), p of the true class (eq. 4 to 6).

    Args:
        logits: (B, K, H, W).
        masks: int64 (B, H, W).
        share: zeta, from 0, plain cross-entropy, to 1.

    Returns:
        The weighed losses (B, H, W), and what Z follows from: the sums (2,) of the losses and of the losses times (1 - p)^gamma. Z, their
        ratio turned over, keeps the sum of the losses what it was; it and the weights are constants to the gradient. To keep it one over
        several processes, use `weighed`.
    """
    losses, focal = focal_parts(logits, masks, gamma, ignore_index)
    sums = torch.stack([losses.detach().sum(), (losses.detach() * focal).sum()])
    return weighed(losses, focal, sums, share), sums


def focal_parts(logits: Tensor, masks: Tensor, gamma: float, ignore_index: int = 255) -> tuple[Tensor, Tensor]:
    """Cross-entropies (B, H, W), 0 where nothing counts, and (1 - p)^gamma of the true class, without gradient."""
    losses = F.cross_entropy(logits, masks, ignore_index=ignore_index, reduction="none")
    focal = (1 - (-losses.detach()).exp()).clamp(min=0).pow(gamma)  # p = exp(-loss)
    return losses, focal


def weighed(losses: Tensor, focal: Tensor, sums: Tensor, share: float) -> Tensor:
    normaliser = sums[0] / sums[1].clamp(min=torch.finfo(sums.dtype).tiny)
    return losses * (1 - share + share * focal * normaliser)


# -- variants ------------------------------------------------------------------------------------------------------------


def farseg_resnet50(num_classes: int = 16, backbone: str | None = None) -> FarSeg:
    """The paper's network; the authors' `farseg50`. `backbone`: another classifier by name, with maps of strides 4 to 32."""
    return FarSeg(resnet50(0) if backbone is None else at_strides(backbone, (4, 8, 16, 32)), num_classes)


def farseg_resnet50_torchgeo(num_classes: int = 16) -> FarSeg:
    """torchgeo's `FarSeg`: the last convolution looks at 3 x 3 pixels."""
    return FarSeg(resnet50(0), num_classes, kernel=3)


def farseg_slim(num_classes: int = 4) -> FarSeg:
    """Not of the paper: a thin backbone and narrow pyramid, for pictures of about 100 pixels."""
    return FarSeg(TinyBody((16, 32, 48, 64)), num_classes, 24, 24)


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names, or torchgeo's, to these. The step counter of the authors' loss and torchgeo's idle classifier are left out."""
    renamed = {}
    for name, value in state_dict.items():
        if name == "buffer_step" or name.startswith("backbone.fc."):
            continue
        for theirs, ours in (("en.resnet.", "backbone."), ("sr.", "fsr."), ("cls_pred_conv.", "decoder.classifier.0.")):
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        for kind in ("inner", "layer"):
            head = f"fpn.fpn_{kind}"
            if name.startswith(head):
                number, _, rest = name.removeprefix(head).partition(".")
                name = f"fpn.{kind}_blocks.{int(number) - 1}.0.{rest}"
        renamed[name] = value
    return renamed
