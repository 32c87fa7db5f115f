"""YOLOv3 against mmdet's answers (`golden.py`), Darknet-53 against timm, weight files against the format, the rest against loops."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou, nms

from paperzoo.engine.parity import Case, Pair
from paperzoo.errors import DataError
from paperzoo.papers.detection.yolov3 import golden
from paperzoo.papers.detection.yolov3.darknet_file import (
    classes_in,
    layers,
    load_darknet_weights,
    read_darknet_weights,
)
from paperzoo.papers.detection.yolov3.model import (
    STRIDES,
    YOLOV3,
    Darknet,
    assign,
    cells,
    darknet53,
    decode,
    encode,
    from_official,
    yolov3,
    yolov3_slim,
)
from paperzoo.papers.detection.yolov3.technique import kmeans_anchors, mean_iou, shape_iou

MMDET = "mmdet 3.3.0, with the paper's one prior an object (golden.py)"

# -- mmdet -------------------------------------------------------------------------------------------------------------


def answers() -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(str(golden.FILE))


def raw(model: YOLOV3, canvas: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Boxes, objectness, classes in mmdet's order at some rows, and the decoded boxes."""
    with torch.no_grad():
        classes, objectness, boxes = model.eval()(golden.pictures(2, canvas))
    flat = torch.cat([boxes, objectness[..., None], classes], dim=-1)
    return flat[:, golden.ROWS], decode(boxes, *cells(canvas, model.anchors))[:, golden.ROWS]


def by_label(objects: dict[str, Tensor]) -> dict[str, Tensor]:
    """Class by class, and the scores as they came: two classes of one box may score the same, and either may be first."""
    order = (10 * objects["labels"].double() - objects["scores"]).argsort()
    return {name: value[order] for name, value in objects.items()} | {"order": objects["scores"]}


def found(model: YOLOV3, canvas: tuple[int, int]) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        outputs = model.eval()(golden.pictures(2, canvas))
    return [by_label(objects) for objects in model.postprocess(outputs, torch.tensor([canvas, canvas]), canvas)]


def their_found(table: Tensor, canvas: tuple[int, int]) -> dict[str, Tensor]:
    limit = torch.tensor([canvas[1], canvas[0]] * 2)
    boxes = table[:, :4].clamp(min=0).minimum(limit)
    return by_label({"boxes": boxes, "scores": table[:, 4], "labels": table[:, 5].long()})


def losses_and_gradients(kind: str) -> tuple[dict[str, Tensor], Tensor]:
    place, mode = golden.LOSS_CASES[kind]
    model = golden.write_weights(yolov3()).train(mode == "train")
    wanted = golden.targets(kind)
    losses = model(golden.pictures(len(wanted), golden.CANVASES[place]), wanted)
    names = dict(model.named_parameters())
    gradients = torch.autograd.grad(sum(losses.values()), list(names.values()))
    prints = golden.fingerprint(dict(zip(names, gradients, strict=True)))
    return {n: v.detach() for n, v in losses.items()}, torch.stack([prints[n] for n in sorted(prints)])


def their_losses(stored: dict[str, Tensor], kind: str) -> tuple[dict[str, Tensor], Tensor]:
    classes, confidence, centre, size = stored[f"{kind}.losses"]
    losses = {"boxes": centre + size, "objectness": confidence, "classification": classes}
    return losses, stored[f"{kind}.gradients"]


# -- slow versions -----------------------------------------------------------------------------------------------------


def slow_assign(
    boxes: Tensor, canvas: tuple[int, int], anchors: Tensor, threshold: float = 0.5
) -> tuple[list[int], list[int]]:
    """One image, one object and one prior at a time: what each prior learns, and the place of each object."""
    place_of: dict[tuple[int, int, int, int], int] = {}
    priors = []
    for level, stride in enumerate(STRIDES):
        for row in range(-(-canvas[0] // stride)):
            for column in range(-(-canvas[1] // stride)):
                for k, (w, h) in enumerate(anchors[level].tolist()):
                    place_of[level, row, column, k] = len(priors)
                    x, y = (column + 0.5) * stride, (row + 0.5) * stride
                    priors.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    matched, places = [-1] * len(priors), []
    for box in boxes:
        for a, overlap in enumerate(box_iou(box[None], torch.tensor(priors))[0].tolist()):
            if overlap > threshold:
                matched[a] = -2
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        width, height = x2 - x1, y2 - y1
        best, where = -1.0, (0, 0)
        for level in range(3):
            for k, (w, h) in enumerate(anchors[level].tolist()):
                shared = min(w, width) * min(h, height)
                overlap = shared / (w * h + width * height - shared)
                if overlap > best + 1e-7:
                    best, where = overlap, (level, k)
        stride = STRIDES[where[0]]
        row, column = int((y1 + y2) / 2 // stride), int((x1 + x2) / 2 // stride)
        row, column = min(row, -(-canvas[0] // stride) - 1), min(column, -(-canvas[1] // stride) - 1)
        places.append(place_of[where[0], row, column, where[1]])
        matched[places[-1]] = i
    return matched, places


class OurLoss(nn.Module):
    """The losses, divided by 500: gradients are compared of their squares, and those of early layers would be huge."""

    def __init__(self, detector: YOLOV3, targets: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.backbone, self.neck, self.bbox_head = detector.backbone, detector.neck, detector.bbox_head
        self.detector, self.targets = [detector], targets

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {name: loss / 500 for name, loss in self.detector[0](images, self.targets).items()}


class SlowLoss(OurLoss):
    """One prior at a time, with `slow_assign`; gradients of a place are what the paper says, t^ - t, by construction."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        canvas, detector = tuple(images.shape[-2:]), self.detector[0]
        classes, objectness, found = detector(images)
        corners, strides, sizes = cells(canvas, detector.anchors)
        total = {"boxes": 0.0, "objectness": 0.0, "classification": 0.0}
        for i, target in enumerate(self.targets):
            matched, places = slow_assign(target["boxes"], canvas, detector.anchors)
            for a, row in enumerate(matched):
                if row == -2:
                    continue
                total["objectness"] -= F.logsigmoid(objectness[i, a] if row >= 0 else -objectness[i, a])
                if row < 0:
                    continue
                x1, y1, x2, y2 = target["boxes"][row]
                weight = 2 - (x2 - x1) * (y2 - y1) / (canvas[0] * canvas[1])
                for axis, middle in enumerate(((x1 + x2) / 2, (y1 + y2) / 2)):
                    wanted, t = (middle - corners[a, axis]) / strides[a], found[i, a, axis]
                    total["boxes"] -= weight * (wanted * F.logsigmoid(t) + (1 - wanted) * F.logsigmoid(-t))
                for axis, extent in enumerate((x2 - x1, y2 - y1)):
                    total["boxes"] += weight * (found[i, a, 2 + axis] - (extent / sizes[a, axis]).log()) ** 2 / 2
                mine = {int(k) for k, place in zip(target["labels"], places, strict=True) if place == a}
                for k, logit in enumerate(classes[i, a]):
                    total["classification"] -= F.logsigmoid(logit if k in mine else -logit)
        return {name: value / len(self.targets) / 500 for name, value in total.items()}


def slow_detections(
    model: YOLOV3, outputs: tuple[Tensor, Tensor, Tensor], canvas: tuple[int, int]
) -> list[dict[str, Tensor]]:
    """One class after the other."""
    boxes, result = decode(outputs[2], *cells(canvas, model.anchors)), []
    limit = torch.tensor([canvas[1], canvas[0]] * 2)
    for b, c, o in zip(boxes, outputs[0].sigmoid(), outputs[1].sigmoid(), strict=True):
        rows = []
        for k in range(c.shape[1]):
            scores = o * c[:, k]
            some = (scores > model.score_threshold).nonzero()[:, 0]
            rows += [(float(scores[a]), k, b[a]) for a in some[nms(b[some], scores[some], model.nms_threshold)]]
        rows = sorted(rows, key=lambda entry: -entry[0])[: model.detections]
        result.append(
            {
                "boxes": torch.stack([box.clamp(min=0).minimum(limit) for *_, box in rows]),
                "scores": torch.tensor([s for s, *_ in rows]),
                "labels": torch.tensor([k for _, k, _ in rows]),
            }
        )
    return result


def configuration(classes: int = 80) -> list[tuple[int, int, int, bool]]:
    """The convolutions of yolov3.cfg from top to bottom: filters, size, stride, batch norm."""
    rows = [(32, 3, 1)]
    for filters, repeats in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
        rows.append((filters, 3, 2))
        rows += [(filters // 2, 1, 1), (filters, 3, 1)] * repeats
    rows = [(*row, True) for row in rows]
    for filters in (512, 256, 128):
        if filters < 512:
            rows.append((filters, 1, 1, True))
        rows += [(filters, 1, 1, True), (2 * filters, 3, 1, True)] * 3
        rows.append((3 * (5 + classes), 1, 1, False))
    return rows


def written(model: nn.Module, version: tuple[int, int, int] = (0, 2, 0), seen: int = 77, cut: int = 0) -> bytes:
    """A `.weights` file of the model as Darknet writes it; `cut` drops numbers at the end, or adds them if negative."""
    content = np.array(version, "<i4").tobytes()
    content += np.array([seen], "<i8" if version[0] * 10 + version[1] >= 2 else "<i4").tobytes()
    numbers = []
    for _, layer, norm in layers(model):
        if norm is None:
            numbers.append(layer.bias)
        else:
            numbers += [norm.bias, norm.weight, norm.running_mean, norm.running_var]
        numbers.append(layer.weight)
    flat = torch.cat([n.detach().flatten() for n in numbers])
    flat = flat[: len(flat) - cut] if cut >= 0 else torch.cat([flat, torch.zeros(-cut)])
    return content + flat.numpy().astype("<f4").tobytes()


def through_a_file(content: bytes, model: nn.Module) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "some.weights"
        path.write_bytes(content)
        load_darknet_weights(model, path)
    return model


def complaint(content: bytes, model: nn.Module, *words: str) -> list[bool]:
    """Which words the error about a broken file has."""
    try:
        through_a_file(content, model)
    except DataError as error:
        return [word in str(error) for word in (*words, "some.weights")]
    return [False]


# -- the cases ---------------------------------------------------------------------------------------------------------


def lively(model: nn.Module) -> nn.Module:
    """Random weights on batch norms that have seen images, and predictors that differ from cell to cell."""
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.rand(2, 3, 64, 96))
        for layer in model.bbox_head.convs_pred:
            layer.weight.normal_(std=0.3)
            layer.bias.normal_(std=0.5)
    return model.eval()


def some_targets(classes: int) -> list[dict[str, Tensor]]:
    """Two objects at one place, one of a pixel, one at the border; none at all; a crowd."""
    boxes = torch.tensor([[4.0, 5, 40, 50], [6, 6, 39, 50], [50, 20, 90, 60], [70, 30, 71, 31], [60, 40, 96, 64]])
    corner = torch.rand(20, 2) * torch.tensor([80.0, 50.0])
    crowd = torch.cat([corner, corner + 2 + torch.rand(20, 2) * 14], dim=1)
    return [
        {"boxes": boxes, "labels": torch.tensor([0, 1, 2, 3, 2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
        {"boxes": crowd, "labels": torch.randint(classes, (20,))},
    ]


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    stored = answers()
    model = golden.write_weights(yolov3(candidates=10**6))
    for name, canvas in golden.CANVASES.items():
        ours = raw(model, canvas)
        for part, value in zip(("raw", "boxes"), ours, strict=True):
            yield Case(
                f"{part} at {canvas[0]} x {canvas[1]} pixels",
                lambda v=value: v,
                lambda key=f"{name}.{part}": stored[key],
                against=MMDET,
                rtol=1e-3,
                atol=1e-3,
            )
        yield Case(
            f"detections at {canvas[0]} x {canvas[1]} pixels",
            lambda c=canvas: found(model, c),
            lambda n=name, c=canvas: [their_found(stored[f"{n}.{i}.found"], c) for i in range(2)],
            against=MMDET,
            rtol=1e-3,
            atol=1e-3,
        )
    for kind, (_, mode) in golden.LOSS_CASES.items():
        yield Case(
            f"losses and gradients of {kind} objects, {mode} mode",
            lambda k=kind: losses_and_gradients(k),
            lambda k=kind: their_losses(stored, k),
            against=MMDET,
            rtol=2e-3,
            atol=1e-3,
        )
    yield from classifier_cases()
    yield from loss_cases()
    yield from file_cases()
    yield from anchor_cases()


def classifier_cases() -> Iterator[Case]:
    from timm import create_model

    theirs = create_model("darknet53")
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, nn.LeakyReLU):
                module.negative_slope = 0.1
            if isinstance(module, nn.BatchNorm2d):  # timm starts the last one of a block at 0
                module.weight.uniform_(0.3, 0.7)
        for _ in range(2):
            theirs.train()(torch.rand(2, 3, 64, 64))
    ours = darknet53()
    ours.load_state_dict(from_official(theirs.state_dict()))
    for shape in ((2, 3, 64, 64), (1, 3, 96, 64)):
        yield Case(
            f"darknet53 at {shape[2]} x {shape[3]} pixels",
            ours.eval(),
            theirs.eval(),
            (torch.rand(shape),),
            "timm 1.0.31 darknet53, its activation's slope set to 0.1",
            gradients=True,
            rtol=1e-3,
            atol=1e-3,
        )


def loss_cases() -> Iterator[Case]:
    torch.manual_seed(1)
    slim, targets = lively(yolov3_slim(num_classes=6)), some_targets(6)
    for mode in ("eval", "train"):
        yield Case(
            f"losses and gradients, {mode} mode; two objects at one place, a box of one pixel, an empty image, a crowd",
            OurLoss(slim, targets).train(mode == "train"),
            SlowLoss(slim, targets).train(mode == "train"),
            (torch.rand(3, 3, 64, 96),),
            "one prior at a time",
            gradients=True,
            rtol=1e-3,
            atol=1e-5,
        )
    slim.eval()
    outputs = tuple(x.detach() for x in slim(torch.rand(2, 3, 64, 96)))
    slim.candidates = 10**6
    yield Case(
        "detections of the small network",
        lambda: slim.postprocess(outputs, torch.tensor([[64, 96]] * 2), (64, 96)),
        lambda: slow_detections(slim, outputs, (64, 96)),
        against="one class after the other",
    )
    corner = torch.rand(60, 2) * 300
    boxes = torch.cat([corner, corner + torch.exp(torch.rand(60, 2) * 5.5)], dim=1)
    owner = torch.zeros(60, dtype=torch.int64)
    anchors, canvas = yolov3_slim().anchors * 5, (320, 352)
    yield Case(
        "which prior learns which object, at 320 x 352 pixels",
        lambda: tuple(part.flatten() for part in assign(boxes.clamp(max=320), owner, 1, canvas, anchors)),
        lambda: tuple(torch.tensor(part) for part in slow_assign(boxes.clamp(max=320), canvas, anchors)),
        against="one object and one prior at a time",
    )
    parts = tuple(part[:60] for part in cells(canvas, anchors))
    yield Case(
        "coding of boxes",
        lambda: encode(decode(torch.linspace(-2, 2, 240).view(60, 4), *parts), *parts),
        lambda: torch.cat(
            [torch.linspace(-2, 2, 240).view(60, 4)[:, :2].sigmoid(), torch.linspace(-2, 2, 240).view(60, 4)[:, 2:]], 1
        ),
        against="its inverse",
        atol=1e-4,
    )


def file_cases() -> Iterator[Case]:
    torch.manual_seed(2)
    with torch.device("meta"):
        full = yolov3()
    yield Case(
        "layers in the order of the file",
        lambda: [
            torch.tensor([c.out_channels, c.kernel_size[0], c.stride[0], norm is not None])
            for _, c, norm in layers(full)
        ],
        lambda: [torch.tensor(row) for row in configuration()],
        against="yolov3.cfg, written out",
    )
    yield Case(
        "how many numbers the file has",
        lambda: sum(v.numel() for v in full.state_dict().values() if v.ndim),
        lambda: (248_007_048 - 20) // 4,
        against="the size of the authors' yolov3.weights, 248,007,048 bytes",
    )
    slim, other = lively(yolov3_slim(num_classes=4)), yolov3_slim(num_classes=4)
    counters = lambda m: {k: v for k, v in m.state_dict().items() if not k.endswith("num_batches_tracked")}  # noqa: E731
    for version in ((0, 2, 0), (0, 1, 0)):
        yield Case(
            f"a detector through a file of version {version[0]}.{version[1]}",
            lambda v=version: counters(through_a_file(written(slim, v), other)),
            lambda: counters(slim),
            against="the weights that were written",
            rtol=0,
            atol=0,
        )
    body = Darknet((1, 1, 1, 1, 1), (4, 4, 8, 8, 8, 16), num_classes=0)
    head = Darknet((1, 1, 1, 1, 1), (4, 4, 8, 8, 8, 16), num_classes=5)
    for network in (body, head):
        fresh = Darknet((1, 1, 1, 1, 1), (4, 4, 8, 8, 8, 16), num_classes=5 if network is head else 0)
        yield Case(
            f"a classifier {'with' if network is head else 'without'} head through a file",
            lambda n=network, f=fresh: counters(through_a_file(written(n), f)),
            lambda n=network: counters(n),
            against="the weights that were written",
            rtol=0,
            atol=0,
        )

    def classes() -> int:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "four.weights"
            path.write_bytes(written(slim))
            return classes_in(read_darknet_weights(path), yolov3_slim(num_classes=9))

    yield Case("for how many classes a file is", classes, lambda: 4, against="the network that was written")
    last = "bbox_head.convs_pred.2.weight"
    broken = {
        "cut short": (written(slim, cut=3), (last, "numbers and ends in")),
        "too long": (written(slim, cut=-5), ("another network or number of classes",)),
        "ends within a number": (written(slim)[:-2], ("cut short",)),
        "without a header": (b"abc", ("3 bytes",)),
        "no weight file": (b"\x89PNG\r\n\x1a\n" + bytes(40), ("version",)),
    }
    for name, (content, words) in broken.items():
        yield Case(
            f"a file that is {name}" if name.startswith(("cut", "too")) else f"a file: {name}",
            lambda c=content, w=words: complaint(c, yolov3_slim(num_classes=4), *w),
            lambda w=words: [True] * (len(w) + 1),
            against="its error names the file and what is wrong",
        )


def anchor_cases() -> Iterator[Case]:
    torch.manual_seed(3)
    sizes = torch.exp(torch.rand(400, 2) * 4 + 1)
    anchors = kmeans_anchors(sizes, 9)

    def lloyd_step() -> Tensor:
        """Each centre as the mean of the boxes that overlap it most, one box at a time."""
        members: list[list[Tensor]] = [[] for _ in anchors]
        for size in sizes:
            overlaps = []
            for anchor in anchors:
                shared = float(torch.minimum(size, anchor).prod())
                overlaps.append(shared / (float(size.prod()) + float(anchor.prod()) - shared))
            members[int(np.argmax(overlaps))].append(size)
        return torch.stack([torch.stack(m).mean(0) for m in members])

    yield Case(
        "clusters of shapes are at rest", lambda: anchors, lloyd_step, against="a step of k-means, in loops", rtol=1e-3
    )
    planted = torch.tensor([[8.0, 10], [40, 20], [100, 160]])
    noisy = (planted[:, None] * (1 + 0.02 * torch.randn(3, 50, 2))).reshape(-1, 2)
    yield Case(
        "clusters that are there are found",
        lambda: kmeans_anchors(noisy, 3),
        lambda: torch.stack([noisy[i * 50 : i * 50 + 50].mean(0) for i in range(3)]),
        against="the means of the groups",
    )
    yield Case(
        "IoU of shapes",
        lambda: (shape_iou(sizes[:20], anchors), mean_iou(sizes, anchors) > mean_iou(sizes, anchors * 1.3)),
        lambda: (box_iou(F.pad(sizes[:20], (2, 0)), F.pad(anchors, (2, 0))), True),
        against="torchvision.ops.box_iou of boxes at one corner",
    )


def pairs() -> dict[str, Pair]:
    """For `paperzoo bench`."""
    from timm import create_model

    images = lambda batch: (torch.rand(batch, 3, 256, 256),)  # noqa: E731
    ours, theirs = (lambda: darknet53(slope=0.01)), (lambda: create_model("darknet53"))
    return {"darknet53": Pair(ours, theirs, images, "timm 1.0.31 darknet53", train_batch=4)}
