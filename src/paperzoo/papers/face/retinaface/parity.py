"""RetinaFace against facexlib (its outputs on weights from a rule are stored, see `golden.py`), and its loss against a slow version."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.detection.deformable_convnets.model import DeformableConv2d
from paperzoo.papers.face.retinaface import golden, model
from paperzoo.papers.face.retinaface.model import RetinaFace, SquareAnchors, from_official, retinaface_tiny
from paperzoo.tasks.face_detection import NORMALISE

SOURCE = "facexlib 0.3.0, stored outputs"


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    stored, mean = load_file(str(golden.FILE)), torch.tensor(NORMALISE["pixels"][0])[:, None, None]
    images = (golden.pictures().float() / 255 - mean) * 255
    for network, variant in golden.NETWORKS.items():
        detector = getattr(model, variant)().eval()
        own = detector.state_dict()
        released = golden.by_rule(dict(zip(golden.released_names(list(own)), own.values(), strict=True)))
        detector.load_state_dict(from_official(released))
        yield Case(
            f"{variant}, raw outputs of two images",
            lambda x, d=detector: [output[:, :: golden.KEPT] for output in d(x)],
            lambda x, n=network: [stored[f"{n}.{part}"] for part in ("logits", "offsets", "points")],
            (images,),
            SOURCE,
            rtol=1e-3,
            atol=1e-3,
            note="released names and colours' order; every 97th anchor",
        )
        yield Case(
            f"{variant}, the best detections of an image",
            lambda x, d=detector: detections(d, x),
            lambda x, n=network: clipped(stored[f"{n}.found"]),
            (images[:1],),
            SOURCE,
            rtol=1e-3,
            atol=2e-2,
            note="boxes, scores and landmarks in pixels after decoding and suppression",
        )
    yield from anchor_cases()
    yield from loss_cases()
    yield from deformable_cases()


@torch.no_grad()
def detections(detector: RetinaFace, images: Tensor) -> Tensor:
    detector.score_threshold, detector.nms_threshold = golden.THRESHOLD, golden.SUPPRESSION
    found = detector.postprocess(detector(images), torch.tensor([images.shape[2:]]), tuple(images.shape[2:]))[0]
    rows = torch.cat([found["boxes"], found["scores"][:, None], found["landmarks"].flatten(1)], dim=1)
    return rows[:40]


def clipped(found: Tensor) -> Tensor:
    """Boxes cut to the image of 96 by 120 pixels, which the released code leaves to others."""
    limit = torch.tensor([120.0, 96, 120, 96])
    return torch.cat([found[:, :4].clamp(min=0).minimum(limit), found[:, 4:]], dim=1)


# -- anchors -----------------------------------------------------------------------------------------------------------


def anchor_cases() -> Iterator[Case]:
    anchors = SquareAnchors((8, 16, 32), model.RELEASED)
    yield Case(
        "anchors of 40 by 70 pixels",
        lambda: anchors(40, 70),
        lambda: torch.tensor(slow_anchors(40, 70)),
        against="one anchor at a time, as the released code's loops",
    )
    yield Case(
        "sides of the paper's anchors",
        lambda: [size for level in model.PAPER for size in level],
        lambda: [16, 20.16, 25.40, 32, 40.32, 50.80, 64, 80.63, 101.59, 128, 161.26, 203.19, 256, 322.54, 406.37],
        against="paper, table 2",
        atol=0.01,
    )
    boxes = anchors(40, 70)[7:12]
    points = torch.randn(5, 5, 2) * 20
    yield Case(
        "landmarks there and back",
        lambda: model.decode_points(model.encode_points(points, boxes), boxes),
        lambda: points,
        against="identity",
        atol=1e-4,
    )


def slow_anchors(height: int, width: int) -> list[list[float]]:
    boxes = []
    for stride, sizes in zip((8, 16, 32), model.RELEASED, strict=True):
        for row in range(-(-height // stride)):
            for column in range(-(-width // stride)):
                for size in sizes:
                    x, y = (column + 0.5) * stride, (row + 0.5) * stride
                    boxes.append([x - size / 2, y - size / 2, x + size / 2, y + size / 2])
    return boxes


# -- the loss ----------------------------------------------------------------------------------------------------------


def some_targets() -> list[dict[str, Tensor]]:
    """Three images: two faces and one without landmarks; none; one that no anchor reaches beside one that is."""
    boxes = [
        torch.tensor([[10.0, 12, 30, 36], [50, 40, 90, 90], [52, 44, 88, 86]]),
        torch.zeros(0, 4),
        torch.tensor([[5.0, 5, 7, 8], [30, 30, 100, 110]]),
    ]
    flags = [torch.tensor([True, False, True]), torch.zeros(0, dtype=torch.bool), torch.tensor([True, True])]
    targets = []
    for b, flag in zip(boxes, flags, strict=True):
        inside = torch.rand(len(b), 5, 2, generator=torch.Generator().manual_seed(4))
        points = b[:, None, :2] + inside * (b[:, 2:] - b[:, :2])[:, None]
        targets.append({"boxes": b, "landmarks": points * flag[:, None, None], "has_landmarks": flag})
    return targets


def loss_cases() -> Iterator[Case]:
    torch.manual_seed(2)
    targets = some_targets()
    released = retinaface_tiny()
    paper = RetinaFace(
        released.body,
        (1, 2, 3),
        released.anchors,
        48,
        high=0.5,
        low=0.3,
        negatives=3.0,
        weights=(1.0, 0.25, 0.1),
    )
    count = len(released.anchors(128, 128))
    outputs = (torch.randn(3, count, 2), torch.randn(3, count, 4), torch.randn(3, count, 10))
    for name, detector in (("released", released), ("paper", paper)):
        yield Case(
            f"losses and gradients, matching of the {name}",
            lambda *o, d=detector: d.loss(o, targets, (128, 128)),
            lambda *o, d=detector: slow_loss(d, o, targets),
            outputs,
            against="one image, one anchor, one face at a time",
            gradients=True,
        )
    empty = [{k: v[:0] for k, v in targets[0].items()}] * 3
    yield Case(
        "no faces, no loss",
        lambda: released.loss(outputs, empty, (128, 128)),
        lambda: {"classification": 0.0, "boxes": 0.0, "landmarks": 0.0},
        against="the released code",
    )
    images = torch.randn(3, 3, 128, 128)
    yield Case(
        "a training step's losses through the network",
        LossOf(released.train(), targets),
        SlowLossOf(released.train(), targets),
        (images,),
        against="one image, one anchor, one face at a time",
        gradients=True,
        rtol=1e-3,
        atol=1e-3,
    )


class LossOf(nn.Module):
    def __init__(self, detector: RetinaFace, targets: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.detector, self.targets = detector, targets

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.detector(images, self.targets)


class SlowLossOf(LossOf):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return slow_loss(self.detector, self.detector(images), self.targets)


def slow_iou(a: list[float], b: list[float]) -> float:
    width, height = (max(0.0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
    both = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
    return width * height / (both - width * height)


def slow_match(d: RetinaFace, faces: list[list[float]], anchors: list[list[float]]) -> list[int]:
    """For each anchor its face, -1 for background, -2 for neither."""
    table = [[slow_iou(face, anchor) for anchor in anchors] for face in faces]
    found = []
    for a in range(len(anchors)):
        column = [row[a] for row in table]
        best = max(column, default=0.0)
        found.append(column.index(best) if best >= d.high and faces else -1 if best < d.low else -2)
    for k, row in enumerate(table):
        if d.high == d.low and max(row) >= 0.2:  # SSD's: the later of two faces keeps the anchor
            found[row.index(max(row))] = k
        if d.high != d.low:  # all anchors that overlap a face most go to the face that they overlap most
            for a, value in enumerate(row):
                if value == max(row) > 0:
                    column = [r[a] for r in table]
                    found[a] = column.index(max(column))
    return found


def slow_loss(
    d: RetinaFace, outputs: tuple[Tensor, Tensor, Tensor], targets: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    anchors = d.anchors(128, 128).tolist()
    classes, boxes, marks, positives, marked = [], [], [], 0, 0
    for logits, offsets, points, target in zip(*outputs, targets, strict=True):
        found = slow_match(d, target["boxes"].tolist(), anchors)
        entropies = []
        for a, face in enumerate(found):
            entropy = torch.logsumexp(logits[a], 0) - logits[a, int(face >= 0)]
            if face == -1:
                entropies.append(entropy)
            if face < 0:
                continue
            classes.append(entropy)
            positives += 1
            x1, y1, x2, y2 = anchors[a]
            fx1, fy1, fx2, fy2 = target["boxes"][face].tolist()
            w, h, cx, cy = x2 - x1, y2 - y1, (x1 + x2) / 2, (y1 + y2) / 2
            goal = [((fx1 + fx2) / 2 - cx) / w / 0.1, ((fy1 + fy2) / 2 - cy) / h / 0.1]
            size = torch.tensor([(fx2 - fx1) / w, (fy2 - fy1) / h]).log() / 0.2
            boxes.append(F.smooth_l1_loss(offsets[a], torch.cat([torch.tensor(goal), size]), reduction="sum"))
            if target["has_landmarks"][face]:
                marked += 1
                scaled = [((x - cx) / w / 0.1, (y - cy) / h / 0.1) for x, y in target["landmarks"][face].tolist()]
                marks.append(F.smooth_l1_loss(points[a], torch.tensor(scaled).flatten(), reduction="sum"))
        here = sum(face >= 0 for face in found)
        classes += sorted(entropies, key=lambda e: -float(e.detach()))[: int(d.negatives * here)]
    total = [sum(part) / max(1, n) for part, n in ((classes, positives), (boxes, positives), (marks, marked))]
    return {k: w * v for k, w, v in zip(("classification", "boxes", "landmarks"), d.weights, total, strict=True)}


# -- the paper's deformable layers ---------------------------------------------------------------------------------------


def deformable_cases() -> Iterator[Case]:
    torch.manual_seed(3)
    context = model.ContextModule(16, 0.0, deformable=True).eval()
    x = torch.randn(2, 16, 9, 11)
    yield Case(
        "a deformable context module before its offsets move",
        lambda x: context(x),
        lambda x: plain_context(context, x),
        (x,),
        against="torch conv2d with the same weights",
        atol=1e-4,
    )


def plain_context(context: nn.Module, x: Tensor) -> Tensor:
    def run(layers: nn.Sequential, x: Tensor) -> Tensor:
        for layer in layers:
            moving = isinstance(layer, DeformableConv2d)
            x = F.conv2d(x, layer.weight, padding=1) if moving else layer(x)
        return x

    shared = run(context.conv5X5_1, x)
    wide = run(context.conv7x7_3, run(context.conv7X7_2, shared))
    return torch.cat([run(context.conv3X3, x), run(context.conv5X5_2, shared), wide], dim=1).clamp(min=0)


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: the thin network from pictures to its outputs, with and without channels last."""

    def images(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 3, 320, 320),)

    def reference() -> nn.Module:
        return model.retinaface_resnet50(backbone="mobilenetv1_025")

    return {
        "retinaface_mobilenet025": Pair(
            model.retinaface_mobilenet025, reference, images, "the same body by its name", train_batch=2
        )
    }
