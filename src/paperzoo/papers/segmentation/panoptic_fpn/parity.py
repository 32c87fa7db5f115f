"""Panoptic FPN against mmdet's answers (`golden.py`), its instance branch against torchvision's, and the rest against loops."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torchvision.ops import roi_align

from paperzoo.blocks.panoptic import PanopticMap
from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.classification.resnet.model import resnet18
from paperzoo.papers.detection.faster_rcnn.parity import livelier, targets_in
from paperzoo.papers.segmentation.mask_rcnn.parity import Losses as InstanceLosses
from paperzoo.papers.segmentation.mask_rcnn.parity import paste_one_by_one, reference_of, with_masks
from paperzoo.papers.segmentation.mask_rcnn.parity import small as small_instances
from paperzoo.papers.segmentation.panoptic_fpn import golden
from paperzoo.papers.segmentation.panoptic_fpn.model import (
    HalfPixelAlign,
    PanopticFPN,
    SemanticBranch,
    SemanticFPN,
    from_official,
    panoptic_fpn_resnet50,
    upsampled,
)
from paperzoo.papers.segmentation.panoptic_quality.technique import merge

MMDET = "mmdet 3.3.0 PanopticFPN (golden.py)"
THINGS = (1, 2, 4, 5, 6, 7, 9)  # seven of eleven categories, so that neither kind comes first
CLASSES = 11

# -- mmdet -------------------------------------------------------------------------------------------------------------


def their_answers() -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """The tensors of the golden file, and the names and shapes of their network's weights."""
    with safe_open(str(golden.FILE), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["shapes"])


class AsTheirs:
    """Our network with the weights that theirs had."""

    def __init__(self, shapes: dict[str, list[int]]) -> None:
        self.model = panoptic_fpn_resnet50().eval()
        self.model.load_state_dict(from_official(golden.weights(shapes)))

    @torch.no_grad()
    def __call__(self, images: Tensor, regions: Tensor) -> dict[str, Tensor]:
        model, labels = self.model, torch.tensor(golden.LABELS)
        levels = model.backbone(images)
        objectness, deltas = model.rpn(levels)
        logits, boxes = model.roi_heads.look(levels, regions)
        return {
            "semantic": model.semantic_head(levels)[:, ::3, ::2, ::2],
            "objectness": objectness[:, ::5],
            "deltas": deltas[:, ::11],
            "classes": logits.roll(-1, 1),  # background is the last one there
            "boxes": boxes[:, 1:].flatten(1)[:, ::3],
            "masks": model.roi_heads.look_closer(levels, regions, labels)[:, ::2, ::2],
        }


def merged_as_theirs() -> Tensor:
    """The golden scene merged, in their numbers: 1000 times the instance plus the category, 133 where nothing is."""
    given = golden.scene()
    stuff = given["logits"].argmax(0)
    semantic = torch.where(stuff == golden.STUFF, -1, stuff + golden.THINGS)
    rules = {"confidence": 0.5, "overlap": 0.5, "smallest": 300}
    found = merge(given["masks"], given["scores"], given["labels"], semantic, range(golden.THINGS), **rules)
    assert len([s for s in found.segments if not s.thing]) > 2, "too little stuff to compare"
    result = torch.full_like(found.ids, golden.THINGS + golden.STUFF)
    for segment in found.segments:
        result[found.ids == segment.id] = segment.category + (1000 * segment.id if segment.thing else 0)
    return result


# -- the semantic branch, written out ----------------------------------------------------------------------------------


class Branch(nn.Module):
    """Fig. 3 from torch's own modules, under the same names."""

    def __init__(self, in_channels: int, num_classes: int, channels: int, groups: int) -> None:
        super().__init__()

        def step(inputs: int, up: bool) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, channels, 3, 1, 1, bias=False)
            last = [nn.UpsamplingBilinear2d(scale_factor=2)] if up else []
            for layer in last:
                layer.align_corners = False
            return nn.Sequential(convolution, nn.GroupNorm(groups, channels), nn.ReLU(), *last)

        first, second = [step(in_channels, False)], [step(in_channels, True)]
        third = [step(in_channels, True), step(channels, True)]
        fourth = [step(in_channels, True), step(channels, True), step(channels, True)]
        self.levels = nn.ModuleList(nn.Sequential(*steps) for steps in (first, second, third, fourth))
        self.predictor = nn.Conv2d(channels, num_classes, 1)

    def forward(self, *levels: Tensor) -> Tensor:
        made = [steps(level) for steps, level in zip(self.levels, levels, strict=True)]
        return self.predictor(torch.stack(made).sum(0))


class Unpacked(nn.Module):
    """Our branch, called with the levels one by one."""

    def __init__(self, branch: SemanticBranch) -> None:
        super().__init__()
        self.levels, self.predictor, self.branch = branch.levels, branch.predictor, [branch]

    def forward(self, *levels: Tensor) -> Tensor:
        return self.branch[0](levels)


def aligned_one_by_one(levels: Sequence[Tensor], regions: Tensor, size: int) -> Tensor:
    """Each region from the level of FPN's eq. 1, by torchvision's RoIAlign with half-pixel places, as many samples as cells."""
    result = []
    for region in regions:
        side = math.sqrt(float((region[3] - region[1]) * (region[4] - region[2])))
        level = min(3, max(0, math.floor(2 + math.log2(side / 224) + 1e-6)))
        result.append(roi_align(levels[level], region[None], size, 1 / 2 ** (level + 2), 0, aligned=True))
    return torch.cat(result)


# -- the whole network -------------------------------------------------------------------------------------------------


def small() -> PanopticFPN:
    """ResNet-18-FPN, every anchor and region in the sample."""
    model = PanopticFPN(small_instances(len(THINGS)), CLASSES, THINGS, channels=32, groups=8)
    livelier(model)
    return model


def with_semantic(targets: Sequence[dict[str, Tensor]], height: int, width: int) -> list[dict[str, Tensor]]:
    """Targets whose labels are categories, on two kinds of stuff with a strip of nothing between them."""
    result = []
    for target in targets:
        labels = torch.tensor(THINGS)[target["labels"]]
        semantic = torch.full((height, width), 3)
        semantic[height // 2 :] = 10
        semantic[height // 2 - 4 : height // 2] = 255
        for mask, label in zip(target["masks"], labels, strict=True):
            semantic[mask] = label
        result.append(target | {"labels": labels, "semantic": semantic})
    return result


class JointLoss(nn.Module):
    """All six losses; of torchvision's network with a branch beside it, L_s pixel by pixel."""

    def __init__(self, detector: nn.Module, branch: nn.Module, targets: list[dict], plain: list[dict] | None) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = detector.backbone, detector.rpn, detector.roi_heads
        self.semantic_head, self.targets, self.detector = branch, targets, [detector]
        self.instances = [] if plain is None else [InstanceLosses(detector, plain)]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if not self.instances:
            return self.detector[0](images, self.targets)
        losses = self.instances[0](images)
        maps = list(self.backbone(images).values())
        logits = F.interpolate(self.semantic_head(*maps[:4]), images.shape[-2:], mode="bilinear")
        chance, stuff = logits.softmax(1), [k for k in range(CLASSES) if k not in THINGS]
        total, count = logits.sum() * 0, 0
        for k in range(CLASSES):
            here = torch.stack([t["semantic"] for t in self.targets]) == k
            row = stuff.index(k) if k in stuff else len(stuff)
            total = total - chance[:, row][here].log().sum()
            count += int(here.sum())
        return losses | {"semantic": 0.5 * total / count}


def plain(found: PanopticMap) -> dict[str, Any]:
    rows = [[s.id, s.category, s.thing, s.score or 0, s.area] for s in found.segments]
    return {"ids": found.ids, "segments": torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)}


def merged_by_hand(model: PanopticFPN, outputs: tuple, size: tuple[int, int], original: tuple[int, int]) -> dict:
    """Panoptic inference of one image instance by instance: pasted, then what is left given to stuff."""
    boxes, scores, labels, masks, logits = (t[0] for t in outputs)
    stuff = [k for k in range(CLASSES) if k not in THINGS]
    ids, rows = torch.zeros(original, dtype=torch.int64), []
    scale = torch.tensor([original[1] / size[1], original[0] / size[0]] * 2)
    for box, score, label, mask in zip(boxes, scores, labels, masks, strict=True):
        if score < model.confidence:
            continue
        mine = paste_one_by_one(mask[None], (box * scale)[None], original)[0] >= 0.5
        free = mine & (ids == 0)
        if not mine.any() or (mine & (ids > 0)).sum() > model.overlap * mine.sum() or not free.any():
            continue
        rows.append([len(rows) + 1, THINGS[int(label)], 1, float(score), int(free.sum())])
        ids[free] = len(rows)
    whole = F.interpolate(logits[None], (96, 128), mode="bilinear")[:, :, : size[0], : size[1]]
    best = F.interpolate(whole, original, mode="bilinear")[0].argmax(0)
    for row, category in enumerate(stuff):
        here = (best == row) & (ids == 0)
        if int(here.sum()) >= model.smallest:
            rows.append([len(rows) + 1, category, 0, 0, int(here.sum())])
            ids[here] = len(rows)
    return {"ids": ids, "segments": torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)}


def cases() -> Iterator[Case]:
    answers, shapes = their_answers()
    yield Case(
        "panoptic_fpn_resnet50: stuff, proposals, classes, boxes and masks of given regions",
        AsTheirs(shapes),
        lambda *inputs: {name: value for name, value in answers.items() if name != "merged"},
        (golden.pictures(), golden.regions()),
        MMDET,
        rtol=1e-3,
        atol=2e-4,
        note="with weights of their names, read by from_official",
    )
    yield Case(
        "instances and stuff merged",
        merged_as_theirs,
        lambda: answers["merged"].long(),
        (),
        MMDET,
        note="HeuristicFusionHead; segments of stuff from 300 pixels on",
    )

    torch.manual_seed(0)
    ours, theirs = SemanticBranch(16, 5, 32, 8), Branch(16, 5, 32, 8)
    theirs.load_state_dict(ours.state_dict())
    for height, width in ((64, 96), (32, 160)):
        levels = tuple(torch.randn(2, 16, height // s, width // s) for s in (4, 8, 16, 32))
        name = f"the semantic branch and its gradients, {height} x {width}"
        yield Case(name, Unpacked(ours), theirs, levels, "fig. 3 of torch's modules", gradients=True)
    levels = [torch.randn(2, 8, 192 // s, 256 // s) for s in (4, 8, 16, 32)]
    regions = torch.tensor(
        [[0, 3.3, 7.9, 61.2, 40.4], [1, 20, 10, 150, 124], [0, 0, 0, 256, 192], [1, -90, -80, 400, 420]]
    )
    pool = HalfPixelAlign(7, sampling_ratio=0)
    yield Case(
        "regions, half a cell to the upper left",
        lambda r: pool(levels, r),
        lambda r: aligned_one_by_one(levels, r, 7),
        (regions,),
        "torchvision.ops.roi_align, aligned",
    )

    canvas = (96, 128)
    images, model = torch.randn(3, 3, *canvas), small()
    things = with_masks(targets_in(len(THINGS)), *canvas)
    targets = with_semantic(things, *canvas)
    reference, branch = reference_of_instances(model), Branch(256, CLASSES - len(THINGS) + 1, 32, 8)
    branch.load_state_dict(model.semantic_head.state_dict())
    in_double = [[t | {"boxes": t["boxes"].double()} for t in some] for some in (targets, things)]
    yield Case(
        "six losses and gradients, train mode",
        JointLoss(model.double(), model.semantic_head, in_double[0], None).train(),
        JointLoss(reference.double(), branch.double(), *in_double).train(),
        (images.double(),),
        "torchvision 0.29.2 MaskRCNN with fig. 3 beside it, L_s category by category",
        gradients=True,
        note="in float64; every anchor and region is in the sample; an image without objects",
    )
    nowhere = [t | {"semantic": torch.full(canvas, 255)} for t in in_double[0]]
    yield Case(
        "no pixel has a category: L_s is 0",
        lambda x: model(x, nowhere)["semantic"].detach(),
        lambda x: torch.zeros(()),
        (images.double(),),
        "normalised by the number of labelled pixels",
    )
    outputs = crafted()
    model.float().eval().smallest = 200
    for size, original in (((96, 128), (96, 128)), ((80, 101), (61, 77)), ((96, 128), (150, 200))):
        yield Case(
            f"a map of {original[0]} x {original[1]} from {size[0]} x {size[1]} of a canvas",
            lambda s=size, o=original: plain(model.postprocess(outputs, torch.tensor([s]), canvas, [o])[0]),
            lambda s=size, o=original: merged_by_hand(model, outputs, s, o),
            (),
            "sec. 3.2, instance by instance",
        )
    semantic = SemanticFPN(resnet18(), 6, 64, 32).eval()
    yield Case(
        "SemanticFPN at a size that strides do not divide",
        lambda x: semantic(x).detach(),
        lambda x: upsampled(odd_branch(semantic, x), x.shape[-2:]).detach(),
        (torch.randn(1, 3, 70, 101),),
        "each level enlarged step by step to the next finer one",
    )


def reference_of_instances(model: PanopticFPN) -> nn.Module:
    """torchvision's MaskRCNN with the weights of our instance branch."""
    twin = small_instances(len(THINGS))
    twin.load_state_dict({n: v for n, v in model.state_dict().items() if not n.startswith("semantic_head.")})
    return reference_of(twin)


def crafted() -> tuple[Tensor, ...]:
    """Outputs of one image: boxes that overlap, unsure ones, filling; and smooth logits."""
    torch.manual_seed(3)
    corner, side = torch.rand(12, 2) * torch.tensor([90.0, 60.0]), 15 + 25 * torch.rand(12, 2)
    boxes = torch.cat([corner, corner + side], dim=1)
    boxes[3] = boxes[1] + 2  # nearly the same place as a better one
    scores = torch.linspace(0.98, 0.42, 12)
    boxes[10:], scores[10:] = 0, 0
    masks = F.interpolate(torch.rand(1, 12, 5, 5), (28, 28), mode="bilinear")[0].pow(0.5)
    labels = torch.arange(12) % len(THINGS)
    logits = F.interpolate(torch.randn(1, CLASSES - len(THINGS) + 1, 4, 5), (24, 32), mode="bilinear")
    return boxes[None], scores[None], labels[None], masks[None], logits


def odd_branch(network: SemanticFPN, images: Tensor) -> Tensor:
    maps, total = network.backbone(images), 0
    for level, steps in enumerate(network.semantic_head.levels):
        x = maps[level]
        for i, step in enumerate(steps):
            x = step(x)
            if level:
                x = F.interpolate(x, maps[level - i - 1].shape[-2:], mode="bilinear", align_corners=False)
        total = total + x
    return network.semantic_head.predictor(total)


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: the semantic branch on a pyramid of an image of 256 x 256, against torch's own modules."""

    def levels(batch: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(batch, 256, 256 // s, 256 // s) for s in (4, 8, 16, 32))

    return {
        "semantic branch": Pair(
            lambda: Unpacked(SemanticBranch(256, 54)),
            lambda: Branch(256, 54, 128, 32),
            levels,
            "fig. 3 of torch's modules",
            train_batch=2,
        )
    }
