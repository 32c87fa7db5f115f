"""Fast R-CNN against torchvision's region heads and the author's pooling by hand; equations checked in slow versions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from paperzoo.blocks.boxes import AnchorGenerator, join_boxes
from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.detection.fast_rcnn.model import (
    FastRCNN,
    RegionPool,
    RoIHeads,
    TwoMLPHead,
    VGGBody,
    fast_rcnn_loss,
    fast_rcnn_resnet50_c4,
    fast_rcnn_vgg16,
    match_regions,
    truncated_svd,
)
from paperzoo.papers.detection.fast_rcnn.pooling import roi_max_pool

SOURCE = "torchvision 0.29.2 RoIHeads"
CANVAS = (96, 128)


class TheirPool(nn.Module):
    """torchvision's own RoIPool or RoIAlign module over the list of boxes that its heads pass."""

    def __init__(self, pool: RegionPool) -> None:
        super().__init__()
        from torchvision.ops import RoIAlign, RoIPool

        size, scale = pool.output_size, pool.scale
        self.pool = RoIAlign(size, scale, pool.sampling_ratio) if pool.align else RoIPool(size, scale)

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list) -> Tensor:
        return self.pool(maps["0"], boxes)


def their_heads(ours: RoIHeads, low: float = 0.5) -> nn.Module:
    """torchvision's RoIHeads with the weights, numbers and thresholds of ours, every region sampled."""
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
    from torchvision.models.detection.roi_heads import RoIHeads as Theirs

    predictor = FastRCNNPredictor(ours.box_head.num_features, ours.num_classes + 1)
    heads = Theirs(
        TheirPool(ours.pool), copy.deepcopy(ours.box_head), predictor, 0.5, low, 10**6, ours.positive, None,
        ours.score_threshold, ours.nms_threshold, ours.detections,
    )  # fmt: skip
    heads.load_state_dict(ours.state_dict())
    return heads


class Reference(nn.Module):
    """Fast R-CNN of torchvision's parts: a backbone, and its heads on given regions; parameter names as ours."""

    def __init__(self, ours: FastRCNN, boxes: Tensor, targets: Sequence[dict[str, Tensor]] | None = None) -> None:
        super().__init__()
        twin = copy.deepcopy(ours)
        self.backbone, self.roi_heads = twin.backbone, their_heads(twin.roi_heads)
        self.boxes, self.targets = boxes, targets

    def forward(self, images: Tensor) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        shapes, maps = [tuple(images.shape[-2:])] * len(images), {"0": self.backbone(images)[0]}
        boxes = [b[(b[:, 2:] > b[:, :2]).all(1)] for b in self.boxes]
        if self.targets is not None:
            targets = [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in self.targets]
            losses = self.roi_heads.train()(maps, boxes, shapes, targets)[1]
            return {"classification": losses["loss_classifier"], "boxes": losses["loss_box_reg"]}
        found = self.roi_heads.eval()(maps, boxes, shapes)[0]
        return [objects | {"labels": objects["labels"] - 1} for objects in found]


class Ours(nn.Module):
    def __init__(self, ours: FastRCNN, boxes: Tensor, targets: Sequence[dict[str, Tensor]] | None = None) -> None:
        super().__init__()
        self.backbone, self.roi_heads = ours.backbone, ours.roi_heads
        self.whole, self.boxes, self.targets = [ours], boxes, targets

    def forward(self, images: Tensor) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        detector, canvas = self.whole[0], tuple(images.shape[-2:])
        if self.targets is not None:
            return detector(images, self.targets, self.boxes)
        found = detector.postprocess(detector(images, None, self.boxes), torch.tensor([canvas] * len(images)), canvas)
        assert any(len(objects["boxes"]) > 5 for objects in found), "too few detections to compare"
        return found


def some_boxes(count: int, height: int, width: int) -> Tensor:
    corner = torch.rand(count, 2) * torch.tensor([width, height]) * 0.7
    size = torch.rand(count, 2) * 60 + 4
    return torch.cat([corner, torch.minimum(corner + size, torch.tensor([width, height]).float())], dim=1)


def targets_in(classes: int) -> list[dict[str, Tensor]]:
    """A picture of four objects, one without any, one with a box of one pixel."""
    boxes = torch.tensor([[4.0, 6, 50, 60], [30, 20, 120, 90], [90, 8, 120, 30], [0, 0, 12, 9]])
    return [
        {"boxes": boxes, "labels": torch.randint(classes, (4,))},
        {"boxes": boxes[:0], "labels": torch.zeros(0, dtype=torch.int64)},
        {"boxes": torch.tensor([[40.0, 40, 41, 41], [20, 10, 60, 80]]), "labels": torch.randint(classes, (2,))},
    ]


def livelier(detector: FastRCNN) -> None:
    """Random weights that make detections of many classes."""
    nn.init.normal_(detector.roi_heads.box_predictor.bbox_pred.weight, std=0.02)
    nn.init.normal_(detector.roi_heads.box_predictor.cls_score.weight, std=0.2)
    for layer in detector.roi_heads.box_head.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)


def slow_roi_pool(feature: Tensor, box: Tensor, size: int, scale: float) -> Tensor:
    """Sec. 2.1 for one region: an h x w window in size x size parts of about h / size by w / size, the largest of each."""
    # corners round half away from zero, as the released code
    x1, y1, x2, y2 = (int((v * scale + 0.5).floor()) for v in box)
    height, width = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
    result = feature.new_zeros(feature.shape[0], size, size)
    for i in range(size):
        for j in range(size):
            top, bottom = y1 + (i * height) // size, y1 - (-(i + 1) * height) // size
            left, right = x1 + (j * width) // size, x1 - (-(j + 1) * width) // size
            part = feature[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
            if part.numel():
                result[:, i, j] = part.amax((1, 2))
    return result


def slow_match(targets: list[dict[str, Tensor]], regions: Tensor, least: float) -> Tensor:
    """Sec. 2.3, one region at a time: an object's row from IoU 0.5, background from `least` on, else ignored."""
    from torchvision.ops import box_iou

    result, first = [], 0
    for target, rows in zip(targets, regions, strict=True):
        for region in rows:
            overlaps = box_iou(region[None], target["boxes"])[0].tolist()
            best = max(overlaps, default=None)
            if (region[2:] <= region[:2]).any():
                result.append(-2)
            elif best is None:
                result.append(-1)
            else:
                result.append(first + overlaps.index(best) if best >= 0.5 else -1 if best >= least else -2)
        first += len(target["boxes"])
    return torch.tensor(result).reshape(regions.shape[:2])


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    from torchvision.models.detection.roi_heads import fastrcnn_loss
    from torchvision.ops import roi_pool

    feature = torch.randn(1, 5, 12, 16)
    boxes = torch.cat(
        [some_boxes(20, 190, 250), torch.tensor([[0.0, 0, 3, 3], [200, 150, 255, 190], [30, 30, 31, 31]])]
    )
    pool = RegionPool(7, 16)
    yield Case(
        "RoI max pooling",
        lambda x: pool([x], torch.cat([torch.zeros(len(boxes), 1), boxes], 1)),
        lambda x: torch.stack([slow_roi_pool(x[0], box, 7, 1 / 16) for box in boxes]),
        (feature,),
        "paper, sec. 2.1: one part of one region at a time",
        gradients=True,
    )
    maps = torch.randn(2, 4, 13, 21)
    many = torch.cat([torch.randint(2, (200, 1)).float(), some_boxes(200, 230, 400) - 20], 1)
    for size in (4, 7):
        yield Case(
            f"RoI max pooling as an exported program has it, {size} x {size}",
            lambda x, r, n=size: roi_max_pool(x, r, n, 1 / 16),
            lambda x, r, n=size: roi_pool(x, r, n, 1 / 16),
            (maps, many),
            "torchvision 0.29.2 ops.roi_pool",
        )
    wanted = targets_in(7)
    regions = torch.stack([some_boxes(60, *CANVAS) for _ in wanted])
    regions[:, :8] = torch.tensor([[4.0, 6, 50, 60]]) + 6 * torch.rand(3, 8, 4)
    regions[1:, 50:] = 0
    for least in (0.1, 0.0):
        yield Case(
            f"regions and what they show, background from IoU {least}",
            lambda r, m=least: match_regions(*join_boxes(wanted), r, least=m),
            lambda r, m=least: slow_match(wanted, r, m),
            (regions,),
            "paper, sec. 2.3: one region at a time",
        )

    plan = (16, 0, 16, 0, 32, 0, 32, 0, 48, 48)
    body = VGGBody(plan)
    options = {"least": 0.0, "sampled": 10**6, "box_beta": 1 / 9}
    heads = RoIHeads(pool, TwoMLPHead(48 * 49, 64), 7, **options)
    ours = FastRCNN(body, heads, AnchorGenerator((32,), [(32, 64)]))
    livelier(ours)
    images = torch.randn(3, 3, *CANVAS)
    yield Case(
        "losses and gradients with given regions",
        Ours(ours, regions, wanted).train(),
        Reference(ours, regions, wanted).train(),
        (images,),
        SOURCE,
        gradients=True,
        note="every region is in the sample; smooth L1 with beta 1/9, as torchvision has it; an image without objects",
    )
    yield Case(
        "detections with given regions",
        Ours(ours, regions).eval(),
        Reference(ours, regions).eval(),
        (images,),
        SOURCE,
        rtol=1e-3,
        atol=1e-3,
    )
    logits, deltas, labels = torch.randn(30, 8), torch.randn(30, 32), torch.randint(8, (30,))
    goal = torch.randn(30, 4)
    yield Case(
        "eq. 1 to 3, beta 1: smooth L1 by hand, over the objects' own class",
        lambda z, d: fast_rcnn_loss(z, d.unflatten(1, (-1, 4)), labels, goal),
        lambda z, d: by_parts(z, d, labels, goal),
        (logits, deltas),
        "paper, eq. 1 to 3, element by element",
        gradients=True,
    )
    yield Case(
        "the same with beta 1/9",
        lambda z, d: fast_rcnn_loss(z, d.unflatten(1, (-1, 4)), labels, goal, 1 / 9),
        lambda z, d: fastrcnn_loss(z, d, [labels], [goal]),
        (logits, deltas),
        "torchvision 0.29.2 fastrcnn_loss",
        gradients=True,
    )

    for make, size in ((fast_rcnn_vgg16, (160, 224)), (fast_rcnn_resnet50_c4, (128, 160))):
        ours = quick(make)
        given = some_boxes(12, *size)[None]
        yield Case(
            f"{make.__name__}: logits and deltas",
            lambda x, m=ours, b=given: m(x, None, b)[1:],
            lambda x, m=ours, b=given: raw(m, b, x),
            (torch.randn(1, 3, *size),),
            "torchvision 0.29.2 ops.RoIPool, ops.RoIAlign and FastRCNNPredictor",
        )
        del ours

    layer = nn.Linear(40, 30)
    x = torch.randn(6, 40)
    yield Case("sec. 3.1: all singular values", truncated_svd(layer, 30), layer, (x,), "the layer itself")
    s = torch.linalg.svdvals(layer.weight.detach())
    yield Case(
        "sec. 3.1: what ten singular values leave out",
        lambda: (truncated_svd(layer, 10)[1].weight @ truncated_svd(layer, 10)[0].weight - layer.weight).norm(),
        lambda: s[10:].square().sum().sqrt(),
        against="Eckart and Young: the root of the squares of the values left out",
    )
    yield from classifier_weights()


def by_parts(logits: Tensor, deltas: Tensor, labels: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    classification = boxes = torch.tensor(0.0)
    for i, u in enumerate(labels.tolist()):
        classification = classification - (logits[i, u] - logits[i].exp().sum().log()) / len(labels)
        for j in range(4) if u > 0 else ():
            x = (deltas[i, 4 * u + j] - goal[i, j]).abs()
            boxes = boxes + (0.5 * x**2 if x < 1 else x - 0.5) / len(labels)
    return classification, boxes


def quick(make: Callable[..., nn.Module]) -> nn.Module:
    """A published network with cheap random weights, as its own start takes seconds; anchors are still to be set."""
    with torch.device("meta"):
        detector = make(num_classes=20)
    detector.to_empty(device="cpu")
    for name, value in detector.state_dict().items():
        if "num_batches" in name:
            value.zero_()
        elif value.ndim > 1:
            value.uniform_(-1, 1).mul_((6 / value[0].numel()) ** 0.5)
        elif name.endswith("bias") or "mean" in name:
            value.uniform_(-0.1, 0.1)
        else:
            value.uniform_(0.5, 1.0)
    return detector.eval()


def raw(ours: FastRCNN, boxes: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """torchvision's pooling and predictor, from normalised images and the given regions to class logits and deltas."""
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

    heads = ours.roi_heads
    predictor = FastRCNNPredictor(heads.box_head.num_features, heads.num_classes + 1)
    predictor.load_state_dict(heads.box_predictor.state_dict())
    with torch.no_grad():
        pooled = TheirPool(heads.pool)({"0": ours.backbone(images)[0]}, list(boxes), [])
        logits, deltas = predictor(heads.box_head(pooled))
    return logits.view(len(images), -1, logits.shape[1]), deltas.view(len(images), -1, logits.shape[1], 4)


def classifier_weights() -> Iterator[Case]:
    """A region that is the whole picture goes the way of the classifier that the weights are from (sec. 2.2)."""
    from torchvision.models import resnet50

    classifier = resnet50().eval()
    detector = fast_rcnn_resnet50_c4(num_classes=3).eval()
    detector.load_backbone(classifier.state_dict())
    body, head = detector.backbone, detector.roi_heads.box_head
    yield Case(
        "backbone and region's network from a classifier's weights",
        lambda x: head(body(x)[0]),
        lambda x: nn.Sequential(*list(classifier.children())[:-1])(x).flatten(1),
        (torch.randn(1, 3, 96, 128),),
        "torchvision 0.29.2 resnet50",
    )


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: from normalised images and the windows of a grid to logits and deltas.

    Small images, which have some hundred windows: the second stage costs the same for each of them, and more tell no more.
    """

    def images(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 3, 192, 192),)

    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            detector = fast_rcnn_resnet50_c4()
            self.windows = detector(torch.zeros(1, 3, 192, 192))[0][0].detach()
            self.backbone, self.roi_heads = detector.backbone, their_heads(detector.roi_heads)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            heads, maps = self.roi_heads, {"0": self.backbone(x)[0]}
            return heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, [self.windows] * len(x), [])))

    return {"fast_rcnn_resnet50_c4": Pair(fast_rcnn_resnet50_c4, Raw, images, SOURCE, train_batch=2)}
