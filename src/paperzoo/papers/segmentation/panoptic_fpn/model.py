"""Panoptic Feature Pyramid Networks (Kirillov et al., CVPR 2019, arXiv:1901.02446).

A semantic branch (sec. 3.1, fig. 3) beside Mask R-CNN's on one pyramid, the joint loss (sec. 3.2), and the merge of both
answers to one map, which is `panoptic_quality`'s. `SemanticFPN` is the pyramid with the semantic branch alone (sec. 5.2).

Names of the instance part are torchvision's, as in `mask_rcnn`; `from_official` reads MMDetection's published files. What differs
from the paper:

- Regions are pooled half a cell to the upper left of where `mask_rcnn` pools them, with as many samples a bin as it has cells, as
  Detectron2 and MMDetection do: their published weights expect it.
- The loss of the proposal network keeps the weight 1 whatever lambda_i is, as in Detectron2; the paper's L_c, L_b, L_m are those of
  the second stage.
- Anchors are rounded to whole pixels, as in torchvision; MMDetection's are not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.backbones import at_strides
from paperzoo.blocks.panoptic import PanopticMap
from paperzoo.papers.classification.resnet.model import resnet50, resnet101
from paperzoo.papers.detection.fpn.model import BackboneWithFPN, assign_levels
from paperzoo.papers.segmentation.mask_rcnn.model import MaskRCNN, RegionAlign, mask_rcnn_tiny_fpn, on_pyramid
from paperzoo.papers.segmentation.panoptic_quality.technique import merge
from paperzoo.tasks.instance_segmentation import place_masks

VOID = 255  # of semantic targets: does not count

# -- the semantic branch (sec. 3.1, fig. 3) ----------------------------------------------------------------------------


class SemanticBranch(nn.Module):
    """Levels P_2 … P_5 (B, in_channels, H_l, W_l), finest first -> logits (B, num_classes, H_2, W_2), at a quarter of the image.

    "Starting from the deepest FPN level (at 1/32 scale), we perform three upsampling stages to yield a feature map at 1/4 scale,
    where each upsampling stage consists of 3x3 convolution, group norm, ReLU, and 2x bilinear upsampling"; of the other levels with
    fewer stages, of P_2 with a stage that does not upsample. The sum goes through a 1x1 convolution; `upsampled` is the last step.

    Args:
        in_channels: of every level.
        num_classes: of the logits.
        channels: 128 in the paper.
        groups: of the group norms.
        levels: how many, each half as fine as the one before it.
    """

    def __init__(
        self, in_channels: int, num_classes: int, channels: int = 128, groups: int = 32, levels: int = 4
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for level in range(levels):
            inputs = [in_channels, *[channels] * max(0, level - 1)]
            self.levels.append(nn.ModuleList(stage(c, channels, groups) for c in inputs))
        self.predictor = last_layer(channels, num_classes)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        total: Tensor | None = None
        for number, (stages, x) in enumerate(zip(self.levels, levels, strict=False)):
            for i, layer in enumerate(stages):
                x = layer(x)
                if number:  # twice the size, which is that of the next finer level where sides do not divide evenly
                    x = F.interpolate(x, size=levels[number - 1 - i].shape[-2:], mode="bilinear", align_corners=False)
            total = x if total is None else total + x
        return self.predictor(total)


def stage(in_channels: int, channels: int, groups: int) -> nn.Sequential:
    """A 3x3 convolution without bias, group norm, ReLU."""
    convolution = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.GroupNorm(groups, channels), nn.ReLU(inplace=True))


def last_layer(channels: int, num_classes: int) -> nn.Conv2d:
    """The branch's 1x1 convolution, which starts unsure."""
    convolution = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(convolution.weight, std=0.01)
    nn.init.zeros_(convolution.bias)
    return convolution


def upsampled(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Fig. 3's last step, "4x bilinear upsampling … to the original image resolution"."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


class SemanticFPN(nn.Module):
    """Images (B, 3, H, W) -> logits (B, num_classes, H, W): the pyramid and the semantic branch alone (sec. 5.2).

    The contract is in `tasks/segmentation.py`.
    """

    def __init__(self, body: nn.Module, num_classes: int, channels: int = 256, branch: int = 128) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = BackboneWithFPN(body, out_channels=channels)
        self.semantic_head = SemanticBranch(channels, num_classes, branch)

    def forward(self, images: Tensor) -> Tensor:
        return upsampled(self.semantic_head(self.backbone(images)), images.shape[-2:])

    def load_backbone(self, state_dict: dict[str, Tensor]) -> None:
        """Start from a classifier's weights."""
        self.backbone.load_body(state_dict)


# -- the instance branch's regions -------------------------------------------------------------------------------------


class HalfPixelAlign(RegionAlign):
    """`RegionAlign` with the middle of the upper left cell at (1/2, 1/2): every region moves by half a cell of its level.

    A side of less than a cell still counts as one, where Detectron2 and MMDetection take it as it is.
    """

    def forward(self, levels: Sequence[Tensor], regions: Tensor) -> Tensor:
        lowest, highest = (int(s).bit_length() - 1 for s in (self.strides[0], self.strides[-1]))
        half = 0.5 * 2.0 ** assign_levels(regions[:, 1:], lowest, highest).to(regions.dtype)
        return super().forward(levels, torch.cat([regions[:, :1], regions[:, 1:] - half[:, None]], dim=1))


# -- the network (sec. 3) ----------------------------------------------------------------------------------------------


class PanopticFPN(MaskRCNN):
    """Images (B, 3, H, W) -> Mask R-CNN's boxes (B, D, 4), scores (B, D), labels int64 (B, D) and masks (B, D, m, m), where labels are
    numbers among the things; and semantic logits (B, S + 1, H / 4, W / 4) of stuff and, last, "other". With targets, the losses.

    The contract is in `tasks/panoptic_segmentation.py`.

    Args:
        instances: a Mask R-CNN for as many classes as there are things; its parts are taken over.
        num_classes: K, things and stuff.
        things: the countable categories among 0 … K - 1.
        channels, groups: of the semantic branch.
        instance_weight, semantic_weight: lambda_i and lambda_s.
        confidence, overlap, smallest: of `panoptic_quality`'s merge: instances with a lower score are not looked at, those that are
            covered by more than this part are dropped, as is stuff of fewer pixels of the original image.
        mask_threshold: from which probability a pixel belongs to an instance.
    """

    thing_rows: Tensor
    semantic_rows: Tensor

    def __init__(
        self,
        instances: MaskRCNN,
        num_classes: int,
        things: Sequence[int],
        channels: int = 128,
        groups: int = 32,
        instance_weight: float = 1.0,
        semantic_weight: float = 0.5,
        confidence: float = 0.5,
        overlap: float = 0.5,
        smallest: float = 64 * 64,
        mask_threshold: float = 0.5,
    ) -> None:
        super().__init__(instances.backbone, instances.rpn, instances.roi_heads, instances.before, instances.after)
        self.instance_weight, self.semantic_weight = instance_weight, semantic_weight
        self.confidence, self.overlap, self.smallest = confidence, overlap, smallest
        self.mask_threshold = mask_threshold
        self.categorise(num_classes, things)
        self.semantic_head = SemanticBranch(self.backbone.out_channels, len(self.stuff) + 1, channels, groups)

    def categorise(self, num_classes: int, things: Sequence[int]) -> None:
        """Which category is which class of the two branches."""
        self.things = check_things(num_classes, things)
        self.stuff = tuple(k for k in range(num_classes) if k not in self.things)
        thing_rows = torch.full((num_classes,), -1)
        thing_rows[list(self.things)] = torch.arange(len(self.things))
        semantic_rows = torch.full((VOID + 1,), VOID)
        semantic_rows[list(self.things)] = len(self.stuff)  # "other": all things
        semantic_rows[list(self.stuff)] = torch.arange(len(self.stuff))
        self.register_buffer("thing_rows", thing_rows, persistent=False)
        self.register_buffer("semantic_rows", semantic_rows, persistent=False)

    @property
    def num_classes(self) -> int:
        return len(self.things) + len(self.stuff)

    def forward(
        self, images: Tensor, targets: Sequence[dict[str, Tensor]] | None = None, sizes: Tensor | None = None
    ) -> tuple[Tensor, ...] | dict[str, Tensor]:
        levels, canvas = self.backbone(images), tuple(images.shape[-2:])
        logits = self.semantic_head(levels)
        if targets is None:
            return *self.detect(levels, canvas, sizes), logits
        semantic = torch.stack([t["semantic"] for t in targets])
        whole = torch.tensor([canvas], device=images.device).expand(images.shape[0], -1)
        return self.instance_losses(levels, targets, canvas, whole if sizes is None else sizes) | {
            "semantic": self.semantic_weight * self.semantic_loss(logits, semantic)
        }

    # -- the joint loss (sec. 3.2) -------------------------------------------------------------------------------

    def instance_losses(
        self, levels: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], canvas: tuple[int, int], sizes: Tensor
    ) -> dict[str, Tensor]:
        """L_c, L_b and L_m with the weight lambda_i, and the proposal network's two losses."""
        things = [t | {"labels": self.thing_rows[t["labels"]]} for t in targets]
        proposed = self.rpn(levels)
        boxes = self.rpn.regions(proposed, sizes, canvas, self.before[0], self.after[0])
        first = self.rpn.loss(proposed, things, canvas)
        second = self.roi_heads.loss(levels, boxes, things)
        return {"objectness": first["objectness"], "proposals": first["boxes"]} | {
            name: self.instance_weight * loss for name, loss in second.items()
        }

    def semantic_loss(self, logits: Tensor, semantic: Tensor) -> Tensor:
        """L_s: cross-entropy "computed as a per-pixel cross entropy loss … normalized by the number of labeled image pixels".

        Args:
            logits: (B, S + 1, H / 4, W / 4).
            semantic: int64 (B, H, W), categories, 255 where none is.
        """
        wanted = self.semantic_rows[semantic]
        summed = F.cross_entropy(
            upsampled(logits.float(), wanted.shape[-2:]), wanted, ignore_index=VOID, reduction="sum"
        )
        return summed / (wanted != VOID).sum().clamp(min=1)

    # -- inference (sec. 3.2, "Panoptic inference") --------------------------------------------------------------

    @torch.no_grad()
    def postprocess(
        self,
        outputs: tuple[Tensor, ...],
        sizes: Tensor,
        canvas: tuple[int, int],
        originals: Sequence[tuple[int, int]],
    ) -> list[PanopticMap]:
        """Each image's instances and semantic map, at its original size, merged.

        Args:
            outputs: of `forward`.
            sizes: (B, 2), height and width of each image inside the canvas.
            canvas: height and width of the batch's images.
            originals: height and width of each image as it was given.
        """
        *instances, logits = outputs
        categories = torch.tensor([*self.stuff, -1], device=logits.device)  # "other" is left to the instances
        things = torch.tensor(self.things, device=logits.device)
        found = []
        for i, (objects, size) in enumerate(zip(super().postprocess(instances, sizes, canvas), originals, strict=True)):
            height, width = sizes[i].tolist()
            n = int((objects["scores"] >= self.confidence).sum())  # best first
            factor = objects["frames"].new_tensor([size[1] / width, size[0] / height]).repeat(2)
            masks = place_masks(objects["masks"][:n], objects["frames"][:n] * factor, size, self.mask_threshold)
            of_image = upsampled(logits[i : i + 1].float(), canvas)[:, :, :height, :width]
            semantic = categories[upsampled(of_image, size)[0].argmax(0)]
            scores, labels = objects["scores"][:n], things[objects["labels"][:n]]
            rules = self.confidence, self.overlap, self.smallest
            found.append(merge(masks, scores, labels, semantic, self.things, *rules))
        return found

    @staticmethod
    def aligned(expected: Sequence[Tensor], found: Sequence[Tensor]) -> list[Tensor]:
        """As Mask R-CNN's for the instances; the semantic logits have no order to lose."""
        return [*MaskRCNN.aligned(expected[:4], found[:4]), found[4]]

    def reset_classifier(self, num_classes: int, things: Sequence[int] | None = None) -> None:
        """Fresh last layers for other categories; without `things` those that exist stay things."""
        chosen = [k for k in self.things if k < num_classes] if things is None else things
        self.categorise(num_classes, chosen)
        self.thing_rows, self.semantic_rows = (
            t.to(self.semantic_head.predictor.weight.device) for t in (self.thing_rows, self.semantic_rows)
        )
        self.roi_heads.reset_classifier(len(self.things))
        old = self.semantic_head.predictor
        self.semantic_head.predictor = last_layer(old.in_channels, len(self.stuff) + 1).to(old.weight)


def check_things(num_classes: int, things: Sequence[int]) -> tuple[int, ...]:
    """The countable categories, rising.

    Raises:
        ValueError: if there is none, or one that is no category; if there are no categories or too many.
    """
    chosen = tuple(sorted({int(k) for k in things}))
    if not 0 < num_classes < VOID:
        raise ValueError(f"num_classes is {num_classes}; it must be 1 to {VOID - 1}")
    if not chosen or chosen[0] < 0 or chosen[-1] >= num_classes:
        raise ValueError(f"things is {list(things)}; some or all of 0 … {num_classes - 1} are needed")
    return chosen


# -- variants ----------------------------------------------------------------------------------------------------------

COCO_THINGS = range(80)  # of COCO's 133 panoptic categories in the order of their numbers


def with_semantics(body: nn.Module, num_classes: int, things: Sequence[int], options: dict[str, float]) -> PanopticFPN:
    """Mask R-CNN on a pyramid of 256 channels, and the semantic branch of 128."""
    count = len(check_things(num_classes, things))
    instances = on_pyramid(body, count, {})
    heads = instances.roi_heads
    heads.pool, heads.mask_pool = HalfPixelAlign(sampling_ratio=0), HalfPixelAlign(14, sampling_ratio=0)
    return PanopticFPN(instances, num_classes, things, **options)


def panoptic_fpn_resnet50(
    num_classes: int = 133, things: Sequence[int] = COCO_THINGS, backbone: str | None = None, **options: float
) -> PanopticFPN:
    """ResNet-50-FPN for COCO's 80 things and 53 kinds of stuff. `options` as `PanopticFPN`.

    `backbone`: another classifier by name, its maps of strides 4, 8, 16 and 32.
    """
    body = resnet50() if backbone is None else at_strides(backbone, (4, 8, 16, 32))
    return with_semantics(body, num_classes, things, options)


def panoptic_fpn_resnet101(
    num_classes: int = 133, things: Sequence[int] = COCO_THINGS, **options: float
) -> PanopticFPN:
    """ResNet-101-FPN, the paper's 40.9 PQ. `options` as `PanopticFPN`."""
    return with_semantics(resnet101(), num_classes, things, options)


def panoptic_fpn_tiny(
    num_classes: int = 10, things: Sequence[int] = range(6), backbone: str | None = None, **options: float
) -> PanopticFPN:
    """The same in small, on `mask_rcnn_tiny_fpn`. `options` as `PanopticFPN`; stuff counts from 64 pixels on."""
    instances = mask_rcnn_tiny_fpn(len(check_things(num_classes, things)), backbone)
    options = {"channels": 32, "groups": 8, "smallest": 64} | options
    return PanopticFPN(instances, num_classes, things, **options)


def semantic_fpn_resnet50(num_classes: int = 19, backbone: str | None = None) -> SemanticFPN:
    """The semantic branch alone, on ResNet-50-FPN, for Cityscapes' classes.

    `backbone`: another classifier by name, its maps of strides 4, 8, 16 and 32.
    """
    return SemanticFPN(resnet50() if backbone is None else at_strides(backbone, (4, 8, 16, 32)), num_classes)


def semantic_fpn_resnet101(num_classes: int = 19) -> SemanticFPN:
    """The semantic branch alone, on ResNet-101-FPN, for Cityscapes' classes."""
    return SemanticFPN(resnet101(), num_classes)


# -- other people's files ----------------------------------------------------------------------------------------------

NAMES = (
    (r"backbone\.(.+)", r"backbone.body.\1"),
    (r"neck\.lateral_convs\.(\d)\.conv\.(.+)", r"backbone.fpn.inner_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.(\d)\.conv\.(.+)", r"backbone.fpn.layer_blocks.\1.0.\2"),
    (r"rpn_head\.rpn_conv\.(.+)", r"rpn.head.conv.0.0.\1"),
    (r"rpn_head\.rpn_cls\.(.+)", r"rpn.head.cls_logits.\1"),
    (r"rpn_head\.rpn_reg\.(.+)", r"rpn.head.bbox_pred.\1"),
    (r"roi_head\.bbox_head\.shared_fcs\.0\.(.+)", r"roi_heads.box_head.fc6.\1"),
    (r"roi_head\.bbox_head\.shared_fcs\.1\.(.+)", r"roi_heads.box_head.fc7.\1"),
    (r"roi_head\.bbox_head\.fc_cls\.(.+)", r"roi_heads.box_predictor.cls_score.\1"),
    (r"roi_head\.bbox_head\.fc_reg\.(.+)", r"roi_heads.box_predictor.bbox_pred.\1"),
    (r"roi_head\.mask_head\.convs\.(\d)\.conv\.(.+)", r"roi_heads.mask_head.\1.0.\2"),
    (r"roi_head\.mask_head\.upsample\.(.+)", r"roi_heads.mask_predictor.conv5_mask.\1"),
    (r"roi_head\.mask_head\.conv_logits\.(.+)", r"roi_heads.mask_predictor.mask_fcn_logits.\1"),
    (r"semantic_head\.conv_upsample_layers\.(\d)\.conv\.(\d)\.conv\.(.+)", r"semantic_head.levels.\1.\2.0.\3"),
    (r"semantic_head\.conv_upsample_layers\.(\d)\.conv\.(\d)\.gn\.(.+)", r"semantic_head.levels.\1.\2.1.\3"),
    (r"semantic_head\.conv_logits\.(.+)", r"semantic_head.predictor.\1"),
)


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """MMDetection's published weights (`panoptic_fpn_r50_fpn_1x_coco` and so on) to these names.

    There background is the last class of the box branch, here the first; boxes and masks have none there.
    """
    renamed = {}
    for name, value in state_dict.items():
        for pattern, ours in NAMES:
            new, found = re.subn(f"^{pattern}$", ours, name)
            if not found:
                continue
            if "fc_cls" in name:
                value = value.roll(1, 0)
            elif "fc_reg" in name or "mask_head.conv_logits" in name:
                rows = 4 if "fc_reg" in name else 1
                value = torch.cat([value.new_zeros(rows, *value.shape[1:]), value])
            renamed[new] = value
            break
        else:
            renamed[name] = value
    return renamed
