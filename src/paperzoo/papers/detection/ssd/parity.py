"""SSD against torchvision: default boxes, raw outputs, losses with gradients, detections; matching and mining against loops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.classification.resnet.model import resnet18
from paperzoo.papers.classification.vgg.model import PLANS
from paperzoo.papers.detection.ssd.model import (
    EXTRAS_512,
    SSD,
    DefaultBoxes,
    StageMaps,
    VGGMaps,
    even_scales,
    hard_negatives,
    match_default_boxes,
    ssd64_slim,
    ssd300_vgg16,
    ssd300_vgg16_voc,
    ssd512_vgg16_voc,
)

SOURCE = "torchvision 0.29.2"


class Raw(nn.Module):
    """torchvision's detector as ours: normalised images -> (class logits, box offsets). Shares its parameter names."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.head(list(self.backbone(images).values()))
        return outputs["cls_logits"], outputs["bbox_regression"]


class TheirLoss(nn.Module):
    """torchvision's own forward in training mode, without its resizing and normalisation; its labels count background."""

    def __init__(self, detector: nn.Module, targets: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.backbone, self.head, self.targets = detector.backbone, detector.head, targets
        self.detector = [detector]  # not a child, so that names are the same on both sides

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        detector = self.detector[0].train()
        detector.transform = Unchanged()
        losses = detector(list(images), [t | {"labels": t["labels"] + 1} for t in self.targets])
        return {"boxes": losses["bbox_regression"], "classification": losses["classification"]}


class Unchanged(nn.Module):
    """Instead of torchvision's resizing and normalisation."""

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> tuple:
        from torchvision.models.detection.image_list import ImageList

        return ImageList(torch.stack(images), [tuple(x.shape[-2:]) for x in images]), targets


class OurLoss(nn.Module):
    def __init__(self, detector: SSD, targets: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.backbone, self.head, self.loss, self.targets = detector.backbone, detector.head, detector.loss, targets

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.loss(self.head(self.backbone(images)), self.targets, tuple(images.shape[-2:]))


def their_ssd(ours: SSD, canvas: int, high: bool) -> nn.Module:
    """torchvision's SSD on VGG-16 with our default boxes; for 512 pixels with the strides of the released code."""
    from torchvision.models import vgg16
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.ssd import SSD as Theirs
    from torchvision.models.detection.ssd import _vgg_extractor

    with torch.device("meta"):
        body = vgg16()
    backbone = _vgg_extractor(body.to_empty(device="cpu"), high, 5)
    if high:
        for block in backbone.extra[3:5]:
            block[2].stride, block[2].padding = (2, 2), (1, 1)
        backbone.extra[5][2].padding = (1, 1)
    ratios = [[2], *[[2, 3]] * (4 if high else 3), [2], [2]]
    scales = (0.07, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05) if high else (0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05)
    steps = (8, 16, 32, 64, 128, 256, 512) if high else (8, 16, 32, 64, 100, 300)
    backbone.out_channels = ours.backbone.out_channels
    generator = DefaultBoxGenerator(ratios, scales=scales, steps=steps)
    theirs = Theirs(backbone, generator, (canvas, canvas), ours.num_classes + 1)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def livelier(detector: SSD) -> SSD:
    """Random weights whose scores differ from class to class and from place to place."""
    with torch.no_grad():
        for layer in detector.modules():
            if isinstance(layer, nn.Conv2d):
                layer.bias.normal_(std=0.2) if layer.bias is not None else None
        for convolution in detector.head.regression_head.module_list:
            convolution.weight.mul_(0.3)
    return detector


def some_targets(classes: int) -> list[dict[str, Tensor]]:
    """Two objects with the same best default box, one of one pixel and a crowd of thirty."""
    boxes = torch.tensor([[4.0, 6, 150, 160], [5, 7, 151, 161], [30, 20, 220, 190], [90, 8, 91, 9], [0, 0, 299, 290]])
    corner = torch.rand(30, 2) * 200
    crowd = torch.cat([corner, corner + 5 + torch.rand(30, 2) * 90], dim=1)
    boxes = torch.cat([boxes, crowd])
    return [{"boxes": boxes, "labels": torch.randint(classes, (len(boxes),))}]


def slow_match(boxes: Tensor, defaults: Tensor) -> Tensor:
    """One image, one default box at a time: a row of `boxes` or -1."""
    from torchvision.ops import box_iou

    matched = []
    for default in defaults:
        overlap = [float(box_iou(box[None], default[None])) for box in boxes]
        best = max(range(len(boxes)), key=lambda i: overlap[i]) if len(boxes) else -1
        matched.append(best if best >= 0 and overlap[best] >= 0.5 else -1)
    for row, box in enumerate(boxes):
        matched[int(box_iou(box[None], defaults).argmax())] = row
    return torch.tensor(matched)


def slow_mining(losses: Tensor, positive: Tensor) -> Tensor:
    chosen = torch.zeros_like(positive)
    for i in range(len(losses)):
        left = [j for j in range(losses.shape[1]) if not positive[i, j]]
        left.sort(key=lambda j: -losses[i, j])
        chosen[i, left[: 3 * int(positive[i].sum())]] = True
    return chosen


def in_order(found: Sequence[dict[str, Tensor]], shift: int = 0) -> list[dict[str, Tensor]]:
    """Best first, as far as scores differ by more than rounding; else by label and position. Labels less `shift`."""
    result = []
    for objects in found:
        objects = objects | {"labels": objects["labels"] - shift}
        keys = zip(
            (-objects["scores"] * 1e4).round().tolist(),
            objects["labels"].tolist(),
            objects["boxes"].round().tolist(),
            strict=True,
        )
        order = [i for i, _ in sorted(enumerate(keys), key=lambda entry: entry[1])]
        result.append({name: value[order] for name, value in objects.items()})
    return result


def cases() -> Iterator[Case]:
    from torchvision.models.detection import ssd300_vgg16 as theirs300
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.image_list import ImageList

    torch.manual_seed(0)
    yield Case(
        "eq. 4 at six maps: 0.2, 0.34, …, 0.9",
        lambda: torch.tensor(even_scales(0.2, 0.9, 6)),
        lambda: torch.tensor([0.2, 0.34, 0.48, 0.62, 0.76, 0.9]),
        against="computed by hand, sec. 2.2",
    )

    # the published model: its state dict, raw outputs, detections through both preprocessings
    with torch.device("meta"):
        reference = theirs300(weights=None, weights_backbone=None)
    reference = reference.to_empty(device="cpu").eval()
    ours = livelier(ssd300_vgg16()).eval()
    reference.load_state_dict(ours.state_dict())
    ours.load_state_dict(reference.state_dict())
    image = torch.randint(0, 256, (3, 200, 260), dtype=torch.uint8)
    ready = prepared(image)
    yield Case("ssd300_vgg16, raw outputs, 300 pixels", ours, Raw(reference), (ready,), f"{SOURCE} ssd300_vgg16")
    yield Case(
        "ssd300_vgg16, detections of one image",
        lambda x: in_order(detect(ours, x)),
        lambda x: in_order(run(reference, x), shift=1),
        (image,),
        f"{SOURCE} ssd300_vgg16",
        rtol=1e-3,
        atol=1e-3,
        note="boxes in pixels of the image; the image passes through each side's resizing and normalisation",
    )

    # the default boxes of both sizes
    voc300, voc512 = livelier(ssd300_vgg16_voc()), ssd512_vgg16_voc()
    for detector, side, total in ((voc300, 300, 8732), (voc512, 512, 24564)):
        theirs = their_ssd(detector, side, side == 512)
        grids = detector.backbone.grids(side, side)
        batch = ImageList(torch.empty(1, 3, side, side), [(side, side)])
        maps = [torch.empty(1, 1, *grid) for grid in grids]
        yield Case(
            f"{total:,} default boxes of SSD{side}",
            lambda d=detector, s=side: (d.default_boxes((s, s), "cpu"), len(d.default_boxes((s, s), "cpu"))),
            lambda t=theirs, b=batch, m=maps, n=total: (t.anchor_generator(b, m)[0], n),
            against=f"{SOURCE} DefaultBoxGenerator; paper, table 7",
            atol=1e-4,
        )
    yield Case(
        "SSD512, raw outputs, 512 pixels",
        voc512.eval(),
        Raw(their_ssd(voc512, 512, True)).eval(),
        (torch.randn(1, 3, 512, 512),),
        f"{SOURCE} SSD with highres=True, strides of the released code",
    )
    for side in (261, 300, 333, 512):
        where = torch.zeros(1, 3, side, side, device="meta")
        maps = VGGMaps(PLANS["A"], EXTRAS_512[: 5 if side >= 512 else 2]).to("meta")
        yield Case(
            f"cells of the maps at {side} pixels",
            lambda m=maps, s=side: m.grids(s, s),
            lambda m=maps, w=where: [tuple(x.shape[-2:]) for x in m(w)],
            against="the maps themselves",
        )

    # losses and gradients
    torch.manual_seed(1)
    targets = some_targets(20)
    theirs = their_ssd(voc300, 300, False)
    yield Case(
        "losses and gradients; a crowd, a box of one pixel",
        OurLoss(voc300, targets),
        TheirLoss(theirs, targets),
        (torch.randn(1, 3, 300, 300),),
        f"{SOURCE} SSD",
        gradients=True,
        rtol=1e-3,
        atol=1e-3,
        note="gradients of squared losses, up to some thousands",
    )
    yield from small_cases(DefaultBoxGenerator)


def small_cases(generator: type) -> Iterator[Case]:
    """What does not need VGG-16."""
    from torchvision.models import resnet18 as their_resnet18
    from torchvision.models.detection.ssd import SSD as Theirs

    torch.manual_seed(2)
    slim = ssd64_slim()
    defaults = slim.default_boxes((64, 64), "cpu")
    corner = torch.rand(5, 2) * 30
    boxes = torch.cat([corner, corner + 3 + torch.rand(5, 2) * 30], dim=1)
    boxes[1] = boxes[0] + 0.1
    owner = torch.tensor([0, 0, 0, 2, 2])
    yield Case(
        "matching, three images, one of them empty",
        lambda: match_default_boxes(boxes, owner, 3, defaults),
        lambda: torch.stack(
            [
                slow_match(boxes[:3], defaults),
                slow_match(boxes[:0], defaults),
                torch.where((m := slow_match(boxes[3:], defaults)) >= 0, m + 3, m),
            ]
        ),
        against="one default box at a time",
    )
    losses, positive = torch.rand(4, 60), torch.rand(4, 60) < torch.tensor([[0.1], [0.3], [0.9], [0.0]])
    yield Case(
        "hard negatives; few background boxes, no object",
        lambda: hard_negatives(losses, positive),
        lambda: slow_mining(losses, positive),
        against="sorted lists",
    )

    extras = ((32, 64, 3, 2, 1),)
    ours = SSD(
        StageMaps(resnet18(), (1, 2, 3), (8, 16, 32), extras),
        DefaultBoxes((8, 16, 32, 64), even_scales(0.2, 1, 5), [[2]] * 4),
        7,
    )
    body = their_resnet18()
    body.load_state_dict(ours.backbone.body.state_dict(), strict=False)
    reference = Theirs(
        Stages(body, ours.backbone.extra),
        generator([[2]] * 4, scales=even_scales(0.2, 1, 5), steps=(8, 16, 32, 64)),
        (128, 128),
        8,
    )
    reference.head.load_state_dict(ours.head.state_dict())
    targets = [{"boxes": torch.tensor([[10.0, 10, 60, 90], [50, 40, 120, 120]]), "labels": torch.tensor([0, 6])}]
    targets += [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]
    for mode in ("train", "eval"):
        yield Case(
            f"another backbone: ResNet-18, raw outputs, {mode} mode",
            ours.train(mode == "train"),
            Raw(reference).train(mode == "train"),
            (torch.randn(2, 3, 128, 96),),
            f"{SOURCE} SSD on its resnet18",
        )
    yield Case(
        "another backbone: losses and gradients, one image without objects",
        OurLoss(ours, targets).train(),
        TheirLoss(reference, targets).train(),
        (torch.randn(2, 3, 128, 128),),
        f"{SOURCE} SSD on its resnet18",
        gradients=True,
        rtol=1e-3,
        atol=1e-3,
    )


class Stages(nn.Module):
    """torchvision's ResNet as a backbone for its SSD: C3 to C5, and the extra layers."""

    def __init__(self, body: nn.Module, extra: nn.ModuleList) -> None:
        super().__init__()
        self.body, self.extra, self.out_channels = body, extra, [128, 256, 512, 64]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        b, maps = self.body, {}
        x = b.layer1(b.maxpool(b.relu(b.bn1(b.conv1(x)))))
        for i, block in enumerate((b.layer2, b.layer3, b.layer4, *self.extra)):
            maps[str(i)] = x = block(x)
        return maps


def prepared(image: Tensor) -> Tensor:
    from paperzoo.papers.detection.ssd.recipe import PRESETS, VGG_PIXELS
    from paperzoo.tasks.detection import to_network

    return to_network(image, PRESETS["coco"], VGG_PIXELS)[None]


@torch.no_grad()
def detect(model: SSD, image: Tensor) -> list[dict[str, Tensor]]:
    batch = prepared(image)
    found = model.postprocess(model(batch), torch.tensor([[300, 300]]), (300, 300))
    factor = torch.tensor([image.shape[2] / 300, image.shape[1] / 300]).repeat(2)
    return [objects | {"boxes": objects["boxes"] * factor} for objects in found]


@torch.no_grad()
def run(reference: nn.Module, image: Tensor) -> list[dict[str, Tensor]]:
    return reference([image.float() / 255])


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: from normalised images to logits and offsets."""
    from torchvision.models.detection import ssd300_vgg16 as theirs

    def images(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 3, 300, 300),)

    def reference() -> nn.Module:
        return Raw(theirs(weights=None, weights_backbone=None))

    return {"ssd300_vgg16": Pair(ssd300_vgg16, reference, images, "torchvision:ssd300_vgg16", train_batch=2)}
