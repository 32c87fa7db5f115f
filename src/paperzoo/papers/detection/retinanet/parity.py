"""RetinaNet against torchvision: focal loss, raw outputs, losses, gradients, detections, published weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.classification.resnet.model import resnet18
from paperzoo.papers.detection.fpn.model import BackboneWithFPN, LastLevelP6P7
from paperzoo.papers.detection.retinanet.model import (
    RetinaNet,
    from_official,
    prior_bias,
    pyramid_anchors,
    retinanet_resnet50_fpn,
    retinanet_resnet101_fpn,
    sigmoid_focal_loss,
)

CANVAS = (96, 128)
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Raw(nn.Module):
    """torchvision's detector as ours: normalised images -> (class logits, box deltas). Shares its parameter names."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.head(list(self.backbone(images).values()))
        return outputs["cls_logits"], outputs["bbox_regression"]


class TheirLoss(Raw):
    def __init__(self, detector: nn.Module, targets: list[dict[str, Tensor]]) -> None:
        super().__init__(detector)
        self.compute, self.anchors, self.targets = detector.compute_loss, detector.anchor_generator, targets

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        from torchvision.models.detection.image_list import ImageList

        levels = list(self.backbone(images).values())
        anchors = self.anchors(ImageList(images, [tuple(images.shape[-2:])] * len(images)), levels)
        losses = self.compute(self.targets, self.head(levels), anchors)
        return {"boxes": losses["bbox_regression"], "classification": losses["classification"]}


class OurLoss(nn.Module):
    def __init__(self, detector: RetinaNet, targets: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.backbone, self.head, self.loss, self.targets = detector.backbone, detector.head, detector.loss, targets

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.loss(self.head(self.backbone(images)), self.targets, tuple(images.shape[-2:]))


def random_targets(classes: int) -> list[dict[str, Tensor]]:
    boxes = torch.tensor(
        [[4.0, 6, 50, 60], [30, 20, 120, 90], [90, 8, 120, 30], [0, 0, 12, 9]]
    )  # the last: below IoU 0.5
    return [
        {"boxes": boxes, "labels": torch.randint(classes, (4,))},
        {"boxes": boxes[1:2] + 3, "labels": torch.randint(classes, (1,))},
    ]


def livelier(detector: nn.Module) -> None:
    """Random weights that make detections: the published start has every score at 0.01."""
    nn.init.normal_(detector.head.classification_head.cls_logits.weight, std=0.02)
    nn.init.constant_(detector.head.classification_head.cls_logits.bias, -3.0)
    nn.init.normal_(detector.head.regression_head.bbox_reg.weight, std=0.02)
    for layer in [*detector.head.classification_head.conv, *detector.head.regression_head.conv]:
        nn.init.kaiming_normal_(layer[0].weight)


def torchvision_retinanet(body: nn.Module, classes: int, p6_channels: int) -> nn.Module:
    """torchvision's RetinaNet on a torchvision ResNet, as its own function for ResNet-50 puts it together."""
    from torchvision.models.detection import RetinaNet as Theirs
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    extra = LastLevelP6P7(p6_channels, 256)
    return Theirs(_resnet_fpn_extractor(body, 5, returned_layers=[2, 3, 4], extra_blocks=extra), classes)


def as_in_2021(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's names of today to those in its published file."""
    old = {}
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        parts = name.split(".")
        if parts[0] == "head" and parts[2] == "conv":
            name = ".".join([*parts[:3], str(2 * int(parts[3])), parts[5]])
        elif "inner_blocks" in name or "layer_blocks" in name:
            name = ".".join([*parts[:4], parts[5]])
        old[name] = value
    return old


def cases() -> Iterator[Case]:
    from torchvision import models as tv
    from torchvision.models.detection import retinanet_resnet50_fpn as theirs50
    from torchvision.models.detection._utils import overwrite_eps
    from torchvision.ops import misc
    from torchvision.ops import sigmoid_focal_loss as their_focal_loss

    source = "torchvision 0.29.2"
    torch.manual_seed(0)
    logits, targets = 4 * torch.randn(3, 40, 7), (torch.rand(3, 40, 7) < 0.1).float()
    for alpha, gamma in ((0.25, 2.0), (0.5, 0.0), (0.75, 5.0)):
        yield Case(
            f"focal loss, alpha {alpha}, gamma {gamma}",
            lambda x, a=alpha, g=gamma: sigmoid_focal_loss(x, targets, a, g),
            lambda x, a=alpha, g=gamma: their_focal_loss(x, targets, a, g),
            (logits,),
            f"{source} ops.sigmoid_focal_loss",
            gradients=True,
        )
    yield Case(
        "sec. 3.2: with gamma 2, p_t = 0.9 counts 100 times less than in cross-entropy, 0.968 about 1000 times",
        lambda: [
            sigmoid_focal_loss(torch.tensor(p).logit(), torch.tensor(1.0), 1.0) / -math.log(p) for p in (0.9, 0.968)
        ],
        lambda: [torch.tensor(1 / 100), torch.tensor(0.032**2)],
        against="paper, sec. 3.2",
    )
    yield Case(
        "sec. 4.1: scores start at 0.01", lambda: torch.tensor(prior_bias()).sigmoid(), lambda: 0.01, against="paper"
    )

    images = torch.randn(2, 3, *CANVAS)
    reference = theirs50(weights=None, weights_backbone=None)
    ours = retinanet_resnet50_fpn()
    ours.load_state_dict(reference.state_dict())
    yield Case(
        "ResNet-50, raw outputs", ours.eval(), Raw(reference).eval(), (images,), f"{source} retinanet_resnet50_fpn"
    )
    reference = torchvision_retinanet(tv.resnet101(), 80, 2048)
    ours = retinanet_resnet101_fpn()
    ours.load_state_dict(reference.state_dict())
    yield Case(
        "ResNet-101, raw outputs, P6 from C5", ours.eval(), Raw(reference).eval(), (images[:1],), f"{source} RetinaNet"
    )

    # the rest does not depend on the body: ResNet-18
    reference = torchvision_retinanet(tv.resnet18(), 20, 256)
    backbone = BackboneWithFPN(resnet18(), (1, 2, 3), 256, LastLevelP6P7(256, 256))
    ours = RetinaNet(backbone, pyramid_anchors(), 20, box_beta=0.0)
    ours.load_state_dict(reference.state_dict())
    for mode in ("train", "eval"):
        wanted = random_targets(20)
        yield Case(
            f"losses and gradients, {mode} mode",
            OurLoss(ours, wanted).train(mode == "train"),
            TheirLoss(reference, wanted).train(mode == "train"),
            (images,),
            f"{source} RetinaNet",
            gradients=True,
            note="with plain L1 (box_beta=0), as torchvision has it",
        )

    # end to end, from two images of different sizes that are enlarged and padded; detections in pixels of the originals
    livelier(reference)
    ours.load_state_dict(reference.state_dict())
    reference.transform.min_size, reference.transform.max_size = (90,), 150
    pictures = (
        torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8),
        torch.randint(0, 256, (3, 75, 141), dtype=torch.uint8),
    )

    def their_detections(*inputs: Tensor) -> list:
        with torch.no_grad():
            return in_order(reference.eval()([image.float() / 255 for image in inputs]))

    yield Case(
        "detections, two images of different size",
        lambda *inputs: in_order(detect(ours.eval(), inputs, 90, 150)),
        their_detections,
        pictures,
        f"{source} RetinaNet",
        rtol=1e-3,
        atol=1e-3,
        note="boxes in pixels; the images pass through the resizing and padding of tasks/detection.py",
    )

    for name, value in reference.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            value.copy_(torch.rand_like(value) * 0.5 + 0.5 * name.endswith("var"))
    old = as_in_2021(reference.state_dict())
    for parent in list(reference.backbone.body.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, misc.FrozenBatchNorm2d(child.num_features))
    reference.load_state_dict(dict(old))
    overwrite_eps(reference, 0.0)
    ours.load_state_dict(from_official(old))
    yield Case(
        "the published file's names and frozen batch norm",
        ours.eval(),
        Raw(reference).eval(),
        (images,),
        f"{source} RetinaNet with FrozenBatchNorm2d of eps 0",
        atol=1e-4,
    )


def detect(model: RetinaNet, inputs: tuple[Tensor, ...], size: int, longest: int) -> list[dict[str, Tensor]]:
    from paperzoo.blocks.boxes import pad_images
    from paperzoo.tasks.detection import Config, scale, to_network

    config, facts = Config(image_sizes=(size,), longest_side=longest), {"mean": MEAN, "deviation": DEVIATION}
    with torch.no_grad():
        ready = [to_network(image, config, facts) for image in inputs]
        batch, sizes = pad_images(ready), torch.tensor([x.shape[1:] for x in ready])
        found = model.postprocess(model(batch), sizes, tuple(batch.shape[-2:]))
    return [
        objects | {"boxes": objects["boxes"] / scale(before, after)}
        for objects, before, after in zip(found, inputs, ready, strict=True)
    ]


def in_order(found: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Best first, so far as scores differ by more than rounding; else by position."""
    result = []
    for objects in found:
        keys = list(zip(objects["scores"].mul(1e4).round().tolist(), objects["boxes"].round().tolist(), strict=True))
        order = sorted(range(len(keys)), key=lambda i: (-keys[i][0], keys[i][1]))
        result.append({name: value[order] for name, value in objects.items()})
    return result


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: from normalised images to logits and deltas."""
    from torchvision.models.detection import retinanet_resnet50_fpn as theirs

    def images(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 3, 320, 320),)

    def reference() -> nn.Module:
        return Raw(theirs(weights=None, weights_backbone=None))

    against = "torchvision:retinanet_resnet50_fpn"
    return {"retinanet_resnet50_fpn": Pair(retinanet_resnet50_fpn, reference, images, against, train_batch=2)}
