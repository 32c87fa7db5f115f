"""FPN against torchvision's pyramid, level rule, RoI pooling and region proposal network, and two checks from the paper."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.boxes import AnchorGenerator, decode_boxes, encode_boxes, pad_images
from paperzoo.engine.parity import Case
from paperzoo.papers.detection.fpn.model import (
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
    PyramidPool,
    RegionProposalNetwork,
    assign_levels,
    faster_rcnn_resnet50_fpn,
    from_official,
    rpn_resnet50_fpn,
)


class Levels(nn.Module):
    """torchvision's dict of levels as a list; `fpn` holds the network, so that parameter names stay comparable."""

    def __init__(self, fpn: nn.Module, as_dict: bool) -> None:
        super().__init__()
        self.fpn, self.as_dict = fpn, as_dict

    def forward(self, *features: Tensor) -> list[Tensor]:
        if self.as_dict:
            return list(self.fpn(OrderedDict((str(i), f) for i, f in enumerate(features))).values())
        return self.fpn(features)


def boxes_in(height: int, width: int, count: int) -> Tensor:
    corner = torch.rand(count, 2) * torch.tensor([width, height]) * 0.7
    size = (torch.rand(count, 2) * 5.5).exp() + 3
    return torch.cat([corner, torch.minimum(corner + size, torch.tensor([width, height]).float())], dim=1)


def cases() -> Iterator[Case]:
    from torchvision.models.detection.anchor_utils import AnchorGenerator as TorchvisionAnchors
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.rpn import RegionProposalNetwork as TorchvisionRPN
    from torchvision.models.detection.rpn import RPNHead as TorchvisionHead
    from torchvision.ops import FeaturePyramidNetwork as TorchvisionFPN
    from torchvision.ops import MultiScaleRoIAlign, poolers
    from torchvision.ops import feature_pyramid_network as levels

    source = "torchvision 0.29.2"
    torch.manual_seed(0)
    channels = [16, 24, 40]
    extras = {
        "plain": (None, None),
        "max pool": (LastLevelMaxPool(), levels.LastLevelMaxPool()),
        "P6 and P7 from C5": (LastLevelP6P7(40, 32), levels.LastLevelP6P7(40, 32)),
        "P6 and P7 from P5": (LastLevelP6P7(32, 32), levels.LastLevelP6P7(32, 32)),
    }
    for name, (ours, theirs) in extras.items():
        mine, reference = FeaturePyramidNetwork(channels, 32, ours), TorchvisionFPN(channels, 32, theirs)
        mine.load_state_dict(reference.state_dict())
        features = tuple(torch.randn(2, c, -(-37 // s), -(-50 // s)) for c, s in zip(channels, (1, 2, 4), strict=True))
        yield Case(
            f"pyramid, {name}, odd sizes",
            Levels(mine, as_dict=False),
            Levels(reference, as_dict=True),
            features,
            f"{source} ops.FeaturePyramidNetwork",
            gradients=True,
        )

    boxes = torch.cat(
        [boxes_in(800, 1200, 200), torch.tensor([[0.0, 0, 224, 224], [0, 0, 112, 112], [5, 5, 453, 453]])]
    )
    yield Case(
        "eq. 1, levels of regions",
        assign_levels,
        lambda b: poolers.LevelMapper(2, 5)([b]) + 2,
        (boxes,),
        f"{source} ops.poolers.LevelMapper",
    )
    yield Case(
        "eq. 1 by hand",
        assign_levels,
        lambda b: torch.tensor([4, 3, 2, 5, 5]),
        (torch.tensor([[0.0, 0, 224, 224], [0, 0, 223, 223], [0, 0, 20, 20], [0, 0, 448, 448], [0, 0, 900, 900]]),),
        "FPN sec. 4.2: 224 is level 4, one level finer or coarser with every factor of 2",
    )
    maps = tuple(torch.randn(2, 8, -(-256 // s), -(-320 // s)) for s in (4, 8, 16, 32))
    regions = [boxes_in(256, 320, 30), boxes_in(256, 320, 17)]
    joined = torch.cat([F.pad(r, (1, 0), value=i) for i, r in enumerate(regions)])
    pooler = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    yield Case(
        "regions pooled from their levels",
        lambda *m: PyramidPool()(m, joined),
        lambda *m: pooler({str(i): x for i, x in enumerate(m)}, regions, [(256, 320)] * 2),
        maps,
        f"{source} ops.MultiScaleRoIAlign",
        gradients=True,
    )

    sizes, strides = [(32,), (64,), (128,), (256,), (512,)], (4, 8, 16, 32, 64)
    canvas = (96, 160)
    pyramid = tuple(torch.randn(2, 16, -(-canvas[0] // s), -(-canvas[1] // s)) for s in strides)
    anchors = TorchvisionAnchors(tuple(sizes), ((0.5, 1.0, 2.0),) * 5)
    # every anchor is sampled on both sides: the sampler is random, what follows from the sample is not
    mine = RegionProposalNetwork(16, AnchorGenerator(strides, sizes), sampled=10**6)
    reference = TorchvisionRPN(
        anchors, TorchvisionHead(16, 3), 0.7, 0.3, 10**6, 0.5,
        {"training": 200, "testing": 200}, {"training": 50, "testing": 50}, 0.7,
    )  # fmt: skip
    for layer in (mine.head.bbox_pred, mine.head.cls_logits):
        nn.init.normal_(layer.weight, std=0.2)
    reference.head.load_state_dict(mine.head.state_dict())
    image_sizes = [(96, 160), (80, 131)]
    targets = [{"boxes": boxes_in(96, 160, 5)}, {"boxes": boxes_in(80, 131, 3)}]
    images = ImageList(torch.zeros(2, 3, *canvas), image_sizes)

    def our_proposals(*levels: Tensor) -> list:
        with torch.no_grad():
            return mine.proposals(mine(levels), torch.tensor(image_sizes), canvas, before=200, after=50)

    def their_proposals(*levels: Tensor) -> list:
        with torch.no_grad():
            outputs = reference.eval().head(list(levels))
            from torchvision.models.detection.rpn import concat_box_prediction_layers

            counts = [o[0].numel() for o in outputs[0]]
            objectness, deltas = concat_box_prediction_layers(*outputs)
            made = anchors(images, list(levels))
            decoded = reference.box_coder.decode(deltas, made).view(2, -1, 4)
            return list(zip(*reference.filter_proposals(decoded, objectness, image_sizes, counts), strict=True))

    def their_losses(*levels: Tensor) -> dict[str, Tensor]:
        losses = reference.train()(images, {str(i): level for i, level in enumerate(levels)}, targets)[1]
        return {"objectness": 1000 * losses["loss_objectness"], "boxes": 1000 * losses["loss_rpn_box_reg"]}

    def our_losses(*levels: Tensor) -> dict[str, Tensor]:
        return {name: 1000 * loss for name, loss in mine.loss(mine(levels), targets, canvas).items()}

    yield Case(
        "anchors",
        lambda: mine.anchors(*canvas),
        lambda: anchors(images, list(pyramid))[0],
        (),
        f"{source} AnchorGenerator",
    )
    yield Case("proposals, two images of different size", our_proposals, their_proposals, pyramid, f"{source} RPN")
    yield Case(
        "losses of the proposal network",
        our_losses,
        their_losses,
        pyramid,
        f"{source} RPN",
        gradients=True,
        note="times 1000; with all anchors sampled, as the sample itself is random",
    )
    anchor, box = boxes_in(300, 300, 50), boxes_in(300, 300, 50)
    yield Case(
        "box coding and back",
        lambda a, b: decode_boxes(encode_boxes(b, a), a),
        lambda a, b: b,
        (anchor, box),
        "identity",
    )

    network, shape = rpn_resnet50_fpn().eval(), (1, 3, 128, 192)
    yield Case(
        "published size: shapes of P2 to P6",
        lambda x: [torch.tensor(level.shape) for level in network.backbone(x)],
        lambda x: [torch.tensor([1, 256, -(-128 // s), 192 // s]) for s in strides],
        (torch.randn(shape),),
        "FPN sec. 3: strides 4 to 32 with 256 channels; sec. 4.1: P6 of stride 64",
    )
    yield whole_detector(source)
    yield Case(
        "torchvision's file of 2021, of other names and with batch norms without epsilon",
        lambda: from_official({"rpn.head.conv.weight": torch.ones(1), "backbone.body.bn1.running_var": torch.ones(1)}),
        lambda: {
            "rpn.head.conv.0.0.weight": torch.ones(1),
            "backbone.body.bn1.running_var": torch.tensor([1 - 1e-5]),
            "backbone.body.bn1.num_batches_tracked": torch.tensor(0),
        },
        against="the file's names, by hand",
        rtol=0.0,
        atol=1e-9,
    )


def whole_detector(source: str) -> Case:
    """torchvision's detector with our weights, from normalised images to boxes, labels and scores."""
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    options = {"score_threshold": 0.012}  # random weights are sure of nothing; about 1 / 91
    ours = faster_rcnn_resnet50_fpn(**options).eval()
    for layer, std in ((ours.rpn.head.cls_logits, 0.3), (ours.rpn.head.bbox_pred, 0.02)):
        nn.init.normal_(layer.weight, std=std)
    nn.init.normal_(ours.roi_heads.box_predictor.cls_score.weight, std=0.03)
    ours.after = (2000, 200)
    reference = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, box_score_thresh=0.012, rpn_post_nms_top_n_test=200
    ).eval()
    reference.load_state_dict(ours.state_dict())
    reference.transform.image_mean, reference.transform.image_std = [0.0] * 3, [1.0] * 3
    reference.transform.min_size, reference.transform.max_size = (96,), 160

    def mine(*images: Tensor) -> list:
        sizes = torch.tensor([x.shape[1:] for x in images])
        batch = pad_images(images)
        with torch.no_grad():
            found = ours.postprocess(ours(batch, sizes=sizes), sizes, tuple(batch.shape[-2:]))
        assert all(len(objects["boxes"]) > 5 for objects in found), "too few objects to compare"
        return [{k: objects[k] for k in ("boxes", "scores", "labels")} for objects in found]

    def theirs(*images: Tensor) -> list:
        with torch.no_grad():
            found = reference([x.clone() for x in images])
        return [o | {"labels": o["labels"] - 1} for o in found]  # theirs count the background

    images = (torch.randn(3, 96, 160), torch.randn(3, 96, 120))
    return Case(
        "the whole detector: boxes, labels, scores of two images",
        mine,
        theirs,
        images,
        f"{source} fasterrcnn_resnet50_fpn",
        atol=1e-3,
        note="boxes in pixels",
    )
