"""SSD: Single Shot MultiBox Detector (Liu et al., ECCV 2016, arXiv:1512.02325).

Convolutional predictors on maps of shrinking size (sec. 2.1), default boxes (sec. 2.2, eq. 4), matching, loss and hard
negative mining (sec. 2.2, eq. 1 to 3), VGG-16 with its dense layers turned into convolutions (sec. 3). Parameter names are
torchvision's; its published COCO weights load as they are. What differs from the paper:

- Column 0 of the logits is background, as in both codes; labels are counted from 0 without it: label k is column k + 1.
- Two objects whose best default box is the same one: the later keeps it, as torchvision has it. The released code matches
  greedily, so that each keeps one.
- An image without objects has no loss, as in both codes: its negatives would be three times nothing.
- At most 400 boxes of each class enter non-maximum suppression, as in both codes; the paper gives no number.
- fc6 and fc7 start from Xavier's weights unless `load_backbone` brings the classifier's; torchvision's always do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou

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
from paperzoo.papers.classification.vgg.model import PLANS, conv_stack, narrow

VARIANCES = (10.0, 10.0, 5.0, 5.0)  # offsets are divided by 0.1, 0.1, 0.2, 0.2: only the released code says so


# -- default boxes (sec. 2.2) ----------------------------------------------------------------------------------------


def even_scales(smallest: float, largest: float, levels: int) -> list[float]:
    """Eq. 4: s_k = s_min + (s_max - s_min) (k - 1) / (m - 1) for k = 1 … m."""
    return [smallest + (largest - smallest) * k / max(1, levels - 1) for k in range(levels)]


class DefaultBoxes:
    """The default boxes at every cell of every map. Holds no state.

    Args:
        steps: for each map the distance of its cells, in pixels.
        scales: s_k for each map, as a part of the image's sides, and one more for the last map's larger square.
        ratios: for each map the aspect ratios besides 1; each stands for itself and its inverse.
    """

    def __init__(self, steps: Sequence[int], scales: Sequence[float], ratios: Sequence[Sequence[float]]) -> None:
        if not len(steps) == len(ratios) == len(scales) - 1:
            raise ValueError(
                f"steps, ratios and scales have {len(steps)}, {len(ratios)} and {len(scales)} entries; "
                "give one for each map, and one more scale"
            )
        self.steps, self.shapes = tuple(steps), []
        for k, more in enumerate(ratios):
            s = scales[k]
            shapes = [(s, s), (math.sqrt(s * scales[k + 1]),) * 2]  # ratio 1, and the extra square s'_k
            for ratio in more:
                long, short = s * math.sqrt(ratio), s / math.sqrt(ratio)
                shapes += [(long, short), (short, long)]
            self.shapes.append(torch.tensor(shapes, dtype=torch.float32, device="cpu").clamp(max=1.0))
        self.per_cell = [len(shapes) for shapes in self.shapes]
        self._kept: dict[tuple, Tensor] = {}

    def __call__(
        self, grids: Sequence[tuple[int, int]], canvas: tuple[int, int], device: torch.device | str = "cpu"
    ) -> Tensor:
        """All boxes (A, 4) in pixels, map by map, row by row, cell by cell; some reach beyond the image.

        Args:
            grids: rows and columns of each map.
            canvas: height and width of the image.
        """
        key = (tuple(grids), tuple(canvas), str(device))
        if key not in self._kept:
            if len(self._kept) >= 32:
                self._kept.clear()
            self._kept[key] = self._make(grids, canvas).to(device)
        return self._kept[key]

    def _make(self, grids: Sequence[tuple[int, int]], canvas: tuple[int, int]) -> Tensor:
        (height, width), levels = canvas, []
        size = torch.tensor([width, height] * 2, dtype=torch.float32)
        for (rows, columns), step, shapes in zip(grids, self.steps, self.shapes, strict=True):
            y, x = (torch.arange(rows) + 0.5) / (height / step), (torch.arange(columns) + 0.5) / (width / step)
            y, x = torch.meshgrid(y, x, indexing="ij")
            centre = torch.stack([x, y], dim=-1).reshape(-1, 1, 2)  # ((i + 0.5) / |f_k|, (j + 0.5) / |f_k|)
            levels.append(torch.cat([centre - 0.5 * shapes, centre + 0.5 * shapes], dim=-1).reshape(-1, 4) * size)
        return torch.cat(levels)


def match_default_boxes(boxes: Tensor, owner: Tensor, images: int, defaults: Tensor, threshold: float = 0.5) -> Tensor:
    """Sec. 2.2: to each object its best default box, and every default box that overlaps one by more than 0.5.

    Arguments and result as `blocks.boxes.match_anchors`: int64 (images, A), a row of `boxes` or BACKGROUND.
    """
    matched = match_anchors(boxes, owner, images, defaults, threshold, threshold, keep_best=False)
    if not len(boxes):
        return matched
    place = owner * len(defaults) + box_iou(boxes, defaults).argmax(1)
    rows = torch.arange(len(boxes), device=boxes.device)
    best = torch.full_like(matched, BACKGROUND).flatten().scatter_reduce(0, place, rows, "amax").view_as(matched)
    return torch.where(best >= 0, best, matched)


def hard_negatives(losses: Tensor, positive: Tensor, ratio: float = 3.0) -> Tensor:
    """Sec. 2.2: of each image the background boxes with the highest loss, at most `ratio` for one positive: bool (B, A).

    Args:
        losses: (B, A), the confidence loss of each default box.
        positive: bool (B, A), the matched ones.
    """
    mined = losses.detach().masked_fill(positive, -math.inf)
    rank = mined.argsort(dim=1, descending=True).argsort(dim=1)
    return (rank < ratio * positive.sum(1, keepdim=True)) & ~positive


# -- networks (sec. 2.1, 3) ------------------------------------------------------------------------------------------


class VGGMaps(nn.Module):
    """VGG cut into conv4_3 and the rest, and smaller and smaller maps behind it: images (B, 3, H, W) -> a list of maps.

    Args:
        plan: of `classification/vgg`, with five poolings.
        fc_channels: of fc6 and fc7 (1024, every fourth of VGG's).
        dilation: of fc6, which keeps its field of view as pool5 no longer halves (6, as in DeepLab).
        extras: for each further map the channels of its 1x1 and its larger convolution, whose kernel size, its stride and
            its padding.
        batch_norm: after each of VGG's convolutions; the paper has none.
    """

    def __init__(
        self,
        plan: Sequence[int],
        extras: Sequence[tuple[int, int, int, int, int]],
        fc_channels: int = 1024,
        dilation: int = 6,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        layers = list(conv_stack(tuple(plan), batch_norm))
        pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
        layers[pools[2]].ceil_mode = True  # 75 -> 38 cells, as the paper's figure 2
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        fine, coarse = (
            layers[pool - 2 - batch_norm].out_channels for pool in (pools[3], pools[4])
        )  # of conv4_3, conv5_3
        self.scale_weight = nn.Parameter(torch.full((fine,), 20.0))  # sec. 3.1
        self.features = nn.Sequential(*layers[: pools[3]])
        dense = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1),  # pool5: from 2x2 - s2 to 3x3 - s1
            nn.Conv2d(coarse, fc_channels, 3, padding=dilation, dilation=dilation),
            nn.ReLU(inplace=True),
            nn.Conv2d(fc_channels, fc_channels, 1),
            nn.ReLU(inplace=True),
        )
        xavier(dense)
        self.extra = nn.ModuleList([nn.Sequential(*layers[pools[3] : pools[4]], dense)])
        self.out_channels = [fine, fc_channels]
        add_extras(self.extra, self.out_channels, extras)
        self.extras = tuple(extras)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.features(images)
        maps = [self.scale_weight[:, None, None] * F.normalize(x)]  # ParseNet's L2 norm over channels, at each cell
        for block in self.extra:
            x = block(x)
            maps.append(x)
        return maps

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Rows and columns of each map for an image of this size."""
        fine = [-(-(side // 4) // 2) for side in (height, width)]
        return extra_grids([tuple(fine), tuple(side // 2 for side in fine)], self.extras)

    def load_body(self, state_dict: dict[str, Tensor]) -> None:
        """A VGG classifier's weights; fc6 and fc7 become convolutions by taking every n-th of their numbers (sec. 3)."""
        cut, own = len(self.features), self.state_dict()
        for name in own:
            parts = name.split(".")
            if parts[0] == "features":
                source = name
            elif parts[:2] == ["extra", "0"] and len(parts) == 4:
                source = f"features.{int(parts[2]) + cut}.{parts[3]}"
            else:
                continue
            if source not in state_dict and not name.endswith("num_batches_tracked"):
                raise ValueError(f"state_dict lacks {source}; weights of the same VGG are needed")
            own[name] = state_dict.get(source, own[name])
        dense = f"extra.0.{len(self.extra[0]) - 1}"
        if "classifier.0.weight" in state_dict and "classifier.3.weight" in state_dict:
            for place, source in ((1, "classifier.0"), (3, "classifier.3")):
                wanted, weight = own[f"{dense}.{place}.weight"], state_dict[f"{source}.weight"]
                kernel = weight.reshape(len(weight), *dense_shape(weight, wanted))
                rows = len(weight) // len(wanted)
                every = [rows, 1 if place == 1 else rows, *[max(1, kernel.shape[2] // 2)] * 2]
                own[f"{dense}.{place}.weight"] = kernel[:: every[0], :: every[1], :: every[2], :: every[3]]
                own[f"{dense}.{place}.bias"] = state_dict[f"{source}.bias"][::rows]
        self.load_state_dict(own)


def dense_shape(weight: Tensor, wanted: Tensor) -> tuple[int, int, int]:
    """A dense layer's inputs as channels, rows and columns: fc6 sees VGG's last 7x7 map, fc7 a vector."""
    side = 1 if wanted.shape[-1] == 1 else math.isqrt(weight.shape[1] // wanted.shape[1])
    return weight.shape[1] // side**2, side, side


class StageMaps(nn.Module):
    """Any classifier with `stages` as the base network ("other networks should also produce good results", sec. 2).

    Args:
        body: has `stages(x)` and `stage_channels`; its pooling and last layer are dropped.
        stages: which stages predict, counted from 0.
        strides: of those stages.
        extras: as `VGGMaps`, behind the last of them.
    """

    def __init__(
        self,
        body: nn.Module,
        stages: Sequence[int],
        strides: Sequence[int],
        extras: Sequence[tuple[int, int, int, int, int]] = (),
    ) -> None:
        super().__init__()
        self.body, self.taken, self.strides, self.extras = headless(body), tuple(stages), tuple(strides), tuple(extras)
        self.out_channels = [body.stage_channels[i] for i in stages]
        self.extra = nn.ModuleList()
        add_extras(self.extra, self.out_channels, extras)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.body.stages(images)
        maps = [maps[i] for i in self.taken]
        for block in self.extra:
            maps.append(block(maps[-1]))
        return maps

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Rows and columns of each map for an image of this size."""
        return extra_grids([(-(-height // s), -(-width // s)) for s in self.strides], self.extras)

    def load_body(self, state_dict: dict[str, Tensor]) -> None:
        """A classifier's weights; its last layer is left out."""
        load_body(self.body, state_dict)


def add_extras(blocks: nn.ModuleList, channels: list[int], extras: Sequence[tuple[int, int, int, int, int]]) -> None:
    """Append to `blocks`, and to the list of their channels, conv8 and its followers."""
    for middle, out, kernel, stride, padding in extras:
        block = nn.Sequential(
            nn.Conv2d(channels[-1], middle, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, out, kernel, stride, padding),
            nn.ReLU(inplace=True),
        )
        xavier(block)
        blocks.append(block)
        channels.append(out)


def extra_grids(
    grids: list[tuple[int, int]], extras: Sequence[tuple[int, int, int, int, int]]
) -> list[tuple[int, int]]:
    for _, _, kernel, stride, padding in extras:
        grids = [*grids, tuple((side + 2 * padding - kernel) // stride + 1 for side in grids[-1])]
    return grids


def xavier(module: nn.Module) -> None:
    """Sec. 3: the new layers start from Xavier's weights."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


class ScoringHead(nn.Module):
    """A 3x3 convolution for each map (sec. 2.1), nothing shared: maps (B, C_k, H_k, W_k) -> (B, A, columns)."""

    def __init__(self, channels: Sequence[int], per_cell: Sequence[int], columns: int) -> None:
        super().__init__()
        self.module_list = nn.ModuleList(
            nn.Conv2d(c, n * columns, 3, padding=1) for c, n in zip(channels, per_cell, strict=True)
        )
        self.columns = columns
        xavier(self.module_list)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        scores = [convolution(x) for convolution, x in zip(self.module_list, maps, strict=True)]
        return flatten_predictions(scores, self.columns)


class Heads(nn.Module):
    """Class logits (B, A, num_classes + 1) and box offsets (B, A, 4)."""

    def __init__(self, channels: Sequence[int], per_cell: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.classification_head = ScoringHead(channels, per_cell, num_classes + 1)
        self.regression_head = ScoringHead(channels, per_cell, 4)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self.classification_head(maps), self.regression_head(maps)


# -- the detector ----------------------------------------------------------------------------------------------------


class SSD(nn.Module):
    """Normalised images (B, 3, H, W) -> class logits (B, A, num_classes + 1) and box offsets (B, A, 4); with targets, the losses.

    The contract of a detector is in `tasks/detection.py`. All images of a batch are resized to the same square
    (`resize="square"`, `multiple=1` in its settings), as the default boxes are parts of the image's sides.

    Args:
        backbone: images -> maps, with `out_channels` for each of them and `grids(height, width)`.
        boxes: the default boxes of those maps.
        num_classes: without background.
        threshold: IoU from which a default box is an object.
        negatives: for each matched default box of an image, so many of its background ones are learned from.
        score_threshold: detections below it are dropped.
        candidates: boxes of each class that are looked at.
        nms_threshold: detections of one class that overlap more are one.
        detections: the most that an image can have.
    """

    def __init__(
        self,
        backbone: nn.Module,
        boxes: DefaultBoxes,
        num_classes: int,
        *,
        threshold: float = 0.5,
        negatives: float = 3.0,
        score_threshold: float = 0.01,
        candidates: int = 400,
        nms_threshold: float = 0.45,
        detections: int = 200,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be 1 or more")
        self.backbone, self.boxes, self.num_classes = backbone, boxes, num_classes
        self.head = Heads(backbone.out_channels, boxes.per_cell, num_classes)
        self.threshold, self.negatives = threshold, negatives
        self.score_threshold, self.candidates = score_threshold, candidates
        self.nms_threshold, self.detections = nms_threshold, detections

    def forward(
        self, images: Tensor, targets: Sequence[dict[str, Tensor]] | None = None
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        canvas = tuple(images.shape[-2:])
        grids = self.backbone.grids(*canvas)
        if min(min(grid) for grid in grids) < 1:
            raise ValueError(f"images of {canvas} pixels are too small: the maps would have {grids} cells")
        outputs = self.head(self.backbone(images))
        return outputs if targets is None else self.loss(outputs, targets, canvas)

    def default_boxes(self, canvas: tuple[int, int], device: torch.device | str) -> Tensor:
        return self.boxes(self.backbone.grids(*canvas), canvas, device)

    def loss(
        self, outputs: tuple[Tensor, Tensor], targets: Sequence[dict[str, Tensor]], canvas: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Eq. 1: softmax loss over the matched and the mined boxes, smooth L1 over the matched, divided by their number N."""
        logits, offsets = (output.float() for output in outputs)
        boxes, owner = join_boxes(targets)
        labels = torch.cat([t["labels"] for t in targets])
        defaults = self.default_boxes(canvas, logits.device)
        matched = match_default_boxes(boxes, owner, len(targets), defaults, self.threshold)  # (B, A)
        positive = matched >= 0
        image, default = positive.nonzero(as_tuple=True)
        box, count = matched[image, default], positive.sum().clamp(min=1)

        wanted = torch.zeros_like(matched)
        wanted[image, default] = labels[box] + 1
        confidence = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)  # eq. 3
        chosen = positive | hard_negatives(confidence, positive, self.negatives)

        goal = encode_boxes(boxes[box], defaults[default], VARIANCES)
        location = F.smooth_l1_loss(offsets[image, default], goal, reduction="sum")  # eq. 2
        return {"classification": (confidence * chosen).sum() / count, "boxes": location / count}

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh class predictors for another number of classes."""
        weight = self.head.classification_head.module_list[0].weight
        fresh = ScoringHead(self.backbone.out_channels, self.boxes.per_cell, num_classes + 1)
        self.head.classification_head, self.num_classes = fresh.to(weight), num_classes

    def load_backbone(self, state_dict: dict[str, Tensor]) -> None:
        """Start from a classifier's weights."""
        self.backbone.load_body(state_dict)

    @torch.no_grad()
    def postprocess(
        self, outputs: tuple[Tensor, Tensor], sizes: Tensor, canvas: tuple[int, int]
    ) -> list[dict[str, Tensor]]:
        """Sec. 3: above 0.01, non-maximum suppression at 0.45 within each class, the best 200 of an image.

        Args:
            outputs: of `forward`.
            sizes: (B, 2) height and width of each image inside the canvas.
            canvas: height and width of the batch's images.

        Returns:
            for each image boxes (N, 4) in pixels of the canvas, scores (N,), labels (N,); best first.
        """
        logits, offsets = (output.float() for output in outputs)
        boxes = clip_boxes(decode_boxes(offsets, self.default_boxes(canvas, logits.device), VARIANCES), sizes)
        scores = logits.softmax(-1)[..., 1:]
        scores, rows = scores.topk(min(self.candidates, scores.shape[1]), dim=1)  # (B, 400, K)
        columns = torch.arange(self.num_classes, device=scores.device).expand(scores.shape[1], -1)
        result = []
        for b, s, row in zip(boxes, scores, rows, strict=True):
            certain = s > self.score_threshold
            b, s, k = b[row[certain]], s[certain], columns[certain]
            keep = batched_nms(b, s, k, self.nms_threshold)[: self.detections]
            result.append({"boxes": b[keep], "scores": s[keep], "labels": k[keep]})
        return result


# -- variants --------------------------------------------------------------------------------------------------------

EXTRAS_300 = ((256, 512, 3, 2, 1), (128, 256, 3, 2, 1), (128, 256, 3, 1, 0), (128, 256, 3, 1, 0))
EXTRAS_512 = ((256, 512, 3, 2, 1), *((128, 256, 3, 2, 1),) * 3, (128, 256, 4, 1, 1))
# eq. 4 in whole hundredths, as the released code rounds it; on conv4_3 about half of s_min
VOC_300 = (0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05)  # sec. 3.1: s_min 0.2, 0.1 on conv4_3
COCO_300 = (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05)  # sec. 3.4: s_min 0.15, 0.07 on conv4_3
VOC_512 = (0.07, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05)  # sec. 3.1, footnote
COCO_512 = (0.04, 0.1, 0.26, 0.42, 0.58, 0.74, 0.9, 1.06)  # sec. 3.4: s_min 0.1, 0.04 on conv4_3


def _maps(backbone: str | None, strides: Sequence[int], extras: Sequence[tuple[int, int, int, int, int]]) -> nn.Module:
    """VGG-16's maps, or those that another classifier has at these strides, with as many extras fewer as it has maps more."""
    if backbone is None:
        return VGGMaps(PLANS["D"], extras)
    return StageMaps(at_strides(backbone, strides), range(len(strides)), strides, extras[len(strides) - 2 :])


def _ssd300(num_classes: int, scales: Sequence[float], backbone: str | None, options: dict[str, float]) -> SSD:
    boxes = DefaultBoxes((8, 16, 32, 64, 100, 300), scales, ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,)))
    return SSD(_maps(backbone, (8, 16, 32), EXTRAS_300), boxes, num_classes, **options)


def _ssd512(num_classes: int, scales: Sequence[float], backbone: str | None, options: dict[str, float]) -> SSD:
    boxes = DefaultBoxes((8, 16, 32, 64, 128, 256, 512), scales, ((2,), *((2, 3),) * 4, (2,), (2,)))
    return SSD(_maps(backbone, (8, 16, 32), EXTRAS_512), boxes, num_classes, **options)


def ssd300_vgg16(num_classes: int = 90, backbone: str | None = None, **options: float) -> SSD:
    """SSD300 with the default boxes for COCO; 8732 of them. 90 classes are COCO's category numbers less 1, as torchvision's.

    `options` as `SSD`. `backbone`: another classifier by name, its maps of strides 8, 16 and 32 in the place of VGG's.
    """
    return _ssd300(num_classes, COCO_300, backbone, options)


def ssd512_vgg16(num_classes: int = 80, backbone: str | None = None, **options: float) -> SSD:
    """SSD512 with the default boxes for COCO; 24,564 of them, with conv12_2. `options` as `SSD`, `backbone` as `ssd300_vgg16`."""
    return _ssd512(num_classes, COCO_512, backbone, options)


def ssd300_vgg16_voc(num_classes: int = 20, backbone: str | None = None, **options: float) -> SSD:
    """SSD300 with the default boxes for Pascal VOC, the paper's main result. `options` as `SSD`, `backbone` as `ssd300_vgg16`."""
    return _ssd300(num_classes, VOC_300, backbone, options)


def ssd512_vgg16_voc(num_classes: int = 20, backbone: str | None = None, **options: float) -> SSD:
    """SSD512 with the default boxes for Pascal VOC. `options` as `SSD`, `backbone` as `ssd300_vgg16`."""
    return _ssd512(num_classes, VOC_512, backbone, options)


def ssd64_slim(num_classes: int = 10, backbone: str | None = None, **options: float) -> SSD:
    """Not of the paper: the same detector for pictures of 64 pixels, on VGG-11 at a quarter of its width, with batch norm.

    Maps of 8, 4, 2 and 1 cells. On so few, fc6 has no use for dilation. `options` as `SSD`, `backbone` as `ssd300_vgg16`.
    """
    extras = ((64, 128, 3, 2, 1), (64, 128, 3, 2, 1))
    if backbone is None:
        maps: nn.Module = VGGMaps(narrow(PLANS["A"], 4), extras, fc_channels=128, dilation=1, batch_norm=True)
    else:
        maps = StageMaps(at_strides(backbone, (8, 16)), (0, 1), (8, 16), extras)
    boxes = DefaultBoxes((8, 16, 32, 64), [*even_scales(0.35, 0.8, 4), 0.95], ((2,), (2, 3), (2, 3), (2,)))
    return SSD(maps, boxes, num_classes, **options)
