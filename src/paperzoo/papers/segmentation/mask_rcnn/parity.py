"""Mask R-CNN against torchvision's: losses and gradients, detections and masks; pasting against Detectron2's way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.classification.resnet.model import resnet18
from paperzoo.papers.detection.fast_rcnn.model import TwoMLPHead
from paperzoo.papers.detection.faster_rcnn.model import RegionProposalNetwork
from paperzoo.papers.detection.faster_rcnn.parity import in_order, livelier, targets_in
from paperzoo.papers.detection.fpn.model import BackboneWithFPN, LastLevelMaxPool, pyramid_anchors
from paperzoo.papers.segmentation.mask_rcnn.model import (
    MaskHead,
    MaskRCNN,
    MaskRoIHeads,
    RegionAlign,
    from_official,
    mask_rcnn_resnet50_fpn,
    mask_targets,
)
from paperzoo.tasks.instance_segmentation import resample_masks

SOURCE = "torchvision 0.29.2 MaskRCNN"


def small(classes: int, sampled: int = 10**6) -> MaskRCNN:
    """ResNet-18-FPN with the published heads, every anchor and region in the sample."""
    options = {"least": 0.0, "sampled": sampled, "box_beta": 1 / 9, "nms_threshold": 0.5}
    heads = MaskRoIHeads(
        RegionAlign(),
        TwoMLPHead(256 * 49, 64),
        classes,
        mask_pool=RegionAlign(14),
        mask_head=MaskHead(256, 32),
        mask_channels=32,
        **options,
    )
    rpn = RegionProposalNetwork(256, pyramid_anchors(), sampled=sampled)
    body = BackboneWithFPN(resnet18(), extra_blocks=LastLevelMaxPool())
    return MaskRCNN(body, rpn, heads, (300, 300), (40, 40))


def reference_of(ours: MaskRCNN) -> nn.Module:
    """torchvision's MaskRCNN on resnet18-fpn with the weights of ours."""
    from torchvision.models import resnet18 as their_resnet18
    from torchvision.models.detection import MaskRCNN as Theirs
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.models.detection.faster_rcnn import TwoMLPHead as TheirHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

    classes = ours.num_classes + 1
    reference = Theirs(
        _resnet_fpn_extractor(their_resnet18(), 5),
        None,
        box_head=TheirHead(256 * 49, 64),
        box_predictor=Predictor(64, classes),
        mask_head=MaskRCNNHeads(256, (32,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(32, 32, classes),
        rpn_pre_nms_top_n_train=300,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_train=40,
        rpn_post_nms_top_n_test=40,
        rpn_batch_size_per_image=10**6,
        box_batch_size_per_image=10**6,
    )
    reference.load_state_dict(ours.state_dict())
    return reference


class Predictor(nn.Module):
    """torchvision's predictor of a head of any width."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.cls_score, self.bbox_pred = nn.Linear(features, classes), nn.Linear(features, 4 * classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x)


def with_masks(targets: Sequence[dict[str, Tensor]], height: int, width: int) -> list[dict[str, Tensor]]:
    """Targets whose masks are discs inside of the boxes."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    result = []
    for target in targets:
        boxes = target["boxes"][:, :, None, None]
        middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
        masks = ((x - middle[:, 0]) / half[:, 0]) ** 2 + ((y - middle[:, 1]) / half[:, 1]) ** 2 <= 1
        result.append(target | {"masks": masks})
    return result


class Losses(nn.Module):
    """The five losses under the same names; `ours` or torchvision's."""

    def __init__(self, detector: nn.Module, targets: Sequence[dict[str, Tensor]]) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = detector.backbone, detector.rpn, detector.roi_heads
        self.whole, self.targets = [detector], targets

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        detector = self.whole[0]
        if isinstance(detector, MaskRCNN):
            return detector(images, self.targets)
        from torchvision.models.detection.image_list import ImageList

        targets = [t | {"labels": t["labels"] + 1, "masks": t["masks"].to(torch.uint8)} for t in self.targets]
        maps, shapes = self.backbone(images), [tuple(images.shape[-2:])] * len(images)
        proposals, first = self.rpn(ImageList(images, shapes), maps, targets)
        second = self.roi_heads(maps, proposals, shapes, targets)[1]
        return {
            "objectness": first["loss_objectness"],
            "proposals": first["loss_rpn_box_reg"],
            "classification": second["loss_classifier"],
            "boxes": second["loss_box_reg"],
            "masks": second["loss_mask"],
        }


def detected(model: MaskRCNN, images: Tensor, sizes: Tensor | None = None) -> list[dict[str, Tensor]]:
    canvas = tuple(images.shape[-2:])
    with torch.no_grad():
        found = model.postprocess(model(images, sizes=sizes), torch.tensor([canvas]), canvas)
    assert all(len(objects["boxes"]) > 5 for objects in found), "too few detections to compare"
    return in_order([{k: v for k, v in objects.items() if k != "frames"} for objects in found])


def their_detections(reference: nn.Module, images: Tensor, shapes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """torchvision's detections with their masks of 28 x 28, before these are pasted."""
    from torchvision.models.detection.image_list import ImageList

    with torch.no_grad():
        maps = reference.backbone(images)
        proposals = reference.rpn(ImageList(images, shapes), maps)[0]
        found = reference.roi_heads(maps, proposals, shapes)[0]
    return in_order([o | {"labels": o["labels"] - 1, "masks": o["masks"][:, 0]} for o in found])


def paste_one_by_one(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Detectron2's way: the middle of every pixel in the box's own coordinates, sampled by grid_sample, mask by mask."""
    result = []
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist(), strict=True):
        y = ((torch.arange(size[0]) + 0.5) - y1) / (y2 - y1) * 2 - 1
        x = ((torch.arange(size[1]) + 0.5) - x1) / (x2 - x1) * 2 - 1
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)
        result.append(F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0])
    return torch.stack(result)


def as_program(function):
    with patch("torch.compiler.is_compiling", lambda: True):
        return function()


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    classes, canvas = 7, (96, 128)
    images = torch.randn(3, 3, *canvas)
    ours = small(classes)
    livelier(ours)
    reference = reference_of(ours)
    wanted = with_masks(targets_in(classes), *canvas)
    in_double = [t | {"boxes": t["boxes"].double()} for t in wanted]
    yield Case(
        "five losses and gradients, train mode",
        Losses(ours.double(), in_double).train(),
        Losses(reference.double(), in_double).train(),
        (images.double(),),
        SOURCE,
        gradients=True,
        note="in float64; every anchor and region is in the sample, as the sample itself is random; an image without objects",
    )
    yield Case(
        "no object in any image: the mask loss is 0",
        lambda x: ours(x, [in_double[1]] * 2)["masks"].detach(),
        lambda x: torch.zeros(()),
        (images[:2].double(),),
        "sec. 3: defined on positive regions alone",
    )
    ours.float().train()(images)  # running statistics that are not those of the start
    ours.eval()
    reference.load_state_dict(ours.state_dict())
    reference.float().eval()
    sizes = [(96, 128), (80, 128), (96, 101)]
    yield Case(
        "boxes, scores, labels and masks of three images of different size",
        lambda x: detected(ours, x, torch.tensor(sizes)),
        lambda x: their_detections(reference, x, sizes),
        (images,),
        SOURCE,
        rtol=1e-3,
        atol=1e-3,
        note="boxes in pixels, masks as 28 x 28 probabilities",
    )
    yield Case(
        "one suppression for all images and classes, as an exported program has it",
        lambda x: as_program(lambda: [v.float() for v in ours(x)]),
        lambda x: [v.float() for v in ours(x)],
        (images,),
        "image by image with torchvision's batched_nms",
        atol=1e-4,
    )

    boxes = torch.tensor([[3.3, 7.9, 61.2, 40.4], [20.0, 10.0, 34.0, 24.0], [50.5, 60.5, 51.5, 61.0], [0, 0, 96, 96]])
    masks = torch.stack([t["masks"].float() for t in with_masks([{"boxes": boxes}], 96, 96)]).flatten(0, 1).bool()
    from torchvision.models.detection.roi_heads import project_masks_on_boxes

    rows = torch.tensor([0, 3, 1, 0, 3])
    regions = torch.tensor([[1.0, 5, 70, 45], [10, 10, 90, 80], [21, 9, 40, 25], [-4, 0, 30, 60], [50, 50, 54, 52]])
    yield Case(
        "a region's part of the true mask",
        lambda r: mask_targets(masks, r, rows, 28),
        lambda r: project_masks_on_boxes(masks, r, rows, 28),
        (regions,),
        f"{SOURCE} project_masks_on_boxes",
    )
    soft = torch.rand(4, 28, 28)
    yield Case(
        "masks at the image's pixels",
        lambda m, b: resample_masks(m, b, (96, 96)),
        lambda m, b: paste_one_by_one(m, b, (96, 96)),
        (soft, boxes),
        "grid_sample, mask by mask, as Detectron2 pastes them",
    )
    yield Case(
        "masks that cover a canvas, at other sizes",
        lambda m: resample_masks(m, torch.tensor([[0.0, 0, 60, 44]]).expand(4, 4), (44, 60), extend=True),
        lambda m: F.interpolate(m[None], (44, 60), mode="bilinear")[0],
        (soft,),
        "torch's bilinear interpolation",
    )
    even = small(classes).roi_heads
    nn.init.zeros_(even.mask_predictor.mask_fcn_logits.weight)
    numbered = F.pad(regions, (1, 0))
    yield Case(
        "the mask loss before anything is known: every pixel at p = 1/2",
        lambda m: even.mask_loss([m], numbered, masks, torch.tensor([2, 0, 5, 6]), rows).detach(),
        lambda m: math.log(2),
        (torch.randn(1, 256, 24, 24),),
        "binary cross-entropy, averaged over the true class's map",
        rtol=1e-6,
    )
    old = {f"roi_heads.mask_head.mask_fcn{i + 1}.weight": torch.full((1,), float(i)) for i in range(4)}
    old["rpn.head.conv.weight"] = torch.ones(1)
    yield Case(
        "torchvision's file of 2021, of other names",
        lambda: from_official(old),
        lambda: (
            {f"roi_heads.mask_head.{i}.0.weight": torch.full((1,), float(i)) for i in range(4)}
            | {"rpn.head.conv.0.0.weight": torch.ones(1)}
        ),
        against="the file's names, by hand",
    )
    yield published()


def published() -> Case:
    """torchvision's `maskrcnn_resnet50_fpn` with the weights of ours, all of them by name."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    ours = mask_rcnn_resnet50_fpn(score_threshold=0.012, detections=15).eval()  # random weights are sure of nothing
    for layer, std in ((ours.rpn.head.cls_logits, 0.3), (ours.rpn.head.bbox_pred, 0.02)):
        nn.init.normal_(layer.weight, std=std)
    nn.init.normal_(ours.roi_heads.box_predictor.cls_score.weight, std=0.03)
    ours.after = (2000, 100)
    options = {"box_score_thresh": 0.012, "rpn_post_nms_top_n_test": 100, "box_detections_per_img": 15}
    reference = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, **options).eval()
    reference.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 96, 128)
    return Case(
        "mask_rcnn_resnet50_fpn, from a normalised image",
        lambda x: detected(ours, x),
        lambda x: their_detections(reference, x, [(96, 128)]),
        (images,),
        f"{SOURCE} maskrcnn_resnet50_fpn",
        rtol=1e-3,
        atol=1e-3,
    )


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: from normalised images to the second stage's outputs for 50 proposals and 20 masks.

    Small images, as regions cost the same on any.
    """

    def images(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 3, 224, 224),)

    def ours() -> MaskRCNN:
        torch.manual_seed(0)
        model = mask_rcnn_resnet50_fpn(score_threshold=0.0, detections=20)
        model.after = (50, 50)
        return model

    class Raw(nn.Module):
        """torchvision's detector without its resizing and pasting."""

        def __init__(self) -> None:
            super().__init__()
            from torchvision.models.detection import maskrcnn_resnet50_fpn

            options = {"box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 50, "box_detections_per_img": 20}
            self.detector = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, **options).eval()
            self.detector.load_state_dict(ours().state_dict())

        def train(self, mode: bool = True) -> nn.Module:  # its proposals need no targets in eval mode alone
            self.training = mode
            self.detector.backbone.train(mode)
            return self

        def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
            from torchvision.models.detection.image_list import ImageList

            shapes = [tuple(x.shape[-2:])] * len(x)
            maps = self.detector.backbone(x)
            proposals = self.detector.rpn(ImageList(x, shapes), maps)[0]
            return self.detector.roi_heads(maps, proposals, shapes)[0]

    return {"mask_rcnn_resnet50_fpn": Pair(ours, Raw, images, SOURCE, train_batch=2)}
