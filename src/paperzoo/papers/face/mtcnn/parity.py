"""MTCNN against facenet-pytorch (its outputs on weights from a rule are stored, see `golden.py`), and against slow versions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.face.mtcnn import cascade, golden
from paperzoo.papers.face.mtcnn.model import MTCNN, from_official, mtcnn, onet, pnet, rnet
from paperzoo.papers.face.mtcnn.windows import TASKS, kinds_of, multi_task_loss, windows_around

SOURCE = "facenet-pytorch 2.6.0, stored outputs"


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    stored, given = load_file(str(golden.FILE)), golden.inputs()
    nets = {name: golden.by_rule(make()) for name, make in (("pnet", pnet), ("rnet", rnet), ("onet", onet))}
    for name, net in nets.items():
        # there: offsets, for O-Net the landmarks, probabilities; here: logits, offsets, landmarks
        theirs = [stored[f"{name}.{i}"] for i in range(3 if name == "onet" else 2)]
        yield Case(
            f"{name}, raw outputs, {tuple(given[name].shape)}",
            lambda x, net=net: probabilities(net(x)),
            lambda x, t=theirs: [t[-1], *t[:-1]],
            (given[name],),
            SOURCE,
        )
    whole = mtcnn().eval()
    whole.load_state_dict(from_official({name: net.state_dict() for name, net in nets.items()}))
    for i in range(2):
        yield Case(
            f"the whole cascade, picture {i}: {len(stored[f'boxes.{i}'])} faces",
            lambda x, i=i: as_released(cascade.detect(whole, x, golden.THRESHOLDS)[i]),
            lambda x, i=i: (stored[f"boxes.{i}"], stored[f"points.{i}"]),
            (given["pictures"],),
            SOURCE,
            atol=1e-3,
            note="boxes, scores and landmarks after all three suppressions, in pixels",
        )
    yield from window_cases(given["pictures"])
    yield from learning_cases()
    yield from offset_cases(whole)


def probabilities(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [outputs[0].softmax(1), *outputs[1:]]


def as_released(found: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Boxes whose corners both belong to them, counted from 1, with the score; and the landmarks."""
    boxes = found["boxes"] + torch.tensor([1.0, 1.0, 0.0, 0.0])
    return torch.cat([boxes, found["scores"][:, None]], dim=1), found["landmarks"]


# -- windows and suppression -------------------------------------------------------------------------------------------


def window_cases(pictures: Tensor) -> Iterator[Case]:
    rng = torch.Generator().manual_seed(0)
    height, width = pictures.shape[2:]
    low = torch.stack([torch.randint(0, n - 1, (40,), generator=rng) for n in (width, height)], 1)
    high = low + 1 + (torch.rand(40, 2, generator=rng) * (torch.tensor([width, height]) - low)).long()
    boxes = torch.cat([low, high.minimum(torch.tensor([width, height]))], dim=1)
    boxes[0] = torch.tensor([0, 0, width, height])
    boxes[1] = torch.tensor([5, 7, 6, 8])  # a pixel
    owner = torch.randint(2, (40,), generator=rng)
    for size in (24, 48):
        yield Case(
            f"40 windows cut out at once, {size} pixels",
            lambda size=size: cascade.cut_windows(cascade.summed(pictures), owner, boxes, size),
            lambda size=size: torch.cat(
                [
                    F.adaptive_avg_pool2d(pictures[o : o + 1, :, y1:y2, x1:x2], size)
                    for o, (x1, y1, x2, y2) in zip(owner.tolist(), boxes.tolist(), strict=True)
                ]
            ),
            against="torch adaptive_avg_pool2d, one window at a time",
            atol=1e-3,
        )
    corner = torch.rand(60, 2, generator=rng) * 40
    near = torch.cat([corner, corner + 5 + torch.rand(60, 2, generator=rng) * 30], dim=1)
    scores, owner = torch.rand(60, generator=rng), torch.randint(2, (60,), generator=rng)
    for threshold in (0.1, 0.4, 0.7):
        yield Case(
            f"suppression by the smaller box at {threshold}",
            lambda t=threshold: cascade.minimum_nms(near, scores, owner, t),
            lambda t=threshold: greedy(near, scores, owner, t),
            against="one box at a time",
        )
    yield Case(
        "scales of the pyramid, 60 by 100 pixels, faces of 24",
        lambda: cascade.pyramid(60, 100, 24),
        lambda: [0.5, 0.5 * 0.709, 0.5 * 0.709**2],
        against="computed by hand: 30, 21.27, 15.08, and 10.69 is below 12",
    )


def greedy(boxes: Tensor, scores: Tensor, owner: Tensor, threshold: float) -> Tensor:
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        a = boxes[i].tolist()
        for j in kept:
            b = boxes[j].tolist()
            width, height = (max(0.0, min(a[k + 2], b[k + 2]) - max(a[k], b[k]) + 1) for k in (0, 1))
            smaller = min((c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b))
            if owner[i] == owner[j] and width * height / smaller > threshold:
                break
        else:
            kept.append(i)
    return torch.tensor(kept)


# -- learning ----------------------------------------------------------------------------------------------------------


def learning_cases() -> Iterator[Case]:
    torch.manual_seed(1)
    faces = torch.tensor([[10.0, 10, 40, 50], [60, 20, 80, 48]])
    windows = torch.cat([windows_around(faces, 40, torch.Generator().manual_seed(2), s) for s in (0.1, 0.3, 0.8)])
    ignored = torch.tensor([[55.0, 15, 90, 60]])
    yield Case(
        f"kinds of {len(windows)} windows",
        lambda: kinds_of(windows, faces, ignored)[0],
        lambda: torch.tensor([slow_kind(w, faces.tolist(), ignored.tolist()) for w in windows.tolist()]),
        against="sec. III-A, one window at a time",
    )
    kind = torch.tensor([0] * 9 + [1] * 3 + [2] * 4 + [3] * 6)[torch.randperm(22)]
    offsets, points = torch.randn(22, 4) * 0.2, torch.rand(22, 10)
    for name, columns in (("rnet", True), ("onet", True), ("pnet", False)):
        outputs = (torch.randn(22, 2) * 2, torch.randn(22, 4), torch.randn(22, 10))[: 3 if columns else 2]
        yield Case(
            f"multi-task loss of {name} and its gradients" + ("" if columns else ", without landmarks"),
            lambda *o, name=name: multi_task_loss(o, kind, offsets, points, TASKS[name]),
            lambda *o, name=name: slow_loss(o, kind, offsets, points, TASKS[name]),
            outputs,
            against="eq. 1 to 4, one sample at a time",
            gradients=True,
        )


def slow_kind(window: list[float], faces: list[list[float]], ignored: list[list[float]]) -> int:
    def iou(a: list[float], b: list[float]) -> float:
        width, height = (max(0.0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
        both = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
        return width * height / (both - width * height)

    best = max(iou(window, face) for face in faces)
    if best >= 0.65:
        return 2
    if best >= 0.4:
        return 1
    return -1 if best >= 0.3 or max(iou(window, box) for box in ignored) > 0.3 else 0


def slow_loss(
    outputs: tuple[Tensor, ...], kind: Tensor, offsets: Tensor, points: Tensor, weights: tuple[float, ...]
) -> dict[str, Tensor]:
    entropies, boxes, marks = [], [], []
    for i, k in enumerate(kind.tolist()):
        p = torch.exp(outputs[0][i, 1]) / (torch.exp(outputs[0][i, 0]) + torch.exp(outputs[0][i, 1]))
        if k == 0:
            entropies.append(-torch.log(1 - p))
        if k == 2:
            entropies.append(-torch.log(p))
        if k in (1, 2):
            boxes.append(sum((outputs[1][i, j] - offsets[i, j]) ** 2 for j in range(4)))
        if k == 3 and len(outputs) > 2:
            marks.append(sum((outputs[2][i, j] - points[i, j]) ** 2 for j in range(10)))
    hard = sorted(entropies, key=lambda v: float(v.detach()), reverse=True)[: -(-len(entropies) * 7 // 10)]
    result = {"classification": weights[0] * sum(hard) / len(hard), "boxes": weights[1] * sum(boxes) / len(boxes)}
    return result | ({"landmarks": weights[2] * sum(marks) / len(marks)} if marks else {})


def offset_cases(model: MTCNN) -> Iterator[Case]:
    """The targets of a window, taken for a network's answer, lead back to the face."""
    faces = torch.tensor([[10.0, 12, 40, 50]])
    windows = windows_around(faces, 6, torch.Generator().manual_seed(3))
    side = windows[:, 2:] - windows[:, :2]
    offsets = (faces - windows) / side.repeat(1, 2)
    yield Case(
        "targets lead back to the face",
        lambda: cascade.calibrated(windows + torch.tensor([1.0, 1.0, 0.0, 0.0]), offsets),
        lambda: (faces + torch.tensor([1.0, 1.0, 0.0, 0.0])).repeat(6, 1),
        against="the identity of eq. 2",
    )


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: O-Net on windows, against the same layers in a row."""

    def windows(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 3, 48, 48),)

    return {"onet": Pair(onet, plain_onet, windows, "the same layers as torch.nn.Sequential", train_batch=32)}


def plain_onet() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, pool in ((3, 32, 3, 3), (32, 64, 3, 3), (64, 64, 3, 2), (64, 128, 2, 0)):
        layers += [nn.Conv2d(inputs, outputs, kernel), nn.PReLU(outputs)]
        layers += [nn.MaxPool2d(pool, 2, ceil_mode=True)] if pool else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1152, 256), nn.PReLU(256), nn.Linear(256, 16))
