"""Fast R-CNN (Girshick, ICCV 2015, arXiv:1504.08083).

The second stage of every two-stage detector: features of regions from one shared map, class scores and class-wise boxes,
their losses and sampling; and the detector of the paper, whose regions come from outside. Parameter names are torchvision's
(`roi_heads.box_head.fc6`, `roi_heads.box_predictor.cls_score`, …) and `backbone.body` those of the classifier. What differs
from the paper:

- Class 0 of the logits is background inside the network; labels that go in or come out are 0 … num_classes - 1.
- Box targets are divided by (0.1, 0.1, 0.2, 0.2), the values of the author's later code; the paper takes mean and deviation
  from the training set (sec. 2.3).
- An image without objects has nothing with IoU in [0.1, 0.5); there, any region is background. The paper has no such images.
- Without given proposals the network takes windows of a regular grid (sec. 5.5 tries such "dense boxes"), and learns from
  jittered true boxes besides; selective search is read from files (`proposals.py`, `recipe.py`).
- The ResNet-50 variant is of the later literature (He et al. 2016): regions from C4, the fifth stage as the region's network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, roi_align, roi_pool

from paperzoo.blocks.backbones import Backbone, at_strides, headless, load_body
from paperzoo.blocks.boxes import (
    BACKGROUND,
    IGNORED,
    AnchorGenerator,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    join_boxes,
    sample_anchors,
)
from paperzoo.papers.classification.resnet.model import resnet50
from paperzoo.papers.classification.vgg.model import PLANS, POOL, conv_stack
from paperzoo.papers.detection.fast_rcnn.pooling import roi_max_pool
from paperzoo.papers.detection.fast_rcnn.proposals import as_rows, grid_windows, jittered

# -- one map of a classifier -----------------------------------------------------------------------------------------


class SingleLevel(nn.Module):
    """One stage of a backbone as it is: images (B, 3, H, W) -> [C_l].

    Args:
        body: has `stages(x)` and `stage_channels`; a classifier's pooling and last layer are dropped.
        stage: which stage, counted from 0.
    """

    def __init__(self, body: nn.Module, stage: int = 2) -> None:
        super().__init__()
        self.body = headless(body)
        stage %= len(body.stage_channels)
        for i in range(stage + 1, len(body.stage_channels)):  # what nobody looks at is not kept
            if hasattr(self.body, f"layer{i + 1}"):
                setattr(self.body, f"layer{i + 1}", nn.Identity())
        self.stage = stage
        self.out_channels = body.stage_channels[stage]

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.body.stages(images)[self.stage]]

    def load_body(self, state_dict: dict[str, Tensor]) -> None:
        """Weights of a classifier with the same body; its later stages and last layer are left out."""
        load_body(self.body, state_dict)


class VGGBody(nn.Module):
    """VGG without its last pooling (sec. 2.2: the RoI pooling takes its place): images -> [conv5's map], stride 16."""

    def __init__(self, plan: Sequence[int] = PLANS["D"], batch_norm: bool = False, in_channels: int = 3) -> None:
        super().__init__()
        self.body = nn.Module()
        kept = tuple(plan[:-1]) if plan[-1] == POOL else tuple(plan)
        self.body.features = conv_stack(kept, batch_norm, in_channels)
        self.out_channels = kept[-1]
        for layer in self.body.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.body.features(images)]

    def load_body(self, state_dict: dict[str, Tensor]) -> None:
        """Weights of a VGG classifier; its dense layers are left out."""
        load_body(self.body, state_dict)


# -- regions (sec. 2.1) ----------------------------------------------------------------------------------------------


class RegionPool(nn.Module):
    """Each region's part of the last of the given maps, brought to one size: RoI max pooling, or RoIAlign (Mask R-CNN).

    Levels (B, C, H, W) and regions (R, 5), the image's number before x1 y1 x2 y2 -> (R, C, output_size, output_size).
    """

    def __init__(self, output_size: int = 7, stride: int = 16, align: bool = False, sampling_ratio: int = 2) -> None:
        super().__init__()
        self.output_size, self.scale, self.align, self.sampling_ratio = output_size, 1 / stride, align, sampling_ratio

    def forward(self, levels: Sequence[Tensor], regions: Tensor) -> Tensor:
        features = exact(levels[-1])  # pixels do not fit into 16 bits
        regions = regions.to(features.dtype)
        if self.align:
            pooled = roi_align(features, regions, self.output_size, self.scale, self.sampling_ratio)
        else:
            pool = roi_max_pool if torch.compiler.is_compiling() else roi_pool
            pooled = pool(features, regions, self.output_size, self.scale)
        return pooled.to(levels[-1].dtype)


def exact(x: Tensor) -> Tensor:
    """In 32 bits at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def with_image_number(boxes: Tensor) -> Tensor:
    """Boxes (B, R, 4) -> regions (B * R, 5) as `torchvision.ops` takes them."""
    number = torch.arange(boxes.shape[0], device=boxes.device).to(boxes.dtype)[:, None, None]
    return torch.cat([number.expand(-1, boxes.shape[1], 1), boxes], dim=2).flatten(0, 1)


def match_regions(
    boxes: Tensor, owner: Tensor, regions: Tensor, high: float = 0.5, low: float = 0.5, least: float = 0.0
) -> Tensor:
    """Which true box each region of each image shows (sec. 2.3), for the whole batch at once.

    Args:
        boxes, owner: (T, 4) and int64 (T,), as `join_boxes` returns them.
        regions: (B, R, 4), those of each image, filled up with empty boxes, which are ignored.
        high: a region with at least this IoU with a box shows it.
        low, least: one with less than `low` and at least `least` is background; others are ignored.

    Returns:
        int64 (B, R): a row of `boxes`, or BACKGROUND, or IGNORED.
    """
    shape = regions.shape[:2]
    area = (regions[..., 2:] - regions[..., :2]).prod(-1)
    if len(boxes):
        own = regions[owner]  # (T, R, 4)
        corner, end = torch.maximum(boxes[:, None, :2], own[..., :2]), torch.minimum(boxes[:, None, 2:], own[..., 2:])
        shared = (end - corner).clamp(min=0).prod(-1)
        overlap = shared / ((boxes[:, 2:] - boxes[:, :2]).prod(-1)[:, None] + area[owner] - shared)  # (T, R)
        segment = owner[:, None].expand_as(overlap)
        best = overlap.new_zeros(shape).scatter_reduce(0, segment, overlap, "amax")
        rows = torch.arange(len(boxes), device=boxes.device)[:, None]
        candidates = torch.where(overlap == best[owner], rows, len(boxes))
        nearest = candidates.new_full(shape, len(boxes)).scatter_reduce(0, segment, candidates, "amin")
    else:
        best, nearest = area.new_zeros(shape), torch.zeros(shape, dtype=torch.int64, device=area.device)
    crowded = torch.zeros(shape[0], dtype=torch.bool, device=area.device).index_fill(0, owner, True)
    is_background = (best < low) & ((best >= least) | ~crowded[:, None])
    matched = torch.where(best >= high, nearest, torch.where(is_background, BACKGROUND, IGNORED))
    return torch.where(area > 0, matched, IGNORED)


# -- the network of a region (sec. 2.1, 2.2) -------------------------------------------------------------------------


class TwoMLPHead(nn.Module):
    """VGG's dense layers: (R, C, s, s) -> (R, num_features). `drop_rate` as VGG's."""

    def __init__(self, in_features: int, num_features: int = 4096, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.fc6 = nn.Linear(in_features, num_features)
        self.fc7 = nn.Linear(num_features, num_features)
        self.num_features, self.drop_rate = num_features, drop_rate

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.fc6, self.fc7):
            x = F.dropout(F.relu(layer(x.flatten(1))), self.drop_rate, self.training)
        return x

    def load_classifier(self, state_dict: dict[str, Tensor]) -> None:
        """fc6 and fc7 from a VGG classifier of the same size, if the weights have them."""
        for layer, name in ((self.fc6, "classifier.0"), (self.fc7, "classifier.3")):
            if f"{name}.weight" in state_dict and state_dict[f"{name}.weight"].shape == layer.weight.shape:
                layer.load_state_dict({key: state_dict[f"{name}.{key}"] for key in ("weight", "bias")})


class StageHead(nn.Module):
    """A stage of the backbone, run on each region, and average pooling: ResNet's fifth on regions of C4."""

    def __init__(self, stage: nn.Module, num_features: int) -> None:
        super().__init__()
        self.layer4, self.num_features = stage, num_features

    def forward(self, x: Tensor) -> Tensor:
        return self.layer4(x).mean((2, 3))

    def load_classifier(self, state_dict: dict[str, Tensor]) -> None:
        """The stage from a classifier's weights, if they have it."""
        own = {name: value for name, value in state_dict.items() if name.startswith("layer4.")}
        if own:
            load_body(self, own)


class FastRCNNPredictor(nn.Module):
    """The two sibling layers: (R, num_features) -> class logits (R, K + 1) and box deltas (R, 4 (K + 1))."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_features, num_classes + 1)
        self.bbox_pred = nn.Linear(in_features, 4 * (num_classes + 1))
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):  # sec. 2.3
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x)


def fast_rcnn_loss(
    logits: Tensor, deltas: Tensor, labels: Tensor, target: Tensor, beta: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Eq. 1 to 3, over R regions: cross-entropy, and smooth L1 on the boxes of the true class; both divided by R.

    Args:
        logits, deltas: (R, K + 1) and (R, K + 1, 4).
        labels: int64 (R,), 0 is background.
        target: (R, 4); where the label is background it is not looked at.
        beta: where smooth L1 turns from square to linear.
    """
    count, objects = max(1, len(labels)), labels.nonzero()[:, 0]
    classification = F.cross_entropy(logits, labels, reduction="sum") / count
    guess = deltas[objects, labels[objects]]
    return classification, F.smooth_l1_loss(guess, target[objects], beta=beta, reduction="sum") / count


class RoIHeads(nn.Module):
    """Regions of shared maps to classes and boxes, with the loss of sec. 2.3; any two-stage detector can hold it.

    Args:
        pool: (levels, regions (R, 5)) -> (R, C, s, s).
        head: (R, C, s, s) -> (R, num_features).
        num_classes: without background.
        high, low, least: IoU from which a region is an object; below `low` and from `least` on it is background.
        sampled, positive: regions of an image that the loss looks at, and the part of them that may be objects.
        weights: what box deltas are multiplied with.
        box_beta: where smooth L1 turns from square to linear (eq. 3: 1).
        score_threshold, nms_threshold, detections: of `postprocess`.
    """

    def __init__(
        self,
        pool: Callable[[Sequence[Tensor], Tensor], Tensor],
        head: nn.Module,
        num_classes: int,
        *,
        high: float = 0.5,
        low: float = 0.5,
        least: float = 0.1,
        sampled: int = 64,
        positive: float = 0.25,
        weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
        box_beta: float = 1.0,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.3,
        detections: int = 100,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be 1 or more")
        self.pool, self.box_head = pool, head
        self.box_predictor = FastRCNNPredictor(head.num_features, num_classes)
        self.high, self.low, self.least, self.sampled, self.positive = high, low, least, sampled, positive
        self.weights, self.box_beta = tuple(weights), box_beta
        self.score_threshold, self.nms_threshold, self.detections = score_threshold, nms_threshold, detections

    @property
    def num_classes(self) -> int:
        return self.box_predictor.cls_score.out_features - 1

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh last layers for another number of classes."""
        fresh = FastRCNNPredictor(self.box_head.num_features, num_classes)
        self.box_predictor = fresh.to(next(self.box_predictor.parameters()))

    def look(self, levels: Sequence[Tensor], regions: Tensor) -> tuple[Tensor, Tensor]:
        """Regions (R, 5) -> logits (R, K + 1), deltas (R, K + 1, 4)."""
        logits, deltas = self.box_predictor(self.box_head(self.pool(levels, regions)))
        return logits, deltas.unflatten(1, (-1, 4))

    def forward(self, levels: Sequence[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Regions of each image, boxes (B, R, 4) -> logits (B, R, K + 1), deltas (B, R, K + 1, 4); 0 for empty boxes."""
        regions, real = with_image_number(boxes), (boxes[..., 2:] > boxes[..., :2]).all(-1)
        if torch.compiler.is_compiling() or boxes.is_meta:  # sizes must not depend on the data
            logits, deltas = self.look(levels, regions)
            logits, deltas = logits * real.reshape(-1, 1), deltas * real.reshape(-1, 1, 1)
        else:
            rows = real.flatten().nonzero()[:, 0]
            logits, deltas = self.look(levels, regions[rows])
            if len(rows) < len(regions):
                logits = logits.new_zeros(len(regions), logits.shape[1]).index_copy(0, rows, logits)
                deltas = deltas.new_zeros(len(regions), *deltas.shape[1:]).index_copy(0, rows, deltas)
        return logits.reshape(*boxes.shape[:2], logits.shape[-1]), deltas.reshape(*boxes.shape[:2], *deltas.shape[1:])

    def loss(
        self, levels: Sequence[Tensor], proposals: Tensor, targets: Sequence[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Eq. 1 over sampled regions: cross-entropy, and smooth L1 on the boxes of the true class; both by their number.

        Args:
            proposals: (B, P, 4), filled up with empty boxes. The true boxes join them.
            targets: for each image {"boxes": (N, 4), "labels": int64 (N,)}.
        """
        boxes, owner = join_boxes(targets)
        regions = torch.cat([proposals, as_rows(targets)], dim=1)
        matched = match_regions(boxes, owner, regions, self.high, self.low, self.least)
        positive, negative = sample_anchors(matched, self.sampled, self.positive)
        image, row = (positive | negative).nonzero(as_tuple=True)
        chosen, box = regions[image, row], matched[image, row]
        logits, deltas = self.look(levels, torch.cat([image[:, None].to(chosen.dtype), chosen], dim=1))
        labels = torch.cat([t["labels"] for t in targets])
        is_object = box >= 0
        wanted = torch.zeros_like(box)  # background
        wanted[is_object] = labels[box[is_object]] + 1
        target = torch.zeros_like(chosen)
        target[is_object] = encode_boxes(boxes[box[is_object]], chosen[is_object], self.weights)
        classification, distance = fast_rcnn_loss(exact(logits), exact(deltas), wanted, target, self.box_beta)
        return {"classification": classification, "boxes": distance}

    @torch.no_grad()
    def postprocess(self, boxes: Tensor, logits: Tensor, deltas: Tensor, sizes: Tensor) -> list[dict[str, Tensor]]:
        """Sec. 2.4: every class moves the region to its box; non-maximum suppression within each class.

        Args:
            boxes: the regions (B, R, 4), filled up with empty boxes.
            logits, deltas: of `forward`.
            sizes: (B, 2) height and width of each image inside the canvas.
        """
        classes = logits.shape[-1] - 1
        scores = exact(logits).softmax(-1)[..., 1:]  # (B, R, K)
        moved = decode_boxes(exact(deltas)[:, :, 1:], boxes[:, :, None], self.weights)  # (B, R, K, 4)
        moved = clip_boxes(moved.flatten(1, 2), sizes).unflatten(1, (-1, classes))
        real = (boxes[..., 2:] > boxes[..., :2]).all(-1)[..., None]
        usable = (scores > self.score_threshold) & real & (moved[..., 2:] - moved[..., :2] >= 1e-2).all(-1)
        result = []
        for b, s, ok in zip(moved, scores, usable, strict=True):
            region, label = ok.nonzero(as_tuple=True)
            b, s = b[region, label], s[region, label]
            keep = batched_nms(b, s, label, self.nms_threshold)[: self.detections]
            result.append({"boxes": b[keep], "scores": s[keep], "labels": label[keep]})
        return result


def truncated_svd(layer: nn.Linear, rank: int) -> nn.Sequential:
    """Sec. 3.1, eq. 5: a dense layer u x v as two, of rank x v and u x rank, from the largest singular values."""
    u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    if not 1 <= rank <= len(s):
        raise ValueError(f"rank is {rank}; the layer {tuple(layer.weight.shape)} allows 1 to {len(s)}")
    first = nn.Linear(layer.in_features, rank, bias=False).to(layer.weight)
    second = nn.Linear(rank, layer.out_features).to(layer.weight)
    with torch.no_grad():
        first.weight.copy_(s[:rank, None] * v[:rank])
        second.weight.copy_(u[:, :rank])
        second.bias.copy_(layer.bias)
    return nn.Sequential(first, second)


# -- the detector ----------------------------------------------------------------------------------------------------


class FastRCNN(nn.Module):
    """Images (B, 3, H, W) and regions (B, P, 4) -> regions, class logits (B, P, K + 1), deltas (B, P, K + 1, 4); with targets,
    the losses. The contract of a detector is in `tasks/detection.py`.

    Args:
        backbone: images -> maps, with `out_channels`.
        roi_heads: the second stage.
        windows: the regions where none are given, as an `AnchorGenerator`.
        jitter: so many shaken copies of each true box are learned from as well where no regions are given.
    """

    def __init__(self, backbone: nn.Module, roi_heads: RoIHeads, windows: AnchorGenerator, jitter: int = 8) -> None:
        super().__init__()
        self.backbone, self.roi_heads, self.windows, self.jitter = backbone, roi_heads, windows, jitter

    @property
    def num_classes(self) -> int:
        return self.roi_heads.num_classes

    def forward(
        self, images: Tensor, targets: Sequence[dict[str, Tensor]] | None = None, proposals: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor] | dict[str, Tensor]:
        levels = self.backbone(images)
        if proposals is None:
            windows = grid_windows(self.windows, *images.shape[-2:], device=images.device)
            proposals = windows.expand(images.shape[0], -1, -1)
            if targets is not None:
                proposals = torch.cat([proposals, jittered(as_rows(targets), self.jitter)], dim=1)
        if targets is not None:
            return self.roi_heads.loss(levels, proposals, targets)
        return proposals, *self.roi_heads(levels, proposals)

    def postprocess(
        self, outputs: tuple[Tensor, Tensor, Tensor], sizes: Tensor, canvas: tuple[int, int]
    ) -> list[dict[str, Tensor]]:
        return self.roi_heads.postprocess(*outputs, sizes)

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh last layers for another number of classes."""
        self.roi_heads.reset_classifier(num_classes)

    def load_backbone(self, state_dict: dict[str, Tensor]) -> None:
        """Start from a classifier's weights; what of its later layers is the region's network goes there."""
        self.backbone.load_body(state_dict)
        self.roi_heads.box_head.load_classifier(state_dict)


# -- variants --------------------------------------------------------------------------------------------------------


def vgg16_parts(drop_rate: float = 0.5) -> tuple[VGGBody, RegionPool, TwoMLPHead]:
    """VGG-16 cut in two at its last pooling (sec. 2.2)."""
    body = VGGBody()
    head = TwoMLPHead(body.out_channels * 7 * 7, 4096, drop_rate)
    for layer in (head.fc6, head.fc7):
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
    return body, RegionPool(7, 16), head


def resnet50_parts() -> tuple[SingleLevel, RegionPool, StageHead]:
    """ResNet-50 cut in two after C4; regions of 14 x 14 (RoIAlign) go through the fifth stage."""
    network = resnet50()
    head = StageHead(network.layer4, network.stage_channels[3])
    return SingleLevel(network, 2), RegionPool(14, 16, align=True), head


def parts_of(backbone: str, stride: int, cells: int, num_features: int) -> tuple[Backbone, RegionPool, TwoMLPHead]:
    """Any classifier by name, its map of this stride, RoIAlign to `cells` x `cells`, and two dense layers."""
    body = at_strides(backbone, (stride,))
    return body, RegionPool(cells, stride, align=True), TwoMLPHead(body.out_channels[0] * cells**2, num_features)


def small_parts(width: int = 32, num_features: int = 128) -> tuple[VGGBody, RegionPool, TwoMLPHead]:
    """VGG in small for pictures of about 64 pixels: seven convolutions with batch norm, stride 8, 4 x 4 RoI max pooling."""
    w = width
    body = VGGBody((w // 2, POOL, w, POOL, 2 * w, 2 * w, POOL, 3 * w, 3 * w, 3 * w), batch_norm=True)
    return body, RegionPool(4, 8), TwoMLPHead(body.out_channels * 16, num_features)


def fast_rcnn_vgg16(
    num_classes: int = 20, drop_rate: float = 0.5, backbone: str | None = None, **options: float
) -> FastRCNN:
    """Model "L" of the paper (sec. 4.1): VGG-16 with 7 x 7 RoI max pooling. `options` as `RoIHeads`.

    `backbone`: another classifier by name, its map of stride 16, with RoIAlign and two layers of 1024 on each region.
    """
    body, pool, head = vgg16_parts(drop_rate) if backbone is None else parts_of(backbone, 16, 7, 1024)
    windows = AnchorGenerator((64,), [(64, 128, 256, 512)])
    return FastRCNN(body, RoIHeads(pool, head, num_classes, **options), windows)


def fast_rcnn_resnet50_c4(num_classes: int = 80, **options: float) -> FastRCNN:
    """ResNet-50 to C4, its fifth stage on each region. `options` as `RoIHeads`."""
    body, pool, head = resnet50_parts()
    windows = AnchorGenerator((64,), [(64, 128, 256, 512)])
    return FastRCNN(body, RoIHeads(pool, head, num_classes, **{"nms_threshold": 0.5} | options), windows)


def fast_rcnn_small(num_classes: int = 10, backbone: str | None = None, **options: float) -> FastRCNN:
    """The same detector in small, for objects of 20 to 60 pixels: windows of four sizes and three ratios every 8 pixels.

    `backbone`: another classifier by name, its map of stride 8.
    """
    body, pool, head = small_parts() if backbone is None else parts_of(backbone, 8, 4, 128)
    windows = AnchorGenerator((8,), [(24, 32, 42)], (1.0, 1.4, 2.0))
    return FastRCNN(body, RoIHeads(pool, head, num_classes, **options), windows)
