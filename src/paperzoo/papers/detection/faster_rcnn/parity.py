"""Faster R-CNN against torchvision's: proposals, losses, gradients and detections, put together as each variant is."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from paperzoo.blocks.boxes import AnchorGenerator
from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.classification.resnet.model import resnet18
from paperzoo.papers.detection.fast_rcnn.model import (
    RegionPool,
    RoIHeads,
    SingleLevel,
    StageHead,
    TwoMLPHead,
    VGGBody,
)
from paperzoo.papers.detection.fast_rcnn.parity import quick
from paperzoo.papers.detection.faster_rcnn.model import (
    FasterRCNN,
    RegionProposalNetwork,
    faster_rcnn_resnet50_c4,
    faster_rcnn_vgg16,
)

MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SOURCE = "torchvision 0.29.2 FasterRCNN"


class Body(nn.Module):
    """A network whose maps are torchvision's backbone; the same parameter names as ours."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.body, self.out_channels = backbone.body, backbone.out_channels
        self.maps = [backbone]  # in a list: not a second set of parameters

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"0": self.maps[0](x)[0]}


class Pool(nn.Module):
    """torchvision.ops' own pooling of the one map, with the list of boxes that its detectors pass."""

    def __init__(self, size: int, stride: int, align: bool) -> None:
        super().__init__()
        from torchvision.ops import RoIAlign, RoIPool

        self.pool = RoIAlign(size, 1 / stride, 2) if align else RoIPool(size, 1 / stride)

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list) -> Tensor:
        return self.pool(maps["0"], boxes)


class Predictor(nn.Module):
    """torchvision's predictor, after a head of any shape."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.cls_score, self.bbox_pred = nn.Linear(features, classes), nn.Linear(features, 4 * classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x)


def reference_of(
    ours: FasterRCNN, sizes: tuple, ratios: tuple, proposals: tuple[int, int], **options: float
) -> nn.Module:
    """torchvision's FasterRCNN with the weights, numbers and thresholds of ours, every region and anchor sampled."""
    from torchvision.models.detection import FasterRCNN as Theirs
    from torchvision.models.detection.rpn import AnchorGenerator as TheirAnchors

    twin, heads = copy.deepcopy(ours) if ours.training else ours, ours.roi_heads
    pool = heads.pool
    reference = Theirs(
        Body(twin.backbone),
        None,
        image_mean=MEAN,
        image_std=DEVIATION,
        rpn_anchor_generator=TheirAnchors(sizes, (ratios,) * len(sizes)),
        rpn_pre_nms_top_n_train=proposals[0],
        rpn_pre_nms_top_n_test=proposals[0],
        rpn_post_nms_top_n_train=proposals[1],
        rpn_post_nms_top_n_test=proposals[1],
        rpn_batch_size_per_image=10**6,
        box_batch_size_per_image=10**6,
        box_head=twin.roi_heads.box_head,
        box_predictor=Predictor(heads.box_head.num_features, heads.num_classes + 1),
        box_nms_thresh=heads.nms_threshold,
        box_score_thresh=heads.score_threshold,
        **options,
    )
    reference.roi_heads.box_roi_pool = Pool(pool.output_size, round(1 / pool.scale), pool.align)
    reference.load_state_dict(ours.state_dict())
    return reference


def livelier(detector: nn.Module) -> None:
    """Random weights that make proposals and detections of many kinds."""
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
    nn.init.normal_(detector.rpn.head.conv[0][0].weight, std=0.03)
    nn.init.normal_(detector.rpn.head.cls_logits.weight, std=0.05)
    nn.init.normal_(detector.rpn.head.bbox_pred.weight, std=0.01)
    nn.init.normal_(detector.roi_heads.box_predictor.bbox_pred.weight, std=0.02)
    nn.init.normal_(detector.roi_heads.box_predictor.cls_score.weight, std=0.2)
    for layer in detector.roi_heads.box_head.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)


def targets_in(classes: int) -> list[dict[str, Tensor]]:
    """A picture of four objects (one small), one without any, one with a box of one pixel."""
    boxes = torch.tensor([[4.0, 6, 50, 60], [30, 20, 120, 90], [90, 8, 120, 30], [0, 0, 12, 9]])
    return [
        {"boxes": boxes, "labels": torch.randint(classes, (4,))},
        {"boxes": boxes[:0], "labels": torch.zeros(0, dtype=torch.int64)},
        {"boxes": torch.tensor([[40.0, 40, 41, 41], [20, 10, 60, 80]]), "labels": torch.randint(classes, (2,))},
    ]


class Losses(nn.Module):
    """A detector's losses under the names and factors of both sides; `ours` or torchvision's."""

    def __init__(self, detector: nn.Module, targets: Sequence[dict[str, Tensor]]) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = detector.backbone, detector.rpn, detector.roi_heads
        self.whole, self.targets = [detector], targets

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        detector = self.whole[0]
        if isinstance(detector, FasterRCNN):
            return detector(images, self.targets)
        from torchvision.models.detection.image_list import ImageList

        targets = [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in self.targets]
        maps, shapes = self.backbone(images), [tuple(images.shape[-2:])] * len(images)
        proposals, first = self.rpn(ImageList(images, shapes), maps, targets)
        second = self.roi_heads(maps, proposals, shapes, targets)[1]
        return {
            "objectness": first["loss_objectness"],
            "proposals": first["loss_rpn_box_reg"],
            "classification": second["loss_classifier"],
            "boxes": second["loss_box_reg"],
        }


def in_order(found: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Best first, so far as scores differ by more than rounding; else by position."""
    result = []
    for objects in found:
        keys = list(zip(objects["scores"].mul(1e4).round().tolist(), objects["boxes"].round().tolist(), strict=True))
        order = sorted(range(len(keys)), key=lambda i: (-keys[i][0], keys[i][1]))
        result.append({name: value[order] for name, value in objects.items()})
    return result


def detect(model: FasterRCNN, inputs: tuple[Tensor, ...], size: int, longest: int) -> list[dict[str, Tensor]]:
    from paperzoo.blocks.boxes import pad_images
    from paperzoo.tasks.detection import Config, scale, to_network

    config, facts = Config(image_sizes=(size,), longest_side=longest), {"mean": MEAN, "deviation": DEVIATION}
    with torch.no_grad():
        ready = [to_network(image, config, facts) for image in inputs]
        batch, sizes = pad_images(ready), torch.tensor([x.shape[1:] for x in ready])
        found = model.postprocess(model(batch, sizes=sizes), sizes, tuple(batch.shape[-2:]))
    return [
        objects | {"boxes": objects["boxes"] / scale(before, after)}
        for objects, before, after in zip(found, inputs, ready, strict=True)
    ]


def detections(name: str, ours: FasterRCNN, reference: nn.Module) -> Case:
    """End to end, from two images of different sizes that are enlarged and padded."""
    reference.transform.min_size, reference.transform.max_size = (90,), 150
    pictures = (
        torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8),
        torch.randint(0, 256, (3, 75, 141), dtype=torch.uint8),
    )

    def theirs(*inputs: Tensor) -> list:
        with torch.no_grad():
            found = in_order(reference.eval()([image.float() / 255 for image in inputs]))
        return [objects | {"labels": objects["labels"] - 1} for objects in found]

    def mine(*inputs: Tensor) -> list:
        found = in_order(detect(ours.eval(), inputs, 90, 150))
        assert all(len(objects["boxes"]) > 5 for objects in found), "too few detections to compare"
        return found

    return Case(
        f"{name}: detections, two images of different size",
        mine,
        theirs,
        pictures,
        SOURCE,
        rtol=1e-3,
        atol=1e-3,
        note="boxes in pixels; the images pass through the resizing and padding of tasks/detection.py",
    )


def small(kind: str, classes: int) -> tuple[FasterRCNN, tuple, tuple]:
    """A variant's parts on thin networks: "vgg" with RoI max pooling and dense layers, "c4" with RoIAlign and the fifth stage."""
    sizes, ratios = ((16, 32, 64),), (0.5, 1.0, 2.0)
    if kind == "vgg":
        plan = (16, 0, 16, 0, 32, 0, 32, 0, 48, 48)
        body, pool, head = VGGBody(plan), RegionPool(7, 16), TwoMLPHead(48 * 49, 64)
        options = {"nms_threshold": 0.3}
    else:
        network = resnet18()
        head, body = StageHead(network.layer4, 512), SingleLevel(network, 2)
        pool, options = RegionPool(14, 16, align=True), {"nms_threshold": 0.5}
    rpn = RegionProposalNetwork(body.out_channels, AnchorGenerator((16,), sizes), sampled=10**6)
    options |= {"least": 0.0, "sampled": 10**6, "box_beta": 1 / 9}
    return FasterRCNN(body, rpn, RoIHeads(pool, head, classes, **options), (200, 200), (24, 24)), sizes, ratios


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    images, classes = torch.randn(3, 3, 96, 128), 7
    for kind in ("vgg", "c4"):
        ours, sizes, ratios = small(kind, classes)
        livelier(ours)
        reference = reference_of(ours, sizes, ratios, (200, 24))
        wanted = targets_in(classes)
        yield Case(
            f"{kind}: four losses and gradients, train mode",
            Losses(ours, wanted).train(),
            Losses(reference, wanted).train(),
            (images,),
            SOURCE,
            gradients=True,
            rtol=1e-3,
            note="every anchor and region is in the sample, as the sample itself is random; an image without objects",
        )
        ours.train()(images)  # running statistics that are not those of the start
        reference.load_state_dict(ours.state_dict())
        yield detections(kind, ours, reference)

    # on a pyramid: torchvision's own detector, with the parts of detection/fpn
    yield from on_a_pyramid(images, classes)

    # the published networks, raw: proposals, logits and deltas
    for make, sizes, canvas, spread in (
        (faster_rcnn_vgg16, ((128, 256, 512),), (160, 224), 0.01),
        (faster_rcnn_resnet50_c4, ((32, 64, 128, 256, 512),), (128, 160), 0.002),
    ):
        ours = quick(make)
        ours.rpn.anchors = AnchorGenerator((16,), sizes)
        nn.init.normal_(ours.rpn.head.bbox_pred.weight, std=spread)
        ours.rpn.smallest = 1e-3  # torchvision's; the paper's 16 pixels leave little on a small picture
        ours.before, ours.after = (100, 100), (20, 20)
        reference = reference_of(ours, sizes, (0.5, 1.0, 2.0), (100, 20)).eval()
        yield Case(
            f"{make.__name__}: proposals, logits and deltas",
            lambda x, m=ours: [out[:, (m(x)[0] != 0).any(2)[0]] for out in m(x)],
            lambda x, r=reference: raw(r, x),
            (torch.randn(1, 3, *canvas),),
            SOURCE,
            rtol=1e-3,
            atol=1e-3,
            note="proposals in pixels; without the empty boxes that fill ours up",
        )
        del ours, reference

    # an exported program has no loop over images: its single suppression keeps the same boxes
    rpn = small("c4", classes)[0].rpn
    nn.init.normal_(rpn.head.cls_logits.weight, std=1.0)
    nn.init.normal_(rpn.head.bbox_pred.weight, std=0.2)
    outputs = tuple(x.detach() for x in rpn([torch.randn(3, 256, 6, 8)]))
    extent = torch.tensor([[96, 128], [80, 128], [96, 100]])
    yield Case(
        "one suppression for all images, as an exported program has it",
        lambda *o: as_compiled(lambda: rpn.regions(o, extent, (96, 128), 200, 30)),
        lambda *o: rpn.regions(o, extent, (96, 128), 200, 30),
        outputs,
        "image by image with torchvision's batched_nms",
    )
    canvas = (600, 1000)
    anchors = AnchorGenerator((16,), [(128, 256, 512)])(*canvas)
    yield Case(
        "nine anchors at each place of conv5 for an image of 600 x 1000 pixels",
        lambda: float(len(anchors)),
        lambda: 38.0 * 63.0 * 9.0,
        against="paper, sec. 3.1.1: k anchors at each of W H places",
        note="21546; the paper, with 40 x 60 places, says roughly 20000 (sec. 3.1.3)",
    )
    yield Case(
        "which anchors cross the border",
        lambda: RegionProposalNetwork.within(anchors, canvas).float(),
        lambda: torch.tensor(
            [float(x1 >= 0 and y1 >= 0 and x2 <= canvas[1] and y2 <= canvas[0]) for x1, y1, x2, y2 in anchors.tolist()]
        ),
        against="one anchor at a time",
    )


def as_compiled(function):
    from unittest.mock import patch

    with patch("torch.compiler.is_compiling", lambda: True):
        return function()


def raw(reference: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """torchvision's detector from normalised images to proposals, class logits and deltas."""
    from torchvision.models.detection.image_list import ImageList

    shapes = [tuple(images.shape[-2:])] * len(images)
    with torch.no_grad():
        maps = reference.backbone(images)
        boxes = reference.rpn(ImageList(images, shapes), maps)[0]
        heads = reference.roi_heads
        logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, boxes, shapes)))
    count = len(boxes[0])
    assert count > 5, "too few proposals to compare"
    return torch.stack(boxes), logits.view(len(images), count, -1), deltas.view(len(images), count, -1, 4)


def on_a_pyramid(images: Tensor, classes: int) -> Iterator[Case]:
    from torchvision.models import resnet18 as their_resnet18
    from torchvision.models.detection import FasterRCNN as Theirs
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

    from paperzoo.papers.detection.fpn.model import BackboneWithFPN, LastLevelMaxPool, PyramidPool

    backbone = BackboneWithFPN(resnet18(), extra_blocks=LastLevelMaxPool())
    anchors = AnchorGenerator((4, 8, 16, 32, 64), [(s,) for s in (32, 64, 128, 256, 512)])
    options = {"least": 0.0, "sampled": 10**6, "box_beta": 1 / 9, "nms_threshold": 0.5}
    heads = RoIHeads(PyramidPool(), TwoMLPHead(256 * 49, 1024), classes, **options)
    rpn = RegionProposalNetwork(256, anchors, sampled=10**6)
    ours = FasterRCNN(backbone, rpn, heads, (300, 300), (60, 60))
    livelier(ours)
    reference = Theirs(
        _resnet_fpn_extractor(their_resnet18(), 5),
        classes + 1,
        rpn_pre_nms_top_n_train=300,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_train=60,
        rpn_post_nms_top_n_test=60,
        rpn_batch_size_per_image=10**6,
        box_batch_size_per_image=10**6,
    )
    reference.load_state_dict(ours.state_dict())
    wanted = [{"boxes": t["boxes"].double(), "labels": t["labels"]} for t in targets_in(classes)[:2]]
    yield Case(
        "on a pyramid: four losses and gradients",
        Losses(ours.double(), wanted).train(),
        Losses(reference.double(), wanted).train(),
        (images[:2].double(),),
        f"{SOURCE} on resnet18-fpn",
        gradients=True,
        note="in float64, as gradients of a hundred and more nearly cancel before a batch norm",
    )
    ours.float(), reference.float()
    ours.train()(images)
    reference.load_state_dict(ours.state_dict())
    yield detections("on a pyramid", ours, reference)


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: from normalised images to proposals, logits and deltas.

    Small images and the 50 best proposals of each: the second stage costs the same for every region, and 1000 of them tell no more.
    """

    def images(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 3, 224, 224),)

    def ours() -> FasterRCNN:
        detector = faster_rcnn_resnet50_c4()
        detector.after = (50, 50)
        return detector

    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes, ratios = ((32, 64, 128, 256, 512),), (0.5, 1.0, 2.0)
            self.detector = reference_of(ours(), sizes, ratios, (6000, 50)).eval()

        def train(self, mode: bool = True) -> nn.Module:  # its proposals need no targets in eval mode alone
            self.training = mode
            self.detector.backbone.train(mode)
            return self

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            from torchvision.models.detection.image_list import ImageList

            shapes, detector = [tuple(x.shape[-2:])] * len(x), self.detector
            maps = detector.backbone(x)
            boxes = detector.rpn(ImageList(x, shapes), maps)[0]
            heads = detector.roi_heads
            return heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, boxes, shapes)))

    return {"faster_rcnn_resnet50_c4": Pair(ours, Raw, images, SOURCE, train_batch=2)}
