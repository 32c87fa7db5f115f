"""RetinaFace: Single-Shot Multi-Level Face Localisation in the Wild (Deng et al., CVPR 2020, arXiv:1905.00641).

A pyramid on a classifier's stages, a context module on each level, and 1x1 convolutions that say for each anchor whether it is
a face, where the face's box is and where its five landmarks are (sec. 3, fig. 2).

Two families. `retinaface_resnet152` is the paper's: five levels, three anchors a cell, deformable convolutions.
`retinaface_resnet50` and `retinaface_mobilenet025` are those of the widely used PyTorch code (biubug6/Pytorch_Retinaface, and
facexlib after it), whose checkpoints load: three levels, two anchors a cell, heads of their own for each level, SSD's matching and
mining. Their parameter names are that code's; `from_official` renames the thin MobileNet's layers, which are
`classification/mobilenet_v1`'s here. What differs, or is not in the paper:

- The branch that decodes a dense 3D face and renders it (sec. 3.2) is left out, as in all public PyTorch code: it needs a mesh
  decoder trained on face scans that are not public. So is its loss, the fourth term of eq. 1.
- The released checkpoints learned from pictures in OpenCV's order. Networks take RGB here; those two turn it round themselves.
- The paper's losses are summed with weights 1, 0.25, 0.1 (eq. 1), the released code's with 1, 2, 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou, nms

from paperzoo.blocks.backbones import at_strides, headless, load_body
from paperzoo.blocks.boxes import (
    BACKGROUND,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    flatten_predictions,
    join_boxes,
    match_anchors,
)
from paperzoo.papers.classification.mobilenet_v1.model import DEPTHS, MobileNetV1
from paperzoo.papers.classification.resnet.model import resnet50, resnet152
from paperzoo.papers.detection.deformable_convnets.model import DeformableConv2d
from paperzoo.papers.detection.fpn.model import TinyBody
from paperzoo.papers.detection.ssd.model import VARIANCES, hard_negatives, match_default_boxes

POINTS = 5
LEAK = 0.1  # of thin networks' activations, in the released code
REACHABLE = 0.2  # a face that overlaps no anchor by as much is not learned from, in the released code
RELEASED = ((16, 32), (64, 128), (256, 512))
PAPER = tuple(
    tuple(size * 2 ** (k / 3) for k in range(3)) for size in (16, 32, 64, 128, 256)
)  # table 2: 16 to 406 pixels


# -- layers ----------------------------------------------------------------------------------------------------------


def conv_norm(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, leak: float | None = 0.0, deformable: bool = False
) -> nn.Sequential:
    """Convolution, batch norm, and a leaky ReLU of this slope; None for no activation."""
    if deformable:
        convolution: nn.Module = DeformableConv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    else:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    layers = [convolution, nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers) if leak is None else nn.Sequential(*layers, nn.LeakyReLU(leak, inplace=True))


class Pyramid(nn.Module):
    """The top-down pathway: unlike FPN's, with batch norm and activation, and each merged map goes on downwards.

    Features (B, in_channels[l], H_l, W_l), finest first -> as many maps of `channels`; with `extra` one more, half the size
    of the last feature.
    """

    def __init__(
        self, in_channels: Sequence[int], channels: int, leak: float, deformable: bool = False, extra: bool = False
    ) -> None:
        super().__init__()
        self.count = len(in_channels)
        for k, inputs in enumerate(in_channels, 1):
            self.add_module(f"output{k}", conv_norm(inputs, channels, 1, leak=leak))
        for k in range(1, self.count):
            self.add_module(f"merge{k}", conv_norm(channels, channels, leak=leak, deformable=deformable))
        self.extra = conv_norm(in_channels[-1], channels, stride=2, leak=leak) if extra else None  # P6, on C5

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        maps = [getattr(self, f"output{k}")(x) for k, x in enumerate(features, 1)]
        for k in reversed(range(self.count - 1)):
            above = F.interpolate(maps[k + 1], size=maps[k].shape[-2:], mode="nearest")
            maps[k] = getattr(self, f"merge{k + 1}")(maps[k] + above)
        return maps if self.extra is None else [*maps, self.extra(features[-1])]


class ContextModule(nn.Module):
    """SSH's: what a 3x3, a 5x5 and a 7x7 field of view see, the larger two as chains of 3x3 (sec. 3.3). Keeps the channels."""

    def __init__(self, channels: int, leak: float, deformable: bool = False) -> None:
        super().__init__()
        if channels % 4:
            raise ValueError(f"channels is {channels}; it must be a multiple of 4")
        make, part = partial(conv_norm, deformable=deformable), channels // 4
        self.conv3X3 = make(channels, channels // 2, leak=None)
        self.conv5X5_1 = make(channels, part, leak=leak)
        self.conv5X5_2 = make(part, part, leak=None)
        self.conv7X7_2 = make(part, part, leak=leak)
        self.conv7x7_3 = make(part, part, leak=None)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.conv5X5_1(x)
        return F.relu(
            torch.cat([self.conv3X3(x), self.conv5X5_2(shared), self.conv7x7_3(self.conv7X7_2(shared))], dim=1)
        )


class Head(nn.Module):
    """A 1x1 convolution: `columns` numbers for each anchor of a cell."""

    def __init__(self, channels: int, anchors: int, columns: int) -> None:
        super().__init__()
        self.conv1x1 = nn.Conv2d(channels, anchors * columns, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1x1(x)


class SquareAnchors:
    """Squares around the middle of every cell of every level (sec. 4.2). Holds no state.

    Args:
        strides: of the levels.
        sizes: for each level the sides of its squares, in pixels.
    """

    def __init__(self, strides: Sequence[int], sizes: Sequence[Sequence[float]]) -> None:
        if len(strides) != len(sizes) or len({len(level) for level in sizes}) != 1:
            raise ValueError("sizes has one entry for each stride, all of the same length")
        self.strides, self.sizes, self.per_cell = tuple(strides), tuple(map(tuple, sizes)), len(sizes[0])
        self._kept: dict[tuple, Tensor] = {}

    def __call__(self, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
        """All anchors (A, 4) in pixels: level by level, row by row, cell by cell, size by size."""
        key = (height, width, str(device))
        if key not in self._kept:
            if len(self._kept) >= 32:
                self._kept.clear()
            self._kept[key] = torch.cat(
                [self._level(height, width, s, sizes) for s, sizes in zip(self.strides, self.sizes, strict=True)]
            ).to(device)
        return self._kept[key]

    @staticmethod
    def _level(height: int, width: int, stride: int, sizes: Sequence[float]) -> Tensor:
        y, x = ((torch.arange(-(-side // stride)) + 0.5) * stride for side in (height, width))
        centre = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 1, 2)
        half = torch.tensor(sizes, dtype=torch.float32)[None, :, None] / 2
        return torch.cat([centre - half, centre + half], dim=-1).reshape(-1, 4)


# -- landmarks and matching ------------------------------------------------------------------------------------------


def encode_points(points: Tensor, anchors: Tensor) -> Tensor:
    """Landmarks (N, 5, 2) relative to anchors (N, 4), in tenths of their sides: (N, 10)."""
    centre, side = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    return ((points - centre[:, None]) / side[:, None] * VARIANCES[0]).flatten(1)


def decode_points(offsets: Tensor, anchors: Tensor) -> Tensor:
    """The inverse of `encode_points`."""
    centre, side = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    return centre[:, None] + offsets.unflatten(1, (POINTS, 2)) / VARIANCES[0] * side[:, None]


def match_released(boxes: Tensor, owner: Tensor, images: int, anchors: Tensor, threshold: float) -> Tensor:
    """As SSD matches; but a face that overlaps no anchor by 0.2 is not learned from.

    Arguments and result as `blocks.boxes.match_anchors`: int64 (images, A), a row of `boxes` or BACKGROUND. The released
    code lets such a face take its anchor from another face that had it; here that one keeps it.
    """
    if not len(boxes):
        return torch.full((images, len(anchors)), BACKGROUND, device=anchors.device)
    reachable = (box_iou(boxes, anchors).amax(1) >= REACHABLE).nonzero()[:, 0]
    matched = match_default_boxes(boxes[reachable], owner[reachable], images, anchors, threshold)
    if not len(reachable):
        return matched
    return torch.where(matched >= 0, reachable[matched.clamp(min=0)], matched)


# -- the detector ----------------------------------------------------------------------------------------------------


class RetinaFace(nn.Module):
    """Normalised RGB images (B, 3, H, W) -> logits (B, A, 2), box offsets (B, A, 4), landmark offsets (B, A, 10); with
    targets, the losses. The contract of a face detector is in `tasks/face_detection.py`.

    Args:
        body: has `stages(x)` and `stage_channels`; a classifier's head is dropped.
        stages: which of its stages the pyramid stands on, counted from 0.
        anchors: of all levels.
        channels: of the pyramid.
        extra: one more level, half the size of the last stage.
        deformable: the pyramid's and the context modules' 3x3 convolutions.
        shared: one head for all levels; else one for each.
        high, low: IoU from which an anchor is a face, and below which it is background. Equal: SSD's matching.
        negatives: background anchors that are learned from, for each face's.
        weights: of the classification's, the boxes' and the landmarks' loss.
        bgr: the colours are turned round first.
        score_threshold, candidates, nms_threshold, detections: of `postprocess`.
    """

    num_classes = 1

    def __init__(
        self,
        body: nn.Module,
        stages: Sequence[int],
        anchors: SquareAnchors,
        channels: int,
        *,
        extra: bool = False,
        deformable: bool = False,
        shared: bool = False,
        high: float = 0.35,
        low: float = 0.35,
        negatives: float = 7.0,
        weights: tuple[float, float, float] = (1.0, 2.0, 1.0),
        bgr: bool = False,
        score_threshold: float = 0.02,
        candidates: int = 5000,
        nms_threshold: float = 0.4,
        detections: int = 750,
    ) -> None:
        super().__init__()
        self.body, self.taken, self.anchors = headless(body), tuple(stages), anchors
        levels, leak = len(anchors.strides), LEAK if channels <= 64 else 0.0
        if levels != len(self.taken) + extra:
            raise ValueError(f"anchors are of {levels} levels, and there are {len(self.taken) + extra}")
        self.fpn = Pyramid([body.stage_channels[i] for i in stages], channels, leak, deformable, extra)
        for k in range(1, levels + 1):
            self.add_module(f"ssh{k}", ContextModule(channels, leak, deformable))
        heads = lambda columns: nn.ModuleList(  # noqa: E731
            Head(channels, anchors.per_cell, columns) for _ in range(1 if shared else levels)
        )
        self.ClassHead, self.BboxHead, self.LandmarkHead = heads(2), heads(4), heads(2 * POINTS)
        self.high, self.low, self.negatives, self.weights, self.bgr = high, low, negatives, weights, bgr
        self.score_threshold, self.candidates = score_threshold, candidates
        self.nms_threshold, self.detections = nms_threshold, detections

    def forward(
        self, images: Tensor, targets: Sequence[dict[str, Tensor]] | None = None
    ) -> tuple[Tensor, Tensor, Tensor] | dict[str, Tensor]:
        features = self.body.stages(images.flip(1) if self.bgr else images)
        maps = self.fpn([features[i] for i in self.taken])
        maps = [getattr(self, f"ssh{k}")(x) for k, x in enumerate(maps, 1)]
        outputs = tuple(
            flatten_predictions([heads[k % len(heads)](x) for k, x in enumerate(maps)], columns)
            for heads, columns in ((self.ClassHead, 2), (self.BboxHead, 4), (self.LandmarkHead, 2 * POINTS))
        )
        return outputs if targets is None else self.loss(outputs, targets, tuple(images.shape[-2:]))

    def loss(
        self, outputs: tuple[Tensor, Tensor, Tensor], targets: Sequence[dict[str, Tensor]], canvas: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Eq. 1 without its last term: softmax loss over the faces' and the mined anchors, smooth L1 over the faces', for
        landmarks over those of faces that have any. Divided by the number of anchors that are faces' (with landmarks)."""
        logits, offsets, marks = (output.float() for output in outputs)
        anchors = self.anchors(*canvas, logits.device)
        boxes, owner = join_boxes(targets)
        if self.high == self.low:
            matched = match_released(boxes, owner, len(targets), anchors, self.high)
        else:
            matched = match_anchors(boxes, owner, len(targets), anchors, self.high, self.low)
        positive = matched >= 0
        image, anchor = positive.nonzero(as_tuple=True)
        face, count = matched[image, anchor], positive.sum().clamp(min=1)

        entropy = F.cross_entropy(logits.flatten(0, 1), positive.long().flatten(), reduction="none").view_as(matched)
        usable = positive | (matched == BACKGROUND)
        mined = hard_negatives(entropy.masked_fill(~usable, -1.0), positive, self.negatives) & usable
        goal = encode_boxes(boxes[face], anchors[anchor], VARIANCES)
        located = F.smooth_l1_loss(offsets[image, anchor], goal, reduction="sum")

        marked = torch.cat([t["has_landmarks"] for t in targets])[face]
        points = torch.cat([t["landmarks"] for t in targets])[face[marked]]
        goal = encode_points(points, anchors[anchor[marked]])
        placed = F.smooth_l1_loss(marks[image[marked], anchor[marked]], goal, reduction="sum")
        return {
            "classification": self.weights[0] * (entropy * (positive | mined)).sum() / count,
            "boxes": self.weights[1] * located / count,
            "landmarks": self.weights[2] * placed / marked.sum().clamp(min=1),
        }

    @torch.no_grad()
    def postprocess(
        self, outputs: tuple[Tensor, Tensor, Tensor], sizes: Tensor, canvas: tuple[int, int]
    ) -> list[dict[str, Tensor]]:
        """Above 0.02, the best 5000, non-maximum suppression at 0.4, the best 750 of an image: as the released code.

        Args:
            outputs: of `forward`.
            sizes: (B, 2) height and width of each image inside the canvas.
            canvas: height and width.
        """
        logits, offsets, marks = (output.float() for output in outputs)
        anchors = self.anchors(*canvas, logits.device)
        scores, results = logits.softmax(2)[..., 1], []
        for i in range(len(scores)):
            rows = (scores[i] > self.score_threshold).nonzero()[:, 0]
            rows = rows[scores[i, rows].argsort(descending=True)[: self.candidates]]
            boxes = decode_boxes(offsets[i, rows], anchors[rows], VARIANCES)
            kept = nms(boxes, scores[i, rows], self.nms_threshold)[: self.detections]
            boxes = clip_boxes(boxes[None, kept], sizes[i : i + 1])[0]
            rows = rows[kept]
            results.append(
                {
                    "boxes": boxes,
                    "scores": scores[i, rows],
                    "landmarks": decode_points(marks[i, rows], anchors[rows]),
                    "labels": torch.zeros_like(rows),
                }
            )
        return results

    def load_backbone(self, state_dict: dict[str, Tensor]) -> None:
        """Start from a classifier's weights, which learned from RGB pictures."""
        load = getattr(self.body, "load_body", partial(load_body, self.body))
        load(state_dict)
        if self.bgr:
            first = next(m for m in self.body.modules() if isinstance(m, nn.Conv2d))
            with torch.no_grad():
                first.weight.copy_(first.weight.flip(1))


# -- variants --------------------------------------------------------------------------------------------------------


def retinaface_resnet50(num_classes: int = 1, backbone: str | None = None) -> RetinaFace:
    """The released code's on ResNet-50; or on any classifier with stages of strides 8, 16 and 32, by its name."""
    only_faces(num_classes)
    anchors = SquareAnchors((8, 16, 32), RELEASED)
    if backbone is not None:
        return RetinaFace(at_strides(backbone, (8, 16, 32)), (0, 1, 2), anchors, 256)
    return RetinaFace(resnet50(), (1, 2, 3), anchors, 256, bgr=True)


def retinaface_mobilenet025(num_classes: int = 1) -> RetinaFace:
    """The released code's on a MobileNet of a quarter of the width, 0.4M parameters."""
    only_faces(num_classes)
    body = MobileNetV1(0.25, activation=partial(nn.LeakyReLU, LEAK))
    return RetinaFace(body, (2, 3, 4), SquareAnchors((8, 16, 32), RELEASED), 64, bgr=True)


def retinaface_resnet152(num_classes: int = 1) -> RetinaFace:
    """The paper's (sec. 4.2): P2 to P6 of ResNet-152, three anchors a cell, deformable convolutions, a shared head."""
    only_faces(num_classes)
    return RetinaFace(
        resnet152(),
        (0, 1, 2, 3),
        SquareAnchors((4, 8, 16, 32, 64), PAPER),
        256,
        extra=True,
        deformable=True,
        shared=True,
        high=0.5,
        low=0.3,
        negatives=3.0,
        weights=(1.0, 0.25, 0.1),
    )


def retinaface_tiny(num_classes: int = 1) -> RetinaFace:
    """The released code's in small, for pictures of about 128 pixels: anchors of 12 to 72 pixels. Not in the paper."""
    only_faces(num_classes)
    return RetinaFace(TinyBody(), (1, 2, 3), SquareAnchors((8, 16, 32), ((12, 18), (26, 36), (50, 72))), 48)


def only_faces(num_classes: int) -> None:
    if num_classes != 1:
        raise ValueError(f"num_classes is {num_classes}; RetinaFace knows one class, a face")


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoints of the released code and of facexlib to these names.

    `module.` prefixes and the classifier's last layer go; the MobileNet's stage1.3.0 is blocks.2.0.conv_dw, and so on.
    """
    place = [(stage, block) for stage, depth in enumerate(DEPTHS) for block in range(depth)]
    first = {"stage1": -1, "stage2": 5, "stage3": 11}  # the number of a stage's first layer among the 13 blocks
    renamed = {}
    for name, value in state_dict.items():
        name = name.removeprefix("module.")
        parts = name.split(".")
        if parts[:2] == ["body", "fc"]:
            continue
        if parts[0] == "body" and parts[1] in first:
            number, layer = first[parts[1]] + int(parts[2]), int(parts[3])
            if number < 0:
                place_name = ("conv_stem", "bn1")[layer]
            else:
                stage, block = place[number]
                place_name = f"blocks.{stage}.{block}.{ {0: 'conv_dw', 1: 'bn1', 3: 'conv_pw', 4: 'bn2'}[layer] }"
            name = f"body.{place_name}.{parts[4]}"
        renamed[name] = value
    return renamed
