"""YOLACT: Real-time Instance Segmentation (Bolya et al., ICCV 2019, arXiv:1904.02689).

Prototype masks of the whole image, coefficients of each object that combine them (sec. 3), and fast NMS (sec. 5). Parameter names are
those of the released code but for the backbone, which `from_official` renames. What differs from the paper, or where it is silent:

- Anchors are squares: the released code takes a ratio's width for the height as well, "for backward compatibility with a bug",
  and its weights were trained so. `square_anchors=False` gives the ratios of sec. 4.
- An anchor with an IoU of 0.4 to 0.5 is left out of the loss, and each object has its best anchor, as in the released code.
- The mask loss looks inside of the true box, enlarged by one cell of the prototypes, as the released code; there, what of the
  mask lies further outside is a constant without a gradient.
- Crowds are not learned from at all; the released code leaves out anchors that lie in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from paperzoo.blocks.backbones import Backbone, at_strides
from paperzoo.blocks.boxes import (
    BACKGROUND,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    flatten_predictions,
    join_boxes,
    match_anchors,
)
from paperzoo.papers.detection.fpn.model import TinyBody
from paperzoo.papers.detection.ssd.model import VARIANCES, hard_negatives, xavier

STRIDES = (8, 16, 32, 64, 128)  # P3 to P7
RATIOS = (1.0, 0.5, 2.0)
MOST_MASKS = 100  # of an image that are learned from in one step

# -- networks (sec. 3.1, 3.2, 4) ---------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """P3 to P7 (sec. 4): features C3, C4, C5 -> five levels (B, channels, H_l, W_l), finest first.

    Unlike FPN's: bilinear upsampling, a ReLU on P3 to P5, and P6 and P7 by strided convolutions on P5. Its layers count from
    the coarsest, as the released names do.
    """

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lat_layers = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in reversed(in_channels))
        self.pred_layers = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        self.downsample_layers = nn.ModuleList(nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(2))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        levels: list[Tensor] = []
        merged: Tensor | None = None
        for lateral, smooth, feature in zip(self.lat_layers, self.pred_layers, reversed(features), strict=True):
            level = lateral(feature)
            if merged is not None:
                level = level + F.interpolate(merged, size=level.shape[-2:], mode="bilinear")
            merged = level
            levels.insert(0, F.relu(smooth(level)))
        for layer in self.downsample_layers:
            levels.append(layer(levels[-1]))
        return levels


class Upsample(nn.Module):
    """Twofold, bilinear."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear")


def protonet(channels: int, prototypes: int) -> nn.Sequential:
    """Fig. 3: P3 (B, channels, h, w) -> prototypes before their ReLU (B, prototypes, 2 h, 2 w)."""
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True)]
    layers += [Upsample(), nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(channels, prototypes, 1))


class PredictionModule(nn.Module):
    """Fig. 4: a 3x3 convolution and three parallel layers, shared by all levels.

    Levels -> class logits (B, A, num_classes + 1), background first; box deltas (B, A, 4); coefficients (B, A, k) in -1 … 1.
    """

    def __init__(self, channels: int, per_cell: int, num_classes: int, prototypes: int) -> None:
        super().__init__()
        self.upfeature = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True))
        self.bbox_layer = nn.Conv2d(channels, per_cell * 4, 3, padding=1)
        self.conf_layer = nn.Conv2d(channels, per_cell * (num_classes + 1), 3, padding=1)
        self.mask_layer = nn.Conv2d(channels, per_cell * prototypes, 3, padding=1)
        self.num_classes, self.prototypes, self.per_cell = num_classes, prototypes, per_cell

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        hidden = [self.upfeature(level) for level in levels]
        logits = flatten_predictions([self.conf_layer(h) for h in hidden], self.num_classes + 1)
        deltas = flatten_predictions([self.bbox_layer(h) for h in hidden], 4)
        coefficients = flatten_predictions([self.mask_layer(h) for h in hidden], self.prototypes)
        return logits, deltas, coefficients.tanh()  # tanh, as subtracting prototypes must be possible


# -- masks and boxes (sec. 3.3, 5) -------------------------------------------------------------------------------------


def assemble(prototypes: Tensor, coefficients: Tensor) -> Tensor:
    """M = P C^T, before the sigmoid (eq. 1): prototypes (k, h, w), coefficients (N, k) -> (N, h, w)."""
    return (coefficients @ prototypes.flatten(1)).unflatten(1, prototypes.shape[1:])


def inside(boxes: Tensor, canvas: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """Which cells lie in a box that is enlarged by one of them: boxes (N, 4) in pixels of the canvas -> bool (N, h, w)."""
    (height, width), (rows, columns) = canvas, cells
    box = boxes * boxes.new_tensor([columns / width, rows / height] * 2)
    x1, y1 = (box[:, i, None].clamp(min=0) - 1 for i in (0, 1))
    x2, y2 = box[:, 2, None] + 1, box[:, 3, None] + 1
    x, y = torch.arange(columns, device=boxes.device), torch.arange(rows, device=boxes.device)
    return ((y >= y1) & (y < y2))[:, :, None] & ((x >= x1) & (x < x2))[:, None, :]


def fast_nms(scores: Tensor, boxes: Tensor, threshold: float, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sec. 5: non-maximum suppression of each class in which boxes that are suppressed suppress others, too; hence parallel.

    Args:
        scores: (K, N), of each class. boxes: (N, 4).
        most: boxes of each class that are looked at.

    Returns:
        scores (M,), classes int64 (M,), rows of `boxes` int64 (M,), in no order.
    """
    best = scores.topk(min(most, scores.shape[1]), dim=1)
    chosen = boxes[best.indices]  # (K, n, 4), best first
    corner = torch.maximum(chosen[:, :, None, :2], chosen[:, None, :, :2])
    end = torch.minimum(chosen[:, :, None, 2:], chosen[:, None, :, 2:])
    shared = (end - corner).clamp(min=0).prod(-1)
    area = (chosen[..., 2:] - chosen[..., :2]).prod(-1)
    overlap = shared / (area[:, :, None] + area[:, None, :] - shared).clamp(min=1e-9)
    kept = overlap.triu(diagonal=1).amax(1) <= threshold  # eq. 2, 3: the most of any better box
    label = torch.arange(len(scores), device=scores.device)[:, None].expand_as(kept)
    return best.values[kept], label[kept], best.indices[kept]


def match(boxes: Tensor, owner: Tensor, images: int, anchors: Tensor, high: float, low: float) -> Tensor:
    """As `blocks.boxes.match_anchors`, and of each object its best anchor, whatever else that overlaps."""
    matched = match_anchors(boxes, owner, images, anchors, high, low, keep_best=False)
    if not len(boxes):
        return matched
    place = owner * len(anchors) + box_iou(boxes, anchors).argmax(1)
    rows = torch.arange(len(boxes), device=boxes.device)
    best = torch.full_like(matched, BACKGROUND).flatten().scatter_reduce(0, place, rows, "amax").view_as(matched)
    return torch.where(best >= 0, best, matched)


# -- the network -------------------------------------------------------------------------------------------------------


class Yolact(nn.Module):
    """Images (B, 3, H, W) -> class logits (B, A, num_classes + 1), box deltas (B, A, 4), coefficients (B, A, k), prototypes
    (B, k, h, w) at about a quarter of the size; with targets, the losses.

    The contract is in `tasks/instance_segmentation.py`. Images are squares in the paper (`resize="square"`, `multiple=1`).

    Args:
        backbone: maps of strides 8, 16 and 32, with `out_channels`.
        num_classes: without background.
        channels: of the pyramid. prototypes: k.
        scales: the anchors' sides in pixels, one for each level.
        square_anchors: see the module's docstring.
        high, low: IoU from which an anchor is an object, below which it is background.
        negatives: for each positive anchor of an image, so many of its background ones are learned from.
        box_weight, mask_weight, semantic_weight: of the losses (sec. 3.3; the semantic one of sec. 5).
        score_threshold, candidates, nms_threshold, detections: of `postprocess`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        channels: int = 256,
        prototypes: int = 32,
        *,
        scales: Sequence[float] = (24, 48, 96, 192, 384),
        square_anchors: bool = True,
        high: float = 0.5,
        low: float = 0.4,
        negatives: float = 3.0,
        box_weight: float = 1.5,
        mask_weight: float = 6.125,
        semantic_weight: float = 1.0,
        score_threshold: float = 0.05,
        candidates: int = 200,
        nms_threshold: float = 0.5,
        detections: int = 100,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be 1 or more")
        self.backbone, self.num_classes = backbone, num_classes
        self.fpn = Pyramid(backbone.out_channels, channels)
        self.proto_net = protonet(channels, prototypes)
        # one module for all levels; in a list, because the released names say so
        self.prediction_layers = nn.ModuleList([PredictionModule(channels, len(RATIOS), num_classes, prototypes)])
        self.semantic_seg_conv = nn.Conv2d(channels, num_classes, 1)
        for part in (self.fpn, self.proto_net, self.prediction_layers, self.semantic_seg_conv):
            xavier(part)
        self.scales, self.square_anchors = tuple(scales), square_anchors
        self.high, self.low, self.negatives = high, low, negatives
        self.box_weight, self.mask_weight, self.semantic_weight = box_weight, mask_weight, semantic_weight
        self.score_threshold, self.candidates = score_threshold, candidates
        self.nms_threshold, self.detections = nms_threshold, detections
        self._kept: dict[tuple, Tensor] = {}

    def anchors(self, canvas: tuple[int, int], device: torch.device | str) -> Tensor:
        """All anchors (A, 4) in pixels, level by level, row by row, ratio by ratio."""
        key = (*canvas, str(device))
        if key not in self._kept:
            (height, width), levels = canvas, []
            for stride, scale in zip(STRIDES, self.scales, strict=True):
                rows, columns = -(-height // stride), -(-width // stride)
                y, x = (torch.arange(n, device="cpu") + 0.5 for n in (rows, columns))
                y, x = torch.meshgrid(y * (height / rows), x * (width / columns), indexing="ij")
                half = [(r**0.5, r**0.5 if self.square_anchors else r**-0.5) for r in RATIOS]
                half = torch.tensor(half, dtype=torch.float32, device="cpu") * scale / 2
                centre = torch.stack([x, y], dim=-1).reshape(-1, 1, 2)
                levels.append(torch.cat([centre - half, centre + half], dim=-1).reshape(-1, 4))
            if len(self._kept) >= 32:
                self._kept.clear()
            self._kept[key] = torch.cat(levels).to(device)
        return self._kept[key]

    def forward(
        self, images: Tensor, targets: Sequence[dict[str, Tensor]] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | dict[str, Tensor]:
        levels = self.fpn(self.backbone(images))
        prototypes = F.relu(self.proto_net(levels[0]))
        outputs = (*self.prediction_layers[0](levels), prototypes)
        if targets is None:
            return outputs
        return self.loss(outputs, self.semantic_seg_conv(levels[0]), targets, tuple(images.shape[-2:]))

    # -- learning ------------------------------------------------------------------------------------------------

    def loss(
        self,
        outputs: tuple[Tensor, Tensor, Tensor, Tensor],
        semantic: Tensor,
        targets: Sequence[dict[str, Tensor]],
        canvas: tuple[int, int],
    ) -> dict[str, Tensor]:
        """Sec. 3.3: softmax with hard negatives, smooth L1, binary cross-entropy of masks, each divided by the number of positive
        anchors of the batch; and the semantic loss of sec. 5.

        Args:
            outputs, semantic: the network's, and the logits (B, num_classes, h', w') on P3.
            targets: for each image boxes (N, 4), labels (N,), masks bool (N, H, W).
        """
        logits, deltas, coefficients, prototypes = (x.float() for x in outputs)
        boxes, owner = join_boxes(targets)
        labels, masks = (torch.cat([t[key] for t in targets]) for key in ("labels", "masks"))
        anchors = self.anchors(canvas, logits.device)
        matched = match(boxes, owner, len(targets), anchors, self.high, self.low)  # (B, A)
        positive = matched >= 0
        image, anchor = positive.nonzero(as_tuple=True)
        row, count = matched[image, anchor], positive.sum().clamp(min=1)

        wanted = torch.zeros_like(matched)
        wanted[image, anchor] = labels[row] + 1
        confidence = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
        usable = positive | (matched == BACKGROUND)
        mined = hard_negatives(confidence.masked_fill(~usable, -math.inf), positive, self.negatives)
        classification = (confidence * (positive | (mined & usable))).sum() / count

        goal = encode_boxes(boxes[row], anchors[anchor], VARIANCES)
        location = F.smooth_l1_loss(deltas[image, anchor], goal, reduction="sum") / count

        cells = tuple(prototypes.shape[-2:])
        small = shrunk(masks, cells)
        chosen, share = self.some(positive, image, anchor)
        image, anchor, row = image[chosen], anchor[chosen], row[chosen]
        pixel = self.mask_losses(
            prototypes, coefficients[image, anchor], image, small[row], inside(boxes[row], canvas, cells)
        )
        extent = (boxes[row, 2:] - boxes[row, :2]) * boxes.new_tensor([cells[1] / canvas[1], cells[0] / canvas[0]])
        mask = (
            pixel / extent.prod(1) * share
        ).sum() / count  # "divide … by the ground truth bounding box area" (sec. 3.3)
        return {
            "classification": classification,
            "boxes": self.box_weight * location,
            "masks": self.mask_weight * mask,
            "semantic": self.semantic_weight * semantic_loss(semantic.float(), masks, labels, owner),
        }

    def some(self, positive: Tensor, image: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """At most `MOST_MASKS` positive anchors of each image, at random: rows of `image`, and what each counts for."""
        noise = torch.where(positive, torch.rand(positive.shape, device=positive.device), -1.0)
        border = noise.topk(min(MOST_MASKS, positive.shape[1]), dim=1).values[:, -1]
        chosen = (noise[image, anchor] >= border[image]).nonzero()[:, 0]
        count = positive.sum(1)
        return chosen, (count / count.clamp(min=1, max=MOST_MASKS))[image[chosen]]

    @staticmethod
    def mask_losses(prototypes: Tensor, coefficients: Tensor, image: Tensor, wanted: Tensor, where: Tensor) -> Tensor:
        """Binary cross-entropy of each mask, summed over the cells `where` it is looked at: (P,).

        Args:
            prototypes: (B, k, h, w). coefficients: (P, k). image: int64 (P,), sorted. wanted, where: (P, h, w).
        """
        counts = torch.bincount(image, minlength=len(prototypes)).tolist()
        # one product an image: to repeat the prototypes for every object would cost k times the masks' memory
        logits = torch.cat([assemble(p, c) for p, c in zip(prototypes, coefficients.split(counts), strict=True)])
        losses = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        return (losses * where).sum((1, 2))

    # -- use -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def postprocess(
        self, outputs: tuple[Tensor, Tensor, Tensor, Tensor], sizes: Tensor, canvas: tuple[int, int]
    ) -> list[dict[str, Tensor]]:
        """Sec. 3.3, 5: anchors of which any class has more than 0.05, fast NMS at 0.5, the best 100 of all classes; their masks
        are cut by their boxes and cover the canvas.

        The detections that are kept may have lower scores than 0.05, "as there is such a minimal amount of computation per
        detection" (released code).
        """
        logits, deltas, coefficients, prototypes = (x.float() for x in outputs)
        boxes = clip_boxes(decode_boxes(deltas, self.anchors(canvas, logits.device), VARIANCES), sizes)
        scores = logits.softmax(-1)[..., 1:].transpose(1, 2)  # (B, K, A)
        cells, result = tuple(prototypes.shape[-2:]), []
        for s, b, c, p in zip(scores, boxes, coefficients, prototypes, strict=True):
            certain = (s.amax(0) > self.score_threshold).nonzero()[:, 0]
            score, label, row = fast_nms(s[:, certain], b[certain], self.nms_threshold, self.candidates)
            score, order = score.topk(min(self.detections, len(score)))
            box, coefficient = b[certain[row[order]]], c[certain[row[order]]]
            masks = assemble(p, coefficient).sigmoid() * inside(box, canvas, cells)
            result.append({"boxes": box, "scores": score, "labels": label[order], "masks": masks})
        return result

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh class layers for another number of classes."""
        head, old = self.prediction_layers[0], self.semantic_seg_conv
        conf = nn.Conv2d(head.conf_layer.in_channels, head.per_cell * (num_classes + 1), 3, padding=1)
        semantic = nn.Conv2d(old.in_channels, num_classes, 1)
        xavier(nn.ModuleList([conf, semantic]))
        head.conf_layer, self.semantic_seg_conv = conf.to(old.weight), semantic.to(old.weight)
        head.num_classes = self.num_classes = num_classes

    def load_backbone(self, state_dict: dict[str, Tensor]) -> None:
        """Start from a classifier's weights."""
        self.backbone.load_body(state_dict)


def shrunk(masks: Tensor, cells: tuple[int, int]) -> Tensor:
    """True masks at the prototypes' size: bool (T, H, W) -> float (T, h, w) of 0 and 1."""
    if not len(masks):
        return torch.zeros(0, *cells, device=masks.device)
    return (F.interpolate(masks[:, None].float(), cells, mode="bilinear")[:, 0] > 0.5).float()


def semantic_loss(logits: Tensor, masks: Tensor, labels: Tensor, owner: Tensor) -> Tensor:
    """Sec. 5: binary cross-entropy of every class at every cell, summed over classes, averaged over cells and images.

    Args:
        logits: (B, K, h, w). masks: bool (T, H, W). labels, owner: int64 (T,), class and image of each.
    """
    images, classes, height, width = logits.shape
    wanted = logits.new_zeros(images * classes, height, width)
    small = shrunk(masks, (height, width)).to(logits.dtype)
    place = (owner * classes + labels)[:, None, None].expand_as(small)
    wanted = wanted.scatter_reduce(0, place, small, "amax").view_as(logits)
    total = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
    return total / (height * width * images)


# -- variants ----------------------------------------------------------------------------------------------------------


def yolact_resnet101(num_classes: int = 80, backbone: str = "resnet101", **options: float) -> Yolact:
    """YOLACT-550 on ResNet-101, the paper's 29.8 mask AP. `options` as `Yolact`.

    `backbone`: another classifier by name, its maps of strides 8, 16 and 32.
    """
    return Yolact(at_strides(backbone, STRIDES[:3]), num_classes, **options)


def yolact_resnet50(num_classes: int = 80, **options: float) -> Yolact:
    """On ResNet-50: 28.2 mask AP. `options` as `Yolact`."""
    return yolact_resnet101(num_classes, "resnet50", **options)


def yolact_darknet53(num_classes: int = 80, **options: float) -> Yolact:
    """On Darknet-53, whose images are in [0, 1]: 28.7 mask AP. `options` as `Yolact`."""
    return yolact_resnet101(num_classes, "darknet53", **options)


def yolact_tiny(num_classes: int = 6, backbone: str | None = None, **options: float) -> Yolact:
    """The same in small, for objects of 20 to 60 pixels: thin pyramid of 48 channels, 16 prototypes. `options` as `Yolact`.

    `backbone`: another classifier by name, its maps of strides 8, 16 and 32.
    """
    body = Backbone(TinyBody((32, 48, 64, 96)), (1, 2, 3)) if backbone is None else at_strides(backbone, STRIDES[:3])
    return Yolact(body, num_classes, 48, 16, **{"scales": (24, 34, 48, 60, 80), "detections": 20} | options)


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released weights (`yolact_base_54_800000.pth` and others) to these names: the backbone's are another's."""
    renamed = {}
    for name, value in state_dict.items():
        parts = name.split(".")
        if parts[0] == "backbone" and parts[1].startswith("layer") and parts[1] != "layers":
            continue  # of version 1.0: the same tensors a second time
        if parts[:2] == ["fpn", "downsample_layers"] and int(parts[2]) > 1:
            continue  # of version 1.0: never used
        if parts[0] == "backbone" and parts[1] != "body":
            name = f"backbone.body.{backbone_name(parts[1:], darknet='backbone._preconv.0.weight' in state_dict)}"
        renamed[name] = value
    return renamed


def backbone_name(parts: Sequence[str], darknet: bool) -> str:
    """`layers.0.2.conv1.weight` as `classification/resnet` or `detection/yolov3` calls it."""
    if not darknet:
        return ".".join([f"layer{int(parts[1]) + 1}", *parts[2:]] if parts[0] == "layers" else parts)
    kind = {"0": "conv", "1": "bn"}[parts[-2]]
    if parts[0] == "_preconv":
        return f"conv1.{kind}.{parts[-1]}"
    block, place = f"conv_res_block{int(parts[1]) + 1}", int(parts[2])
    inner = "conv" if place == 0 else f"res{place - 1}.{parts[3]}"
    return f"{block}.{inner}.{kind}.{parts[-1]}"
