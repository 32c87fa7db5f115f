"""YOLOv3: An Incremental Improvement (Redmon & Farhadi, 2018, arXiv:1804.02767).

Darknet-53 (table 1), three maps of strides 32, 16 and 8 that are joined from coarse to fine (sec. 2.3), and on each of their
cells three boxes: a prior's size, a place inside the cell, a logistic objectness and independent logistic classes.

Parameter names are those of mmdet's `yolov3_d53` checkpoints, which load unchanged; `from_official` converts timm's `darknet53`,
`darknet_file.py` reads the authors' own `.weights` files. Images are RGB in [0, 1] (`normalise="none"`). Where the paper is
silent the authors' released code is followed, and where the two differ:

- Which prior an object takes: the paper says the one that overlaps it most; in the released code, as in the k-means that made
  the priors, only shapes are compared, not places. So here. (mmdet compares priors at the middle of their cells.)
- Which cells are ignored: the paper says those whose prior overlaps an object by more than 0.5, and so it is here; the released
  code takes the predicted box instead of the prior.
- An object's box loss is weighted with 2 - w h, its share of the image, in the released code and here; the paper is silent.
- Predictors start from small weights and an objectness of 0.01, as later detectors do; the released code starts at one half.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou

from paperzoo.blocks.backbones import at_strides, load_body
from paperzoo.blocks.boxes import BACKGROUND, IGNORED, clip_boxes, flatten_predictions, join_boxes

STRIDES = (32, 16, 8)
ANCHORS = (
    ((116, 90), (156, 198), (373, 326)),
    ((30, 61), (62, 45), (59, 119)),
    ((10, 13), (16, 30), (33, 23)),
)
"""Sec. 2.3: width and height in pixels of COCO's nine clusters, three for each stride."""

# -- Darknet-53 (table 1) ----------------------------------------------------------------------------------------------


class ConvModule(nn.Module):
    """Convolution, batch norm, leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, slope: float = 0.1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.activate = nn.LeakyReLU(slope, inplace=True)
        nn.init.kaiming_normal_(self.conv.weight)  # variance 2 / fan-in, as the released code

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.bn(self.conv(x)))


class ResBlock(nn.Module):
    """1x1 to half the channels, 3x3 back, a shortcut around both."""

    def __init__(self, channels: int, slope: float = 0.1) -> None:
        super().__init__()
        self.conv1 = ConvModule(channels, channels // 2, 1, slope=slope)
        self.conv2 = ConvModule(channels // 2, channels, 3, slope=slope)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))


class Darknet(nn.Module):
    """Images (B, in_channels, H, W) in [0, 1] -> logits (B, num_classes).

    Args:
        depths: residual blocks at each of the five resolutions, of strides 2 to 32.
        widths: channels of the first convolution and of the five resolutions.
        num_classes: columns of the logits; 0 for no head.
        slope: of the leaky ReLU for negative values; timm's weights were trained with 0.01.
    """

    def __init__(
        self,
        depths: Sequence[int] = (1, 2, 8, 8, 4),
        widths: Sequence[int] = (32, 64, 128, 256, 512, 1024),
        num_classes: int = 1000,
        in_channels: int = 3,
        slope: float = 0.1,
    ) -> None:
        super().__init__()
        if len(depths) != 5 or len(widths) != 6:
            raise ValueError(f"depths has five entries and widths six, got {len(depths)} and {len(widths)}")
        self.stage_channels, self.stage_strides = list(widths[1:]), [2, 4, 8, 16, 32]
        self.num_features = widths[-1]
        self.conv1 = ConvModule(in_channels, widths[0], 3, slope=slope)
        for k, depth in enumerate(depths):
            layers = [("conv", ConvModule(widths[k], widths[k + 1], 3, 2, slope))]
            layers += [(f"res{i}", ResBlock(widths[k + 1], slope)) for i in range(depth)]
            self.add_module(f"conv_res_block{k + 1}", nn.Sequential(OrderedDict(layers)))
        self.reset_classifier(num_classes)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The outputs at the five resolutions."""
        maps = [self.conv1(x)]
        for k in range(1, 6):
            maps.append(getattr(self, f"conv_res_block{k}")(maps[-1]))
        return maps[1:]

    def embed(self, x: Tensor) -> Tensor:
        """Pooled features (B, num_features)."""
        return self.stages(x)[-1].mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.embed(x))

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer for another number of classes; 0 for none."""
        weight = self.conv1.conv.weight
        self.fc = nn.Linear(self.num_features, num_classes).to(weight) if num_classes else nn.Identity()


# -- neck and head (sec. 2.3) ------------------------------------------------------------------------------------------


class DetectionBlock(nn.Module):
    """Five convolutions, 1x1 and 3x3 in turn."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = ConvModule(inputs, outputs, 1)
        self.conv2 = ConvModule(outputs, 2 * outputs, 3)
        self.conv3 = ConvModule(2 * outputs, outputs, 1)
        self.conv4 = ConvModule(outputs, 2 * outputs, 3)
        self.conv5 = ConvModule(2 * outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv5(self.conv4(self.conv3(self.conv2(self.conv1(x)))))


class YOLOV3Neck(nn.Module):
    """Maps of strides 8, 16, 32 -> maps of strides 32, 16, 8: each doubled in size and joined to the next finer one.

    Args:
        inputs: channels of the maps of strides 32, 16, 8.
        outputs: channels of the answers, alike.
    """

    def __init__(self, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        super().__init__()
        self.detect1 = DetectionBlock(inputs[0], outputs[0])
        for i in (1, 2):
            self.add_module(f"conv{i}", ConvModule(outputs[i - 1], outputs[i], 1))
            self.add_module(f"detect{i + 1}", DetectionBlock(inputs[i] + outputs[i], outputs[i]))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        answers = [self.detect1(maps[-1])]
        for i, finer in ((1, maps[-2]), (2, maps[-3])):
            x = getattr(self, f"conv{i}")(answers[-1])
            x = F.interpolate(x, size=finer.shape[-2:], mode="nearest")
            answers.append(getattr(self, f"detect{i + 1}")(torch.cat([x, finer], dim=1)))
        return answers


class YOLOV3Head(nn.Module):
    """Maps of strides 32, 16, 8 -> class logits (B, A, num_classes), objectness (B, A), boxes as they come (B, A, 4).

    A counts level by level, row by row, cell by cell, prior by prior.
    """

    def __init__(self, inputs: Sequence[int], num_classes: int, priors: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be 1 or more")
        self.num_classes, self.priors = num_classes, priors
        self.convs_bridge = nn.ModuleList(ConvModule(c, 2 * c, 3) for c in inputs)
        self.convs_pred = nn.ModuleList(nn.Conv2d(2 * c, priors * (5 + num_classes), 1) for c in inputs)
        for layer in self.convs_pred:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
            nn.init.constant_(layer.bias.data.view(priors, -1)[:, 4], -math.log((1 - 0.01) / 0.01))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        levels = [pred(bridge(x)) for pred, bridge, x in zip(self.convs_pred, self.convs_bridge, maps, strict=True)]
        flat = flatten_predictions(levels, 5 + self.num_classes)
        return flat[..., 5:], flat[..., 4], flat[..., :4]


# -- priors and boxes (sec. 2.1) ---------------------------------------------------------------------------------------


def cells(canvas: tuple[int, int], anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the head's A boxes start from: corners of their cells (A, 2) in pixels, strides (A,), priors' sizes (A, 2)."""
    corners, strides, sizes = [], [], []
    for stride, level in zip(STRIDES, anchors, strict=True):
        rows, columns = (-(-side // stride) for side in canvas)
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        corner = stride * torch.stack([x, y], dim=-1).reshape(-1, 1, 2).expand(-1, len(level), -1)
        corners.append(corner.reshape(-1, 2).to(anchors.device, torch.float32))
        strides.append(torch.full((len(corners[-1]),), float(stride), device=anchors.device))
        sizes.append(level.repeat(rows * columns, 1))
    return torch.cat(corners), torch.cat(strides), torch.cat(sizes)


def decode(raw: Tensor, corners: Tensor, strides: Tensor, sizes: Tensor) -> Tensor:
    """b_x = sigma(t_x) + c_x, b_w = p_w e^t_w: boxes as they come (…, A, 4) -> x1 y1 x2 y2 in pixels."""
    centre = corners + raw[..., :2].sigmoid() * strides[:, None]
    half = 0.5 * sizes * raw[..., 2:].exp()
    return torch.cat([centre - half, centre + half], dim=-1)


def encode(boxes: Tensor, corners: Tensor, strides: Tensor, sizes: Tensor) -> Tensor:
    """The inverse of `decode`, one box each (N, 4): sigma(t_x), sigma(t_y), t_w, t_h."""
    extent = boxes[:, 2:] - boxes[:, :2]
    centre = boxes[:, :2] + 0.5 * extent
    return torch.cat([(centre - corners) / strides[:, None], (extent / sizes).log()], dim=1)


@torch.no_grad()
def assign(
    boxes: Tensor, owner: Tensor, images: int, canvas: tuple[int, int], anchors: Tensor, threshold: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Sec. 2.1: one prior for each object, in the cell that has its centre; none for those that overlap one anyhow.

    Args:
        boxes, owner: (T, 4) in pixels and int64 (T,), the objects of all images and the image of each.
        images: how many images B there are.
        anchors: (levels, priors, 2), widths and heights.
        threshold: other boxes whose prior, in the middle of its cell, has a larger IoU with an object are ignored.

    Returns:
        int64 (B, A): a row of `boxes` (of several, the last), BACKGROUND or IGNORED; and int64 (T,), the place of each object in A.
    """
    corners, strides, sizes = cells(canvas, anchors)
    matched = torch.full((images, len(strides)), BACKGROUND, device=boxes.device)
    if not len(boxes):
        return matched, owner
    extent, centre = boxes[:, 2:] - boxes[:, :2], 0.5 * (boxes[:, :2] + boxes[:, 2:])
    every = anchors.flatten(0, 1)
    shared = torch.minimum(extent[:, None], every).prod(-1)
    best = (shared / (extent.prod(-1)[:, None] + every.prod(-1) - shared)).argmax(1)  # IoU of shapes
    level, prior = best // anchors.shape[1], best % anchors.shape[1]
    grids = torch.tensor([[-(-side // s) for side in canvas] for s in STRIDES], device=boxes.device)  # rows, columns
    first = F.pad(grids.prod(1).cumsum(0), (1, 0))[:-1]
    stride = torch.tensor(STRIDES, device=boxes.device)[level]
    column, row = (centre / stride[:, None]).long().clamp(min=0).minimum(grids[level].flip(1) - 1).unbind(1)
    place = (first[level] + row * grids[level, 1] + column) * anchors.shape[1] + prior

    middle = corners + 0.5 * strides[:, None]
    overlap = box_iou(boxes, torch.cat([middle - 0.5 * sizes, middle + 0.5 * sizes], dim=1))  # (T, A)
    most = overlap.new_zeros(matched.shape).scatter_reduce(0, owner[:, None].expand_as(overlap), overlap, "amax")
    matched = torch.where(most > threshold, IGNORED, matched)
    rows = torch.arange(len(boxes), device=boxes.device)
    flat = owner * matched.shape[1] + place
    taken = torch.full_like(matched, -1).flatten().scatter_reduce(0, flat, rows, "amax").view_as(matched)
    return torch.where(taken >= 0, taken, matched), place


# -- the detector ------------------------------------------------------------------------------------------------------


class YOLOV3(nn.Module):
    """RGB images (B, 3, H, W) in [0, 1] -> the head's class logits, objectness and boxes; with targets, the losses.

    The contract of a detector is in `tasks/detection.py` (with `normalise="none"`).

    Args:
        body: images -> maps of which the last three have strides 8, 16, 32; with `stages` and `stage_channels`.
        widths: channels of the head's answers at strides 32, 16, 8.
        anchors: for each of these strides, (width, height) in pixels of as many priors.
        score_threshold: detections below it are dropped.
        nms_threshold: detections of one class that overlap more are one.
        candidates: so many of the best scores of an image go into non-maximum suppression.
        detections: so many of the best are left.
    """

    def __init__(
        self,
        body: nn.Module,
        widths: Sequence[int] = (512, 256, 128),
        num_classes: int = 80,
        anchors: Sequence[Sequence[Sequence[float]]] = ANCHORS,
        *,
        score_threshold: float = 0.005,
        nms_threshold: float = 0.45,
        candidates: int = 1000,
        detections: int = 100,
    ) -> None:
        super().__init__()
        sizes = torch.tensor(anchors, dtype=torch.float32)
        if sizes.ndim != 3 or len(sizes) != 3 or sizes.shape[2] != 2:
            raise ValueError("anchors has three lists, for strides 32, 16, 8, of equally many (width, height)")
        self.backbone = body
        self.neck = YOLOV3Neck(body.stage_channels[:-4:-1], widths)
        self.bbox_head = YOLOV3Head(widths, num_classes, sizes.shape[1])
        self.register_buffer("anchors", sizes, persistent=False)  # checkpoints have none
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.candidates, self.detections = candidates, detections

    @property
    def num_classes(self) -> int:
        return self.bbox_head.num_classes

    def forward(
        self, images: Tensor, targets: Sequence[dict[str, Tensor]] | None = None
    ) -> tuple[Tensor, Tensor, Tensor] | dict[str, Tensor]:
        outputs = self.bbox_head(self.neck(self.backbone.stages(images)))
        return outputs if targets is None else self.loss(outputs, targets, tuple(images.shape[-2:]))

    def loss(
        self, outputs: tuple[Tensor, Tensor, Tensor], targets: Sequence[dict[str, Tensor]], canvas: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Sec. 2.1 and 2.2, summed over objects and cells, for a mean image.

        The gradient with respect to t_x is to be t^ - t (sec. 2.1). For a place that comes out of a sigmoid this is what cross-entropy
        has; for sizes, half the squared error.
        """
        classes, objectness, raw = (output.float() for output in outputs)
        boxes, owner = join_boxes(targets)
        labels = torch.cat([t["labels"] for t in targets])
        count = len(targets)
        matched, place = assign(boxes, owner, count, canvas, self.anchors)
        # an object with several labels, or two objects at one place, have several classes: that is why they are independent
        wanted = torch.zeros_like(classes)
        wanted[owner, place, labels] = 1.0
        image, cell = (matched >= 0).nonzero(as_tuple=True)
        box = boxes[matched[image, cell]]
        goal = encode(box, *(part[cell] for part in cells(canvas, self.anchors)))
        share = (box[:, 2:] - box[:, :2]).prod(1) / (canvas[0] * canvas[1])
        weight = (2 - share)[:, None]  # small objects count up to twice as much
        found = raw[image, cell]
        centre = F.binary_cross_entropy_with_logits(found[:, :2], goal[:, :2], weight.expand(-1, 2), reduction="sum")
        size = 0.5 * (weight * (found[:, 2:] - goal[:, 2:]).square()).sum()
        entropy = F.binary_cross_entropy_with_logits(objectness, (matched >= 0).float(), reduction="none")
        return {
            "boxes": (centre + size) / count,
            "objectness": (entropy * (matched != IGNORED)).sum() / count,
            "classification": F.binary_cross_entropy_with_logits(
                classes[image, cell], wanted[image, cell], reduction="sum"
            )
            / count,
        }

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh class predictors for another number of classes; those of boxes and objectness are kept."""
        old = self.bbox_head
        widths = [layer.conv.in_channels for layer in old.convs_bridge]
        fresh = YOLOV3Head(widths, num_classes, old.priors).convs_pred
        with torch.no_grad():
            for new, layer in zip(fresh, old.convs_pred, strict=True):
                for name in ("weight", "bias"):
                    parts = [getattr(x, name).view(old.priors, -1, *getattr(x, name).shape[1:]) for x in (new, layer)]
                    parts[0][:, :5] = parts[1][:, :5]
        old.convs_pred, old.num_classes = fresh.to(old.convs_pred[0].weight), num_classes

    def load_backbone(self, state_dict: dict[str, Tensor]) -> None:
        """Weights of a classifier with the same body; its head is left out."""
        if isinstance(self.backbone, Darknet):
            load_body(self.backbone, from_official(state_dict))
        else:
            self.backbone.load_body(state_dict)

    @torch.no_grad()
    def postprocess(
        self, outputs: tuple[Tensor, Tensor, Tensor], sizes: Tensor, canvas: tuple[int, int]
    ) -> list[dict[str, Tensor]]:
        """Every box with every class whose score, objectness times class, is high enough; suppression within each class.

        Args:
            outputs: of `forward`.
            sizes: (B, 2) height and width of each image inside the canvas.
            canvas: height and width of the batch's images.

        Returns:
            for each image boxes (N, 4) in pixels of the canvas, scores (N,), labels (N,); best first.
        """
        classes, objectness, raw = (output.float() for output in outputs)
        boxes = decode(raw, *cells(canvas, self.anchors))
        scores = (objectness.sigmoid()[..., None] * classes.sigmoid()).flatten(1)  # (B, A * num_classes)
        scores, at = scores.topk(min(self.candidates, scores.shape[1]), dim=1)
        result = []
        for b, s, i, size in zip(boxes, scores, at, sizes, strict=True):
            certain = s > self.score_threshold
            s, i = s[certain], i[certain]
            b, k = b[i // self.num_classes], i % self.num_classes
            keep = batched_nms(b, s, k, self.nms_threshold)[: self.detections]
            result.append({"boxes": clip_boxes(b[keep][None], size[None])[0], "scores": s[keep], "labels": k[keep]})
        return result


# -- variants ----------------------------------------------------------------------------------------------------------


def darknet53(num_classes: int = 1000, in_channels: int = 3, slope: float = 0.1) -> Darknet:
    """The classifier of table 1, for 256 pixels. timm's weights go with `slope=0.01`."""
    return Darknet(num_classes=num_classes, in_channels=in_channels, slope=slope)


def yolov3(num_classes: int = 80, backbone: str | None = None, **options) -> YOLOV3:
    """YOLOv3 for 320 to 608 pixels. `options` as `YOLOV3`; `backbone`: another classifier by name, its maps of strides 8, 16, 32."""
    body = Darknet(num_classes=0) if backbone is None else at_strides(backbone, STRIDES[::-1])
    return YOLOV3(body, num_classes=num_classes, **options)


def yolov3_slim(num_classes: int = 10, backbone: str | None = None, **options) -> YOLOV3:
    """Not of the paper: the same network with fewer layers and channels, for pictures of 64 pixels. `options` as `yolov3`."""
    slim = lambda: Darknet((1, 1, 1, 1, 1), (8, 16, 32, 64, 96, 128), num_classes=0)  # noqa: E731
    body = slim() if backbone is None else at_strides(backbone, STRIDES[::-1])
    anchors = options.pop("anchors", [[[w / 5, h / 5] for w, h in level] for level in ANCHORS])
    return YOLOV3(body, (64, 48, 32), num_classes, anchors, **options)


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's `darknet53` in our names; other state dicts as they are."""
    if not any(name.startswith("stem.conv1.") for name in state_dict):
        return state_dict
    rules = [
        (r"^stem\.conv1\.", "conv1."),
        (r"^stages\.(\d+)\.conv_down\.", lambda m: f"conv_res_block{int(m[1]) + 1}.conv."),
        (r"^stages\.(\d+)\.blocks\.(\d+)\.", lambda m: f"conv_res_block{int(m[1]) + 1}.res{m[2]}."),
        (r"^head\.fc\.", "fc."),
    ]
    converted = {}
    for name, value in state_dict.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        converted[name] = value
    return converted


def read_official(path: Path, model: nn.Module) -> dict[str, Tensor] | None:
    """The state dict in one of Darknet's `.weights` files; None if the file's name is none of these."""
    from paperzoo.papers.detection.yolov3.darknet_file import darknet_state, is_darknet_file, read_darknet_weights

    return darknet_state(read_darknet_weights(path), model) if is_darknet_file(path) else None
