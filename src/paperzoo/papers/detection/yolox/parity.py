"""YOLOX against numbers that the released code gave for written-down weights, and against slow versions of each part."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou, nms

from paperzoo.blocks.mosaic import affine_matrix, fitted, mixup, mosaic, warp
from paperzoo.engine.parity import Case
from paperzoo.papers.detection.yolox.model import (
    YOLOX,
    cells,
    class_cost,
    decode,
    encode,
    simota,
    yolox_darknet53,
    yolox_nano,
    yolox_s,
    yolox_slim,
)

RELEASED = "numbers of the released code (commit 6ddff48), run with these weights"
CANVAS = (64, 96)
ROWS = slice(0, None, 18)


# -- weights and images that can be written down ---------------------------------------------------------------------


def noise(shape: tuple[int, ...], phase: float = 0.0) -> Tensor:
    """Numbers between 0 and 1 that look random and need no generator."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((n * 12.9898 + phase).sin() * 437.585).remainder(1).float().reshape(shape)


def written_down(model: nn.Module, gain: float = 3.3) -> nn.Module:
    """Every parameter and buffer filled with `noise`, by the order of the names."""
    state = model.state_dict()
    for phase, name in enumerate(sorted(state)):
        value = state[name]
        if name.endswith("num_batches_tracked"):
            continue
        values = noise(tuple(value.shape), phase) - 0.5
        if value.ndim == 4:
            value.copy_(values * gain / value[0].numel() ** 0.5)
        elif name.endswith("running_var") or name.endswith("bn.weight"):
            value.copy_(1 + values)
        else:
            value.copy_(values - int("preds" in name))
    stem = [name for name in state if "stem.conv.bn.running" in name]
    for name in stem:  # pixels come from 0 to 255
        state[name].mul_(100.0 ** (1 + name.endswith("var")))
    return model.eval()


def pictures(batch: int) -> Tensor:
    return noise((batch, 3, *CANVAS))


def some_targets() -> list[dict[str, Tensor]]:
    """Overlapping objects and one of a pixel; and a single one."""
    boxes = torch.tensor([[4.0, 5, 40, 50], [6, 8, 44, 52], [50, 20, 90, 60], [70, 30, 71, 31], [0, 0, 95, 63]])
    return [
        {"boxes": boxes, "labels": torch.tensor([0, 1, 2, 3, 2])},
        {"boxes": boxes[2:3] - 9, "labels": torch.tensor([4])},
    ]


def decoded(model: YOLOX, images: Tensor) -> Tensor:
    """As the released network answers: centre x, centre y, width, height, objectness, scores."""
    classes, objectness, raw = model(images)
    boxes = decode(raw, *cells(tuple(images.shape[-2:]), (8, 16, 32)))
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low, objectness.sigmoid()[..., None], classes.sigmoid()], dim=-1)


# at every eighteenth cell: centre, width, height, objectness, score of the first class; then the losses
ANSWERS = {
    "yolox_nano": [
        [-13.659, -10.317, 3.0175, 1.7368, 0.29640, 0.22111],
        [33.966, -2.467, 2.8095, 1.7818, 0.29614, 0.24520],
        [-13.757, 13.644, 2.9743, 1.8092, 0.28933, 0.23040],
        [33.94, 21.592, 2.8256, 1.7875, 0.29791, 0.24424],
        [-13.736, 37.623, 2.9667, 1.7834, 0.28855, 0.23015],
        [33.931, 45.394, 2.808, 1.7727, 0.29507, 0.23839],
        [-15.811, 27.931, 3.2849, 9.486, 0.24495, 0.34740],
    ],
    "yolox_s": [
        [-7.2942, -2.4316, 2.7873, 2.3083, 0.29992, 0.21524],
        [41.499, 5.9954, 2.3974, 2.7174, 0.28406, 0.25385],
        [-6.7925, 22.064, 2.8686, 2.5913, 0.30261, 0.24401],
        [41.434, 30.117, 2.465, 2.8207, 0.27747, 0.24620],
        [-6.6876, 45.856, 2.791, 2.6007, 0.30180, 0.25019],
        [41.992, 53.27, 2.6085, 2.9115, 0.26906, 0.28154],
        [-26.881, 16.99, 7.3602, 3.8097, 0.40718, 0.37017],
    ],
    "yolox_darknet53": [
        [-8.509, -11.561, 4.0454, 5.3647, 0.20112, 0.19117],
        [39.375, -3.4072, 4.3164, 5.3695, 0.18210, 0.18499],
        [-8.7474, 12.29, 4.1769, 5.5716, 0.20125, 0.18401],
        [39.289, 20.487, 4.2945, 5.3512, 0.18505, 0.18393],
        [-8.7343, 36.19, 4.1634, 5.5697, 0.20034, 0.18223],
        [39.139, 44.083, 4.2624, 5.0316, 0.19600, 0.17882],
        [-17.452, 10.945, 5.5474, 5.0637, 0.26870, 0.27729],
    ],
}
LOSSES = {
    "yolox_nano": {"boxes": 4.99859, "objectness": 18.1102, "classification": 27.6917, "l1": 5.29547},
    "yolox_s": {"boxes": 4.99978, "objectness": 19.4732, "classification": 25.9754, "l1": 6.68217},
    "yolox_darknet53": {"boxes": 4.99920, "objectness": 11.1447, "classification": 26.0582, "l1": 6.75914},
}

# -- slow versions ---------------------------------------------------------------------------------------------------


class Slow:
    """The network read off a state dict's names, one tensor operation after the other."""

    def __init__(self, model: YOLOX) -> None:
        self.state = model.state_dict()

    def base(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.conv.weight"]
        groups = x.shape[1] // weight.shape[1]
        x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=groups)
        mean, var, scale, shift = (
            self.state[f"{name}.bn.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean) / (var + 1e-3).sqrt() * scale + shift
        return x * x.sigmoid()

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        if f"{name}.dconv.conv.weight" in self.state:
            return self.base(f"{name}.pconv", self.base(f"{name}.dconv", x, stride))
        return self.base(name, x, stride)

    def csp(self, name: str, x: Tensor, shortcut: bool = False) -> Tensor:
        y, k = self.base(f"{name}.conv1", x), 0
        while f"{name}.m.{k}.conv1.conv.weight" in self.state:
            z = self.conv(f"{name}.m.{k}.conv2", self.base(f"{name}.m.{k}.conv1", y))
            y, k = y + z if shortcut else z, k + 1
        return self.base(f"{name}.conv3", torch.cat([y, self.base(f"{name}.conv2", x)], 1))

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.stack([255 * images[:, 2], 255 * images[:, 1], 255 * images[:, 0]], 1)
        parts = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        x, maps, body = self.base("backbone.backbone.stem.conv", torch.cat(parts, 1)), [], "backbone.backbone.dark"
        for k in (2, 3, 4, 5):
            x = self.conv(f"{body}{k}.0", x, 2)
            if k == 5:
                x = self.base(f"{body}5.1.conv1", x)
                x = torch.cat([x] + [F.max_pool2d(F.pad(x, [w // 2] * 4, value=-1e9), w, 1) for w in (5, 9, 13)], 1)
                x = self.base(f"{body}5.1.conv2", x)
            x = self.csp(f"{body}{k}.{2 if k == 5 else 1}", x, shortcut=k < 5)
            maps.append(x)
        _, c3, c4, c5 = maps
        double = lambda y: y.repeat_interleave(2, 2).repeat_interleave(2, 3)  # noqa: E731
        top = self.base("backbone.lateral_conv0", c5)
        middle = self.base("backbone.reduce_conv1", self.csp("backbone.C3_p4", torch.cat([double(top), c4], 1)))
        p3 = self.csp("backbone.C3_p3", torch.cat([double(middle), c3], 1))
        p4 = self.csp("backbone.C3_n3", torch.cat([self.conv("backbone.bu_conv2", p3, 2), middle], 1))
        p5 = self.csp("backbone.C3_n4", torch.cat([self.conv("backbone.bu_conv1", p4, 2), top], 1))
        columns = []
        for k, level in enumerate((p3, p4, p5)):
            level = self.base(f"head.stems.{k}", level)
            branch = {}
            for name in ("cls", "reg"):
                branch[name] = self.conv(f"head.{name}_convs.{k}.1", self.conv(f"head.{name}_convs.{k}.0", level))
            for name, source in (("cls", "cls"), ("obj", "reg"), ("reg", "reg")):
                weight, bias = (self.state[f"head.{name}_preds.{k}.{part}"] for part in ("weight", "bias"))
                columns.append(F.conv2d(branch[source], weight, bias).flatten(2).transpose(1, 2))
        classes, objectness, boxes = (torch.cat(columns[i::3], 1) for i in range(3))
        return classes, objectness[..., 0], boxes


def slow_simota(
    boxes: Tensor, labels: Tensor, predicted: Tensor, classes: Tensor, objectness: Tensor, canvas: tuple[int, int]
) -> list[int]:
    """One image, one object and one cell at a time: for each cell a row of `boxes` or -1."""
    corners, strides = cells(canvas, (8, 16, 32))
    middle = (corners + 0.5) * strides[:, None]
    near = [
        [bool(((middle[a] - (box[:2] + box[2:]) / 2).abs() < 1.5 * strides[a]).all()) for a in range(len(corners))]
        for box in boxes
    ]
    usable = [a for a in range(len(corners)) if any(row[a] for row in near)]
    cost, claims = {}, {a: [] for a in usable}
    for i, box in enumerate(boxes):
        overlap = {a: float(box_iou(box[None], predicted[a][None])) for a in usable}
        for a in usable:
            score = (classes[a].sigmoid() * objectness[a].sigmoid()).sqrt()
            wanted = F.one_hot(labels[i], len(score)).float()
            entropy = float(F.binary_cross_entropy(score, wanted, reduction="sum"))
            cost[i, a] = entropy - 3 * float(torch.tensor(overlap[a] + 1e-8).log()) + 1e6 * (not near[i][a])
        k = max(1, int(sum(sorted(overlap.values(), reverse=True)[:10])))
        for a in sorted(usable, key=lambda a: cost[i, a])[:k]:
            claims[a].append(i)
    matched = [-1] * len(corners)
    for a, claimed in claims.items():
        if len(claimed) == 1:
            matched[a] = claimed[0]
        elif claimed:
            matched[a] = min(range(len(boxes)), key=lambda i: cost[i, a])
    return matched


class OurLoss(nn.Module):
    def __init__(self, detector: YOLOX, targets: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.backbone, self.head, self.targets, self.detector = detector.backbone, detector.head, targets, [detector]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.detector[0](images, self.targets)


class SlowLoss(OurLoss):
    """One cell at a time, with the assignment of `slow_simota`."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        canvas = tuple(images.shape[-2:])
        classes, objectness, raw = self.detector[0](images)
        corners, strides = cells(canvas, (8, 16, 32))
        total, count = {"boxes": 0.0, "objectness": 0.0, "classification": 0.0, "l1": 0.0}, 0
        for i, target in enumerate(self.targets):
            predicted = []
            for a, (dx, dy, w, h) in enumerate(raw[i]):
                x, y, w, h = (v * strides[a] for v in (corners[a, 0] + dx, corners[a, 1] + dy, w.exp(), h.exp()))
                predicted.append(torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2]))
            fixed = [torch.stack(predicted).detach(), classes[i].detach(), objectness[i].detach()]
            matched = slow_simota(target["boxes"], target["labels"], *fixed, canvas)
            for a, row in enumerate(matched):
                total["objectness"] += F.binary_cross_entropy_with_logits(
                    objectness[i, a], torch.tensor(float(row >= 0))
                )
                if row < 0:
                    continue
                count += 1
                box = target["boxes"][row]
                overlap = box_iou(predicted[a][None], box[None])[0, 0]
                total["boxes"] += 5 * (1 - overlap**2)
                wanted = F.one_hot(target["labels"][row], classes.shape[-1]) * overlap.detach()
                total["classification"] += F.binary_cross_entropy_with_logits(classes[i, a], wanted, reduction="sum")
                size = (box[2:] - box[:2]) / strides[a]
                place = (box[:2] + box[2:]) / 2 / strides[a] - corners[a]
                total["l1"] += (raw[i, a] - torch.cat([place, (size + 1e-8).log()])).abs().sum()
        return {name: value / max(1, count) for name, value in total.items()}


def slow_detections(outputs: tuple[Tensor, Tensor, Tensor], canvas: tuple[int, int]) -> list[dict[str, Tensor]]:
    """One class after the other, from every cell's best class."""
    boxes = decode(outputs[2], *cells(canvas, (8, 16, 32)))
    result = []
    for b, c, o in zip(boxes, outputs[0].sigmoid(), outputs[1].sigmoid(), strict=True):
        found = []
        for k in range(c.shape[1]):
            rows = [a for a in range(len(c)) if int(c[a].argmax()) == k and float(o[a] * c[a, k]) >= 0.01]
            rows = torch.tensor(rows, dtype=torch.int64)
            found += [(float(o[a] * c[a, k]), k, b[a]) for a in rows[nms(b[rows], (o * c[:, k])[rows], 0.65)]]
        found.sort(key=lambda entry: -entry[0])
        limit = torch.tensor([canvas[1], canvas[0]] * 2)
        result.append(
            {
                "boxes": torch.stack([box.clamp(min=0).minimum(limit) for *_, box in found]),
                "scores": torch.tensor([s for s, *_ in found]),
                "labels": torch.tensor([k for _, k, _ in found]),
            }
        )
    return result


# -- the transforms --------------------------------------------------------------------------------------------------


def block(height: int, width: int, x1: int, y1: int, x2: int, y2: int, colour: int) -> dict[str, Tensor]:
    """A dark image with one bright block, which is its object."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, y1:y2, x1:x2] = colour
    return {"image": image, "boxes": torch.tensor([[x1, y1, x2, y2]]).float(), "labels": torch.tensor([colour])}


def bright(image: Tensor, colour: int) -> Tensor:
    """The smallest box around the pixels of a colour."""
    y, x = (image[0] == colour).nonzero(as_tuple=True)
    return torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()


def four() -> list[dict[str, Tensor]]:
    places = ((10, 20, 30, 60), (5, 2, 62, 9), (1, 30, 20, 64), (12, 12, 40, 44))
    return [block(64, 64, *place, 200 + i) for i, place in enumerate(places)]


# -- the cases -------------------------------------------------------------------------------------------------------


def lively(model: YOLOX) -> YOLOX:
    """Predictors whose scores and boxes differ from cell to cell, on batch norms that have seen images."""
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.rand(2, 3, *CANVAS))
        for layer in [*model.head.cls_preds, *model.head.obj_preds, *model.head.reg_preds]:
            layer.weight.normal_(std=0.4)
            layer.bias.normal_(std=0.5).sub_(0.3)
    return model.eval()


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    for name, function in (("yolox_nano", yolox_nano), ("yolox_s", yolox_s), ("yolox_darknet53", yolox_darknet53)):
        model = written_down(function(), 1.8 if function is yolox_darknet53 else 3.3)
        yield Case(
            f"{name}, decoded answers",
            lambda m=model: decoded(m, pictures(2))[0, ROWS, :6].detach(),
            lambda n=name: torch.tensor(ANSWERS[n]),
            against=RELEASED,
            rtol=1e-3,
            atol=1e-4,
        )
        model.use_l1 = True
        yield Case(
            f"{name}, the four losses",
            lambda m=model: {n: v.detach() for n, v in m(pictures(2), some_targets()).items()},
            lambda n=name: LOSSES[n],
            against=RELEASED,
            rtol=1e-3,
        )
    for name, function, canvas in (("yolox_nano", yolox_nano, (64, 96)), ("yolox_s", yolox_s, (160, 128))):
        model = lively(function())
        yield Case(
            f"{name}, raw outputs at {canvas[0]} x {canvas[1]} pixels",
            model,
            lambda x, m=model: Slow(m)(x),
            (torch.rand(2, 3, *canvas),),
            "the network written out as functions of the state dict's names",
            rtol=1e-3,
            atol=1e-4,
        )
    slim = lively(yolox_slim())
    slim.use_l1 = True
    targets = [*some_targets(), {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]
    corner = torch.rand(25, 2) * torch.tensor([80.0, 50.0])
    crowd = {"boxes": torch.cat([corner, corner + 2 + torch.rand(25, 2) * 30], 1), "labels": torch.randint(10, (25,))}
    for mode in ("eval", "train"):
        yield Case(
            f"losses and gradients, {mode} mode; a crowd, a box of one pixel, an empty image",
            OurLoss(slim, [*targets, crowd]).train(mode == "train"),
            SlowLoss(slim, [*targets, crowd]).train(mode == "train"),
            (torch.rand(4, 3, *CANVAS),),
            "one object and one cell at a time",
            gradients=True,
            rtol=1e-3,
            atol=1e-3,
        )
    slim.eval()
    images = torch.rand(2, 3, *CANVAS)
    yield Case(
        "detections",
        lambda: slim.postprocess(slim(images), torch.tensor([CANVAS, CANVAS]), CANVAS),
        lambda: slow_detections(tuple(x.detach() for x in slim(images)), CANVAS),
        against="one class after the other",
    )
    yield from small_cases()


def small_cases() -> Iterator[Case]:
    """Parts without a network."""
    torch.manual_seed(1)
    corners, strides = cells(CANVAS, (8, 16, 32))
    raw, labels, owner = torch.randn(2, len(strides), 4), torch.tensor([3, 0, 4]), torch.tensor([0, 1, 1])
    classes, objectness = torch.randn(2, len(strides), 5) * 3, torch.randn(2, len(strides))

    def whole_cost() -> Tensor:
        score = (classes.sigmoid() * objectness.sigmoid()[..., None]).sqrt()[owner]
        wanted = F.one_hot(labels, 5).float()[:, None].expand_as(score)
        return F.binary_cross_entropy(score, wanted, reduction="none").sum(-1)

    yield Case(
        "the cost's class part",
        lambda: class_cost(labels, owner, classes, objectness),
        whole_cost,
        against="torch.nn.functional.binary_cross_entropy over (T, A, K)",
    )
    yield Case(
        "coding of boxes",
        lambda: encode(decode(raw[0], corners, strides), corners, strides),
        lambda: raw[0],
        against="its inverse",
        atol=1e-4,
    )
    nothing = torch.zeros(0, dtype=torch.int64)
    boxes = decode(raw, corners, strides)
    yield Case(
        "SimOTA without objects",
        lambda: simota(torch.zeros(0, 4), nothing, nothing, boxes, classes, objectness, corners, strides)[0],
        lambda: torch.full((2, len(strides)), -1),
        against="nothing to learn",
    )
    for centre in ((64, 64), (50, 90), (96, 60)):
        made = mosaic(four(), 64, centre)
        yield Case(
            f"mosaic around {centre}: boxes",
            lambda m=made: (m["boxes"], m["labels"]),
            lambda m=made: (torch.stack([bright(m["image"], 200 + i) for i in range(4)]), torch.arange(200, 204)),
            against="the pixels of the pasted objects",
        )
    shifted = warp(four()[0], affine_matrix(0.0, 2.0, (0.0, 0.0), (-15.0, -20.0)), 64)
    yield Case(
        "twice as large and shifted: boxes",
        lambda: shifted["boxes"],
        lambda: bright(200 * (shifted["image"] > 140), 200)[None],  # edges are blurred
        against="the pixels of the object",
    )
    turned = warp(four()[0], affine_matrix(90.0, 1.0, (0.0, 0.0), (0.0, 64.0)), 64)
    yield Case(
        "turned by 90 degrees",
        lambda: (turned["image"], turned["boxes"]),
        lambda: (four()[0]["image"].rot90(1, (1, 2)), bright(turned["image"], 200)[None]),
        against="torch.rot90",
    )

    def mixed() -> tuple[Tensor, Tensor, Tensor]:
        result = mixup(four()[0], four()[3], scale=(1.0, 1.0), flip=1.0)
        return result["image"], result["boxes"], result["labels"]

    def by_hand() -> tuple[Tensor, Tensor, Tensor]:
        first, other = four()[0], four()[3]
        image = (first["image"].float() + other["image"].flip(2).float()) / 2
        boxes = torch.cat([first["boxes"], torch.tensor([[24.0, 12, 52, 44]])])
        return image.to(torch.uint8), boxes, torch.tensor([200, 203])

    yield Case("mixup with a mirrored image", mixed, by_hand, against="half and half, computed by hand")
    yield Case(
        "fitted to another size",
        lambda: (fitted(block(32, 64, 8, 4, 16, 12, 250), 128)["boxes"], fitted(four()[0], 32)["image"].shape[1]),
        lambda: (torch.tensor([[16.0, 8, 32, 24]]), 32),
        against="computed by hand",
    )
