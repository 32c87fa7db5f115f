"""YOLACT against the released code's own numbers (`golden.py`), and its parts against slow versions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.segmentation.yolact.golden import (
    CELLS,
    FILE,
    GRADIENTS,
    PICTURE,
    ROWS,
    SHOWN,
    SIDE,
    made,
    pictures,
    released_names,
    targets,
)
from paperzoo.papers.segmentation.yolact.model import (
    Yolact,
    assemble,
    fast_nms,
    from_official,
    inside,
    semantic_loss,
    yolact_darknet53,
    yolact_resnet101,
    yolact_tiny,
)
from paperzoo.tasks.instance_segmentation import place_masks

SOURCE = "released code (dbolya/yolact 902073d)"


def ordered(scores: Tensor, classes: Tensor) -> list[int]:
    """Best first, so far as scores differ by more than rounding; else by class."""
    keys = list(zip(scores.mul(1e6).round().tolist(), classes.tolist(), strict=True))
    return sorted(range(len(keys)), key=lambda i: (-keys[i][0], keys[i][1]))


def detections(model: Yolact, images: Tensor) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        found = model.postprocess(model(images), torch.tensor([[SIDE, SIDE]] * 2), (SIDE, SIDE))
    frame = torch.tensor([[0.0, 0.0, PICTURE[1], PICTURE[0]]])
    result = []
    for objects in found:
        masks = place_masks(objects["masks"], frame.expand(len(objects["masks"]), 4), PICTURE, extend=True)
        order = ordered(objects["scores"], objects["labels"])
        result.append({"boxes": objects["boxes"][order], "scores": objects["scores"][order]})
        result[-1] |= {"labels": objects["labels"][order], "masks": masks[:SHOWN].flatten(1).float()}
    return result


def their_detections(golden: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    result = []
    for i in range(2):
        scores, classes = golden[f"{i}.scores"], golden[f"{i}.classes"]
        order = ordered(scores, classes)
        masks = np.unpackbits(golden[f"{i}.masks"].numpy(), axis=1)[:, : PICTURE[0] * PICTURE[1]]
        boxes = (golden[f"{i}.boxes"][order] * SIDE).clamp(0, SIDE)  # theirs are cut when they are drawn
        result.append({"boxes": boxes, "scores": scores[order], "labels": classes[order]})
        result[-1] |= {"masks": torch.from_numpy(masks.copy()).float()}
    return result


def one_by_one(scores: Tensor, boxes: Tensor, threshold: float, most: int) -> list[tuple[int, int]]:
    """Fast NMS, a box at a time: kept unless any better box of its class overlaps it, kept or not."""
    from torchvision.ops import box_iou

    overlap, kept = box_iou(boxes, boxes), []
    for k, of_class in enumerate(scores):
        order = of_class.argsort(descending=True)[:most].tolist()
        kept += [(k, i) for n, i in enumerate(order) if all(overlap[i, j] <= threshold for j in order[:n])]
    return sorted(kept)


def slow_mask_loss(prototypes: Tensor, coefficients: Tensor, image: Tensor, wanted: Tensor, boxes: Tensor) -> Tensor:
    """The released way: assembled, sigmoid, cut, then binary cross-entropy of the cut mask; object by object."""
    losses = []
    for c, i, w, box in zip(coefficients, image.tolist(), wanted, boxes, strict=True):
        mask = torch.zeros_like(w)
        soft = (prototypes[i] * c[:, None, None]).sum(0).sigmoid()
        x1, y1, x2, y2 = (box / 4).tolist()  # cells of 4 pixels
        for y in range(mask.shape[0]):
            for x in range(mask.shape[1]):
                if max(x1, 0) - 1 <= x < x2 + 1 and max(y1, 0) - 1 <= y < y2 + 1:
                    mask[y, x] = soft[y, x]
        losses.append(F.binary_cross_entropy(mask, w, reduction="sum"))
    return torch.stack(losses)


def slow_semantic_loss(logits: Tensor, batch: list[dict[str, Tensor]]) -> Tensor:
    total = logits.new_zeros(())
    for scores, target in zip(logits, batch, strict=True):
        wanted = torch.zeros_like(scores)
        for mask, label in zip(target["masks"], target["labels"].tolist(), strict=True):
            small = F.interpolate(mask[None, None].float(), scores.shape[-2:], mode="bilinear")[0, 0] > 0.5
            wanted[label] = torch.maximum(wanted[label], small.float())
        p = scores.sigmoid()
        total = total - (wanted * p.log() + (1 - wanted) * (1 - p).log()).sum()
    return total / (logits.shape[0] * logits.shape[2] * logits.shape[3])


def cases() -> Iterator[Case]:
    golden, model, images = load_file(FILE), made(), pictures()
    with torch.no_grad():
        levels = model.fpn(model.backbone(images))

    def outputs(x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            logits, deltas, coefficients, prototypes = model(x)
        return {
            "logits": logits[:, ROWS],
            "deltas": deltas[:, ROWS],
            "coefficients": coefficients[:, ROWS],
            "prototypes": prototypes[:, :, CELLS, CELLS],
            "semantic": model.semantic_seg_conv(levels[0]).detach()[:, :, ::4, ::4],
        }

    names = ("logits", "deltas", "coefficients", "prototypes", "semantic")
    yield Case(
        "ResNet-50: class logits, deltas, coefficients, prototypes, semantic logits",
        outputs,
        lambda x: {name: golden[name] for name in names},
        (images,),
        SOURCE,
    )

    def losses() -> dict[str, Tensor]:
        found = model(images, targets())
        parameters = dict(model.named_parameters())
        gradients = torch.autograd.grad(sum(found.values()), [parameters[name] for name in GRADIENTS])
        return {f"loss.{name}": loss.detach() for name, loss in found.items()} | {
            f"gradient.{name}": g for name, g in zip(GRADIENTS, gradients, strict=True)
        }

    def their_losses() -> dict[str, Tensor]:
        letters = {"classification": "C", "boxes": "B", "masks": "M", "semantic": "S"}
        return {f"loss.{name}": golden[f"loss.{letter}"] for name, letter in letters.items()} | {
            f"gradient.{name}": golden[f"gradient.{name}"] for name in GRADIENTS
        }

    yield Case("four losses and gradients of nine layers", losses, their_losses, against=SOURCE, rtol=1e-3, atol=1e-4)
    yield Case(
        "boxes, scores, classes and masks at a picture's size, two images",
        lambda x: detections(model, x),
        lambda x: their_detections(golden),
        (images,),
        SOURCE,
        rtol=1e-3,
        atol=1e-3,
        note="boxes in pixels",
    )
    yield Case(
        "the released file's names: ResNet-50",
        lambda: from_official(released_names(model.state_dict())),
        lambda: dict(model.state_dict()),
        against="the names, there and back",
        rtol=0.0,
        atol=0.0,
    )
    yield Case(
        "the released file's names: Darknet-53, every tensor has its place",
        lambda: sorted_shapes(from_official(darknet_file())),
        lambda: sorted_shapes(yolact_darknet53().state_dict()),
        against="the names in the released code's backbone.py",
        rtol=0.0,
        atol=0.0,
    )

    torch.manual_seed(0)
    corner, extent = torch.rand(60, 2) * 80, torch.rand(60, 2) * 40 + 4
    boxes, scores = torch.cat([corner, corner + extent], dim=1), torch.rand(3, 60)

    def quick(s: Tensor, b: Tensor) -> Tensor:
        _, label, row = fast_nms(s, b, 0.5, 40)
        return torch.tensor(sorted(zip(label.tolist(), row.tolist(), strict=True)))

    yield Case(
        "fast NMS",
        quick,
        lambda s, b: torch.tensor(one_by_one(s, b, 0.5, 40)),
        (scores, boxes),
        "box by box, sec. 5",
    )
    prototypes, coefficients = torch.rand(2, 5, 24, 24), torch.randn(7, 5)
    image, chosen = torch.tensor([0, 0, 0, 1, 1, 1, 1]), boxes[:7].clamp(0, 96)
    where = inside(chosen, (96, 96), (24, 24))
    wanted = (torch.rand(7, 24, 24) > 0.5).float() * where
    yield Case(
        "mask losses and their gradients",
        lambda p, c: Yolact.mask_losses(p, c, image, wanted, where),
        lambda p, c: slow_mask_loss(p, c, image, wanted, chosen),
        (prototypes, coefficients),
        "object by object, cell by cell",
        gradients=True,
    )
    yield Case(
        "a mask is a sum of prototypes",
        lambda p, c: assemble(p[0], c),
        lambda p, c: torch.einsum("khw,nk->nhw", p[0], c),
        (prototypes, coefficients),
        "eq. 1",
    )
    batch = targets()
    joined = {key: torch.cat([t[key] for t in batch]) for key in ("masks", "labels")}
    yield Case(
        "the semantic loss",
        lambda x: semantic_loss(x, joined["masks"], joined["labels"], torch.tensor([0, 0, 0, 1])),
        lambda x: slow_semantic_loss(x, batch),
        (torch.randn(2, 80, 12, 12),),
        "class by class",
        gradients=True,
    )
    tiny = yolact_tiny().train()
    nothing = [{k: v[:0] for k, v in t.items()} for t in batch]
    yield Case(
        "no object in any image: no loss but the semantic one",
        lambda x: {k: v.detach() for k, v in tiny(x, nothing).items() if k != "semantic"},
        lambda x: {"classification": 0.0, "boxes": 0.0, "masks": 0.0},
        (images,),
        "every other loss is summed over positive anchors, and three negative ones for each",
    )
    with torch.device("meta"):
        large = yolact_resnet101()
    yield Case(
        "prototypes and anchors at 550 pixels",
        lambda: [*map(float, large(torch.empty(1, 3, 550, 550, device="meta"))[3].shape[2:]), float(count(large))],
        lambda: [138.0, 138.0, 3.0 * (69**2 + 35**2 + 18**2 + 9**2 + 5**2)],
        against="sec. 3.1 and fig. 2: 138 x 138 prototypes; 69, 35, 18, 9, 5 cells",
        note="the paper's 550 pixels",
    )


def count(model: Yolact) -> int:
    return len(model.anchors((550, 550), "cpu"))


def sorted_shapes(state: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in state.items()}


def darknet_file() -> dict[str, Tensor]:
    """Names and shapes of a released file on Darknet-53, from the structure of its backbone."""
    state = yolact_darknet53().state_dict()
    found = {name: value for name, value in state.items() if not name.startswith("backbone.")}

    def layer(prefix: str, inputs: int, outputs: int, kernel: int) -> None:
        norm = nn.BatchNorm2d(outputs)
        found[f"backbone.{prefix}.0.weight"] = torch.zeros(outputs, inputs, kernel, kernel)
        found.update({f"backbone.{prefix}.1.{name}": value for name, value in norm.state_dict().items()})

    layer("_preconv", 3, 32, 3)
    width = 32
    for i, depth in enumerate((1, 2, 8, 8, 4)):
        layer(f"layers.{i}.0", width, 2 * width, 3)
        width *= 2
        for k in range(1, depth + 1):
            layer(f"layers.{i}.{k}.conv1", width, width // 2, 1)
            layer(f"layers.{i}.{k}.conv2", width // 2, width, 3)
    return found
