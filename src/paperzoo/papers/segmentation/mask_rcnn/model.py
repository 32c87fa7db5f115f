"""Mask R-CNN (He et al., ICCV 2017, arXiv:1703.06870).

The mask branch (sec. 3, fig. 4 right) on `detection/fpn`'s Faster R-CNN, whose regions are pooled by RoIAlign. Parameter
names are torchvision's; `from_official` reads its published COCO weights. What differs from the paper:

- The network's output is the finished detections, as masks are predicted for those alone (sec. 3.1, inference).
- Of the last layer's K + 1 maps only the one that is looked at is computed: the true class's while learning, the predicted
  one's at test. That is the same number; map 0, of background, is never looked at, and is there for the checkpoints' sake.
- A whole program (torch.export) looks at the 2000 best boxes of an image in its non-maximum suppression.
- Regions that are sampled for boxes and for masks are the same, and the region proposal network shares the backbone (sec. 3.1,
  "for convenience of ablation" the paper trains it apart; its released code and all later ones train jointly).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import nms, roi_align

from paperzoo.blocks.backbones import at_strides
from paperzoo.blocks.boxes import AnchorGenerator, clip_boxes, decode_boxes, encode_boxes, join_boxes, sample_anchors
from paperzoo.papers.classification.resnet.model import resnet50, resnet101
from paperzoo.papers.detection.fast_rcnn.model import (
    RoIHeads,
    TwoMLPHead,
    exact,
    fast_rcnn_loss,
    match_regions,
    with_image_number,
)
from paperzoo.papers.detection.fast_rcnn.proposals import as_rows
from paperzoo.papers.detection.faster_rcnn.model import FasterRCNN, RegionProposalNetwork
from paperzoo.papers.detection.fpn.model import (
    BackboneWithFPN,
    LastLevelMaxPool,
    PyramidPool,
    TinyBody,
    assign_levels,
    pyramid_anchors,
)
from paperzoo.papers.detection.fpn.model import from_official as pyramid_from_official

MOST_BOXES = 2000  # of an image, in a whole program

# -- RoIAlign (sec. 3) -------------------------------------------------------------------------------------------------


class RegionAlign(PyramidPool):
    """FPN's pooling; in a whole program without a size that depends on how many images there are."""

    def forward(self, levels: Sequence[Tensor], regions: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return super().forward(levels, regions)
        lowest, highest = (int(s).bit_length() - 1 for s in (self.strides[0], self.strides[-1]))
        number = (assign_levels(regions[:, 1:], lowest, highest) - lowest)[:, None, None, None]
        pooled: Tensor | None = None
        for i, (level, stride) in enumerate(zip(levels, self.strides, strict=False)):
            features = exact(level)  # pixels do not fit into 16 bits
            found = roi_align(features, regions.to(features.dtype), self.output_size, 1 / stride, self.sampling_ratio)
            pooled = found if pooled is None else torch.where(number == i, found, pooled)
        return pooled.to(levels[0].dtype)


# -- the mask branch (sec. 3, fig. 4) ----------------------------------------------------------------------------------


class MaskHead(nn.Sequential):
    """3x3 convolutions with ReLU: (R, in_channels, 14, 14) -> (R, channels, 14, 14)."""

    def __init__(self, in_channels: int, channels: int = 256, depth: int = 4) -> None:
        wide = [in_channels, *[channels] * depth]
        # each convolution is in a Sequential of its own, because the public checkpoints' names say so
        super().__init__(
            *(nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU()) for a, b in zip(wide, wide[1:], strict=False))
        )
        self.channels = channels
        he(self)


class MaskPredictor(nn.Module):
    """A deconvolution with ReLU and a 1x1 convolution: (R, in_channels, s, s) -> a map of logits (R, 2 s, 2 s) for a class of each."""

    def __init__(self, in_channels: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv5_mask = nn.ConvTranspose2d(in_channels, channels, 2, stride=2)
        self.mask_fcn_logits = nn.Conv2d(channels, num_classes + 1, 1)
        he(self)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """`labels`: int64 (R,), 0 … num_classes - 1."""
        x = F.relu(self.conv5_mask(x))
        weight, bias = self.mask_fcn_logits.weight[labels + 1, :, 0, 0], self.mask_fcn_logits.bias[labels + 1]
        logits = weight[:, None] @ x.flatten(2) + bias[:, None, None]
        return logits.reshape(x.shape[0], x.shape[2], x.shape[3])


def he(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)


def mask_targets(masks: Tensor, boxes: Tensor, rows: Tensor, size: int) -> Tensor:
    """The part of a true mask inside of a region, at the mask branch's resolution (sec. 3.1, training).

    Args:
        masks: bool (T, H, W).
        boxes: (P, 4), regions in pixels of the masks.
        rows: int64 (P,), the mask of each.

    Returns:
        float (P, size, size), the share of each cell that the object covers.
    """
    used, row = rows.unique(return_inverse=True)  # pixels become floats only where they are looked at
    regions = torch.cat([row[:, None].to(boxes.dtype), boxes], dim=1)
    return roi_align(masks[used][:, None].to(boxes.dtype), regions, size)[:, 0]


class MaskRoIHeads(RoIHeads):
    """Faster R-CNN's second stage with masks of what it has found, in parallel to boxes and classes while learning.

    Args:
        mask_pool: (levels, regions (R, 5)) -> (R, C, s, s).
        mask_head, mask_predictor: the branch.
        arguments, options: of `RoIHeads`.
    """

    def __init__(
        self,
        *arguments: object,
        mask_pool: Callable[[Sequence[Tensor], Tensor], Tensor],
        mask_head: MaskHead,
        mask_channels: int,
        **options: float,
    ) -> None:
        super().__init__(*arguments, **options)
        self.mask_pool, self.mask_head = mask_pool, mask_head
        self.mask_predictor = MaskPredictor(mask_head.channels, mask_channels, self.num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh last layers for another number of classes."""
        super().reset_classifier(num_classes)
        old = self.mask_predictor.conv5_mask
        fresh = MaskPredictor(old.in_channels, old.out_channels, num_classes).to(old.weight)
        fresh.conv5_mask = old
        self.mask_predictor = fresh

    def look_closer(self, levels: Sequence[Tensor], regions: Tensor, labels: Tensor) -> Tensor:
        """Regions (R, 5) and a class for each, int64 (R,) -> mask logits (R, m, m)."""
        return self.mask_predictor(self.mask_head(self.mask_pool(levels, regions)), labels)

    def loss(
        self, levels: Sequence[Tensor], proposals: Tensor, targets: Sequence[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """L = L_cls + L_box + L_mask (sec. 3): as `RoIHeads.loss`, and over the regions that show an object the average
        binary cross-entropy of the true class's map.

        Args:
            targets: for each image also {"masks": bool (N, H, W)}, all of the canvas' size.
        """
        boxes, owner = join_boxes(targets)
        regions = torch.cat([proposals, as_rows(targets)], dim=1)
        matched = match_regions(boxes, owner, regions, self.high, self.low, self.least)
        positive, negative = sample_anchors(matched, self.sampled, self.positive)
        image, row = (positive | negative).nonzero(as_tuple=True)
        chosen, box = regions[image, row], matched[image, row]
        numbered = torch.cat([image[:, None].to(chosen.dtype), chosen], dim=1)
        logits, deltas = self.look(levels, numbered)
        labels = torch.cat([t["labels"] for t in targets])
        shows = (box >= 0).nonzero()[:, 0]
        wanted = torch.zeros_like(box)  # background
        wanted[shows] = labels[box[shows]] + 1
        target = torch.zeros_like(chosen)
        target[shows] = encode_boxes(boxes[box[shows]], chosen[shows], self.weights)
        classification, distance = fast_rcnn_loss(exact(logits), exact(deltas), wanted, target, self.box_beta)
        masks = torch.cat([t["masks"] for t in targets])
        return {
            "classification": classification,
            "boxes": distance,
            "masks": self.mask_loss(levels, numbered[shows], masks, labels, box[shows]),
        }

    def mask_loss(
        self, levels: Sequence[Tensor], regions: Tensor, masks: Tensor, labels: Tensor, rows: Tensor
    ) -> Tensor:
        """L_mask: regions (P, 5) that show the objects `rows` (P,) of masks (T, H, W) with labels (T,)."""
        logits = exact(self.look_closer(levels, regions, labels[rows]))
        if not len(rows):
            return logits.sum() * 0
        wanted = mask_targets(masks, regions[:, 1:].to(logits.dtype), rows, logits.shape[-1])
        return F.binary_cross_entropy_with_logits(logits, wanted)

    def detect(
        self, levels: Sequence[Tensor], boxes: Tensor, sizes: Tensor, canvas: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sec. 3.1, inference: the box branch, non-maximum suppression, and the mask branch on the `detections` best boxes.

        Args:
            boxes: regions (B, R, 4), filled up with empty ones.
            sizes: (B, 2) height and width of each image inside the canvas.

        Returns:
            boxes (B, D, 4), scores (B, D), labels int64 (B, D), best first, and for each the predicted class's mask,
            probabilities (B, D, m, m); filled up with zeros.
        """
        logits, deltas = self(levels, boxes)
        if torch.compiler.is_compiling():
            found, scores, labels = self.best(boxes, logits, deltas, sizes, canvas)
        elif boxes.is_meta:  # shapes alone
            scores = boxes.new_zeros(len(boxes), self.detections)
            found, labels = boxes.new_zeros(*scores.shape, 4), torch.zeros_like(scores, dtype=torch.int64)
        else:
            each = self.postprocess(boxes, logits, deltas, sizes)
            found, scores, labels = (self.filled([d[key] for d in each]) for key in ("boxes", "scores", "labels"))
        real = scores.flatten() > 0
        regions, chosen = with_image_number(found), labels.flatten()
        if torch.compiler.is_compiling() or boxes.is_meta:  # sizes must not depend on the data
            masks = exact(self.look_closer(levels, regions, chosen)).sigmoid() * real[:, None, None]
        else:
            rows = real.nonzero()[:, 0]
            made = exact(self.look_closer(levels, regions[rows], chosen[rows])).sigmoid()
            masks = made.new_zeros(len(regions), *made.shape[1:]).index_copy(0, rows, made)
        return found, scores, labels, masks.reshape(*scores.shape, *masks.shape[1:])

    def filled(self, each: Sequence[Tensor]) -> Tensor:
        """What each image has, filled up with zeros to `detections`."""
        rows = pad_sequence(list(each), batch_first=True)
        return F.pad(rows, (0, 0) * (rows.ndim - 2) + (0, self.detections - rows.shape[1]))

    def best(
        self, boxes: Tensor, logits: Tensor, deltas: Tensor, sizes: Tensor, canvas: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`postprocess` without a loop over images, whose number a program does not know: one suppression, each class of each
        image in a place of its own. Boxes, scores and labels, filled up with zeros to `detections`.
        """
        images, classes = logits.shape[0], logits.shape[2] - 1
        scores = exact(logits).softmax(-1)[..., 1:]  # (B, R, K)
        moved = decode_boxes(exact(deltas)[:, :, 1:], boxes[:, :, None], self.weights)
        moved = clip_boxes(moved.flatten(1, 2), sizes)  # (B, R K, 4)
        real = (boxes[..., 2:] > boxes[..., :2]).all(-1)[..., None]
        usable = ((scores > self.score_threshold) & real).flatten(1) & (moved[..., 2:] - moved[..., :2] >= 1e-2).all(-1)
        count = min(MOST_BOXES, usable.shape[1])
        top = torch.where(usable, scores.flatten(1), -1.0).topk(count, dim=1)
        moved, label = moved.gather(1, top.indices[..., None].expand(-1, -1, 4)), top.indices % classes
        group = torch.arange(images, device=boxes.device)[:, None] * classes + label
        apart = moved + (group * (max(canvas) + 1.0))[..., None]
        keep = nms(apart.flatten(0, 1), top.values.flatten(), self.nms_threshold)
        last = images * count
        rank = torch.full((last,), last, device=boxes.device)
        rank = rank.scatter(0, keep, torch.arange(keep.shape[0], device=boxes.device)).reshape(images, count)
        order = torch.where(top.values > 0, rank, last).topk(min(self.detections, count), dim=1, largest=False)
        kept = order.values < last
        found = moved.gather(1, order.indices[..., None].expand(-1, -1, 4)) * kept[..., None]
        score, label = top.values.gather(1, order.indices) * kept, label.gather(1, order.indices) * kept
        room = self.detections - min(self.detections, count)
        return F.pad(found, (0, 0, 0, room)), F.pad(score, (0, room)), F.pad(label, (0, room))


# -- the network -------------------------------------------------------------------------------------------------------


class MaskRCNN(FasterRCNN):
    """Images (B, 3, H, W) -> boxes (B, D, 4), scores (B, D), labels int64 (B, D), masks (B, D, m, m), best first, filled up with
    zeros; with targets, the losses.

    The contract is in `tasks/instance_segmentation.py`. `sizes` (B, 2), the images' height and width inside the canvas, cuts
    proposals and boxes; without it the canvas does.

    Args as `FasterRCNN`.
    """

    roi_heads: MaskRoIHeads

    def forward(
        self, images: Tensor, targets: Sequence[dict[str, Tensor]] | None = None, sizes: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | dict[str, Tensor]:
        if targets is not None:
            return super().forward(images, targets, sizes)
        return self.detect(self.backbone(images), tuple(images.shape[-2:]), sizes)

    def detect(
        self, levels: Sequence[Tensor], canvas: tuple[int, int], sizes: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The rest of `forward` from the backbone's levels, for networks that need these as well."""
        if sizes is None:
            sizes = torch.tensor([canvas], device=levels[0].device)
        sizes = sizes.expand(levels[0].shape[0], -1)
        boxes = self.rpn.regions(self.rpn(levels), sizes, canvas, self.before[1], self.after[1])
        return self.roi_heads.detect(levels, boxes, sizes, canvas)

    def postprocess(
        self, outputs: tuple[Tensor, Tensor, Tensor, Tensor], sizes: Tensor, canvas: tuple[int, int]
    ) -> list[dict[str, Tensor]]:
        """What is no filling; `frames` of the masks are the boxes."""
        result = []
        for boxes, scores, labels, masks in zip(*outputs, strict=True):
            n = int((scores > 0).sum())
            result.append({"boxes": boxes[:n], "scores": scores[:n], "labels": labels[:n]})
            result[-1] |= {"masks": masks[:n], "frames": boxes[:n]}
        return result


# -- variants ----------------------------------------------------------------------------------------------------------


def on_pyramid(body: nn.Module, num_classes: int, options: dict[str, float]) -> MaskRCNN:
    """Sec. 3.1 with FPN: boxes from 7 x 7, masks of 28 x 28 from 14 x 14."""
    pyramid = BackboneWithFPN(body, extra_blocks=LastLevelMaxPool())
    options = {"least": 0.0, "sampled": 512, "box_beta": 1 / 9, "nms_threshold": 0.5} | options
    heads = MaskRoIHeads(
        RegionAlign(),
        TwoMLPHead(256 * 7 * 7, 1024),
        num_classes,
        mask_pool=RegionAlign(14),
        mask_head=MaskHead(256),
        mask_channels=256,
        **options,
    )
    return MaskRCNN(pyramid, RegionProposalNetwork(256, pyramid_anchors()), heads, (2000, 1000), (2000, 1000))


def mask_rcnn_resnet50_fpn(num_classes: int = 90, backbone: str | None = None, **options: float) -> MaskRCNN:
    """ResNet-50-FPN, 44.5M parameters. 90 classes are COCO's category numbers less 1, as torchvision's checkpoint has them.

    `options` as `RoIHeads`. `backbone`: another classifier by name, its maps of strides 4, 8, 16 and 32.
    """
    body = resnet50() if backbone is None else at_strides(backbone, (4, 8, 16, 32))
    return on_pyramid(body, num_classes, options)


def mask_rcnn_resnet101_fpn(num_classes: int = 80, **options: float) -> MaskRCNN:
    """ResNet-101-FPN, the paper's 35.7 mask AP. `options` as `RoIHeads`."""
    return on_pyramid(resnet101(), num_classes, options)


def mask_rcnn_tiny_fpn(num_classes: int = 6, backbone: str | None = None, **options: float) -> MaskRCNN:
    """The same in small, for objects of 20 to 60 pixels: a thin pyramid of 32 channels with anchors of 20 to 112 pixels, masks
    of 14 x 14; one sample in each bin of RoIAlign, as regions are small ("not sensitive to … how many points are sampled", sec. 3).

    `options` as `RoIHeads`. `backbone`: another classifier by name, its maps of strides 4, 8, 16 and 32.
    """
    body = TinyBody((24, 32, 48, 64)) if backbone is None else at_strides(backbone, (4, 8, 16, 32))
    pyramid = BackboneWithFPN(body, out_channels=32, extra_blocks=LastLevelMaxPool())
    anchors = AnchorGenerator((4, 8, 16, 32, 64), [(size,) for size in (20, 40, 56, 80, 112)])
    rpn = RegionProposalNetwork(32, anchors, sampled=64)
    options = {"least": 0.0, "sampled": 16, "nms_threshold": 0.5, "detections": 20} | options
    heads = MaskRoIHeads(
        RegionAlign(sampling_ratio=1),
        TwoMLPHead(32 * 7 * 7, 128),
        num_classes,
        mask_pool=RegionAlign(7, sampling_ratio=1),
        mask_head=MaskHead(32, 32),
        mask_channels=32,
        **options,
    )
    return MaskRCNN(pyramid, rpn, heads, (100, 100), (32, 32))


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's published weights to these names and to our batch norm: as `detection/fpn`'s, and the mask branch's of 2021."""
    renamed = {}
    for name, value in pyramid_from_official(state_dict).items():
        head, number, kind = name.rpartition(".")[0].partition("mask_fcn")
        if head == "roi_heads.mask_head." and number and kind.isdigit():  # roi_heads.mask_head.mask_fcn1.weight
            name = f"roi_heads.mask_head.{int(kind) - 1}.0.{name.rpartition('.')[2]}"
        renamed[name] = value
    return renamed
