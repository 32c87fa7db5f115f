"""Faster R-CNN (Ren et al., NeurIPS 2015, arXiv:1506.01497).

The region proposal network (sec. 3.1) and the detector that shares its map with Fast R-CNN's second stage (sec. 3.2).
Parameter names are torchvision's; `backbone.body` is the classifier. What differs from the paper:

- Both stages learn at once ("approximate joint training", sec. 3.2): gradients do not flow through the proposals' corners.
  The paper's own numbers come from four alternating steps; its released code and all later ones train jointly.
- Objectness is one sigmoid for each anchor where the paper has a softmax over two (sec. 3.1.1 allows either).
- Both losses of the proposal network are divided by the number of sampled anchors, as in the released code, with smooth L1
  of beta 1/9; the paper divides the second by the number of places and weighs it by 10, which is about the same (sec. 3.1.2).
- Anchors that cross the border are left out of the loss by `inside=True` (sec. 3.1.3); the border is the batch's canvas.
- The ResNet-50 variant is of the later literature (He et al. 2016, "C4"): RoIAlign, no dense layers, all anchors learned from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import batched_nms, nms

from paperzoo.blocks.boxes import (
    AnchorGenerator,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    flatten_predictions,
    join_boxes,
    match_anchors,
    sample_anchors,
)
from paperzoo.papers.detection.fast_rcnn.model import (
    RoIHeads,
    exact,
    parts_of,
    resnet50_parts,
    small_parts,
    vgg16_parts,
)
from paperzoo.papers.detection.fast_rcnn.proposals import anchors_of

# -- region proposals (sec. 3.1) -------------------------------------------------------------------------------------


class RPNHead(nn.Module):
    """A 3x3 convolution and two sibling 1x1 convolutions (fig. 3); over several levels, shared across them (FPN).

    Levels (B, C, H_l, W_l) -> objectness logits (B, A) and box deltas (B, A, 4) over all levels' anchors.
    """

    def __init__(self, in_channels: int, num_anchors: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Sequential(nn.Conv2d(in_channels, in_channels, 3, padding=1), nn.ReLU()))
        self.cls_logits = nn.Conv2d(in_channels, num_anchors, 1)
        self.bbox_pred = nn.Conv2d(in_channels, 4 * num_anchors, 1)
        for layer in (self.conv[0][0], self.cls_logits, self.bbox_pred):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        hidden = [self.conv(level) for level in levels]
        objectness = flatten_predictions([self.cls_logits(h) for h in hidden], 1)
        return objectness[..., 0], flatten_predictions([self.bbox_pred(h) for h in hidden], 4)


class RegionProposalNetwork(nn.Module):
    """The head, its anchors, its loss and its proposals; plain enough for any two-stage detector to hold.

    Args:
        channels: of every level.
        anchors: where the head predicts.
        high, low: IoU from which an anchor is an object, below which it is background (0.7 and 0.3).
        sampled, positive: anchors of an image that the loss looks at, and the part of them that may be objects.
        nms_threshold: proposals of one level that overlap more are one.
        smallest: proposals with a side below this many pixels are dropped.
        inside: the loss leaves out anchors that cross the canvas' border, unless all do.
    """

    def __init__(
        self,
        channels: int,
        anchors: AnchorGenerator,
        high: float = 0.7,
        low: float = 0.3,
        sampled: int = 256,
        positive: float = 0.5,
        nms_threshold: float = 0.7,
        smallest: float = 1e-3,
        inside: bool = False,
    ) -> None:
        super().__init__()
        if len(set(anchors.per_cell)) != 1:
            raise ValueError(
                f"anchors has {anchors.per_cell} anchors a cell; a shared head needs the same on each level"
            )
        self.head = RPNHead(channels, anchors.per_cell[0])
        self.anchors = anchors
        self.high, self.low = high, low
        self.sampled, self.positive = sampled, positive
        self.nms_threshold, self.smallest, self.inside = nms_threshold, smallest, inside

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self.head(levels)

    def loss(
        self, outputs: tuple[Tensor, Tensor], targets: Sequence[dict[str, Tensor]], canvas: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Log loss over the sampled anchors, and smooth L1 (beta 1/9) over the matched ones among them.

        Args:
            outputs: of `forward`.
            targets: for each image {"boxes": (N, 4)} in pixels of the canvas.
            canvas: height and width of the batch's images.
        """
        objectness, deltas = (exact(output) for output in outputs)
        boxes, owner = join_boxes(targets)
        anchors = self.anchors(*canvas, device=objectness.device)
        row = self.within(anchors, canvas).nonzero()[:, 0] if self.inside else ()
        if len(row):
            anchors, objectness, deltas = anchors[row], objectness[:, row], deltas[:, row]
        matched = match_anchors(boxes, owner, len(targets), anchors, self.high, self.low)
        positive, negative = sample_anchors(matched, self.sampled, self.positive)
        chosen = positive | negative
        count = chosen.sum().clamp(min=1)
        image, anchor = positive.nonzero(as_tuple=True)
        wanted = encode_boxes(boxes[matched[image, anchor]], anchors[anchor])
        return {
            "objectness": F.binary_cross_entropy_with_logits(objectness[chosen], positive[chosen].to(objectness.dtype)),
            "boxes": F.smooth_l1_loss(deltas[image, anchor], wanted, beta=1 / 9, reduction="sum") / count,
        }

    @staticmethod
    def within(anchors: Tensor, canvas: tuple[int, int]) -> Tensor:
        height, width = canvas
        return (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] <= width) & (anchors[:, 3] <= height)

    def candidates(
        self, outputs: tuple[Tensor, Tensor], sizes: Tensor, canvas: tuple[int, int], before: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best `before` of each level, decoded and cut: boxes (B, N, 4), scores, levels and usable, (B, N) each."""
        objectness, deltas = (exact(output) for output in outputs)
        anchors = anchors_of(self.anchors, canvas, objectness.device)
        score, column, level, first = [], [], [], 0
        for i, count in enumerate(self.anchors.counts(*canvas)):
            best = objectness[:, first : first + count].topk(min(before, count), dim=1)
            score.append(best.values)
            column.append(best.indices + first)
            level.append(torch.full_like(best.indices, i))
            first += count
        scores, columns, levels = (torch.cat(x, dim=1) for x in (score, column, level))
        picked = deltas.gather(1, columns[..., None].expand(-1, -1, 4))
        boxes = clip_boxes(decode_boxes(picked, anchors[columns]), sizes)
        usable = (boxes[..., 2:] - boxes[..., :2] >= self.smallest).all(-1)
        return boxes, scores.sigmoid(), levels, usable

    @torch.no_grad()
    def proposals(
        self, outputs: tuple[Tensor, Tensor], sizes: Tensor, canvas: tuple[int, int], before: int, after: int
    ) -> list[tuple[Tensor, Tensor]]:
        """The best proposals of each image: boxes (N, 4) in pixels and scores (N,), N <= after, best first.

        Args:
            outputs: of `forward`.
            sizes: (B, 2) height and width of each image inside the canvas.
            canvas: height and width of the batch's images.
            before: kept of each level before non-maximum suppression, which works within a level.
            after: kept of each image after it.
        """
        result = []
        for b, s, k, ok in zip(*self.candidates(outputs, sizes, canvas, before), strict=True):
            b, s, k = b[ok], s[ok], k[ok]
            keep = batched_nms(b, s, k, self.nms_threshold)[:after]
            result.append((b[keep], s[keep]))
        return result

    @torch.no_grad()
    def regions(
        self, outputs: tuple[Tensor, Tensor], sizes: Tensor, canvas: tuple[int, int], before: int, after: int
    ) -> Tensor:
        """`proposals` as one tensor (B, P, 4), filled up with empty boxes; P is `after`, or what there is of candidates."""
        most = min(after, sum(min(before, count) for count in self.anchors.counts(*canvas)))
        if outputs[0].is_meta:  # shapes alone
            return outputs[1].new_zeros(len(sizes), most, 4)
        if not torch.compiler.is_compiling():
            found = [boxes for boxes, _ in self.proposals(outputs, sizes, canvas, before, after)]
            filled = pad_sequence(found, batch_first=True)
            return F.pad(filled, (0, 0, 0, most - filled.shape[1]))
        # no loop over images, whose number a program does not know: one suppression, each group of boxes in a place of its own
        boxes, scores, levels, usable = self.candidates(outputs, sizes, canvas, before)
        images, count = scores.shape
        group = torch.arange(images, device=boxes.device)[:, None] * len(self.anchors.strides) + levels
        apart = boxes + (group * (max(canvas) + 1.0))[..., None]
        scores = torch.where(usable, scores, -1.0)
        keep = nms(apart.flatten(0, 1), scores.flatten(), self.nms_threshold)
        # best first, in the suppression's own order, as the order of equal scores is part of the answer
        rank = torch.full((images * count,), images * count, device=boxes.device)
        rank = rank.scatter(0, keep, torch.arange(keep.shape[0], device=boxes.device)).reshape(images, count)
        order = torch.where(usable, rank, images * count).topk(most, dim=1, largest=False)
        best = boxes.gather(1, order.indices[..., None].expand(-1, -1, 4))
        return best * (order.values < images * count)[..., None]


# -- the detector (sec. 3.2) -----------------------------------------------------------------------------------------


class FasterRCNN(nn.Module):
    """Images (B, 3, H, W) -> proposals (B, P, 4), class logits (B, P, K + 1), deltas (B, P, K + 1, 4); with targets, the losses.

    The contract of a detector is in `tasks/detection.py`. A pyramid of levels works as well as one map, if `roi_heads.pool`
    knows how to pool from it. Proposals are filled up with empty boxes, and cut to `sizes` (B, 2), the images' height and
    width inside the canvas, if these are given, else to the canvas.

    Args:
        backbone: images -> list of maps, with `out_channels`.
        rpn, roi_heads: the two stages.
        before, after: proposals kept of each level before non-maximum suppression and of an image after it: while learning,
            and at test time.
    """

    def __init__(
        self,
        backbone: nn.Module,
        rpn: RegionProposalNetwork,
        roi_heads: RoIHeads,
        before: tuple[int, int] = (12000, 6000),
        after: tuple[int, int] = (2000, 300),
    ) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = backbone, rpn, roi_heads
        self.before, self.after = before, after

    @property
    def num_classes(self) -> int:
        return self.roi_heads.num_classes

    def forward(
        self, images: Tensor, targets: Sequence[dict[str, Tensor]] | None = None, sizes: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor] | dict[str, Tensor]:
        canvas = tuple(images.shape[-2:])
        levels = self.backbone(images)
        outputs = self.rpn(levels)
        if sizes is None:
            sizes = torch.tensor([canvas], device=images.device)
        sizes = sizes.expand(images.shape[0], -1)
        learning = targets is not None
        boxes = self.rpn.regions(outputs, sizes, canvas, self.before[not learning], self.after[not learning])
        if not learning:
            return boxes, *self.roi_heads(levels, boxes)
        first = self.rpn.loss(outputs, targets, canvas)
        second = self.roi_heads.loss(levels, boxes, targets)
        return {"objectness": first["objectness"], "proposals": first["boxes"]} | second

    def postprocess(
        self, outputs: tuple[Tensor, Tensor, Tensor], sizes: Tensor, canvas: tuple[int, int]
    ) -> list[dict[str, Tensor]]:
        return self.roi_heads.postprocess(*outputs, sizes)

    @staticmethod
    def aligned(expected: Sequence[Tensor], found: Sequence[Tensor]) -> list[Tensor]:
        """Outputs of another runtime in the order of `expected`, as rounding swaps proposals of nearly equal scores.

        Where it decides a suppression otherwise a proposal has no counterpart within a hundredth of a pixel; up to one in
        fifty are passed over. With more the outputs come back as they are.
        """
        distance, place = torch.cdist(expected[0].float(), found[0].float(), p=torch.inf).min(dim=2)
        missing = distance > 0.01
        if missing.sum() > 0.02 * missing.numel():
            return list(found)
        rows = torch.arange(len(place), device=place.device)[:, None]
        return [
            torch.where(missing.reshape(*missing.shape, *(1,) * (a.ndim - 2)), a, b[rows, place])
            for a, b in zip(expected, found, strict=True)
        ]

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh last layers of the second stage for another number of classes."""
        self.roi_heads.reset_classifier(num_classes)

    def load_backbone(self, state_dict: dict[str, Tensor]) -> None:
        """Start from a classifier's weights; what of its later layers is the region's network goes there."""
        self.backbone.load_body(state_dict)
        self.roi_heads.box_head.load_classifier(state_dict)


# -- variants --------------------------------------------------------------------------------------------------------


def channels_of(body: nn.Module) -> int:
    """Channels of a backbone's single map."""
    channels = body.out_channels
    return channels if isinstance(channels, int) else channels[-1]


def faster_rcnn_vgg16(
    num_classes: int = 20, drop_rate: float = 0.5, backbone: str | None = None, **options: float
) -> FasterRCNN:
    """The paper's network: VGG-16, nine anchors at each place of conv5 (128, 256, 512 pixels; 1:2, 1:1, 2:1), 7 x 7 RoI
    max pooling. Proposals of at least 16 pixels. `options` as `RoIHeads`.

    `backbone`: another classifier by name, its map of stride 16, with RoIAlign and two layers of 1024 on each region.
    """
    body, pool, head = vgg16_parts(drop_rate) if backbone is None else parts_of(backbone, 16, 7, 1024)
    anchors = AnchorGenerator((16,), [(128, 256, 512)])
    rpn = RegionProposalNetwork(channels_of(body), anchors, smallest=16, inside=True)
    options = {"least": 0.0, "sampled": 128} | options  # as the released code's joint training
    return FasterRCNN(body, rpn, RoIHeads(pool, head, num_classes, **options))


def faster_rcnn_resnet50_c4(num_classes: int = 80, **options: float) -> FasterRCNN:
    """ResNet-50 to C4 with fifteen anchors at each place (32 to 512 pixels), its fifth stage on 14 x 14 regions.

    `options` as `RoIHeads`.
    """
    body, pool, head = resnet50_parts()
    rpn = RegionProposalNetwork(body.out_channels, AnchorGenerator((16,), [(32, 64, 128, 256, 512)]))
    options = {"least": 0.0, "sampled": 512, "box_beta": 1 / 9, "nms_threshold": 0.5} | options
    return FasterRCNN(body, rpn, RoIHeads(pool, head, num_classes, **options), (12000, 6000), (2000, 1000))


def faster_rcnn_small(num_classes: int = 10, backbone: str | None = None, **options: float) -> FasterRCNN:
    """The same detector in small, for objects of 20 to 60 pixels: a thin VGG, six anchors at each place of stride 8.

    `options` as `RoIHeads`. `backbone`: another classifier by name, its map of stride 8.
    """
    body, pool, head = small_parts() if backbone is None else parts_of(backbone, 8, 4, 128)
    rpn = RegionProposalNetwork(channels_of(body), AnchorGenerator((8,), [(24, 40)], (1.0, 1.4, 2.0)), sampled=64)
    heads = RoIHeads(pool, head, num_classes, **{"least": 0.0} | options)
    return FasterRCNN(body, rpn, heads, (200, 200), (64, 32))
