"""YOLOX: Exceeding YOLO Series in 2021 (Ge et al., arXiv:2107.08430).

A modified CSPNet with a path-aggregation pyramid (sec. 2.2), a decoupled head without anchors, and SimOTA (sec. 2.1).
Parameter names and numbers are those of the released checkpoints (`yolox_s.pth` and so on), which load as they are: images
come in as RGB in [0, 1], and `YOLOX.forward` makes of them what those weights know, BGR from 0 to 255. What differs from the
paper, always as the released code has it:

- The box loss is 1 - IoU^2, five times in the sum; the paper only says "IoU loss".
- The classes' targets are the IoU of the prediction with its object, not 1.
- SimOTA looks at cells within 1.5 strides of an object's centre; the first release also took those inside the box.
- A cell's score is the product of objectness and class; for the cost of an assignment its square root.

Detections are cut to the image after non-maximum suppression; the released code leaves them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou

from paperzoo.blocks.backbones import at_strides
from paperzoo.blocks.boxes import BACKGROUND, clip_boxes, flatten_predictions, join_boxes

# -- parts of the network --------------------------------------------------------------------------------------------


class BaseConv(nn.Module):
    """Convolution, batch norm (eps 1e-3, momentum 0.03), SiLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        padding = (kernel_size - 1) // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class LeakyConv(BaseConv):
    """The same with a leaky ReLU of slope 0.1: Darknet's convolution."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride)
        self.act = nn.LeakyReLU(0.1, inplace=True)


class DWConv(nn.Module):
    """A depthwise convolution and a 1x1 one: YOLOX-Nano's 3x3 convolutions."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.dconv = BaseConv(in_channels, in_channels, kernel_size, stride, groups=in_channels)
        self.pconv = BaseConv(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pconv(self.dconv(x))


class Bottleneck(nn.Module):
    """1x1 and 3x3 convolution, with a shortcut around them unless it is switched off."""

    def __init__(self, channels: int, shortcut: bool, conv: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = BaseConv(channels, channels, 1)
        self.conv2 = conv(channels, channels, 3)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        return x + y if self.shortcut else y


class CSPLayer(nn.Module):
    """CSPNet's split: one half of the channels passes through the bottlenecks, the other beside them."""

    def __init__(
        self, in_channels: int, out_channels: int, depth: int, shortcut: bool = True, conv: type[nn.Module] = BaseConv
    ) -> None:
        super().__init__()
        hidden = out_channels // 2
        self.conv1 = BaseConv(in_channels, hidden, 1)
        self.conv2 = BaseConv(in_channels, hidden, 1)
        self.conv3 = BaseConv(2 * hidden, out_channels, 1)
        self.m = nn.Sequential(*(Bottleneck(hidden, shortcut, conv) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(torch.cat([self.m(self.conv1(x)), self.conv2(x)], dim=1))


class SPPBottleneck(nn.Module):
    """Spatial pyramid pooling: the map beside its maxima in windows of 5, 9 and 13 cells."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        conv: type[nn.Module] = BaseConv,
        windows: Sequence[int] = (5, 9, 13),
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, in_channels // 2, 1)
        self.m = nn.ModuleList(nn.MaxPool2d(w, stride=1, padding=w // 2) for w in windows)
        self.conv2 = conv(in_channels // 2 * (len(windows) + 1), out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.conv2(torch.cat([x] + [pool(x) for pool in self.m], dim=1))


class Focus(nn.Module):
    """Every second pixel, four times, as channels; then a convolution: (B, C, H, W) -> (B, out_channels, H / 2, W / 2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = BaseConv(4 * in_channels, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] % 2 or x.shape[-1] % 2:
            raise ValueError(f"images of {tuple(x.shape[-2:])} pixels; height and width must be even")
        return self.conv(torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], dim=1))


class CSPDarknet(nn.Module):
    """The modified CSPNet: images (B, 3, H, W) -> maps of strides 4, 8, 16 and 32.

    Args:
        depth, width: factors on the layers' number and channels.
        conv: `BaseConv` or `DWConv`, for the 3x3 convolutions.
    """

    def __init__(self, depth: float, width: float, conv: type[nn.Module] = BaseConv, in_channels: int = 3) -> None:
        super().__init__()
        base, blocks = int(64 * width), max(1, round(3 * depth))
        self.stage_channels = [base * 2**k for k in range(1, 5)]
        self.stage_strides = [4, 8, 16, 32]
        self.stem = Focus(in_channels, base)
        before = base
        for k, (channels, n) in enumerate(zip(self.stage_channels, (1, 3, 3, 1), strict=True), 2):
            last = k == 5
            layers = [conv(before, channels, 3, 2)]
            layers += [SPPBottleneck(channels, channels)] if last else []
            layers += [CSPLayer(channels, channels, n * blocks, not last, conv)]
            self.add_module(f"dark{k}", nn.Sequential(*layers))
            before = channels

    def stages(self, x: Tensor) -> list[Tensor]:
        maps = [self.stem(x)]
        for k in range(2, 6):
            maps.append(getattr(self, f"dark{k}")(maps[-1]))
        return maps[1:]


class YOLOPAFPN(nn.Module):
    """Path aggregation: top-down over the last three stages, and bottom-up again. Images -> maps of strides 8, 16, 32.

    Args:
        body: any network with `stages(x)` and `stage_channels` whose last three stages have strides 8, 16, 32.
        depth: factor on the number of bottlenecks.
    """

    def __init__(self, body: nn.Module, depth: float, conv: type[nn.Module] = BaseConv) -> None:
        super().__init__()
        self.backbone = body
        self.out_channels = c3, c4, c5 = [int(c) for c in body.stage_channels[-3:]]
        layer = partial(CSPLayer, depth=round(3 * depth), shortcut=False, conv=conv)
        self.lateral_conv0 = BaseConv(c5, c4, 1)
        self.C3_p4 = layer(2 * c4, c4)
        self.reduce_conv1 = BaseConv(c4, c3, 1)
        self.C3_p3 = layer(2 * c3, c3)
        self.bu_conv2 = conv(c3, c3, 3, 2)
        self.C3_n3 = layer(2 * c3, c4)
        self.bu_conv1 = conv(c4, c4, 3, 2)
        self.C3_n4 = layer(2 * c4, c5)

    def forward(self, images: Tensor) -> list[Tensor]:
        c3, c4, c5 = self.backbone.stages(images)[-3:]
        top = self.lateral_conv0(c5)
        middle = self.reduce_conv1(self.C3_p4(torch.cat([enlarged(top, c4), c4], dim=1)))
        p3 = self.C3_p3(torch.cat([enlarged(middle, c3), c3], dim=1))
        p4 = self.C3_n3(torch.cat([self.bu_conv2(p3), middle], dim=1))
        p5 = self.C3_n4(torch.cat([self.bu_conv1(p4), top], dim=1))
        return [p3, p4, p5]


class ResLayer(nn.Module):
    """Darknet's block: 1x1 to half the channels, 3x3 back, a shortcut around both."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer1 = LeakyConv(channels, channels // 2, 1)
        self.layer2 = LeakyConv(channels // 2, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer2(self.layer1(x))


def alternating(channels: int, narrow: int, wide: int, pooled: bool = False) -> nn.Sequential:
    """YOLOv3's five convolutions, 1x1 and 3x3 in turn; with `pooled`, spatial pyramid pooling in place of the third."""
    third = SPPBottleneck(wide, narrow, LeakyConv) if pooled else LeakyConv(wide, narrow, 1)
    return nn.Sequential(
        LeakyConv(channels, narrow, 1),
        LeakyConv(narrow, wide, 3),
        third,
        LeakyConv(narrow, wide, 3),
        LeakyConv(wide, narrow, 1),
    )


class Darknet53(nn.Module):
    """YOLOv3-SPP's backbone, the baseline of sec. 2.1: images -> maps of strides 4, 8, 16 and 32."""

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.stage_channels, self.stage_strides = [128, 256, 512, 512], [4, 8, 16, 32]
        group = lambda c, n: [LeakyConv(c, 2 * c, 3, 2), *(ResLayer(2 * c) for _ in range(n))]  # noqa: E731
        self.stem = nn.Sequential(LeakyConv(in_channels, 32, 3), *group(32, 1))
        for k, (channels, blocks) in enumerate(((64, 2), (128, 8), (256, 8), (512, 4)), 2):
            pooling = alternating(1024, 512, 1024, pooled=True) if k == 5 else ()
            self.add_module(f"dark{k}", nn.Sequential(*group(channels, blocks), *pooling))

    stages = CSPDarknet.stages


class YOLOFPN(nn.Module):
    """YOLOv3's top-down pyramid: images -> maps of strides 8, 16, 32."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.out_channels = Darknet53(), [128, 256, 512]
        self.out1_cbl = LeakyConv(512, 256, 1)
        self.out1 = alternating(512 + 256, 256, 512)
        self.out2_cbl = LeakyConv(256, 128, 1)
        self.out2 = alternating(256 + 128, 128, 256)

    def forward(self, images: Tensor) -> list[Tensor]:
        c3, c4, c5 = self.backbone.stages(images)[-3:]
        p4 = self.out1(torch.cat([enlarged(self.out1_cbl(c5), c4), c4], dim=1))
        p3 = self.out2(torch.cat([enlarged(self.out2_cbl(p4), c3), c3], dim=1))
        return [p3, p4, c5]


def enlarged(x: Tensor, like: Tensor) -> Tensor:
    """To the size of the finer map, which may be odd; nearest neighbour."""
    return F.interpolate(x, size=like.shape[-2:], mode="nearest")


class YOLOXHead(nn.Module):
    """The decoupled head (fig. 2): maps -> class logits (B, A, num_classes), objectness (B, A), boxes as they come (B, A, 4).

    Nothing is shared between the levels. A box is x, y relative to its cell's corner and log w, h, all in strides.
    """

    def __init__(
        self, channels: Sequence[int], hidden: int, num_classes: int, conv: type[nn.Module] = BaseConv
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be 1 or more")
        self.num_classes = num_classes
        stem = BaseConv if conv is DWConv else conv
        self.stems = nn.ModuleList(stem(c, hidden, 1) for c in channels)
        branch = lambda: nn.Sequential(conv(hidden, hidden, 3), conv(hidden, hidden, 3))  # noqa: E731
        self.cls_convs = nn.ModuleList(branch() for _ in channels)
        self.reg_convs = nn.ModuleList(branch() for _ in channels)
        self.cls_preds = nn.ModuleList(nn.Conv2d(hidden, num_classes, 1) for _ in channels)
        self.reg_preds = nn.ModuleList(nn.Conv2d(hidden, 4, 1) for _ in channels)
        self.obj_preds = nn.ModuleList(nn.Conv2d(hidden, 1, 1) for _ in channels)
        for layer in [*self.cls_preds, *self.obj_preds]:
            nn.init.constant_(layer.bias, -math.log((1 - 0.01) / 0.01))  # scores start at 0.01

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        classes, objectness, boxes = [], [], []
        for k, level in enumerate(maps):
            x = self.stems[k](level)
            regression = self.reg_convs[k](x)
            classes.append(self.cls_preds[k](self.cls_convs[k](x)))
            boxes.append(self.reg_preds[k](regression))
            objectness.append(self.obj_preds[k](regression))
        return (
            flatten_predictions(classes, self.num_classes),
            flatten_predictions(objectness, 1)[..., 0],
            flatten_predictions(boxes, 4),
        )


# -- cells and boxes (sec. 2.1, "anchor-free") -----------------------------------------------------------------------


def cells(canvas: tuple[int, int], strides: Sequence[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Corners (A, 2), x and y counted in strides, and strides (A,) of every cell: level by level, row by row."""
    corners, sizes = [], []
    for stride in strides:
        rows, columns = (-(-side // stride) for side in canvas)
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        corners.append(torch.stack([x, y], dim=-1).reshape(-1, 2))
        sizes.append(torch.full((rows * columns,), stride))
    return torch.cat(corners).to(device, torch.float32), torch.cat(sizes).to(device, torch.float32)


def decode(raw: Tensor, corners: Tensor, strides: Tensor) -> Tensor:
    """Boxes as they come (…, A, 4) -> x1 y1 x2 y2 in pixels."""
    centre = (raw[..., :2] + corners) * strides[:, None]
    half = 0.5 * raw[..., 2:].exp() * strides[:, None]
    return torch.cat([centre - half, centre + half], dim=-1)


def encode(boxes: Tensor, corners: Tensor, strides: Tensor) -> Tensor:
    """The inverse of `decode`, one box a cell: (N, 4) -> (N, 4)."""
    size = boxes[:, 2:] - boxes[:, :2]
    centre = boxes[:, :2] + 0.5 * size
    return torch.cat([centre / strides[:, None] - corners, (size / strides[:, None] + 1e-8).log()], dim=1)


# -- SimOTA (sec. 2.1) -----------------------------------------------------------------------------------------------


@torch.no_grad()
def simota(
    boxes: Tensor,
    labels: Tensor,
    owner: Tensor,
    predicted: Tensor,
    classes: Tensor,
    objectness: Tensor,
    corners: Tensor,
    strides: Tensor,
    weight: float = 3.0,
    radius: float = 1.5,
    most: int = 10,
) -> tuple[Tensor, Tensor]:
    """Which object each cell of each image learns, for the whole batch at once.

    An object asks for as many cells as the sum of its ten best IoUs, takes the cheapest, and loses those that another object
    has cheaper.

    Args:
        boxes, labels, owner: (T, 4), int64 (T,) and int64 (T,), the objects of all images and the image of each.
        predicted: (B, A, 4) boxes in pixels.
        classes, objectness: logits (B, A, num_classes) and (B, A).
        corners, strides: of `cells`.
        weight: lambda of eq. 1.
        radius: an object's cells have their centres nearer than this many strides to its own, in x and in y.
        most: an object gets at most so many cells.

    Returns:
        int64 (B, A), a row of `boxes` or BACKGROUND; and float (B, A), the IoU of the prediction with that object.
    """
    shape = predicted.shape[:2]
    if not len(boxes):
        return torch.full(shape, BACKGROUND, device=predicted.device), predicted.new_zeros(shape)
    centre = 0.5 * (boxes[:, None, :2] + boxes[:, None, 2:])  # (T, 1, 2)
    distance = (centre - (corners + 0.5) * strides[:, None]).abs().amax(-1)
    near = distance < radius * strides  # (T, A)
    segment = owner[:, None].expand_as(near)
    # only cells near one of the image's objects take part; those near another object are a last resort
    candidate = torch.zeros(shape, dtype=torch.uint8, device=near.device)
    candidate = candidate.scatter_reduce(0, segment, near.to(torch.uint8), "amax").bool()[owner]

    overlap = pairwise_iou(boxes, predicted, owner)
    cost = class_cost(labels, owner, classes, objectness) - weight * (overlap + 1e-8).log()  # eq. 1
    cost = (cost + 1e6 * ~near).masked_fill(~candidate, math.inf)

    most = min(most, shape[1])
    wanted = overlap.masked_fill(~candidate, 0.0).topk(most, dim=1).values.sum(1).int().clamp(min=1)  # dynamic k
    value, cell = cost.topk(most, dim=1, largest=False)
    taken = (torch.arange(most, device=cost.device) < wanted[:, None]) & value.isfinite()
    taken = torch.zeros_like(near).scatter(1, cell, taken)  # (T, A)

    rows = torch.arange(len(boxes), device=cost.device)[:, None].expand_as(cost)
    nobody = rows.new_full(shape, BACKGROUND)
    claims = torch.zeros(shape, dtype=torch.int64, device=cost.device).index_add(0, owner, taken.long())
    last = nobody.scatter_reduce(0, segment, rows.masked_fill(~taken, BACKGROUND), "amax")
    least = cost.new_full(shape, math.inf).scatter_reduce(0, segment, cost, "amin")
    cheapest = torch.full(shape, len(boxes), device=cost.device)
    cheapest = cheapest.scatter_reduce(0, segment, rows.masked_fill(cost != least[owner], len(boxes)), "amin")
    matched = torch.where(claims > 1, cheapest, last)
    return matched, overlap.gather(0, matched.clamp(min=0)) * (matched >= 0)


def pairwise_iou(boxes: Tensor, predicted: Tensor, owner: Tensor) -> Tensor:
    """IoU of each object with each prediction of its own image: (T, 4), (B, A, 4), (T,) -> (T, A)."""
    if len(predicted) == 1:
        return box_iou(boxes, predicted[0])
    mine = predicted[owner]  # (T, A, 4)
    low, high = torch.maximum(boxes[:, None, :2], mine[..., :2]), torch.minimum(boxes[:, None, 2:], mine[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)[:, None] + (mine[..., 2:] - mine[..., :2]).prod(-1)
    return shared / (area - shared)


def class_cost(labels: Tensor, owner: Tensor, classes: Tensor, objectness: Tensor) -> Tensor:
    """Cross-entropy of each cell's scores with each object's class, summed over classes: (T, A).

    Written as the cost of no class at all and what the object's own class changes in it, so that nothing of size
    (T, A, num_classes) is needed.
    """
    score = (classes.sigmoid() * objectness.sigmoid()[..., None]).sqrt()  # (B, A, K)
    yes, no = -score.log().clamp(min=-100), -torch.log1p(-score).clamp(min=-100)
    own = (yes - no).transpose(1, 2)[owner, labels]  # (T, A)
    return no.sum(-1)[owner] + own


def iou_loss(predicted: Tensor, boxes: Tensor) -> Tensor:
    """1 - IoU^2 of boxes in pairs: (N, 4), (N, 4) -> (N,)."""
    low, high = torch.maximum(predicted[:, :2], boxes[:, :2]), torch.minimum(predicted[:, 2:], boxes[:, 2:])
    shared = (high - low).prod(1) * (low < high).all(1)
    area = (predicted[:, 2:] - predicted[:, :2]).prod(1) + (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return 1 - (shared / (area - shared + 1e-16)) ** 2


# -- the detector ----------------------------------------------------------------------------------------------------


class YOLOX(nn.Module):
    """RGB images (B, 3, H, W) in [0, 1] -> the head's class logits, objectness and boxes; with targets, the losses.

    The contract of a detector is in `tasks/detection.py` (with `normalise="none"`). `use_l1` adds the L1 loss of the last
    epochs (sec. 2.1, "strong data augmentation").

    Args:
        backbone: images -> three maps of strides 8, 16, 32, with `out_channels`.
        head: of those maps.
        score_threshold: detections below it are dropped.
        nms_threshold: detections of one class that overlap more are one.
    """

    def __init__(
        self, backbone: nn.Module, head: YOLOXHead, *, score_threshold: float = 0.01, nms_threshold: float = 0.65
    ) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.strides = (8, 16, 32)
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.use_l1 = False

    @property
    def num_classes(self) -> int:
        return self.head.num_classes

    def forward(
        self, images: Tensor, targets: Sequence[dict[str, Tensor]] | None = None
    ) -> tuple[Tensor, Tensor, Tensor] | dict[str, Tensor]:
        outputs = self.head(self.backbone(255 * images.flip(1)))
        return outputs if targets is None else self.loss(outputs, targets, tuple(images.shape[-2:]))

    def loss(
        self, outputs: tuple[Tensor, Tensor, Tensor], targets: Sequence[dict[str, Tensor]], canvas: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Sec. 2.1: cross-entropy of classes and objectness, IoU loss of the boxes, divided by the cells that learn an object."""
        classes, objectness, raw = (output.float() for output in outputs)
        boxes, owner = join_boxes(targets)
        labels = torch.cat([t["labels"] for t in targets])
        corners, strides = cells(canvas, self.strides, raw.device)
        predicted = decode(raw, corners, strides)
        matched, overlap = simota(boxes, labels, owner, predicted, classes, objectness, corners, strides)
        image, cell = (matched >= 0).nonzero(as_tuple=True)
        box, count = matched[image, cell], (matched >= 0).sum().clamp(min=1)

        goal = torch.zeros_like(classes[image, cell])
        goal[torch.arange(len(box), device=box.device), labels[box]] = overlap[image, cell]
        entropy = partial(F.binary_cross_entropy_with_logits, reduction="sum")
        losses = {
            "boxes": 5 * iou_loss(predicted[image, cell], boxes[box]).sum() / count,
            "objectness": entropy(objectness, (matched >= 0).float()) / count,
            "classification": entropy(classes[image, cell], goal) / count,
        }
        if self.use_l1:
            wanted = encode(boxes[box], corners[cell], strides[cell])
            losses["l1"] = (raw[image, cell] - wanted).abs().sum() / count
        return losses

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh class predictors for another number of classes."""
        layers = self.head.cls_preds
        hidden = layers[0].in_channels
        fresh = YOLOXHead([hidden] * len(layers), hidden, num_classes).cls_preds
        self.head.cls_preds, self.head.num_classes = fresh.to(layers[0].weight), num_classes

    def load_backbone(self, state_dict: dict[str, Tensor]) -> None:
        """Weights of the same body; the paper starts from none (sec. 2.1)."""
        body = self.backbone.backbone
        wanted = body.state_dict()
        missing = [name for name in wanted if name not in state_dict and not name.endswith("num_batches_tracked")]
        if missing:
            raise ValueError(f"state_dict lacks {missing[0]}; weights of the same body are needed")
        body.load_state_dict({name: state_dict.get(name, value) for name, value in wanted.items()})

    @torch.no_grad()
    def postprocess(
        self, outputs: tuple[Tensor, Tensor, Tensor], sizes: Tensor, canvas: tuple[int, int]
    ) -> list[dict[str, Tensor]]:
        """Each cell's best class above the threshold; non-maximum suppression within each class.

        Args:
            outputs: of `forward`.
            sizes: (B, 2) height and width of each image inside the canvas.
            canvas: height and width of the batch's images.

        Returns:
            for each image boxes (N, 4) in pixels of the canvas, scores (N,), labels (N,); best first.
        """
        classes, objectness, raw = (output.float() for output in outputs)
        boxes = decode(raw, *cells(canvas, self.strides, raw.device))
        best, labels = classes.sigmoid().max(-1)
        scores = objectness.sigmoid() * best
        result = []
        for b, s, k, size in zip(boxes, scores, labels, sizes, strict=True):
            certain = s >= self.score_threshold
            b, s, k = b[certain], s[certain], k[certain]
            keep = batched_nms(b, s, k, self.nms_threshold)
            result.append({"boxes": clip_boxes(b[keep][None], size[None])[0], "scores": s[keep], "labels": k[keep]})
        return result


# -- variants --------------------------------------------------------------------------------------------------------


def _yolox(
    depth: float,
    width: float,
    num_classes: int,
    conv: type[nn.Module] = BaseConv,
    backbone: str | None = None,
    **options: float,
) -> YOLOX:
    body = CSPDarknet(depth, width, conv) if backbone is None else at_strides(backbone, (8, 16, 32))
    pyramid = YOLOPAFPN(body, depth, conv)
    return YOLOX(pyramid, YOLOXHead(pyramid.out_channels, int(256 * width), num_classes, conv), **options)


def yolox_nano(num_classes: int = 80, backbone: str | None = None, **options: float) -> YOLOX:
    """YOLOX-Nano: a quarter of the width, depthwise convolutions, for 416 pixels. `options` as `YOLOX`; `backbone`: another classifier by name, its maps of strides 8, 16 and 32."""
    return _yolox(0.33, 0.25, num_classes, DWConv, backbone, **options)


def yolox_tiny(num_classes: int = 80, backbone: str | None = None, **options: float) -> YOLOX:
    """YOLOX-Tiny, for 416 pixels. `options` as `YOLOX`."""
    return _yolox(0.33, 0.375, num_classes, backbone=backbone, **options)


def yolox_s(num_classes: int = 80, backbone: str | None = None, **options: float) -> YOLOX:
    """YOLOX-S, for 640 pixels. `options` as `YOLOX`."""
    return _yolox(0.33, 0.5, num_classes, backbone=backbone, **options)


def yolox_m(num_classes: int = 80, backbone: str | None = None, **options: float) -> YOLOX:
    """YOLOX-M, for 640 pixels. `options` as `YOLOX`."""
    return _yolox(0.67, 0.75, num_classes, backbone=backbone, **options)


def yolox_l(num_classes: int = 80, backbone: str | None = None, **options: float) -> YOLOX:
    """YOLOX-L, for 640 pixels. `options` as `YOLOX`."""
    return _yolox(1.0, 1.0, num_classes, backbone=backbone, **options)


def yolox_x(num_classes: int = 80, backbone: str | None = None, **options: float) -> YOLOX:
    """YOLOX-X, for 640 pixels. `options` as `YOLOX`."""
    return _yolox(1.33, 1.25, num_classes, backbone=backbone, **options)


def yolox_darknet53(num_classes: int = 80, **options: float) -> YOLOX:
    """YOLOX-DarkNet53 (sec. 2.1): the same head and training on YOLOv3's network, for 640 pixels. `options` as `YOLOX`."""
    pyramid = YOLOFPN()
    return YOLOX(pyramid, YOLOXHead(pyramid.out_channels, 256, num_classes, LeakyConv), **options)


def yolox_slim(num_classes: int = 10, backbone: str | None = None, **options: float) -> YOLOX:
    """Not of the paper: YOLOX-S at three eighths of its width, for pictures of 64 pixels. `options` as `YOLOX`."""
    return _yolox(0.33, 0.1875, num_classes, backbone=backbone, **options)
