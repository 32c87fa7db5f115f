"""RetinaNet: Focal Loss for Dense Object Detection (Lin et al., ICCV 2017, arXiv:1708.02002).

The focal loss (sec. 3) and the one-stage detector (sec. 4). Parameter names are torchvision's; `from_official` reads its
published COCO weights. What differs from the paper:

- `retinanet_resnet50_fpn` computes P6 from P5, as torchvision's checkpoint does; `retinanet_resnet101_fpn` from C5, as the
  paper (sec. 4, footnote 2).
- Smooth L1 has beta 1/9, as the released code; the paper gives no value. torchvision has plain L1 (`box_beta=0`).
- The losses are divided by the number of matched anchors of each image and averaged over images, as torchvision; the
  released code divides by the number in the images of one GPU (two).
- Anchors that overlap a box most are matched to it even below IoU 0.5, as both codes; the paper does not say so.
- The ResNet backbone strides on its 3x3 convolutions (see `classification/resnet`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from paperzoo.blocks.backbones import at_strides
from paperzoo.blocks.boxes import (
    IGNORED,
    AnchorGenerator,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    flatten_predictions,
    join_boxes,
    match_anchors,
)
from paperzoo.papers.classification.resnet.model import resnet50, resnet101
from paperzoo.papers.detection.fpn.model import BackboneWithFPN, LastLevelP6P7, TinyBody

# -- the focal loss (sec. 3) -----------------------------------------------------------------------------------------


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Eq. 5, for each element: -alpha_t (1 - p_t)^gamma log(p_t).

    Args:
        logits: any shape.
        targets: the same shape, 0 or 1 (or between).
        alpha: the weight of the positives, in [0, 1]; the negatives' is 1 - alpha.
        gamma: the focusing parameter; 0 leaves alpha-balanced cross-entropy.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must be between 0 and 1")
    if gamma < 0:
        raise ValueError(f"gamma is {gamma}; it must be 0 or more")
    p = logits.sigmoid()
    p_t = p * targets + (1 - p) * (1 - targets)  # eq. 2
    alpha_t = alpha * targets + (1 - alpha) * (1 - targets)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")  # -log(p_t), in a stable form
    return alpha_t * (1 - p_t) ** gamma * cross_entropy


def prior_bias(probability: float = 0.01) -> float:
    """The bias with which a sigmoid starts at this probability (sec. 3.3 and 4.1): -log((1 - pi) / pi)."""
    return -math.log((1 - probability) / probability)


class FocalLoss(nn.Module):
    """`sigmoid_focal_loss` summed over everything and divided by the number of positives (sec. 4.1)."""

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0) -> None:
        super().__init__()
        self.alpha, self.gamma = alpha, gamma

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return sigmoid_focal_loss(logits, targets, self.alpha, self.gamma).sum() / targets.sum().clamp(min=1)


# -- the subnets (sec. 4) --------------------------------------------------------------------------------------------


def tower(channels: int, depth: int = 4) -> nn.Sequential:
    """Four 3x3 convolutions with ReLU, shared across the levels."""
    return nn.Sequential(
        *(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True)) for _ in range(depth))
    )


def start(module: nn.Module, std: float = 0.01, bias: float = 0.0) -> None:
    """Sec. 4.1: normal weights of standard deviation 0.01, constant biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=std)
            nn.init.constant_(layer.bias, bias)


class ClassificationHead(nn.Module):
    """Levels (B, C, H_l, W_l) -> class logits (B, A, num_classes)."""

    def __init__(self, channels: int, num_anchors: int, num_classes: int, std: float = 0.01) -> None:
        super().__init__()
        self.conv = tower(channels)
        self.cls_logits = nn.Conv2d(channels, num_anchors * num_classes, 3, padding=1)
        self.num_classes = num_classes
        start(self.conv, std)
        start(self.cls_logits, bias=prior_bias())

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        return flatten_predictions([self.cls_logits(self.conv(level)) for level in levels], self.num_classes)


class RegressionHead(nn.Module):
    """Levels (B, C, H_l, W_l) -> class-agnostic box deltas (B, A, 4)."""

    def __init__(self, channels: int, num_anchors: int, std: float = 0.01) -> None:
        super().__init__()
        self.conv = tower(channels)
        self.bbox_reg = nn.Conv2d(channels, num_anchors * 4, 3, padding=1)
        start(self.conv, std)
        start(self.bbox_reg)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        return flatten_predictions([self.bbox_reg(self.conv(level)) for level in levels], 4)


class Heads(nn.Module):
    """The two subnets: the same design, separate parameters."""

    def __init__(self, channels: int, num_anchors: int, num_classes: int, std: float = 0.01) -> None:
        super().__init__()
        self.classification_head = ClassificationHead(channels, num_anchors, num_classes, std)
        self.regression_head = RegressionHead(channels, num_anchors, std)

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self.classification_head(levels), self.regression_head(levels)


# -- the detector ----------------------------------------------------------------------------------------------------


class RetinaNet(nn.Module):
    """Normalised images (B, 3, H, W) -> class logits (B, A, num_classes) and box deltas (B, A, 4); with targets, the losses.

    The contract of a detector is in `tasks/detection.py`.

    Args:
        backbone: images -> pyramid levels, with `out_channels`.
        anchors: the anchors of those levels.
        num_classes: columns of the logits; there is none for background.
        high, low: IoU from which an anchor is an object, below which it is background.
        alpha, gamma: of the focal loss.
        head_std: of the subnets' first weights.
        box_beta: where smooth L1 turns from square to linear; 0 is plain L1.
        score_threshold: detections below it are dropped.
        candidates: detections of each level that are decoded.
        nms_threshold: detections of one class that overlap more are one.
        detections: the most that an image can have.
    """

    def __init__(
        self,
        backbone: nn.Module,
        anchors: AnchorGenerator,
        num_classes: int,
        *,
        high: float = 0.5,
        low: float = 0.4,
        alpha: float = 0.25,
        gamma: float = 2.0,
        head_std: float = 0.01,
        box_beta: float = 1 / 9,
        score_threshold: float = 0.05,
        candidates: int = 1000,
        nms_threshold: float = 0.5,
        detections: int = 300,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be 1 or more")
        self.backbone, self.anchors, self.num_classes = backbone, anchors, num_classes
        self.head = Heads(backbone.out_channels, anchors.per_cell[0], num_classes, head_std)
        self.high, self.low, self.alpha, self.gamma, self.box_beta = high, low, alpha, gamma, box_beta
        self.score_threshold, self.candidates = score_threshold, candidates
        self.nms_threshold, self.detections = nms_threshold, detections

    def forward(
        self, images: Tensor, targets: Sequence[dict[str, Tensor]] | None = None
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        outputs = self.head(self.backbone(images))
        return outputs if targets is None else self.loss(outputs, targets, tuple(images.shape[-2:]))

    def loss(
        self, outputs: tuple[Tensor, Tensor], targets: Sequence[dict[str, Tensor]], canvas: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Focal loss over all anchors but the ignored ones, smooth L1 over the matched ones (sec. 4.1)."""
        logits, deltas = (output.float() for output in outputs)
        boxes, owner = join_boxes(targets)
        labels = torch.cat([t["labels"] for t in targets])
        anchors = self.anchors(*canvas, device=logits.device)
        matched = match_anchors(boxes, owner, len(targets), anchors, self.high, self.low)  # (B, A)
        image, anchor = (matched >= 0).nonzero(as_tuple=True)
        box = matched[image, anchor]
        share = 1 / (matched >= 0).sum(1).clamp(min=1) / len(targets)  # (B,)

        wanted = torch.zeros_like(logits)
        wanted[image, anchor, labels[box]] = 1.0
        by_anchor = sigmoid_focal_loss(logits, wanted, self.alpha, self.gamma).sum(-1)
        classification = (by_anchor * (matched != IGNORED) * share[:, None]).sum()

        distance = F.smooth_l1_loss(
            deltas[image, anchor], encode_boxes(boxes[box], anchors[anchor]), beta=self.box_beta, reduction="none"
        )
        return {"classification": classification, "boxes": (distance.sum(-1) * share[image]).sum()}

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer of the class subnet for another number of classes."""
        head, anchors = self.head.classification_head, self.anchors.per_cell[0]
        fresh = ClassificationHead(head.cls_logits.in_channels, anchors, num_classes).cls_logits
        head.cls_logits, head.num_classes, self.num_classes = fresh.to(head.cls_logits.weight), num_classes, num_classes

    def load_backbone(self, state_dict: dict[str, Tensor]) -> None:
        """Start from a classifier's weights."""
        self.backbone.load_body(state_dict)

    @torch.no_grad()
    def postprocess(
        self, outputs: tuple[Tensor, Tensor], sizes: Tensor, canvas: tuple[int, int]
    ) -> list[dict[str, Tensor]]:
        """Sec. 4.1, inference: the best 1000 of each level above 0.05, decoded, non-maximum suppression within each class.

        Args:
            outputs: of `forward`.
            sizes: (B, 2) height and width of each image inside the canvas.
            canvas: height and width of the batch's images.

        Returns:
            for each image boxes (N, 4) in pixels of the canvas, scores (N,), labels (N,); best first.
        """
        logits, deltas = (output.float() for output in outputs)
        anchors = self.anchors(*canvas, device=logits.device)
        best_logits, best_columns, first = [], [], 0
        for count in self.anchors.counts(*canvas):
            level = logits[:, first : first + count].flatten(1)
            best = level.topk(min(self.candidates, level.shape[1]), dim=1)
            best_logits.append(best.values)
            best_columns.append(best.indices + first * self.num_classes)
            first += count
        scores, columns = torch.cat(best_logits, 1).sigmoid(), torch.cat(best_columns, 1)  # (B, 5000)
        anchor, labels = columns // self.num_classes, columns % self.num_classes
        picked = deltas.gather(1, anchor[..., None].expand(-1, -1, 4))
        boxes = clip_boxes(decode_boxes(picked, anchors[anchor]), sizes)
        result = []
        for b, s, k in zip(boxes, scores, labels, strict=True):
            certain = s > self.score_threshold
            b, s, k = b[certain], s[certain], k[certain]
            keep = batched_nms(b, s, k, self.nms_threshold)[: self.detections]
            result.append({"boxes": b[keep], "scores": s[keep], "labels": k[keep]})
        return result


# -- variants --------------------------------------------------------------------------------------------------------

STRIDES = (8, 16, 32, 64, 128)  # P3 to P7


def pyramid_anchors() -> AnchorGenerator:
    """Sec. 4: areas from 32^2 on P3 to 512^2 on P7, at each level three sizes and three ratios; nine anchors a cell."""
    sizes = [32 * 2**level for level in range(5)]
    thirds = [
        (size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3))) for size in sizes
    ]  # whole pixels, as torchvision
    return AnchorGenerator(STRIDES, thirds)


def retinanet_resnet50_fpn(num_classes: int = 91, backbone: str | None = None, **options: float) -> RetinaNet:
    """ResNet-50-FPN, 34.0M parameters. 91 classes are COCO's category numbers, as torchvision's checkpoint has them.

    `options` as `RetinaNet`. `backbone`: another classifier by name, its maps of strides 8, 16 and 32.
    """
    body, taken = (resnet50(), (1, 2, 3)) if backbone is None else (at_strides(backbone, STRIDES[:3]), (0, 1, 2))
    pyramid = BackboneWithFPN(body, taken, 256, LastLevelP6P7(256, 256))
    return RetinaNet(pyramid, pyramid_anchors(), num_classes, **options)


def retinanet_resnet101_fpn(num_classes: int = 80, **options: float) -> RetinaNet:
    """ResNet-101-FPN, the paper's 39.1 AP network, with P6 from C5. `options` as `RetinaNet`."""
    backbone = BackboneWithFPN(resnet101(), (1, 2, 3), 256, LastLevelP6P7(2048, 256))
    return RetinaNet(backbone, pyramid_anchors(), num_classes, **options)


def retinanet_tiny_fpn(num_classes: int = 10, backbone: str | None = None, **options: float) -> RetinaNet:
    """The same detector in small, for objects of 30 pixels and more: a thin backbone, 64 channels, the same anchors.

    Its subnets start with He's weights, as it learns from nothing in some hundred steps: 0.01 is for fine-tuning.

    `options` as `RetinaNet`. `backbone`: another classifier by name, its maps of strides 8, 16 and 32.
    """
    body, taken = (TinyBody(), (1, 2, 3)) if backbone is None else (at_strides(backbone, STRIDES[:3]), (0, 1, 2))
    pyramid = BackboneWithFPN(body, taken, 64, LastLevelP6P7(64, 64))
    return RetinaNet(pyramid, pyramid_anchors(), num_classes, **{"head_std": math.sqrt(2 / (9 * 64))} | options)


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's published weights to these names and to our batch norm.

    The file of 2021 (36.4 AP) names a convolution `conv.0`, `conv.2`, …, and was trained with a frozen batch norm without
    epsilon. With nn.BatchNorm2d's epsilon the same scale follows from a variance that is smaller by that epsilon.
    """
    old = any(name.startswith("head.classification_head.conv.6.") for name in state_dict)
    renamed = {}
    for name, value in state_dict.items():
        value = torch.as_tensor(value)
        parts = name.split(".")
        if old and len(parts) == 5 and parts[2] == "conv":  # head.classification_head.conv.2.weight
            name = ".".join([*parts[:3], str(int(parts[3]) // 2), "0", parts[4]])
        elif old and parts[1] == "fpn" and parts[2].endswith("_blocks") and len(parts) == 5 and parts[3].isdigit():
            name = ".".join([*parts[:4], "0", parts[4]])  # backbone.fpn.inner_blocks.0.weight
        if old and name.endswith("running_var"):
            value = value - 1e-5
        renamed[name] = value
        if name.endswith("running_var"):
            renamed.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    return renamed
